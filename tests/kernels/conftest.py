import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "portable")  # where the machine has less, it runs that again


@pytest.fixture
def in_every_instruction_set(tmp_path: Path) -> Callable[[str], list[Tensor]]:
    """The numbers that a program prints, once for each instruction set of the native kernels."""

    def run(program: str) -> list[Tensor]:
        printed = []
        for name in INSTRUCTION_SETS:
            environment = {**os.environ, "BTINET_INSTRUCTION_SET": name}
            command = [sys.executable, "-c", program]  # elsewhere: the checkout lacks the compiled part
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
            printed.append(torch.tensor([float(number) for number in done.stdout.split()]))
        return printed

    return run


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out is full of NaN, so that what a kernel leaves unwritten shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
