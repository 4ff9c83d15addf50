from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btinet.data import read_image, read_mask
from btinet.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
MASK = np.zeros((5, 7), dtype=bool)
MASK[1:3, 2:6] = True


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_colour_and_grey(tmp_path: Path) -> None:
    colour = save(tmp_path / "rgb.png", RGB)
    assert np.array_equal(read_image(colour, 3), RGB)
    grey = read_image(colour, 1)
    assert grey.shape == (5, 7, 1)
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - luma).max() <= 1
    single = read_image(save(tmp_path / "l.png", RGB[..., 0]), 3)
    assert np.array_equal(single, np.repeat(RGB[..., :1], 3, axis=2))
    alpha = np.concatenate([RGB, np.full((5, 7, 1), 9, np.uint8)], axis=2)
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", alpha), 3), RGB)
    assert read_image(colour, 3).dtype == np.uint8
    with pytest.raises(UserError, match="found 4, expected 1"):
        read_image(colour, 4)


def test_palette(tmp_path: Path) -> None:
    indexed = Image.fromarray(MASK.astype(np.uint8), mode="L").convert("P")
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.save(tmp_path / "p.png")
    pixels = read_image(tmp_path / "p.png", 3)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[1, 2].tolist() == [200, 100, 50]


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    pixels = np.array([[0, 255, 256], [4096, 0x8123, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        path = save(tmp_path / name, pixels)
        assert read_image(path, 1)[..., 0].tolist() == [[0, 0, 1], [16, 0x81, 255]]
        assert read_image(path, 3)[1, 1].tolist() == [0x81] * 3
    assert not read_image(save(tmp_path / "black.png", pixels * 0), 1).any()
    with pytest.raises(UserError, match=r"dark\.png: a 16-bit image whose largest value is 4095"):
        read_image(save(tmp_path / "dark.png", np.minimum(pixels, 4095)), 1)
    with pytest.raises(UserError, match="exceed 16 bits"):
        read_image(save(tmp_path / "wide.tif", pixels.astype(np.int32) * 2), 1)
    with pytest.raises(UserError, match="floating-point"):
        read_image(save(tmp_path / "f.tif", pixels.astype(np.float32)), 1)


def test_exif_orientation_is_applied_to_images_and_masks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: show it turned by 90° clockwise
    path = save(tmp_path / "turned.png", RGB, exif=exif)
    assert np.array_equal(read_image(path, 3), np.rot90(RGB, -1))
    mask = save(tmp_path / "mask.png", MASK, exif=exif)
    assert np.array_equal(read_mask([mask], 7, 5), np.rot90(MASK, -1))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        path = save(tmp_path / name, big)
        path.write_bytes(path.read_bytes()[:1500])
        for read in (lambda p: read_image(p, 3), lambda p: read_mask([p], 64, 64)):
            with pytest.raises(UserError, match=rf"{name}: the image could not be read \(.*truncated") as caught:
                read(path)
            assert "\n" not in str(caught.value)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png: is not an image"):
        read_image(text, 3)
    with pytest.raises(UserError, match=r"none\.png: .*No such file"):
        read_image(tmp_path / "none.png", 3)
    with pytest.raises(UserError, match=r"could not be read"):
        read_image(tmp_path, 3)


def mask_files(folder: Path) -> list[Path]:
    grey = np.where(MASK, 255, 0).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    alpha = np.full((5, 7, 1), 255, np.uint8)
    files = [
        save(folder / "1.png", MASK),
        save(folder / "l.png", grey),
        save(folder / "l01.png", MASK.astype(np.uint8)),
        save(folder / "rgb.png", rgb),
        save(folder / "red.png", rgb * np.array([1, 0, 0], np.uint8)),
        save(folder / "rgba.png", np.concatenate([rgb, alpha], axis=2)),
        save(folder / "la.png", np.concatenate([grey[..., None], alpha], axis=2)),
        save(folder / "i16.png", grey.astype(np.uint16) * 257),
    ]
    for name, palette in (
        ("p", [0, 0, 0, 255, 0, 0]),
        ("p_black", [0, 0, 0, 0, 0, 0]),
        ("p_swapped", [9, 9, 9, 0, 0, 0]),
    ):
        indexed = Image.new("P", (7, 5))
        indexed.putpalette(palette)
        indexed.frombytes((~MASK if name == "p_swapped" else MASK).astype(np.uint8).tobytes())
        indexed.save(folder / f"{name}.png")
        files.append(folder / f"{name}.png")
    return files


def test_every_kind_of_mask(tmp_path: Path) -> None:
    modes = set()
    for path in mask_files(tmp_path):
        with Image.open(path) as picture:
            modes.add(picture.mode)
        mask = read_mask([path], 5, 7)
        assert mask.dtype == bool
        assert np.array_equal(mask, MASK), path.name
    assert modes == {"1", "L", "RGB", "RGBA", "LA", "I;16", "P"}


def test_masks_are_united(tmp_path: Path) -> None:
    other = np.zeros_like(MASK)
    other[2:5, 0:3] = True
    paths = [
        save(tmp_path / "a.png", MASK),
        save(tmp_path / "b.png", np.where(other, 255, 0).astype(np.uint8)),
    ]
    assert np.array_equal(read_mask(paths, 5, 7), MASK | other)
    empty = read_mask((), 5, 7)
    assert empty.shape == (5, 7)
    assert empty.dtype == bool
    assert not empty.any()
    assert not read_mask([save(tmp_path / "zero.png", ~(MASK | True))], 5, 7).any()


@pytest.mark.parametrize("value", [1, 255])
def test_a_lesion_may_fill_the_picture(tmp_path: Path, value: int) -> None:
    assert read_mask([save(tmp_path / "full.png", np.full((5, 7), value, np.uint8))], 5, 7).all()


def test_masks_that_are_not_binary(tmp_path: Path) -> None:
    grey = np.where(MASK, 200, 10).astype(np.uint8)
    with pytest.raises(UserError, match=r"b\.png: .*found no black \(0\) pixel"):
        read_mask([save(tmp_path / "b.png", grey)], 5, 7)
    grey[0, 0] = 0
    path = save(tmp_path / "c.png", grey)
    with pytest.raises(UserError, match=r"c\.png: .*found 3 different values; .*mask_threshold"):
        read_mask([path], 5, 7)
    assert np.array_equal(read_mask([path], 5, 7, threshold=127), MASK)
    assert np.array_equal(read_mask([path], 5, 7, threshold=199), MASK)
    assert not read_mask([path], 5, 7, threshold=200).any(), "strictly greater"
    colours = np.zeros((5, 7, 3), np.uint8)
    colours[0, 0], colours[1, 1] = (255, 0, 0), (0, 255, 0)
    path = save(tmp_path / "two.png", colours)
    with pytest.raises(UserError, match="3 different values"):
        read_mask([path], 5, 7)
    assert read_mask([path], 5, 7, threshold=127).sum() == 2


def test_mask_of_another_size(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", MASK)
    with pytest.raises(UserError, match=r"m\.png: the mask is 7×5 pixels but its image is 5×7"):
        read_mask([path], 7, 5)
