"""BTI-Net-B4 end to end: ``pytest benchmarks/test_network.py --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
from network import VARIANTS, NetworkCase, NetworkProblem, network_cases, peak_memory_mib
from timing import interleaved


@pytest.mark.parametrize("case", network_cases(), ids=lambda case: f"{case.mode}, B={case.batch}")
def test_network(benchmark: Any, case: NetworkCase, recorder: Any, request: pytest.FixtureRequest) -> None:
    recorder.refuse_if_late(case.name)
    if recorder.device != "cpu":
        pytest.skip("the network is measured on the CPU")
    names = [n for n in VARIANTS if "compile" not in n or not request.config.getoption("no_compile")]
    problem = NetworkProblem(case, tuple(names))
    summaries = interleaved(problem.samples(case.mode), min_rounds=request.config.getoption("rounds"))
    recorder.network.append(
        {
            "name": case.name,
            "mode": case.mode,
            "batch": case.batch,
            "direction": case.mode,
            "variants": {name: summary.as_dict() for name, summary in summaries.items()},
            "peak_mib": {name: peak_memory_mib(case, name) for name in ("eager", "ours")},
        }
    )
    benchmark.group = case.name
    benchmark.pedantic(problem.run, args=("ours", case.mode), rounds=3, warmup_rounds=1)
