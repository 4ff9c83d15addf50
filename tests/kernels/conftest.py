import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
