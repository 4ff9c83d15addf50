"""``btinet data check`` and ``btinet data split``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from btinet.data.audit import Audit, Finding, audit
from btinet.data.groups import near_duplicate_groups, read_groups, without_prescribed
from btinet.data.manifest import MANIFEST_NAME, write_manifest
from btinet.data.masks import MaskFormat
from btinet.data.samples import Collection, Sample
from btinet.data.source import DataSource
from btinet.data.splits import SPLITS, fold_collection, read_split, split_collection, write_folds, write_split
from btinet.errors import UserError

ENTRIES_SHOWN = 5


def check_data(options: Mapping[str, Any], console: Console | None = None) -> int:
    """Check a data set, print what was found and write its manifest.

    Args:
        options: those of ``btinet data check``.
        console: where to print.

    Returns:
        0: no error (with ``strict``: and no warning); 1: otherwise. The manifest is not written with errors.

    Raises:
        UserError: the layout cannot be read, so nothing can be checked; the manifest cannot be written.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    collection = DataSource.from_options(options).read()
    if options["split"] is not None:
        parts = read_split(options["split"], collection, options["fold"])
        divided = tuple(replace(sample, split=parts[sample.id]) for sample in collection.samples)
        collection = replace(collection, samples=divided)
    elif options["fold"] is not None:
        raise UserError(f"--fold {options['fold']}: needs the folds to choose from; give them with --split FILE.")
    result = audit(collection, MaskFormat.from_options(options))
    _print_audit(console, collection, result, None if options["all"] else ENTRIES_SHOWN)
    if not result.usable:
        console.print("no manifest written: training would refuse the data until the errors are corrected")
        return 1
    folder = options["data"] if options["data"].is_dir() else options["data"].parent
    manifest = options["out"] or folder / MANIFEST_NAME
    write_manifest(manifest, collection, result)
    console.print(f"manifest: {escape(str(manifest))}")
    return int(bool(options["strict"] and result.findings))


def split_data(options: Mapping[str, Any], console: Console | None = None) -> int:
    """Divide a data set into parts or folds and write them.

    Args:
        options: those of ``btinet data split``.
        console: where to print.

    Returns:
        0.

    Raises:
        UserError: the data cannot be read, or not be divided like this; the file cannot be written.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    collection = DataSource.from_options(options).read()
    samples, out = collection.samples, options["out"]
    if options["groups"] is not None:
        groups = read_groups(options["groups"])
    else:
        groups = without_prescribed(samples, near_duplicate_groups(samples))
    if options["folds"] is None:
        split = split_collection(collection, groups, fractions=options["fractions"], seed=options["seed"])
        write_split(out, collection, split, groups)
        console.print(_counts(collection, {s.id: split[s.id] for s in samples}))
    else:
        folds = fold_collection(collection, groups, options["folds"], seed=options["seed"])
        write_folds(out, collection, folds, groups)
        parts = {s.id: f"fold {folds[s.id]}" if s.id in folds else s.split or "" for s in samples}
        console.print(_counts(collection, parts))
    console.print(f"written to {escape(str(out))}")
    return 0


def _print_audit(console: Console, collection: Collection, result: Audit, most: int | None) -> None:
    samples = collection.samples
    console.print(f"{collection.name}: {len(samples)} images in {escape(str(collection.root))}")
    console.print(_counts(collection, {s.id: s.split or "not prescribed" for s in samples}, result.lesions))
    groups = {sample.group for sample in samples if sample.group is not None}
    if groups:
        console.print(f"groups of the data set: {len(groups)}")
    if result.near_duplicates:
        count = len(set(result.near_duplicates.values()))
        console.print(f"near-duplicates: {len(result.near_duplicates)} images in {count} groups")
    console.print(f"images: {_kinds(result.image_kinds)}; {_sizes(result.image_sizes)}")
    console.print(f"masks: {_kinds(result.mask_kinds) or 'none'}")
    for finding in result.findings:
        _print_finding(console, finding, most)
    if not result.findings:
        console.print("nothing to complain about")


def _print_finding(console: Console, finding: Finding, most: int | None) -> None:
    console.print(f"[bold]{finding.severity}[/bold]: {escape(finding.title)} ({len(finding.entries)})")
    for entry in finding.entries[:most]:
        console.print(f"  {escape(entry)}")
    if most is not None and len(finding.entries) > most:
        console.print(f"  … {len(finding.entries) - most} more, shown with --all")


def _counts(collection: Collection, part_of: Mapping[str, str], lesions: Mapping[str, bool] | None = None) -> Table:
    parts = sorted(set(part_of.values()), key=lambda part: (SPLITS.index(part) if part in SPLITS else 3, part))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("class", *parts, "all", *(["with lesion"] if lesions is not None else [])):
        table.add_column(heading, justify="left" if heading == "class" else "right")

    def row(name: str, chosen: list[Sample]) -> None:
        counts = Counter(part_of[sample.id] for sample in chosen)
        cells = [*(counts[part] for part in parts), len(chosen)]
        if lesions is not None:
            cells.append(sum(lesions.get(sample.id, False) for sample in chosen))
        table.add_row(escape(name), *map(str, cells))

    for label, name in [*enumerate(collection.classes), (-1, "not labelled")]:
        chosen = [sample for sample in collection.samples if sample.label == label]
        if chosen or label >= 0:
            row(name, chosen)
    row("all", list(collection.samples))
    return table


def _kinds(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} × {kind}" for kind, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def _sizes(counts: Mapping[tuple[int, int], int]) -> str:
    if not counts:
        return "no size known"
    least, most = (f"{width}×{height}" for width, height in (f(counts, key=lambda s: s[0] * s[1]) for f in (min, max)))
    return f"{least} pixels" if least == most and len(counts) == 1 else f"{least} to {most} pixels (width×height)"
