"""One interaction level at the shapes of BTI-Net's decoder: ours, the eager modules, and ``torch.compile`` of them.

``pytest benchmarks/ --benchmark-only`` runs it; README.md beside this file lists the options. Nothing is timed before
it has been compared with float64. The numbers that count are the interleaved medians in the summary; pytest-benchmark's
own table times our operator alone, with warm caches.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import BOTH, FORWARD, directions
from timing import interleaved
from variants import Problem


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_level(benchmark: Any, problem: Problem, direction: str, recorder: Any, request: pytest.FixtureRequest) -> None:
    workload = problem.workload
    if direction not in directions(workload, recorder.device):
        pytest.skip("inference has no backward")
    recorder.refuse_if_late(f"{workload.name}, {direction}")
    samples = problem.samples(direction)
    summaries = interleaved(samples, min_rounds=request.config.getoption("rounds"))
    measured = {
        "automatic": problem.automatic,
        "inputs": problem.state_of_caches(),
        "variants": {name: summary.as_dict() for name, summary in summaries.items()},
        "unavailable": dict(problem.unavailable),
    }
    recorder.add(workload, direction, measured)
    benchmark.group = f"{workload.name}, {direction}"
    benchmark.extra_info.update(measured)
    benchmark.pedantic(problem.run, args=(problem.automatic, direction), rounds=5, warmup_rounds=1)
