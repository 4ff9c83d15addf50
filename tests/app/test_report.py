from __future__ import annotations

import base64
import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from btinet.errors import UserError
from btinet.serving.report import Report, read_gates, write_report

NASTY = "<script>alert('&')</script>"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture
def report(tmp_path: Path) -> Report:
    run, evaluation = tmp_path / "run", tmp_path / "run/evaluation-test"
    evaluation.mkdir(parents=True)
    epochs = [
        {
            "stage": stage,
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_loss": 1.2 / epoch,
            "val_iou": 0.1 * epoch,
            "val_accuracy": 0.5,
            "val_score": 0.3,
            "learning_rate": 1e-4,
            "seconds": 30.0,
        }
        for stage, length in ((1, 4), (2, 2))
        for epoch in range(1, length + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    config = {"model": {"backbone": f"resnet{NASTY}"}, "preprocessing": {"image_size": [48, 80]}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "split.csv").write_text(f"image,label,group,split\na,{NASTY},,train\nb,{NASTY},,test\nc,plain,,val\n")
    column = {
        "images": 2,
        "n_missed": 1,
        "measures": {
            name: {"mean": 0.625, "sd": None, "median": 0.5, "n": 2}
            for name in ("iou", "dice", "sensitivity", "precision")
        }
        | {"hd95": {"mean": "inf", "sd": None, "median": 3.0, "n": 2}},
        "pooled_iou": 0.71,
        "pooled_dice": 0.72,
    }
    summary = {
        "split": "test",
        "images": 2,
        "eval_size": "native",
        "image_size": [64, 96],
        "threshold": 0.5,
        "hd95_empty": "inf",
        "segmentation": {
            "lesion_images": column,
            "all_images": column,
            "images_without_lesion": 0,
            "false_positives": 0,
            "false_positive_rate": None,
        },
        "classification": {
            "images": 2, "accuracy": 0.875, "majority_accuracy": 0.5, "balanced_accuracy": 0.5,
            "macro_f1": 0.5, "weighted_f1": 0.5, "macro_auroc": None, "absent_classes": ["never"],
            "support": {NASTY: 2, "plain": 0}, "sensitivity": {NASTY: 0.875, "plain": None},
            "specificity": {NASTY: None, "plain": 1.0}, "auroc": {NASTY: None, "plain": None},
        },
        "baselines": {
            "all_background_iou": {"lesion_images": 0.0, "all_images": 0.0},
            "all_foreground_iou": {"lesion_images": 0.2, "all_images": 0.2},
        },
    }  # fmt: skip
    (evaluation / "summary.json").write_text(json.dumps(summary))
    with (evaluation / "per_image.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "label", "gate_seg_d1", "gate_clf_d1", "gate_seg_d2", "gate_clf_d2"])
        writer.writerows([["a", NASTY, 0.1, 0.2, 0.3, 0.4], ["b", NASTY, 0.3, 0.4, 0.5, 0.6], ["c", "$x", 1, 0, 1, 0]])
    for name in ("cases.png", "confusion_matrix.png"):
        Image.new("RGB", (8, 6)).save(evaluation / name)
    return Report(run, evaluation, title=f"Demo {NASTY}", data_note=f"Sample of ISIC 2017, CC-0 {NASTY}")


def test_report_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    page = parsed(tmp_path / "report.html")
    names = [name for name, _ in page.tags]
    assert names.count("title") == 1
    assert not {"script", "link", "iframe", "object", "base"} & set(names)
    pictures = [attributes for name, attributes in page.tags if name == "img"]
    assert len(pictures) == 5
    for attributes in pictures:
        assert attributes["alt"]
        head, _, data = (attributes["src"] or "").partition(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in source
    assert "url(" not in source
    assert all(attributes.get("scope") for name, attributes in page.tags if name == "th")


def test_text_from_files_is_escaped(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert source.count("&lt;script&gt;") >= 7


def test_report_shows_the_numbers_and_the_warning(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    text = " ".join(parsed(tmp_path / "report.html").text)
    expected = (
        "not a medical device",
        "0.625 ± –",
        "inf",
        "0.875",
        "never",
        "CC-0",
        "3.0 minutes",
        "48 × 80",
    )
    for words in expected:
        assert words in text
    # Mean gates of the first class: d1 0.2 and 0.3, d2 0.4 and 0.5.
    assert f"{NASTY} 0.200 0.400 0.300 0.500" in " ".join(text.split())


def test_gates_are_read_per_level_and_class(report: Report) -> None:
    gates = read_gates(report.evaluation / "per_image.csv")
    assert gates.levels == ("d1", "d2")
    assert gates.mean(gates.seg, NASTY) == pytest.approx([0.2, 0.4])
    assert gates.mean(gates.clf, NASTY) == pytest.approx([0.3, 0.5])


def test_a_model_without_gates_is_said_to_have_none(report: Report, tmp_path: Path) -> None:
    (report.evaluation / "per_image.csv").write_text("image,label\na,plain\n")
    write_report(tmp_path / "report.html", report)
    page = parsed(tmp_path / "report.html")
    assert "there are no gates" in " ".join(page.text)
    assert sum(name == "img" for name, _ in page.tags) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run/metrics.jsonl", "{broken"),
        ("run/metrics.jsonl", ""),
        ("run/config.json", "{}"),
        ("run/evaluation-test/summary.json", "[]"),
        ("run/evaluation-test/summary.json", '{"segmentation": {}}'),
        ("run/evaluation-test/per_image.csv", "image,label,gate_seg_d1,gate_clf_d1\na,b,much,0\n"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(
    report: Report, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=Path(name).name):
        write_report(tmp_path / "report.html", report)
    assert not (tmp_path / "report.html").exists()
