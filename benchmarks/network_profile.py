"""What a training step of BTI-Net-B4 is made of, plain PyTorch and ours: ``python benchmarks/network_profile.py``.

Prints the CPU time of every operator, without what it calls, averaged over some steps, and writes
``results/<machine>/network_profile.json`` for ``report.py``; with it the step's floating-point operations, three times
those of the plain network's forward, which are the least time at the processor's rates. Recording costs time: compare
shares, and take times from ``network.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from btinet.allocator import keep_pages

keep_pages()  # before anything is allocated

from machine import describe  # noqa: E402
from machine_limit import cpu_peaks  # noqa: E402
from network import TRAINING, NetworkCase, NetworkProblem  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

WARM_UPS, STEPS = 5, 3
SHOWN = 0.004  # of the step; what takes less is summed up
CASE = NetworkCase(TRAINING, 8, 0.3)


def profiled(problem: NetworkProblem, variant: str) -> dict[str, float]:
    """Operator → milliseconds of a step, the longest first."""
    for _ in range(WARM_UPS):
        problem.run(variant, TRAINING)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            problem.run(variant, TRAINING)
    times = {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in recorded.key_averages()}
    least = SHOWN * sum(times.values())
    shown = dict(sorted(((k, t) for k, t in times.items() if t >= least), key=lambda pair: -pair[1]))
    shown["others"] = sum(times.values()) - sum(shown.values())
    return {name: round(milliseconds, 1) for name, milliseconds in shown.items()}


def main() -> None:
    profiles, flops = {}, 0
    for variant in ("eager", "ours"):
        problem = NetworkProblem(CASE, (variant,))
        problem.set_dropout()
        if variant == "eager":
            flops = problem.flops(variant)
        profiles[variant] = profiled(problem, variant)
    described = describe("cpu")
    content: dict[str, Any] = {
        "machine": described,
        "case": CASE.name,
        "gflop": round(flops / 1e9, 1),
        "peak_gflop_per_s": {what: round(rate / 1e9, 1) for what, rate in cpu_peaks().items()},
        "profiles": profiles,
    }
    for variant, times in profiles.items():
        print(f"{variant}: {sum(times.values()):.0f} ms")
        for name, milliseconds in times.items():
            print(f"  {milliseconds:8.1f}  {name}")
    print({name: value for name, value in content.items() if name in ("gflop", "peak_gflop_per_s")})
    path = Path(__file__).parent / "results" / described["slug"] / "network_profile.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
