"""What a level's time on the CPU is made of: every call into the native extension, and the rest.

``python benchmarks/native_profile.py`` prints medians for the decoder's levels, forward and backward in training,
float32, B = 8, and writes ``results/<machine>/native_profile.json``. Each level runs in a loop of its own: its caches
are warm, unlike in the interleaved measurements of ``test_interaction.py``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from cases import BOTH, DECODER, LAYOUTS, Workload
from machine import describe
from variants import Problem, step

from btinet.allocator import keep_pages
from btinet_kernels.interaction import native

WARM_UPS, ROUNDS = 10, 60


def profile(workload: Workload) -> dict[str, float]:
    """Median milliseconds of each pass, of the whole step, and of what lies outside the passes."""
    problem = Problem(workload, "cpu")
    ours = next(variant for variant in problem.variants if variant.backend == "native")
    call, taken = native._call, defaultdict(list)

    def timed(name: str, *arguments: Any) -> None:
        start = time.perf_counter()
        call(name, *arguments)
        taken[name].append(1e3 * (time.perf_counter() - start))

    native._call = timed
    try:
        for turn in range(WARM_UPS + ROUNDS):
            if turn == WARM_UPS:
                taken.clear()
            start = time.perf_counter()
            step(ours, problem.inputs[0], BOTH, inference=False)
            taken["whole"].append(1e3 * (time.perf_counter() - start))
    finally:
        native._call = call
    medians = {name: round(statistics.median(samples), 3) for name, samples in taken.items()}
    medians["outside the extension"] = round(2 * medians["whole"] - sum(medians.values()), 3)
    return medians


def main() -> None:
    keep_pages()
    torch.manual_seed(0)
    machine = describe("cpu")
    levels = [Workload(c, s, channels_last=layout) for layout in LAYOUTS for c, s in DECODER]
    profiles = {workload.name: profile(workload) for workload in levels}
    for name, medians in profiles.items():
        print(f"{name}: " + ", ".join(f"{part} {ms}" for part, ms in medians.items()))
    target = Path(__file__).parent / "results" / machine["slug"] / "native_profile.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine, "median_ms": profiles}, indent=1) + "\n")


if __name__ == "__main__":
    main()
