"""Interrupted, resumed, extended: the same weights, bit for bit, as without interruption."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file

from btinet.cli import main
from btinet.training import epochs, records
from btinet.training import resume as state_files
from btinet.training.options import TrainOptions
from btinet.training.resume import only_process, random_states, restore_random_states
from btinet.training.train import resume, train

SMALL = {"model": "btinet_mobilenetv3_small_050", "image_size": 32, "epochs": 2, "stage2_epochs": 2, "device": "cpu"}


def options(data: Path, out: Path, **changes: Any) -> TrainOptions:
    plain = TrainOptions(data=str(data), out=str(out), dataset="busi", lr=1e-3, deterministic=True)
    return replace(plain, **{**SMALL, **changes})


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_runs(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("stage1.pt", "stage2.pt"):
        states = [torch.load(run / name, weights_only=True) for run in (one, other)]
        for state in states:
            for row in state["rows"]:
                row.pop("seconds")
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)


class Killed(BaseException):
    pass


class Killer:
    """Ends a run at a step of the optimizer, or within the writing of a state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = self.state = -1
        clip, save = Fabric.clip_gradients, torch.save

        def clip_or_die(*arguments: Any, **options: Any) -> Any:
            self.step -= 1
            if self.step == 0:
                raise Killed
            return clip(*arguments, **options)

        def save_or_die(content: Any, file: Any) -> None:
            self.state -= 1
            if self.state == 0:
                Path(file).write_bytes(b"half of a state")
                raise Killed
            save(content, file)

        monkeypatch.setattr(epochs.Fabric, "clip_gradients", clip_or_die)
        monkeypatch.setattr(state_files.torch, "save", save_or_die)


@pytest.mark.slow
def test_a_run_interrupted_in_many_places_ends_as_if_it_had_not_been(
    ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 images in batches of 8: three steps an epoch."""
    monkeypatch.setattr(records, "WRITING_INTERVAL", 0)  # a state after every epoch, however fast
    whole = train(options(ultrasound, tmp_path / "whole", ema=0.9))
    killer, broken = Killer(monkeypatch), tmp_path / "broken"
    killer.step = 2
    with pytest.raises(Killed):
        train(options(ultrasound, broken, ema=0.9))
    assert not (broken / "stage1.pt").exists()
    for step, state, known in ((-1, 1, 0), (5, -1, 1), (5, -1, 2), (-1, 1, 2)):
        killer.step, killer.state = step, state
        with pytest.raises(Killed):
            resume(broken)
        found = [
            torch.load(broken / name, weights_only=True)
            for name in ("stage1.pt", "stage2.pt")
            if (broken / name).exists()
        ]
        assert len(found[-1]["rows"] if found else []) == known
    killer.step = killer.state = -1
    resume(broken)
    assert_same_runs(whole, broken)


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(ultrasound: Path, tmp_path: Path) -> None:
    """SIGKILL while each kind of file is being written, and between them."""
    arguments = ["--data", ultrasound, "--model", "btinet_resnet18", "--image-size", "32", "--device", "cpu"]
    arguments += ["--epochs", "2", "--stage2-epochs", "2", "--deterministic", "--lr", "1e-3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(*arguments, "--out", whole).wait() == 0
    process = start(*arguments, "--out", broken)
    kill(process, lambda: list(broken.glob(".stage1-*")))
    assert list(broken.glob(".stage1-*"))  # killed while it was written
    assert not (broken / "stage1.pt").exists()
    for moment in (
        lambda: list(broken.glob(".model-*")),
        lambda: list(broken.glob(".stage1-*")),
        lambda: list(broken.glob(".stage2-*")),
        lambda: len(rows(broken)) == 3,
    ):
        process = start("--resume", broken)
        kill(process, moment)
    assert start("--resume", broken).wait() == 0
    assert not list(broken.glob(".*"))
    assert_same_runs(whole, broken)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "btinet.cli", "train", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def kill(process: subprocess.Popen[bytes], moment: Any) -> None:
    while not moment():
        assert process.poll() is None, "it ended before that"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("patience", [22, 1])
def test_extension_is_the_same_whenever_it_is_asked_for(
    ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """Two more epochs, asked for at the start, or one by one after the end, the first interrupted."""
    plain = {"epochs": 2, "stage2_epochs": 1}
    if patience == 1:  # too slow to improve
        plain = {"epochs": 5, "stage2_epochs": 1, "patience": patience, "lr": 1e-8}
    at_once = train(options(ultrasound, tmp_path / "at_once", **plain, extend_epochs=2))
    later = train(options(ultrasound, tmp_path / "later", **plain))
    before = rows(later)
    killer = Killer(monkeypatch)
    killer.step = 2
    with pytest.raises(Killed):
        resume(later, extend_epochs=1)
    resume(later)
    assert len(rows(later)) == len(before) + 1
    resume(later, extend_epochs=1)
    assert_same_runs(at_once, later)
    first = [row for row in rows(later) if row["stage"] == 1]
    assert len(first) == sum(row["stage"] == 1 for row in before) + 2
    assert first[:-2] == before[:-1]
    rates = [row["learning_rate"] for row in first]
    assert rates == sorted(rates, reverse=True)
    if patience == 22:
        assert rates[-2:] == pytest.approx([0.03 * 1e-3] * 2)
    else:
        assert len(first) == 4


def test_a_finished_run_is_left_alone(ultrasound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, stage2_epochs=0))
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.iterdir()}
    assert main(["train", "--resume", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.iterdir()}


def test_a_run_killed_before_its_last_model_was_written_is_not_finished(ultrasound: Path, tmp_path: Path) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, stage2_epochs=0))
    model, metrics = (run / "model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()
    (run / "model.safetensors").unlink()
    (run / "metrics.jsonl").unlink()
    resume(run)
    assert (run / "model.safetensors").read_bytes() == model
    assert (run / "metrics.jsonl").read_text() == metrics


def test_a_run_can_be_moved_and_keeps_its_split(ultrasound: Path, tmp_path: Path) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, stage2_epochs=0))
    split = (run / "split.csv").read_text()
    moved = run.rename(tmp_path / "moved")
    assert resume(moved, extend_epochs=1) == moved
    assert not run.exists()
    assert (moved / "split.csv").read_text() == split
    environment = json.loads((moved / "environment.json").read_text())
    assert len(environment["resumed"]) == 1


def test_what_cannot_be_resumed(ultrasound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, stage2_epochs=0))

    def refused(*arguments: object, words: str) -> None:
        assert main(["train", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert words in error

    refused("--resume", tmp_path, words="no config.yaml")
    refused("--resume", run, "--lr", 1, "--out", "x", words="leave out --out, --lr")
    refused("--resume", run, "--extend-epochs", -1, words="at least 0")
    refused("--data", ultrasound, "--out", run, words="--resume this one")
    with only_process(run):
        refused("--resume", run, "--extend-epochs", 1, words="another process")
    config, state = (run / "config.yaml").read_text(), (run / "stage1.pt").read_bytes()
    (run / "config.yaml").write_text(config.replace("small_050", "small_075"))
    refused("--resume", run, "--extend-epochs", 1, words="another network than its config.yaml")
    (run / "config.yaml").write_text(config + "colour: red\n")
    refused("--resume", run, words="colour")
    (run / "config.yaml").write_text(config)
    (run / "stage1.pt").write_bytes(state[: len(state) // 2])
    refused("--resume", run, words="not the state of a training")
    (run / "stage1.pt").unlink()
    refused("--resume", run, words="no such file")
    (ultrasound / "benign" / "benign (3).png").unlink()
    (ultrasound / "benign" / "benign (3)_mask.png").unlink()
    (run / "stage1.pt").write_bytes(state)
    refused("--resume", run, "--extend-epochs", 1, words="benign (3).png")


def test_random_generators_continue() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    for seed in (0, 1):  # after one draw of a gauss both have another in store, after two none
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        for _ in range(seed):
            draw()
        states = random_states(fabric)
        assert all(state.shape[0] == 1 for state in states.values())
        expected = [draw() for _ in range(3)]
        restore_random_states(states, fabric)
        assert [draw() for _ in range(3)] == expected
