"""Times variants interleaved in one process: one sample of each, again and again, in changing order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS, MIN_SECONDS = 20, 200, 1.0
WARM_UPS = 3

Sample = Callable[[], float]  # takes one sample, returns milliseconds


@dataclass(frozen=True)
class Summary:
    """Of one variant's samples."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, min(samples), len(samples))

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in asdict(self).items()}


def interleaved(variants: dict[str, Sample], *, min_rounds: int = MIN_ROUNDS) -> dict[str, Summary]:
    """Sample all variants round by round, at least ``min_rounds`` times and for at least ``MIN_SECONDS``.

    The first variant of a round changes every round and the direction every other, so that nobody always runs after
    the same neighbour, in the caches that it leaves.
    """
    for sample in variants.values():
        for _ in range(WARM_UPS):
            sample()
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= min_rounds and time.perf_counter() - start > MIN_SECONDS:
            break
        for name in order_of_round(names, turn):
            samples[name].append(variants[name]())
    return {name: Summary.of(taken) for name, taken in samples.items()}


def order_of_round(names: Sequence[str], turn: int) -> list[str]:
    """The names, rotated by ``turn`` and reversed in every other full rotation."""
    first = turn % len(names)
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if turn // len(names) % 2 else rotated


def cpu_sample(run: Callable[[], object]) -> Sample:
    """Times one call; what it returns is freed afterwards."""

    def sample() -> float:
        start = time.perf_counter_ns()
        result = run()
        stop = time.perf_counter_ns()
        del result
        return (stop - start) / 1e6

    return sample


class CudaSampler:
    """Times GPU work by events, as the mean over one sweep through several sets of inputs.

    A sweep visits more bytes than the L2 holds, so that inputs come from memory. A filler runs first: the host gets
    ahead of the device by its length, and the first launch is not measured. Variants that are bound by their launches
    stay so, because a sweep of theirs is longer than the filler.
    """

    def __init__(self) -> None:
        self._filler = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, sweep: Callable[[], object], visits: int) -> Sample:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            self._filler.zero_()
            start.record()
            sweep()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / visits

        return sample


def captured(sweep: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """``sweep`` as a CUDA graph: what replays it, and its result, which every replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            sweep()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sweep()
    return graph.replay, result
