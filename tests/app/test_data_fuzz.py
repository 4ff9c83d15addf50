"""Damaged, renamed and unusual files: each is read correctly or refused in one sentence that names it."""

from __future__ import annotations

import resource
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btinet.cli import main
from btinet.data import read_collection, read_image, read_mask
from btinet.data.images import MAX_PIXELS
from btinet.errors import UserError

HEIGHT, WIDTH = 24, 31
# Format → the modes it can store.
KINDS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "bmp": ("1", "L", "P", "RGB"),
    "tif": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB"),
    "jpg": ("L", "RGB", "CMYK"),
    "gif": ("L", "P"),
    "webp": ("RGB", "RGBA"),
}
DAMAGES = ("none", "cut", "flip", "zero", "shuffle", "empty", "noise", "text", "append", "rename")


def disc() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (x - 14) ** 2 + (y - 11) ** 2 < 49


def picture(mode: str, random: np.random.Generator) -> Image.Image:
    grey = Image.fromarray(np.where(disc(), 255, 0).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.where(disc(), 65535, 0).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(np.where(disc(), 1.0, 0.0).astype(np.float32))
    if mode == "LAB":
        return Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), "LAB")
    if mode in ("RGBA", "LA"):
        grey.putalpha(Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)))
    if mode == "P":
        return grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    return grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)


def damaged(content: bytes, damage: str, random: np.random.Generator) -> bytes:
    data = bytearray(content)
    at = int(random.integers(0, len(data)))
    if damage == "cut":
        return bytes(data[:at])
    if damage == "flip":
        for _ in range(int(random.integers(1, 9))):
            data[int(random.integers(0, len(data)))] ^= 1 << int(random.integers(0, 8))
    if damage == "zero":
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    if damage == "shuffle":
        other = int(random.integers(0, len(data)))
        data[at : at + 24], data[other : other + 24] = data[other : other + 24], data[at : at + 24]
    if damage == "append":
        data += random.bytes(50)
    replacement = {"empty": b"", "noise": random.bytes(len(data)), "text": b"%!PS-Adobe-3.0\n<html>404</html>\n"}
    return replacement.get(damage, bytes(data))


def fuzzed(folder: Path, count: int, seed: int) -> list[tuple[Path, str, str, str]]:
    """Write files; return path, format, mode and damage of each."""
    random = np.random.default_rng(seed)
    kinds = [(kind, mode) for kind, modes in KINDS.items() for mode in modes]
    files = []
    for number in range(count):
        kind, mode = kinds[number % len(kinds)]
        damage = DAMAGES[number // len(kinds) % len(DAMAGES)]
        plain = folder / f"{number}.{kind}"
        picture(mode, random).save(plain, **({"lossless": True, "exact": True} if kind == "webp" else {}))
        content = damaged(plain.read_bytes(), damage, random)
        path = plain.with_suffix(".png") if damage == "rename" else plain
        plain.unlink()
        path.write_bytes(content)
        files.append((path, kind, mode, damage))
    return files


def one_sentence(error: UserError, name: str) -> None:
    assert name in str(error)
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 5000


def attempt(read: Callable[[], np.ndarray], path: Path) -> np.ndarray | None:
    """Return the pixels, or None when the file was refused in one sentence."""
    try:
        return read()
    except UserError as error:
        one_sentence(error, path.name)
        return None


def read_every_way(path: Path, kind: str, mode: str, damage: str, outcomes: Counter[str]) -> None:
    whole = damage in ("none", "append", "rename")
    for channels in (1, 3):
        pixels = attempt(lambda channels=channels: read_image(path, channels), path)
        outcomes["refused" if pixels is None else "read"] += 1
        if pixels is not None:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == channels
        if whole and mode not in ("F", "LAB"):
            assert pixels is not None, path
            expected = np.where(disc(), 255, 0)
            assert np.abs(pixels[..., 0].astype(int) - expected).max() <= (90 if kind == "jpg" else 0), path
    mask = attempt(lambda: read_mask([path], HEIGHT, WIDTH), path)
    if mask is not None:
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.dtype == bool
    if whole and mode not in ("F", "LAB", "CMYK") and kind != "jpg":
        assert mask is not None, path
        assert np.array_equal(mask, disc())


@pytest.mark.parametrize(
    ("count", "seed"),
    [(260, 0), pytest.param(1000, 1, marks=pytest.mark.slow), pytest.param(3000, 2, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks about damaged files
def test_files(tmp_path: Path, count: int, seed: int) -> None:
    outcomes: Counter[str] = Counter()
    before = peak_memory()
    for file in fuzzed(tmp_path, count, seed):
        read_every_way(*file, outcomes)
    assert min(outcomes["read"], outcomes["refused"]) > count / 5, "both happen"
    assert peak_memory() - before < 500 * 2**20


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def huge_png(width: int, height: int) -> bytes:
    """A PNG of one byte of content that claims to be of this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (200_000_000, 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(*size))
    before = peak_memory()
    for read in (lambda: read_image(path, 3), lambda: read_mask([path], 10, 10)):
        with pytest.raises(UserError, match=r"bomb\.png") as caught:
            read()
        one_sentence(caught.value, path.name)
        assert "pixels" in str(caught.value)
    assert peak_memory() - before < 100 * 2**20


def test_a_very_wide_picture_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    pixels = np.zeros((30, 20_000), np.uint8)
    pixels[:, 10_000:] = 200
    Image.fromarray(pixels).save(path)
    assert pixels.size < MAX_PIXELS
    assert np.array_equal(read_image(path, 1)[..., 0], pixels)
    assert read_mask([path], 30, 20_000).sum() == 30 * 10_000


def test_postscript_is_not_run(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript."""
    path = tmp_path / "page.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match=r"page\.png: is not an image in a format that can be read"):
        read_image(path, 3)


CELLS = [
    "",
    " ",
    "é.png",
    "a\0b",
    "x" * 300,
    "x" * 5000,
    "../" * 50,
    "/",
    ".",
    "0.png;",
    ";;",
    '"',
    "1e9",
    "-1",
    "train ",
    "nan",
    "0.png\n",
    "CON",
    "~",
    "$HOME",
    "\u202e",
    "0.PNG",
    "masks",
    "masks/0.png;masks/0.png",
    ",",
    "\ufeff",
    "image",
]


def broken_table(lines: list[str], random: np.random.Generator) -> bytes:
    rows = [line.split(",") for line in lines]
    for _ in range(int(random.integers(1, 4))):
        row = rows[int(random.integers(0, len(rows)))]
        kind = int(random.integers(0, 5))
        if kind == 0:
            row.pop()
        elif kind == 1:
            row.append(str(random.choice(CELLS)))
        elif kind == 2:
            rows.append(list(row))
        else:
            row[int(random.integers(0, len(row)))] = str(random.choice(CELLS))
        rows = [row for row in rows if row]
    content = "\n".join(",".join(row) for row in rows).encode()
    if random.random() < 0.2:
        at = int(random.integers(0, len(content)))
        content = content[:at] + random.bytes(4) + content[at:]
    return content


@pytest.mark.parametrize(("count", "seed"), [(60, 0), pytest.param(1000, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["csv", "ham10000", "isic2018", "isic2017", "cheng", "busi_whu_named"])
def test_tables(name: str, count: int, seed: int, publish: Any) -> None:
    published = publish(name)
    lines = published.table.read_text().splitlines()
    whole = read_collection(published.root)
    random = np.random.default_rng(seed)
    refused = 0
    for _ in range(count):
        published.table.write_bytes(broken_table(lines, random))
        try:
            collection = read_collection(published.root, whole.name)
        except UserError as error:
            one_sentence(error, str(published.root))
            refused += 1
        else:
            assert all(sample.image.is_file() for sample in collection.samples)
            assert all(-1 <= sample.label < len(collection.classes) for sample in collection.samples)
            assert len({sample.id for sample in collection.samples}) == len(collection.samples)
    assert refused > count / 3


def test_file_names_that_cannot_be_shown(publish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folders = publish("folders")
    for name in (b"a\xff", b"two\nlines"):
        twin = folders.image.parent / name.decode(errors="surrogateescape")
        image, mask = twin.with_name(f"{twin.name}.png"), twin.with_name(f"{twin.name}_mask.png")
        image.write_bytes(folders.image.read_bytes())
        mask.write_bytes(folders.mask.read_bytes())
        assert main(["data", "check", str(folders.root)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert ascii(name.decode(errors="surrogateescape"))[1:-1] in error
        image.unlink()
        mask.unlink()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "seed"), [(12, 0), pytest.param(150, 1, marks=pytest.mark.slow)])
def test_commands_end_in_a_sentence_and_leave_nothing_half_written(
    publish: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, seed: int
) -> None:
    busi = publish("busi")
    content = {path: path.read_bytes() for path in (busi.image, busi.mask)}
    random = np.random.default_rng(seed)
    for number in range(count):
        path = busi.image if number % 2 else busi.mask
        path.write_bytes(damaged(content[path], DAMAGES[1 + number % 7], random))
        out = tmp_path / f"{number}.json"
        code = main(["data", "check", str(busi.root), "--out", str(out)])
        captured = capsys.readouterr()
        assert captured.err == ""
        assert code in (0, 1)
        assert out.exists() == (code == 0)
        assert code == 0 or path.name in captured.out
        if code == 1:
            run = tmp_path / f"run{number}"
            flags = [
                "--model",
                "btinet_mobilenetv3_small_050",
                "--image-size",
                "32",
                "--epochs",
                "1",
                "--device",
                "cpu",
            ]
            assert main(["train", "--data", str(busi.root), "--out", str(run), *flags]) == 2
            assert path.name in capsys.readouterr().err
            assert not run.exists()
        path.write_bytes(content[path])
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
