"""Stratified splits in which no group of images straddles two parts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from btinet.data.groups import group_components, merge_groups
from btinet.data.samples import Collection, Sample
from btinet.data.tables import read_table, write_table
from btinet.errors import UserError

SPLITS = ("train", "val", "test")
_Table = list[tuple[int, dict[str, str]]]
_MOST_FOLDS = 20
_ARRANGEMENTS = 200


def split_collection(
    collection: Collection,
    groups: Mapping[str, str],
    *,
    fractions: Sequence[float] = (0.70, 0.15, 0.15),
    seed: int = 42,
) -> dict[str, str]:
    """Divide a collection into train, val and test, stratified by class, groups kept together.

    Folds of scikit-learn's ``StratifiedGroupKFold`` are combined to the fractions; where a class too small
    for the folds is then absent from a part, a group of it is moved there. A sample's prescribed split is
    respected, for its whole group. Prescribed val or test parts are complete as they are: nothing is added to
    them except the rest of their groups. Unlabelled samples form a stratum of their own; ``Sample.stratum``
    divides the classes further.

    Args:
        collection: the samples.
        groups: sample id → group name, in addition to ``Sample.group``; samples that share either stay
            together.
        fractions: of train, val and test; positive, their sum 1.
        seed: another seed gives another split.

    Returns:
        sample id → "train", "val" or "test", for every sample. It depends on the arguments only.

    Raises:
        UserError: faulty fractions; a group with two prescribed splits; a class with fewer groups than parts,
            or whose groups cannot be divided among the parts; a part without samples.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions: found {fractions}, expected three positive numbers whose sum is 1.")
    samples = collection.samples
    component = group_components(samples, groups)
    part_of = _prescribed(samples, component)
    prescribed = set(part_of.values())
    parts = [part for part in SPLITS if part == "train" or part not in prescribed]
    free = np.array([root not in part_of for root in component.tolist()], dtype=bool)
    if free.any():
        roots, content = _contents(np.array([s.label for s in samples])[free], component[free])
        strata = _contents(_stratum_numbers(samples)[free], component[free])[1]
        part_of |= dict.fromkeys(roots.tolist(), "train")
        if len(parts) > 1:
            weights = [fractions[SPLITS.index(part)] for part in parts]
            _check_divisible(collection, content, parts)
            chosen = _divide(collection, content, strata, np.array(weights) / sum(weights), seed)
            part_of |= {root: parts[number] for root, number in zip(roots.tolist(), chosen, strict=True)}
    for part in SPLITS:
        if part not in part_of.values():
            raise UserError(
                f"{collection.root}: no sample is left for {part}; "
                "give samples that part in the split column, or leave the split of some samples empty."
            )
    return {sample.id: part_of[root] for sample, root in zip(samples, component.tolist(), strict=True)}


def fold_collection(collection: Collection, groups: Mapping[str, str], folds: int, *, seed: int = 42) -> dict[str, int]:
    """Divide the samples whose split is not prescribed into folds, stratified, groups kept together.

    Args:
        collection: the samples.
        groups: as in ``split_collection``.
        folds: how many; at least 3 where a fold is tested and the next one validates, at least 2 where the data
            set prescribes one of these two parts.
        seed: another seed gives other folds.

    Returns:
        sample id → number of its fold, from 0. It depends on the arguments only.

    Raises:
        UserError: too few folds; val and test both prescribed; a class with fewer groups than folds, or
            absent from a fold.
    """
    samples = collection.samples
    component = group_components(samples, groups)
    part_of = _prescribed(samples, component)
    free = np.array([root not in part_of for root in component.tolist()], dtype=bool)
    rotating = _rotating_parts(str(collection.root), set(part_of.values()))
    least = len(rotating) + 1
    if folds < least:
        raise UserError(f"--folds {folds}: expected at least {least}, for train, {' and '.join(rotating)}.")
    if not free.any():
        raise UserError(f"{collection.root}: the split of every sample is prescribed, nothing is left to fold.")
    labels = np.array([sample.label for sample in samples])[free]
    roots, content = _contents(labels, component[free])
    for column in _required(content):
        count = int((content[:, column] > 0).sum())
        if count < folds:
            raise UserError(
                f"{collection.root}: {_stratum_name(collection, column)} has {count} independent group(s) of images, "
                f"too few for {folds} folds; use fewer folds."
            )
    strata = _contents(_stratum_numbers(samples)[free], component[free])[1]
    fold = _folds(content, strata, folds, seed)
    for number, column in np.argwhere(_per_part(content, fold, folds) == 0).tolist():
        if column in _required(content):
            raise UserError(
                f"{collection.root}: fold {number} would hold no image of {_stratum_name(collection, column)}; "
                "use fewer folds or another --seed."
            )
    fold_of = dict(zip(roots.tolist(), fold.tolist(), strict=True))
    return {
        sample.id: fold_of[root] for sample, root in zip(samples, component.tolist(), strict=True) if root in fold_of
    }


def write_folds(path: Path, collection: Collection, folds: Mapping[str, int], groups: Mapping[str, str]) -> None:
    """Write folds as a CSV file: the columns of ``write_split`` and fold; a prescribed split has no fold."""
    split = _fixed_parts(collection, groups)
    rows = [(*row, "" if row[0] not in folds else str(folds[row[0]])) for row in _split_rows(collection, split, groups)]
    write_table(path, ("image", "label", "group", "split", "fold"), rows)


def write_split(path: Path, collection: Collection, split: Mapping[str, str], groups: Mapping[str, str]) -> None:
    """Write a split as a CSV file with the columns image (sample id), label (class name), group and split.

    The group column joins ``Sample.group`` and ``groups``; it is empty for a sample connected with no other.
    """
    write_table(path, ("image", "label", "group", "split"), _split_rows(collection, split, groups))


def _split_rows(
    collection: Collection, split: Mapping[str, str], groups: Mapping[str, str]
) -> list[tuple[str, str, str, str]]:
    merged = merge_groups(collection.samples, groups)
    return [
        (s.id, collection.classes[s.label] if s.label >= 0 else "", merged.get(s.id, ""), split.get(s.id, ""))
        for s in collection.samples
    ]


def _fixed_parts(collection: Collection, groups: Mapping[str, str]) -> dict[str, str]:
    """Return the prescribed split of the samples that have one, and of the rest of their groups."""
    component = group_components(collection.samples, groups)
    part_of = _prescribed(collection.samples, component)
    pairs = zip(collection.samples, component.tolist(), strict=True)
    return {sample.id: part_of[root] for sample, root in pairs if root in part_of}


def read_split(path: Path, collection: Collection, fold: int | None = None) -> dict[str, str]:
    """Read a split written by ``write_split`` or ``write_folds`` (or by hand).

    Of folds, ``fold`` is the test part and the next one (after the last: the first) the validation part; where
    the split column prescribes one of the two, ``fold`` is the other.

    Returns:
        sample id → "train", "val" or "test".

    Raises:
        UserError: not such a table; an unknown split; an image listed twice or not in the collection; a
            sample of the collection that is missing; a group (of the table or of ``Sample.group``) in two
            parts; ``fold`` given without folds, missing with them, or not one of them.
    """
    table = _with_fold(path, read_table(path, ("image", "split")), fold)
    known = {sample.id for sample in collection.samples}
    split: dict[str, str] = {}
    groups: dict[str, str] = {}
    for line, row in table:
        image, part = row["image"], row["split"]
        if part not in SPLITS:
            raise UserError(f"{path}: line {line} has the split {part!r}, expected one of {', '.join(SPLITS)}.")
        if image not in known:
            raise UserError(f"{path}: line {line} names {image!r}, which is not in the data at {collection.root}.")
        if image in split:
            raise UserError(f"{path}: line {line} lists {image!r} a second time; one line per image.")
        split[image] = part
        if row.get("group"):
            groups[image] = row["group"]
    missing = [sample.id for sample in collection.samples if sample.id not in split]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} image(s) of the data at {collection.root} are not listed, "
            f"the first is {missing[0]!r}; add them or make a new split."
        )
    samples = collection.samples
    for sample, root in zip(samples, group_components(samples, groups).tolist(), strict=True):
        if split[sample.id] != split[samples[root].id]:
            raise UserError(
                f"{path}: {samples[root].id!r} is in {split[samples[root].id]} but {sample.id!r} of the same "
                f"group is in {split[sample.id]}; put the whole group into one part."
            )
    return split


def number_of_folds(path: Path) -> int | None:
    """Return how many folds a file written by ``write_folds`` holds; None for a split. Raises as ``read_split``."""
    numbers = {row["fold"] for _, row in read_table(path, ("image", "split")) if row.get("fold")}
    return len(numbers) or None


def _with_fold(path: Path, table: _Table, fold: int | None) -> _Table:
    """Replace fold numbers by the part that they mean when ``fold`` is held out."""
    numbers = {row["fold"] for _, row in table if row.get("fold")}
    if not numbers:
        if fold is not None:
            raise UserError(f"--fold {fold}: {path} holds no folds; leave --fold out, or make folds with --folds K.")
        return table
    count = len(numbers)
    if numbers != {str(number) for number in range(count)}:
        raise UserError(
            f"{path}: the column fold holds {', '.join(sorted(numbers))[:100]}, expected 0, 1, 2 and so on."
        )
    if fold is None or not 0 <= fold < count:
        found = "none given" if fold is None else f"found {fold}"
        raise UserError(f"--fold: {path} holds the folds 0 to {count - 1}, {found}; say which one to hold out.")
    rotating = _rotating_parts(str(path), {row["split"] for _, row in table if not row.get("fold")})
    if count <= len(rotating):
        raise UserError(f"{path}: holds {count} fold(s), expected at least {len(rotating) + 1}.")
    meaning = dict.fromkeys(numbers, "train")
    for step, part in enumerate(rotating):
        meaning[str((fold + step) % count)] = part
    return [(line, row | {"split": meaning[row["fold"]]}) if row.get("fold") else (line, row) for line, row in table]


def _rotating_parts(where: str, prescribed: set[str]) -> list[str]:
    """Return the parts that folds take turns to be: test and val where these are not prescribed."""
    rotating = [part for part in ("test", "val") if part not in prescribed]
    if not rotating:
        raise UserError(f"{where}: val and test are prescribed, so there is nothing for folds to be; leave them out.")
    return rotating


def _stratum_name(collection: Collection, column: int) -> str:
    return f"the class {collection.classes[column - 1]!r}" if column else "the unlabelled data"


def _prescribed(samples: Sequence[Sample], component: np.ndarray) -> dict[int, str]:
    part_of: dict[int, str] = {}
    by: dict[int, str] = {}
    for sample, root in zip(samples, component.tolist(), strict=True):
        if sample.split is None:
            continue
        if part_of.setdefault(root, sample.split) != sample.split:
            raise UserError(
                f"split: {by[root]!r} is prescribed for {part_of[root]} but {sample.id!r} of the same group "
                f"for {sample.split}; prescribe one split for both or leave one of them out."
            )
        by.setdefault(root, sample.id)
    return part_of


def _contents(labels: np.ndarray, component: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the components and how many samples of each label they hold, column 0 being unlabelled."""
    roots, position = np.unique(component, return_inverse=True)
    content = np.zeros((len(roots), int(labels.max()) + 2), dtype=int)
    np.add.at(content, (position, labels + 1), 1)
    return roots, content


def _stratum_numbers(samples: Sequence[Sample]) -> np.ndarray:
    """Number the combinations of label, stratum and absence of a mask that occur."""
    pairs = [(sample.label, sample.stratum, sample.masks is None) for sample in samples]
    numbers = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
    return np.array([numbers[pair] for pair in pairs])


def _required(content: np.ndarray) -> list[int]:
    """Return the columns that must be in every part: the classes that occur, or else the unlabelled."""
    return [column for column in range(1, content.shape[1]) if content[:, column].any()] or [0]


def _check_divisible(collection: Collection, content: np.ndarray, parts: Sequence[str]) -> None:
    for column in _required(content):
        count = int((content[:, column] > 0).sum())
        if count < len(parts):
            raise UserError(
                f"{collection.root}: {_stratum_name(collection, column)} has {count} independent group(s) of images, "
                f"too few to be in each of {', '.join(parts)}; add images of it, leave it out, "
                "or prescribe the split."
            )


def _divide(
    collection: Collection, content: np.ndarray, strata: np.ndarray, fractions: np.ndarray, seed: int
) -> np.ndarray:
    """Return the part of each component, given its numbers of samples per label and per stratum [components, …]."""
    required = _required(content)
    sizes = _folds_per_part([int((content[:, column] > 0).sum()) for column in required], fractions)
    fold = _folds(content, strata, sum(sizes), seed)
    labels_per_fold, strata_per_fold = (_per_part(counts, fold, sum(sizes)) for counts in (content, strata))
    random = np.random.default_rng(seed)
    slots = np.repeat(np.arange(len(sizes)), sizes)
    arrangements = [random.permutation(slots) for _ in range(_ARRANGEMENTS)]
    best = min(arrangements, key=lambda parts: _cost(labels_per_fold, strata_per_fold, parts, fractions, required))
    return _complete(collection, content, strata, best[fold], fractions, required)


def _folds_per_part(group_counts: Sequence[int], fractions: np.ndarray) -> list[int]:
    """Choose into how many folds to cut, and how many of them make each part.

    The number of folds is the one (at most 20) whose combination comes nearest to the fractions, and at most
    the number of groups of the smallest class that has enough of them to be cut at all that finely.
    """
    enough = math.ceil(1 / fractions.min())
    limit = min([_MOST_FOLDS, *[n for n in group_counts if n >= enough]])
    if all(n < enough for n in group_counts):
        limit = max(group_counts)

    def sizes(folds: int) -> list[int]:
        wanted = [max(1, round(fraction * folds)) for fraction in fractions.tolist()]
        wanted[wanted.index(max(wanted))] += folds - sum(wanted)
        return wanted

    def deviation(folds: int) -> tuple[float, int]:
        return float(np.abs(np.array(sizes(folds)) / folds - fractions).max().round(9)), -folds

    return sizes(min(range(len(fractions), limit + 1), key=deviation))


def _folds(content: np.ndarray, strata: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the fold of each component, stratified by the strata, or by label if all strata are too small."""
    counts = strata if strata.sum(axis=0).max() >= count else content
    component, label = np.nonzero(counts)
    repeats = counts[component, label]
    component, label = np.repeat(component, repeats), np.repeat(label, repeats)
    fold = np.zeros(len(content), dtype=int)
    splitter = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class smaller than the number of folds is dealt with in _complete.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for number, (_, held_out) in enumerate(splitter.split(label, label, component)):
            fold[component[held_out]] = number
    return fold


def _per_part(content: np.ndarray, parts: np.ndarray, count: int) -> np.ndarray:
    return np.stack([content[parts == part].sum(axis=0) for part in range(count)])


def _cost(
    content: np.ndarray, strata: np.ndarray, parts: np.ndarray, fractions: np.ndarray, required: Sequence[int]
) -> float:
    """Return absent classes first, then how far the sizes of strata and parts are from the fractions."""
    absent = int((_per_part(content, parts, len(fractions))[:, required] == 0).sum())
    per_part = _per_part(strata[:, strata.any(axis=0)], parts, len(fractions))
    counts = np.concatenate([per_part, per_part.sum(axis=1, keepdims=True)], axis=1)
    return 1000.0 * absent + float(((counts / counts.sum(axis=0) - fractions[:, None]) ** 2).sum())


def _complete(
    collection: Collection,
    content: np.ndarray,
    strata: np.ndarray,
    parts: np.ndarray,
    fractions: np.ndarray,
    required: Sequence[int],
) -> np.ndarray:
    """Move single components until every required class is in every part."""
    parts = parts.copy()
    while True:
        per_part = _per_part(content, parts, len(fractions))
        absent = [(part, column) for part in range(len(fractions)) for column in required if not per_part[part, column]]
        if not absent:
            return parts
        candidates = []
        for part, column in absent:
            for mover in np.flatnonzero(content[:, column]).tolist():
                moved = parts.copy()
                moved[mover] = part
                giver = parts[mover]
                kept = _per_part(content, moved, len(fractions))[giver, required]
                # A class that the giving part loses would only be absent elsewhere.
                if not (kept == 0)[per_part[giver, required] > 0].any():
                    candidates.append((_cost(content, strata, moved, fractions, required), mover, part))
        if not candidates:
            raise UserError(
                f"{collection.root}: the groups of the class {collection.classes[column - 1]!r} hold other "
                "classes too and could not be divided among the parts; "
                "try another seed, add images of it or prescribe the split."
            )
        _, mover, part = min(candidates)
        parts[mover] = part
