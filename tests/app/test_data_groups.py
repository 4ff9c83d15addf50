from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import idctn

from btinet.data import Sample, near_duplicate_groups, read_groups, read_image, sample_csv, write_groups
from btinet.data import groups as module
from btinet.data.groups import group_components, merge_groups
from btinet.data.layouts import read_collection
from btinet.errors import UserError


def bare(identifier: str, group: str | None = None) -> Sample:
    return Sample(identifier, Path(identifier), (), 0, group)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    samples = read_collection(sample_csv()).samples[:6]
    return [read_image(sample.image, 3) for sample in samples]


def write(folder: Path, pictures: dict[str, np.ndarray]) -> list[Sample]:
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / name)
    return [Sample(name, folder / name, (), 0) for name in sorted(pictures)]


def test_copies_are_found_and_strangers_are_not(tmp_path: Path, photos: list[np.ndarray]) -> None:
    first, second = photos[0], photos[1]
    small = np.array(Image.fromarray(first).resize((150, 120)))
    noisy = np.clip(first + np.random.default_rng(0).normal(0, 8, first.shape), 0, 255).astype(np.uint8)
    darker = (second * 0.8).astype(np.uint8)
    pictures = {
        "b.png": first,
        "a.png": small,
        "c.png": noisy,
        "e.png": second,
        "d.png": darker,
        "f.png": photos[2],
        "g.png": photos[3],
        "h.png": np.zeros((40, 40, 3), np.uint8),
        "i.png": np.zeros((40, 40, 3), np.uint8),
    }
    samples = write(tmp_path, pictures)
    expected = {"a.png": "a.png", "b.png": "a.png", "c.png": "a.png", "d.png": "d.png", "e.png": "d.png"}
    assert near_duplicate_groups(samples) == expected
    assert near_duplicate_groups(samples[::-1]) == expected, "independent of the order"
    assert near_duplicate_groups(samples[:1]) == {}
    assert near_duplicate_groups([]) == {}


def test_a_hash_alone_is_not_enough(tmp_path: Path) -> None:
    """Two pictures with the same low frequencies, of which one is overlaid with a high one."""
    spectrum = np.zeros((32, 32))
    spectrum[:8, :8] = np.random.default_rng(0).normal(0, 120, (8, 8))
    spectrum[0, 0] = 32 * 128
    smooth = idctn(spectrum, norm="ortho").clip(0, 255)
    spectrum[20, 20] = 600
    checked = idctn(spectrum, norm="ortho").clip(0, 255)
    pictures = {"a.png": smooth.astype(np.uint8), "b.png": checked.astype(np.uint8)}
    samples = write(tmp_path, pictures)
    thumbnails = np.stack([module._thumbnail(sample.image) for sample in samples])
    signs = module._hash_signs(thumbnails)
    correlation = np.corrcoef(thumbnails.reshape(2, -1))[0, 1]
    assert (signs[0] != signs[1]).sum() <= module.HASH_DISTANCE
    assert 0.7 < correlation < 0.95
    assert near_duplicate_groups(samples) == {}


def test_hash_and_correlation_agree_with_plain_formulas(photos: list[np.ndarray]) -> None:
    thumbnails = np.stack([photo[::8, ::8, 0].astype(np.float32) for photo in photos])
    signs = module._hash_signs(thumbnails)
    k, n = np.mgrid[0:8, 0:32]
    basis = np.cos(np.pi * (2 * n + 1) * k / 64) * np.where(k == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))
    for thumbnail, sign in zip(thumbnails, signs, strict=True):
        low = (basis @ thumbnail @ basis.T).ravel()
        assert np.array_equal(sign > 0, low > np.median(low))
    unit = module._standardise(thumbnails)
    assert np.allclose(unit @ unit.T, np.corrcoef(thumbnails.reshape(len(photos), -1)), atol=1e-5)


def test_blocks_do_not_change_the_result(
    tmp_path: Path, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {f"{i}{copy}.png": photo[copy:, copy:] for i, photo in enumerate(photos) for copy in range(3)}
    samples = write(tmp_path, pictures)
    expected = near_duplicate_groups(samples)
    assert len(set(expected.values())) == 6
    assert len(expected) == 18
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 1)
    assert near_duplicate_groups(samples) == expected


def test_an_unreadable_image_is_named(tmp_path: Path, photos: list[np.ndarray]) -> None:
    samples = write(tmp_path, {"a.png": photos[0], "b.png": photos[1]})
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.png"):
        near_duplicate_groups(samples)


def test_groups_of_both_kinds_are_joined() -> None:
    samples = [bare("a"), bare("b", "p1"), bare("c", "p1"), bare("d"), bare("e", "x"), bare("f", "p2")]
    groups = {"a": "1", "b": "1", "d": "x", "zzz": "1"}
    assert group_components(samples, groups).tolist() == [0, 0, 0, 3, 4, 5], "'x' of both kinds is not one group"
    assert merge_groups(samples, groups) == {"a": "a", "b": "a", "c": "a"}
    chain = {"a": "1", "b": "1", "c": "2", "d": "2"}
    linked = [bare("d", "q"), bare("b", "q"), bare("a"), bare("c")]
    assert merge_groups(linked, chain) == dict.fromkeys("abcd", "a"), "d–b through q joins both groups"
    assert merge_groups([], {}) == {}


def test_groups_of_other_data_are_refused() -> None:
    with pytest.raises(UserError, match=r"none of the 1 images in it \(such as 'x'\) is in the data"):
        group_components([bare("a")], {"x": "1"})


def test_groups_file_round_trip_and_defects(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    groups = {"benign/benign (1).png": "0", "b, c.png": "0", "ü.png": "1"}
    write_groups(path, groups)
    assert path.read_text(encoding="utf-8").splitlines()[:2] == ["group,image", '0,"b, c.png"']
    assert read_groups(path) == groups
    for text, pattern in (
        ("image\na\n", "group not found"),
        ("group,image\n1,a\n2,a\n", "line 3 lists 'a' a second time"),
        ("group,image\n,a\n", "line 2 must name a group and an image"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=pattern):
            read_groups(path)
