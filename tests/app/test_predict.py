from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from btinet.data.preprocessing import default_preprocessing
from btinet.errors import UserError
from btinet.evaluation.tables import write_csv, write_json
from btinet.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from btinet.models.factory import create_model
from btinet.serving import predict
from btinet.serving.overlays import OUTLINES, draw_overlay
from btinet.serving.predict import PredictOptions, find_images, output_names, predict_files


@pytest.fixture(autouse=True)
def _loads_the_stand_in(monkeypatch: pytest.MonkeyPatch, brightness_checkpoint: Checkpoint) -> None:
    monkeypatch.setattr(predict, "load_checkpoint", lambda path: brightness_checkpoint)


def save(path: Path, columns: int, height: int = 40, width: int = 60) -> Path:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, :columns] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_one_image_gives_mask_overlay_and_tables(tmp_path: Path) -> None:
    image = save(tmp_path / "scan.png", columns=30)
    rows = predict_files(PredictOptions(Path("run"), (image,), tmp_path / "out"))
    mask = Image.open(tmp_path / "out/masks/scan.png")
    assert (mask.mode, mask.size) == ("L", (60, 40))
    expected = np.zeros((40, 60), dtype=np.uint8)
    expected[:, :30] = 255
    np.testing.assert_array_equal(np.asarray(mask), expected)
    assert Image.open(tmp_path / "out/overlays/scan.png").size == (60, 40)
    (row,) = read_rows(tmp_path / "out/predictions.csv")
    assert row["image"] == image.as_posix()
    assert row["predicted"] == "'=bright"
    assert float(row["prob_dark"]) + float(row["prob_=bright"]) == pytest.approx(1, abs=1e-5)
    assert (row["lesion_area_pixels"], row["lesion_area_fraction"]) == ("1200", "0.5")
    assert float(row["gate_seg_d1"]) == pytest.approx(0.5, abs=0.01)
    assert float(row["gate_clf_d2"]) == pytest.approx(0.25, abs=0.01)
    assert float(row["proxy_align_d1"]) == pytest.approx(0.5, abs=0.01)
    (stored,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert stored == rows[0]
    assert stored["predicted"] == "=bright"


def test_more_images_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    images = tuple(save(tmp_path / "in" / f"{n}.png", columns=12 * n) for n in range(5))
    rows = predict_files(PredictOptions(Path("run"), images, tmp_path / "out", batch_size=2))
    assert [row["lesion_area_pixels"] for row in rows] == [40 * 12 * n for n in range(5)]


def test_folders_are_walked_without_masks_hidden_files_and_own_results(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    wanted = [save(folder / name, 10) for name in ("a.png", "sub/b.PNG", "sub/unmasked.png")]
    for name in ("a_mask.png", "a_mask_1.png", ".hidden.png", ".thumbnails/c.png"):
        save(folder / name, 10)
    (folder / "notes.txt").write_text("no image")
    options = PredictOptions(Path("run"), (folder,), folder)
    for _ in range(2):
        predict_files(options)
        assert find_images((folder,), folder) == wanted
    assert sorted(path.relative_to(folder / "masks").as_posix() for path in (folder / "masks").rglob("*.png")) == [
        "a.png",
        "sub/b.png",
        "sub/unmasked.png",
    ]


def test_equal_names_do_not_overwrite_each_other(tmp_path: Path) -> None:
    left, right = save(tmp_path / "one/x.png", 60), save(tmp_path / "two/x.png", 0)
    again = save(tmp_path / "two/x.bmp", 30)
    rows = predict_files(PredictOptions(Path("run"), (left, right.parent, right), tmp_path / "out"))
    assert len(rows) == 3
    areas = {
        name: int((np.asarray(Image.open(tmp_path / "out/masks" / name)) > 0).sum())
        for name in ("one/x.png", "two/x.png.png", "two/x.bmp.png")
    }
    assert areas == {"one/x.png": 2400, "two/x.png.png": 0, "two/x.bmp.png": 1200}
    assert again.exists()


def test_names_that_still_clash_are_refused(tmp_path: Path) -> None:
    clash = [save(tmp_path / name, 1) for name in ("y.png", "y.bmp", "y.bmp.bmp")]
    with pytest.raises(UserError, match=r"y\.bmp.*y\.bmp\.bmp.*rename"):
        output_names(clash, clash)


@pytest.mark.parametrize("kind", ["truncated", "text", "missing", "empty folder"])
def test_bad_input_stops_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    good = save(tmp_path / "in/a.png", 10)
    bad = tmp_path / "in/b.png"
    if kind == "truncated":
        bad.write_bytes(good.read_bytes()[:60])
    elif kind == "text":
        bad.write_text("not an image")
    elif kind == "empty folder":
        bad.mkdir()
    with pytest.raises(UserError, match=r"b\.png"):
        predict_files(PredictOptions(Path("run"), (good, bad), tmp_path / "out", batch_size=1))
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    image = save(tmp_path / "masks/a.png", 10)
    before = image.read_bytes()
    with pytest.raises(UserError, match="overwritten"):
        predict_files(PredictOptions(Path("run"), (image,), tmp_path))
    assert image.read_bytes() == before


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", 10)
    with pytest.raises(UserError, match="batch size"):
        predict_files(PredictOptions(Path("run"), (image,), tmp_path / "out", batch_size=0))
    with pytest.raises(UserError, match=r"a\.png: is a file"):
        predict_files(PredictOptions(Path("run"), (image,), image))
    with pytest.raises(UserError, match="No input"):
        predict_files(PredictOptions(Path("run"), (), tmp_path / "out"))


def test_overlay_draws_the_inner_edge_of_the_mask() -> None:
    image = np.full((20, 20, 1), 90, dtype=np.uint8)
    mask = np.zeros((20, 20), dtype=bool)
    mask[5:10, 0:6] = True
    picture = draw_overlay(image, mask)
    outlined = (picture == OUTLINES[0]).all(axis=2)
    expected = mask.copy()
    expected[6:9, 1:5] = False
    np.testing.assert_array_equal(outlined, expected)
    assert (picture[~outlined] == 90).all()
    np.testing.assert_array_equal(draw_overlay(image, np.zeros_like(mask)), np.repeat(image, 3, axis=2))


@pytest.mark.parametrize(("interaction", "channels"), [("gated", 3), ("none", 1)])
def test_a_real_network_predicts_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interaction: str, channels: int
) -> None:
    monkeypatch.setattr(predict, "load_checkpoint", load_checkpoint)
    torch.manual_seed(0)
    model = create_model("btinet_test_efficientnet", 2, in_chans=channels, interaction=interaction)
    save_checkpoint(tmp_path / "run", model, ("a", "b"), default_preprocessing((32, 48), channels))
    images = [save(tmp_path / "in" / f"{n}.png", columns=11 * n, height=30 + n, width=47) for n in range(3)]
    options = PredictOptions(tmp_path / "run", tuple(images), tmp_path / "out")
    together = predict_files(options)
    for image, row in zip(images, together, strict=True):
        (alone,) = predict_files(replace(options, inputs=(image,), out=tmp_path / "alone"))
        assert alone["lesion_area_pixels"] == pytest.approx(row["lesion_area_pixels"], abs=2)
        assert alone["prob_a"] == pytest.approx(row["prob_a"], abs=1e-4)
        assert Image.open(tmp_path / "alone/masks" / image.name).size == Image.open(image).size
        gates = [value for name, value in row.items() if name.startswith("gate_")]
        assert len(gates) == (8 if interaction == "gated" else 0)
        assert all(0 < gate < 1 for gate in gates)
        proxies = {name: value for name, value in row.items() if name.startswith("proxy_")}
        assert len(proxies) == (12 if interaction == "gated" else 0)
        assert {name: alone[name] for name in proxies} == pytest.approx(proxies, abs=1e-3)


def test_only_text_is_kept_from_being_a_formula(tmp_path: Path) -> None:
    row = {
        "text": "-1+2",
        "other": "@x",
        "number": -1.5,
        "count": -2,
        "undefined": float("nan"),
        "large": float("inf"),
    }
    write_csv(tmp_path / "table.csv", [row], list(row))
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "'-1+2,'@x,-1.5,-2,,inf"
    write_json(tmp_path / "table.json", row)
    stored = json.loads((tmp_path / "table.json").read_text())
    assert (stored["text"], stored["number"], stored["undefined"], stored["large"]) == (
        "-1+2",
        -1.5,
        None,
        "inf",
    )
