"""Two processes under torchrun, on the CPU with gloo."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import btinet.training.train as training
from btinet.data import EpochBatches
from btinet.training import stages
from btinet.training.options import TrainOptions

SMALL: dict[str, Any] = {
    "dataset": "busi",
    "model": "btinet_mobilenetv3_small_050",
    "image_size": 32,
    "device": "cpu",
    "lr": 1e-3,
    "epochs": 2,
    "stage2_epochs": 1,
    "deterministic": True,
}

# Dropout draws other numbers in each process, and BatchNorm sees each process's images alone: without both, the
# processes must do what one process with all images does. Plain descent, because Adam hardly sees how long a gradient
# is.
QUIET = """
import torch
from torch import nn
import btinet.training.train as training
from btinet.training import stages

build = training._network

def quiet(*arguments, **options):
    network = build(*arguments, **options)
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.weight.requires_grad_(False)  # keeps to its running statistics
    return network

training._network = quiet
stages._adam = lambda fabric, parameters, lr, beta1=0.9: torch.optim.SGD(parameters, 30 * lr)
"""

RUN = """
import json, sys
from btinet.training.options import TrainOptions
from btinet.training.train import train

train(TrainOptions(**json.loads(sys.argv[1])))
"""

INTERRUPT = """
import json, os, sys
from pathlib import Path
import torch
import btinet.training.train as training
from btinet.training import records
from btinet.training.options import TrainOptions

records.WRITING_INTERVAL = 0
options = json.loads(sys.argv[1])
rank, networks, build = os.environ["RANK"], [], training._network

def remember(*arguments, **settings):
    networks.append(build(*arguments, **settings))
    return networks[-1]

training._network = remember
training.train(TrainOptions(**options))
torch.save(networks[-1].state_dict(), options["out"] + "-rank" + rank)

class Killed(BaseException):
    pass

write = records.RunWriter.epoch

def write_and_die(self, state, better, last):
    write(self, state, better, last)
    raise Killed

for _ in range(2):  # after the first epoch, and after the second
    records.RunWriter.epoch = write_and_die
    out = Path(options["out"] + "-broken")
    try:
        training.resume(out) if out.exists() else training.train(TrainOptions(**{**options, "out": str(out)}))
    except Killed:
        torch.distributed.barrier()
records.RunWriter.epoch = write
training.resume(out)
"""


def torchrun(script: str, file: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    file.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(file), json.dumps(SMALL | options)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
def test_two_processes_do_what_one_with_twice_the_batch_does(
    ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 images: the last step has 9, of which one process gets 4 and the other 5. Some have no mask or no class.

    The weights of the tasks are learned as well, outside of what the processes average by themselves.
    """
    parts = dict.fromkeys((5, 11, 18, 23, 29, 34), "val") | dict.fromkeys((3, 10, 17, 24, 31), "test")
    rows_of_table = ["image,mask,label,split"]
    for number, image in enumerate(sorted(p for p in ultrasound.glob("*/*.png") if "_mask" not in p.name)):
        mask = "?" if number % 5 == 0 else image.with_name(f"{image.stem}_mask.png")
        rows_of_table.append(
            f"{image},{mask},{'' if number % 4 == 0 else image.parent.name},{parts.get(number, 'train')}"
        )
    table = tmp_path / "partly.csv"
    table.write_text("\n".join(rows_of_table) + "\n")
    two, one = tmp_path / "two", tmp_path / "one"
    options = {"data": str(table), "dataset": "csv", "stage2_epochs": 0, "weighting": "uncertainty"}
    done = torchrun(QUIET + RUN, tmp_path / "run.py", **options, out=str(two), batch_size=4)
    assert done.stdout.count("run saved in") == 1
    monkeypatch.setattr(training, "_network", training._network)  # what it is again after the test
    monkeypatch.setattr(stages, "_adam", stages._adam)
    exec(QUIET, {})
    training.train(TrainOptions(**SMALL | options | {"out": str(one), "batch_size": 8}))
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    states = [torch.load(run / "stage1.pt", weights_only=True) for run in (two, one)]
    torch.testing.assert_close(states[0]["network"], states[1]["network"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[0]["weighting"], states[1]["weighting"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_processes_stay_equal_and_resume_bit_for_bit(ultrasound: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "run", tmp_path / "run-broken"
    torchrun(INTERRUPT, tmp_path / "run.py", data=str(ultrasound), out=str(whole), batch_size=4, ema=0.9, accumulate=2)
    ranks = [torch.load(tmp_path / f"run-rank{rank}") for rank in (0, 1)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert rows(whole) == rows(broken)
    state = torch.load(whole / "stage2.pt", weights_only=True)
    assert state["processes"] == 2
    assert not torch.equal(*state["random"]["torch"])


def test_processes_share_every_item() -> None:
    for length, size, processes in ((25, 4, 2), (26, 4, 2), (24, 4, 2), (33, 2, 3), (40, 1, 3), (7, 8, 3)):
        shares = [
            EpochBatches(length, size, shuffle=True, seed=3, rank=rank, processes=processes)
            for rank in range(processes)
        ]
        alone = EpochBatches(length, size * processes, shuffle=True, seed=3)
        steps = list(zip(*shares, strict=True))
        assert len(steps) == len(shares[0])
        items = sorted(item for step in steps for batch in step for item in batch)
        assert items == [(index, 0) for index in range(length)]
        if length % (size * processes) in (0, 1) and size > 1:
            assert [sorted(chain(*step)) for step in steps] == [sorted(batch) for batch in alone]
        if size > 1:
            assert min(len(batch) for step in steps for batch in step) >= 2
        in_order = [
            EpochBatches(length, size, shuffle=False, rank=rank, processes=processes) for rank in range(processes)
        ]
        assert [len(list(share)) for share in in_order] == [len(share) for share in in_order]
        found = sorted(batch for share in in_order for batch in share)
        assert found == list(EpochBatches(length, size, shuffle=False))
