"""BTI-Net-B4 end to end: ``pytest benchmarks/test_network.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
from foreign import ForeignProblem
from network import NetworkCase, NetworkProblem, network_cases, peak_memory_mib
from timing import interleaved


@pytest.mark.parametrize("case", network_cases(), ids=lambda case: case.name)
def test_network(benchmark: Any, case: NetworkCase, recorder: Any, request: pytest.FixtureRequest) -> None:
    recorder.refuse_if_late(case.name)
    if recorder.device != "cpu":
        pytest.skip("the network is measured on the CPU")
    names = [n for n in case.variants if "compile" not in n or not request.config.getoption("no_compile")]
    problem = NetworkProblem(case, tuple(names))
    summaries = interleaved(problem.samples(case.mode), min_rounds=request.config.getoption("rounds"))
    recorder.network.append(
        {
            "name": case.name,
            "mode": case.mode,
            "batch": case.batch,
            "direction": case.mode,
            "variants": {name: summary.as_dict() for name, summary in summaries.items()},
            "peak_mib": {} if case.dropout else {name: peak_memory_mib(case, name) for name in ("eager", "ours")},
        }
    )
    benchmark.group = case.name
    benchmark.pedantic(problem.run, args=("ours", case.mode), rounds=3, warmup_rounds=1)


def test_foreign_network(benchmark: Any, recorder: Any, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    recorder.refuse_if_late(ForeignProblem.name)
    problem = ForeignProblem()
    summaries = interleaved(problem.samples(), min_rounds=request.config.getoption("rounds"))
    recorder.foreign.append(
        {
            "name": problem.name,
            "mode": "training step",
            "batch": problem.batch,
            "direction": "training step",
            "variants": {name: summary.as_dict() for name, summary in summaries.items()},
        }
    )
    benchmark.group = problem.name
    benchmark.pedantic(problem.run, args=("ours",), rounds=3, warmup_rounds=1)
