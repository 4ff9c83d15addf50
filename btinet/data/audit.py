"""What is wrong, or suspicious, in a data set."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from btinet.data.groups import near_duplicate_groups, straddling_groups
from btinet.data.images import describe_mask, image_mode, map_in_threads, read_image
from btinet.data.layouts import check_trainable
from btinet.data.masks import MaskFormat
from btinet.data.samples import Collection, Sample
from btinet.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One kind of defect and where it was found.

    Attributes:
        severity: "error": training refuses it; "warning": it can spoil a result.
        title: the kind, in words.
        entries: one line per file, pair or group.
    """

    severity: Literal["error", "warning"]
    title: str
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found.

    Attributes:
        findings: errors first.
        hashes: SHA-256 of every image and mask file that could be read, hexadecimal.
        near_duplicates: as ``near_duplicate_groups`` returns them, of the readable images.
        lesions: sample id → whether its mask shows a lesion, of the samples that could be read.
        image_kinds: mode → number of images.
        image_sizes: (width, height) → number of images.
        mask_kinds: mode and values → number of mask files.
    """

    findings: tuple[Finding, ...]
    hashes: Mapping[Path, str]
    near_duplicates: Mapping[str, str]
    lesions: Mapping[str, bool]
    image_kinds: Mapping[str, int]
    image_sizes: Mapping[tuple[int, int], int]
    mask_kinds: Mapping[str, int]

    @property
    def usable(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)


@dataclass
class _Inspected:
    sample: Sample
    image_error: str | None = None
    mask_errors: list[str] = field(default_factory=list)
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    mask_kinds: list[str] = field(default_factory=list)
    lesion: bool | None = None
    hashes: dict[Path, str] = field(default_factory=dict)


def audit(collection: Collection, mask_format: MaskFormat = MaskFormat()) -> Audit:  # noqa: B008
    """Read every file of a data set and report what is wrong.

    Args:
        collection: the samples; ``Sample.split`` is what leaks are looked for between.
        mask_format: how masks are to be read.
    """
    inspected = list(map_in_threads(lambda sample: _inspect(sample, mask_format), collection.samples))
    readable = [entry.sample for entry in inspected if entry.image_error is None]
    near = near_duplicate_groups(readable)
    hashes = {path: digest for entry in inspected for path, digest in entry.hashes.items()}
    lesions = {entry.sample.id: entry.lesion for entry in inspected if entry.lesion is not None}
    exact = _same_file(readable, hashes)
    findings = [
        _finding("error", "images that cannot be used", (e.image_error for e in inspected if e.image_error)),
        _finding("error", "masks that cannot be used", (error for e in inspected for error in e.mask_errors)),
        _finding("error", "groups divided by the prescribed split", _leaks(collection, _own_groups(collection))),
        *_unexpected_masks(collection, lesions),
        *_duplicates(collection, "the same file more than once", exact),
        *_duplicates(collection, "near-duplicates", _beyond(near, exact)),
        _finding("warning", "near-duplicates on both sides of the split", _leaks(collection, near)),
        _finding("warning", "training would refuse the set", _untrainable(collection)),
    ]
    return Audit(
        findings=tuple(finding for finding in findings if finding.entries),
        hashes=hashes,
        near_duplicates=near,
        lesions=lesions,
        image_kinds=Counter(e.kind for e in inspected if e.image_error is None),
        image_sizes=Counter(e.size for e in inspected if e.image_error is None),
        mask_kinds=Counter(kind for e in inspected for kind in e.mask_kinds),
    )


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal; raises ``UserError`` when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error}).") from error


def _inspect(sample: Sample, mask_format: MaskFormat) -> _Inspected:
    result = _Inspected(sample)
    try:
        height, width, _ = read_image(sample.image, 3).shape
        result.kind, result.size = image_mode(sample.image), (width, height)
        result.hashes[sample.image] = file_hash(sample.image)
    except UserError as error:
        result.image_error = str(error)
        return result
    lesion = False
    for path in sample.masks or ():
        try:
            lesion |= bool(mask_format.read([path], height, width).any())
            result.mask_kinds.append(describe_mask(path))
            result.hashes[path] = file_hash(path)
        except UserError as error:
            result.mask_errors.append(str(error))
    if sample.masks is not None and not result.mask_errors:
        result.lesion = lesion
    return result


def _finding(severity: Literal["error", "warning"], title: str, entries: Iterable[str]) -> Finding:
    return Finding(severity, title, tuple(entries))


def _own_groups(collection: Collection) -> dict[str, str]:
    return {sample.id: sample.group for sample in collection.samples if sample.group is not None}


def _leaks(collection: Collection, groups: Mapping[str, str]) -> list[str]:
    # Images without a prescribed part are trained on, or divided, where parts are prescribed at all.
    split = {sample.id: sample.split or "train" for sample in collection.samples}
    if not any(sample.split for sample in collection.samples):
        return []
    return [
        ", ".join(f"{identifier} ({split[identifier]})" for identifier in members)
        for members in straddling_groups(split, groups).values()
    ]


def _same_file(samples: Sequence[Sample], hashes: Mapping[Path, str]) -> dict[str, str]:
    """Return sample id → name of its group of byte-identical images, for groups of two or more."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        members[hashes[sample.image]].append(sample.id)
    return {identifier: ids[0] for ids in members.values() if len(ids) > 1 for identifier in ids}


def _beyond(near: Mapping[str, str], exact: Mapping[str, str]) -> dict[str, str]:
    """Return the groups of near-duplicates that are more than one file repeated."""
    files: defaultdict[str, set[str]] = defaultdict(set)
    for identifier, group in near.items():
        files[group].add(exact.get(identifier, identifier))
    return {identifier: group for identifier, group in near.items() if len(files[group]) > 1}


def _duplicates(collection: Collection, title: str, groups: Mapping[str, str]) -> list[Finding]:
    """Report groups of one class, and groups that contradict themselves about the class."""
    labels = {sample.id: sample.label for sample in collection.samples}
    members: defaultdict[str, list[str]] = defaultdict(list)
    for identifier, group in groups.items():
        members[group].append(identifier)
    within: list[str] = []
    across: list[str] = []
    for ids in members.values():
        several = len({labels[identifier] for identifier in ids if labels[identifier] >= 0}) > 1
        (across if several else within).append(", ".join(ids))
    return [
        _finding("warning", f"{title}, in different classes", across),
        _finding("warning", f"{title}, in one class", within),
    ]


def _unexpected_masks(collection: Collection, lesions: Mapping[str, bool]) -> list[Finding]:
    """Report masks that differ from most of their class: empty ones among lesions, and the reverse."""
    empty: list[str] = []
    filled: list[str] = []
    for label in sorted({sample.label for sample in collection.samples}):
        ids = [sample.id for sample in collection.samples if sample.label == label and sample.id in lesions]
        expected = 2 * sum(lesions[identifier] for identifier in ids) > len(ids)
        (empty if expected else filled).extend(identifier for identifier in ids if lesions[identifier] != expected)
    return [
        _finding("warning", "no lesion in the mask, in a class where most images have one", empty),
        _finding("warning", "a lesion in the mask, in a class where most images have none", filled),
    ]


def _untrainable(collection: Collection) -> list[str]:
    try:
        check_trainable(collection)
    except UserError as error:
        return [str(error)]
    return []
