"""manifest.json: which files a data set consists of, so that a training can be repeated on exactly these."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btinet.data.audit import Audit, file_hash
from btinet.data.groups import merge_groups, without_prescribed
from btinet.data.images import map_in_threads
from btinet.data.layouts import LAYOUTS
from btinet.data.listing import label_of
from btinet.data.samples import Collection, Sample
from btinet.data.splits import SPLITS
from btinet.errors import UserError
from btinet.files import write_text

MANIFEST_NAME = "manifest.json"
_FORMAT = "btinet manifest 1"


def write_manifest(path: Path, collection: Collection, audit: Audit) -> None:
    """Write counts, class names and findings, and of each sample its files with SHA-256, class, group and split.

    The group joins ``Sample.group`` with the near-duplicates among the samples whose split is not prescribed.

    Raises:
        UserError: an error among the findings; the file cannot be written.
    """
    if not audit.usable:
        raise UserError(f"{path}: not written, because training would refuse the data; correct the errors first.")
    groups = merge_groups(collection.samples, without_prescribed(collection.samples, audit.near_duplicates))
    counts = {
        name: Counter(s.split or "not prescribed" for s in collection.samples if s.label == index)
        for index, name in [*enumerate(collection.classes), (-1, "not labelled")]
    }

    def entry(file: Path) -> dict[str, str]:
        return {"file": Path(os.path.relpath(file, collection.root)).as_posix(), "sha256": audit.hashes[file]}

    content = {
        "format": _FORMAT,
        "layout": collection.name,
        "classes": collection.classes,
        "counts": {name: count for name, count in counts.items() if count},
        "findings": {finding.title: finding.entries for finding in audit.findings},
        "samples": [
            {
                "id": s.id,
                "image": entry(s.image),
                "masks": None if s.masks is None else [entry(mask) for mask in s.masks],
                "label": collection.classes[s.label] if s.label >= 0 else None,
                "group": groups.get(s.id),
                "split": s.split,
                "stratum": s.stratum,
            }
            for s in collection.samples
        ],
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_manifest(path: Path, data: Path, classes: Sequence[str] | None = None) -> Collection:
    """Read the samples of a manifest and compare their files with it; files that it does not name are ignored.

    Args:
        path: the manifest.
        data: folder or CSV file of the data, as ``read_collection`` takes it.
        classes: see ``read_collection``.

    Raises:
        UserError: not a manifest; a file that is missing or has changed.
    """
    content = _load(path)
    try:
        layout = LAYOUTS[content["layout"]]
        root = (layout.find(data) or data) if data.is_dir() else data.parent
        known = tuple(classes if classes is not None else content["classes"])
        samples = tuple(_sample(path, root, known, entry) for entry in content["samples"])
        expected = {
            root / entry["file"]: entry["sha256"]
            for sample in content["samples"]
            for entry in (sample["image"], *(sample["masks"] or ()))
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a whole manifest ({error}); write it again with btinet data check.") from error
    if not samples:
        raise UserError(f"{path}: lists no image; write it again with btinet data check.")
    _compare(path, expected)
    return Collection(content["layout"], root, known, samples)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error}).") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not a manifest of btinet data check ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"{path}: is not a manifest of btinet data check; write one with it.")
    return content


def _sample(path: Path, root: Path, classes: tuple[str, ...], entry: dict[str, Any]) -> Sample:
    if entry["split"] not in (None, *SPLITS):
        raise UserError(f"{path}: {entry['id']!r} has the split {entry['split']!r}, expected {', '.join(SPLITS)}.")
    return Sample(
        id=entry["id"],
        image=root / entry["image"]["file"],
        masks=None if entry["masks"] is None else tuple(root / mask["file"] for mask in entry["masks"]),
        label=-1 if entry["label"] is None else label_of(entry["label"], classes, f"{path}: {entry['id']}"),
        group=entry["group"],
        split=entry["split"],
        stratum=entry["stratum"],
    )


def _compare(path: Path, expected: dict[Path, str]) -> None:
    missing = [file for file in expected if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: is missing, but {path} lists it ({len(missing)} of {len(expected)} files are missing); "
            "restore the data or check it again."
        )
    changed = [
        file
        for file, digest in zip(expected, map_in_threads(file_hash, expected), strict=True)
        if digest != expected[file]
    ]
    if changed:
        raise UserError(
            f"{changed[0]}: has changed since {path} was written ({len(changed)} of {len(expected)} files differ); "
            "restore the data or check it again."
        )
