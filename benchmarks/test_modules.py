"""Modules of the network beside plain PyTorch: ``pytest benchmarks/test_modules.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
from cases import BOTH, FORWARD
from modules import ModuleProblem, recorded
from timing import interleaved


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_module(
    benchmark: Any, module_problem: ModuleProblem, direction: str, recorder: Any, request: pytest.FixtureRequest
) -> None:
    name = f"{module_problem.case.name}, {direction}"
    recorder.refuse_if_late(name)
    samples = module_problem.samples(direction)
    summaries = interleaved(samples, min_rounds=request.config.getoption("rounds"))
    recorder.modules.append(recorded(module_problem.case, direction, summaries))
    benchmark.group = name
    benchmark.pedantic(module_problem.run, args=("ours", direction), rounds=5, warmup_rounds=1)
