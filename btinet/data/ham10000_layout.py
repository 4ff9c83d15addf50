"""HAM10000, as published with its segmentations, and as task 3 of ISIC 2018."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.listing import images_by_stem, label_of, one_hot, refuse_left_over, take_mask
from btinet.data.samples import Collection, Sample
from btinet.data.tables import read_table
from btinet.errors import UserError

CLASSES = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")  # order of the ISIC 2018 columns
_MASKS = "HAM10000_segmentations_lesion_tschandl"
HAM10000_TREE = (
    "HAM10000_images_part_1/ISIC_0024306.jpg, HAM10000_images_part_2/, "
    f"{_MASKS}/ISIC_0024306_segmentation.png, HAM10000_metadata.csv (or HAM10000_metadata)"
)
_METADATA = ("ham10000_metadata.csv", "ham10000_metadata")
_IMAGES_2018 = "ISIC2018_Task3_Training_Input"
_LABELS_2018 = "ISIC2018_Task3_Training_GroundTruth"
_LESIONS_2018 = "ISIC2018_Task3_Training_LesionGroupings.csv"
ISIC2018_TREE = (
    f"{_IMAGES_2018}/ISIC_0024306.jpg, {_LABELS_2018}.csv (or {_LABELS_2018}/{_LABELS_2018}.csv), "
    f"{_MASKS}/ISIC_0024306_segmentation.png, and, if there, {_LESIONS_2018}"
)


def find_ham10000(path: Path) -> Path | None:
    """Return ``path`` if it holds HAM10000's table or one of its image folders."""
    return path if _metadata_files(path) or _image_folders(path) else None


def find_isic2018(path: Path) -> Path | None:
    """Return ``path`` if it holds the images of task 3 of ISIC 2018."""
    return path if (path / _IMAGES_2018).is_dir() else None


def read_ham10000(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read HAM10000; lesions are the groups. See ``read_collection``."""
    tables, folders = _metadata_files(root), _image_folders(root)
    if len(tables) != 1 or not folders:
        found = ", ".join(path.name for path in [*tables, *folders]) or "neither table nor images"
        raise UserError(f"{root}: expected one table and the image folders of {HAM10000_TREE}; found {found}.")
    images: dict[str, Path] = {}
    for folder in folders:
        for stem, image in images_by_stem(folder).items():
            if stem in images:
                raise UserError(f"{image}: there is also {images[stem]}; keep one of the two.")
            images[stem] = image
    names: dict[str, tuple[int, str]] = {}  # image → line, class
    groups: dict[str, str] = {}
    for line, row in read_table(tables[0], ("lesion_id", "image_id", "dx")):
        _check_new(tables[0], line, row["image_id"], names)
        if not row["lesion_id"]:
            raise UserError(f"{tables[0]}: line {line} names no lesion_id; it says which images show one lesion.")
        names[row["image_id"]] = (line, row["dx"])
        groups[row["image_id"]] = row["lesion_id"]
    return _collect("ham10000", root, classes, tables[0], images, names, groups)


def read_isic2018(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read task 3 of ISIC 2018 with HAM10000's segmentations. See ``read_collection``."""
    places = (root / f"{_LABELS_2018}.csv", root / _LABELS_2018 / f"{_LABELS_2018}.csv")
    table = next((place for place in places if place.is_file()), None)
    if table is None:
        raise UserError(f"{root}: expected {ISIC2018_TREE}; complete the folder.")
    columns = {name.upper(): name for name in CLASSES}
    names: dict[str, tuple[int, str]] = {}
    for line, row in read_table(table, ("image", *columns)):
        _check_new(table, line, row["image"], names)
        column = one_hot(row, list(columns), f"{table}: line {line}")
        if not column:
            raise UserError(f"{table}: line {line} has a 1 in no column; expected exactly one.")
        names[row["image"]] = (line, columns[column])
    groups = _lesion_groups(options.lesion_groups or root / _LESIONS_2018, options.lesion_groups is not None, names)
    return _collect("isic2018", root, classes, table, images_by_stem(root / _IMAGES_2018), names, groups)


def _collect(
    layout: str,
    root: Path,
    classes: Sequence[str] | None,
    table: Path,
    images: dict[str, Path],
    names: dict[str, tuple[int, str]],
    groups: dict[str, str],
) -> Collection:
    folder = _entry(root, _MASKS)
    if folder is None:
        raise UserError(f"{root}: the folder {_MASKS} with the lesion masks is missing; it is a separate download.")
    masks = images_by_stem(folder, "_segmentation")
    known = CLASSES if classes is None else tuple(classes)
    for stem, image in images.items():
        if stem not in names:
            raise UserError(f"{image}: is not in {table}; remove the image or complete the table.")
    samples = []
    for stem, (line, name) in names.items():
        if stem not in images:
            raise UserError(f"{table}: line {line} names the image {stem!r}, which is not in the image folders.")
        label = label_of(name, CLASSES, f"{table}: line {line}")
        label = label_of(CLASSES[label], known, f"{table}: line {line}")
        mask = take_mask(masks, stem, images[stem], folder / f"{stem}_segmentation.png")
        identifier = images[stem].relative_to(root).as_posix()
        samples.append(Sample(identifier, images[stem], mask, label, groups.get(stem)))
    refuse_left_over(masks)
    return Collection(layout, root, known, tuple(sorted(samples, key=lambda sample: sample.id)))


def _check_new(table: Path, line: int, image: str, names: dict[str, tuple[int, str]]) -> None:
    if not image:
        raise UserError(f"{table}: line {line} names no image.")
    if image in names:
        raise UserError(f"{table}: line {line} lists the image {image!r} a second time; one line each.")


def _lesion_groups(table: Path, wanted: bool, names: dict[str, tuple[int, str]]) -> dict[str, str]:
    if not wanted and not table.is_file():
        return {}
    groups = {row["image"]: row["lesion_id"] for _, row in read_table(table, ("image", "lesion_id"))}
    missing = [image for image in names if not groups.get(image)]
    if missing:
        raise UserError(f"{table}: names no lesion_id for {len(missing)} image(s), the first is {missing[0]!r}.")
    return groups


def _metadata_files(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.name.lower() in _METADATA and path.is_file())


def _image_folders(root: Path) -> list[Path]:
    """Return the two folders of images; of copies that differ in upper and lower case only, the first."""
    names = ("HAM10000_images_part_1", "HAM10000_images_part_2")
    return [folder for folder in (_entry(root, name) for name in names) if folder is not None]


def _entry(root: Path, name: str) -> Path | None:
    """Return the folder ``name`` in ``root``, in upper or lower case."""
    if not root.is_dir():
        return None
    return min((path for path in root.iterdir() if path.name.lower() == name.lower() and path.is_dir()), default=None)
