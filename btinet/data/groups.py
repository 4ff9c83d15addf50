"""Images that must stay on one side of a split: near-duplicates, and groups named by the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from btinet.data.images import map_in_threads, read_image
from btinet.data.samples import Sample
from btinet.data.tables import read_table, write_table
from btinet.errors import UserError

THUMBNAIL_SIZE = 32
# Measured: all 193 pairs of BUSI above the correlation lie within 8 of the 64 bits and 98 % of 289 pairs of a
# brain MRI set within 12, as do only 0.1, 0.1 and 0.7 % of all pairs of BUSI, ISIC 2017 and that MRI set.
HASH_DISTANCE = 12
CORRELATION = 0.98
_ROWS_AT_ONCE = 512
_PAIRS_AT_ONCE = 8192


def near_duplicate_groups(samples: Sequence[Sample]) -> dict[str, str]:
    """Find groups of images that show (nearly) the same picture.

    Pairs whose 64-bit perceptual hashes (signs of the low DCT frequencies about their median) differ in at
    most ``HASH_DISTANCE`` bits are candidates; a candidate counts when its 32×32 grey thumbnails correlate by
    more than ``CORRELATION``; groups are the connected components. Images of one flat colour are never
    duplicates. Mirrored, rotated or cropped copies are not found. Memory grows with the number of images, not
    with that of pairs.

    Args:
        samples: samples with distinct ids.

    Returns:
        sample id → group name, for the members of groups of two or more; the name is the smallest id in the
        group.

    Raises:
        UserError: an image cannot be read.
    """
    if len(samples) < 2:
        return {}
    thumbnails = np.stack(list(map_in_threads(_thumbnail, [sample.image for sample in samples])))
    signs = _hash_signs(thumbnails)
    unit = _standardise(thumbnails)
    component = np.arange(len(samples))
    for start in range(0, len(samples), _ROWS_AT_ONCE):
        distance = (64 - signs[start : start + _ROWS_AT_ONCE] @ signs[start:].T) / 2
        left, right = np.nonzero(np.triu(distance <= HASH_DISTANCE, k=1))
        for first in range(0, len(left), _PAIRS_AT_ONCE):
            i = left[first : first + _PAIRS_AT_ONCE] + start
            j = right[first : first + _PAIRS_AT_ONCE] + start
            same = np.einsum("nd,nd->n", unit[i], unit[j]) > CORRELATION
            component = _join(component, i[same], j[same])
    return _named([sample.id for sample in samples], component)


def group_components(samples: Sequence[Sample], groups: Mapping[str, str]) -> np.ndarray:
    """Join ``Sample.group`` and ``groups`` (sample id → group name): samples that share either are connected.

    Returns:
        int [N], for each sample the position of the first sample that it is connected with (itself if alone).

    Raises:
        UserError: ``groups`` names no sample at all, so it belongs to other data.
    """
    if samples and groups and not any(sample.id in groups for sample in samples):
        raise UserError(
            f"groups: none of the {len(groups)} images in it (such as {next(iter(groups))!r}) is in the data "
            f"(such as {samples[0].id!r}); give the groups of this data set."
        )
    first: dict[tuple[str, str], int] = {}
    left, right = [], []
    for index, sample in enumerate(samples):
        for source, name in (("sample", sample.group), ("given", groups.get(sample.id))):
            if name is not None:
                left.append(first.setdefault((source, name), index))
                right.append(index)
    joined = _join(np.arange(len(samples)), np.array(left, dtype=int), np.array(right, dtype=int))
    return joined


def merge_groups(samples: Sequence[Sample], groups: Mapping[str, str]) -> dict[str, str]:
    """Join ``Sample.group`` and ``groups`` into one map: sample id → smallest id it is connected with.

    Samples that are connected with no other are left out. Raises ``UserError`` as ``group_components`` does.
    """
    return _named([sample.id for sample in samples], group_components(samples, groups))


def without_prescribed(samples: Sequence[Sample], groups: Mapping[str, str]) -> dict[str, str]:
    """Leave out samples whose split is prescribed: near-duplicates do not change a published test set."""
    prescribed = {sample.id for sample in samples if sample.split is not None}
    return {identifier: group for identifier, group in groups.items() if identifier not in prescribed}


def straddling_groups(split: Mapping[str, str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the groups (name → sample ids) that lie in more than one part of ``split`` (sample id → part)."""
    members: dict[str, list[str]] = {}
    for identifier, group in groups.items():
        if identifier in split:
            members.setdefault(group, []).append(identifier)
    return {group: ids for group, ids in members.items() if len({split[identifier] for identifier in ids}) > 1}


def read_groups(path: Path) -> dict[str, str]:
    """Read a CSV file with the columns group and image; return image (sample id) → group.

    Raises:
        UserError: not such a table, an empty cell, an image listed twice.
    """
    groups: dict[str, str] = {}
    for line, row in read_table(path, ("group", "image")):
        if not row["group"] or not row["image"]:
            raise UserError(f"{path}: line {line} must name a group and an image; one of the two is empty.")
        if row["image"] in groups:
            raise UserError(f"{path}: line {line} lists {row['image']!r} a second time; one line per image.")
        groups[row["image"]] = row["group"]
    return groups


def write_groups(path: Path, groups: Mapping[str, str]) -> None:
    """Write image (sample id) → group as a CSV file with the columns group and image, sorted by both."""
    write_table(path, ("group", "image"), sorted((group, image) for image, group in groups.items()))


def _thumbnail(path: Path) -> np.ndarray:
    grey = Image.fromarray(read_image(path, 1)[..., 0])
    small = grey.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32)


def _hash_signs(thumbnails: np.ndarray) -> np.ndarray:
    """Return the hash bits of thumbnails [N, 32, 32] as ±1, float32 [N, 64]: products count equal bits."""
    low = dctn(thumbnails, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbnails), 64)
    return np.where(low > np.median(low, axis=1, keepdims=True), np.float32(1), np.float32(-1))


def _standardise(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails [N, 32, 32] as [N, 1024] of mean 0 and length 1 (0 for flat ones)."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 0, length, 1)


def _join(component: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Connect positions ``left`` and ``right``; return for each position the first one of its component."""
    count = len(component)
    rows = np.concatenate([np.arange(count), left])
    columns = np.concatenate([component, right])
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def _named(ids: Sequence[str], component: np.ndarray) -> dict[str, str]:
    members: dict[int, list[str]] = {}
    for identifier, root in zip(ids, component.tolist(), strict=True):
        members.setdefault(root, []).append(identifier)
    names = {identifier: min(group) for group in members.values() if len(group) > 1 for identifier in group}
    return dict(sorted(names.items()))
