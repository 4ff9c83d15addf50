"""Masks of several classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from btinet import UserError
from btinet.data import Augmentation, MaskFormat, Preprocessing, Sample, SegmentationDataset

TWO = MaskFormat(classes=("core", "rim"))
NUMBERS = np.zeros((40, 48), dtype=np.uint8)
NUMBERS[10:30, 10:30], NUMBERS[15:25, 15:25] = 2, 1
PLAIN = Preprocessing((32, 32), 3, 1 / 255, (0.0,) * 3, (1.0,) * 3)


def saved(picture: Image.Image, path: Path) -> Path:
    picture.save(path)
    return path


def test_numbers_are_read_in_any_form(tmp_path: Path) -> None:
    grey = Image.fromarray(NUMBERS)
    palette = Image.fromarray(NUMBERS, mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    for name, picture in (("L", grey), ("P", palette), ("RGB", grey.convert("RGB")), ("RGBA", grey.convert("RGBA"))):
        assert np.array_equal(TWO.read([saved(picture, tmp_path / f"{name}.png")], 40, 48), NUMBERS), name


def test_one_class_is_black_and_white(tmp_path: Path) -> None:
    path = saved(Image.fromarray((NUMBERS > 0).astype(np.uint8) * 255), tmp_path / "m.png")
    assert np.array_equal(MaskFormat().read([path], 40, 48), NUMBERS > 0)
    assert MaskFormat().read([], 40, 48).max() == 0


def test_files_of_single_classes_are_united_and_must_not_contradict_each_other(tmp_path: Path) -> None:
    core = saved(Image.fromarray(np.where(NUMBERS == 1, 1, 0).astype(np.uint8)), tmp_path / "core.png")
    rim = saved(Image.fromarray(np.where(NUMBERS == 2, 2, 0).astype(np.uint8)), tmp_path / "rim.png")
    assert np.array_equal(TWO.read([core, rim], 40, 48), NUMBERS)
    whole = saved(Image.fromarray((NUMBERS > 0).astype(np.uint8) * 2), tmp_path / "whole.png")
    with pytest.raises(UserError, match=r"whole\.png: gives pixels another class"):
        TWO.read([core, whole], 40, 48)


def test_planes_divide_the_classes() -> None:
    planes = TWO.planes(NUMBERS)
    assert planes.shape == (2, 40, 48)
    assert np.array_equal(planes[0], NUMBERS == 1)
    assert np.array_equal(planes[1], NUMBERS == 2)


def test_bad_masks_are_refused(tmp_path: Path) -> None:
    path = saved(Image.fromarray(NUMBERS * 127), tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: holds the value 254, but --mask-classes names 2 classes, 1 to 2"):
        TWO.read([path], 40, 48)
    colours = np.zeros((40, 48, 3), dtype=np.uint8)
    colours[..., 0] = NUMBERS
    with pytest.raises(UserError, match="is in colour"):
        TWO.read([saved(Image.fromarray(colours), tmp_path / "c.png")], 40, 48)
    with pytest.raises(UserError, match="same size"):
        TWO.read([path], 41, 48)


@pytest.mark.parametrize("names", ["a,,b", "a,a", ""])
def test_bad_names_are_refused(names: str) -> None:
    with pytest.raises(UserError, match=r"--mask-classes .*different names"):
        MaskFormat.from_options({"mask_classes": names})


def test_a_threshold_and_several_classes_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--mask-threshold 127"):
        MaskFormat.from_options({"mask_classes": "a, b", "mask_threshold": 127})


def test_items_have_a_plane_for_each_class_that_moves_with_the_image(tmp_path: Path) -> None:
    image = saved(Image.fromarray((NUMBERS * 100)[..., None].repeat(3, 2)), tmp_path / "i.png")
    mask = saved(Image.fromarray(NUMBERS), tmp_path / "m.png")
    samples = [Sample("i.png", image, (mask,), 0), Sample("j.png", image, None, 1), Sample("k.png", image, (), -1)]
    for memory in (0.5, 0.0):
        data = SegmentationDataset(samples, PLAIN, mask_format=TWO, memory_share=memory)
        item = data[0]
        assert item["mask"].dtype == torch.float32
        assert item["mask"].shape == (2, 32, 32)
        shrunk = np.array(Image.fromarray(NUMBERS).resize((32, 32), Image.Resampling.NEAREST))
        assert np.array_equal(item["mask"].numpy(), TWO.planes(shrunk))
        assert [bool(data[i]["has_mask"]) for i in range(3)] == [True, False, True]
        assert not data[1]["mask"].any()
    augmented = SegmentationDataset(samples, PLAIN, mask_format=TWO, augmentation=Augmentation(), seed=3)
    for epoch in range(4):
        item = augmented[0, epoch]
        bright = item["image"][0] * 255
        assert (bright[item["mask"][0] > 0] > 50).float().mean() > 0.9
        assert (bright[item["mask"][1] > 0] > 150).float().mean() > 0.7
        assert item["mask"].sum(0).max() == 1
