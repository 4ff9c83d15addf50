"""What is measured: the shapes, batches, dtypes and layouts of the interaction's benchmarks, most important first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

VECTOR = 256  # K, the width of BTI-Net's vector stream
DECODER = ((384, 14), (192, 28), (96, 56), (48, 112))  # C and height = width of the levels d1 … d4
LARGE = ((48, 224, 8), (64, 256, 16))  # C, height = width, batch
FORWARD, BOTH = "forward", "forward+backward"
LAYOUTS = (True, False)  # channels_last, contiguous


@dataclass(frozen=True)
class Workload:
    """One level on one kind of input. A batch of one is inference: BatchNorm uses its running statistics."""

    channels: int
    size: int
    batch: int = 8
    dtype_name: str = "float32"
    channels_last: bool = True
    max_autotune: bool = False  # compare with torch.compile's longest search instead of its default

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def inference(self) -> bool:
        return self.batch == 1

    @property
    def positions(self) -> int:
        return self.size * self.size

    @property
    def elements(self) -> int:
        """Of the dense tensor."""
        return self.batch * self.channels * self.positions

    @property
    def dense_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def name(self) -> str:
        search = ", max-autotune" if self.max_autotune else ""
        return f"{self.channels}x{self.size}x{self.size}, B={self.batch}, {self.dtype_name}, {self.layout}{search}"


def cpu_workloads(*, quick: bool, full: bool) -> list[Workload]:
    """``quick``: the decoder in float32, channels_last; ``full``: also bfloat16 where it takes minutes."""
    training = [Workload(c, s) for c, s in DECODER]
    if quick:
        return training
    training += [Workload(c, s, channels_last=False) for c, s in DECODER]
    inference = [Workload(c, s, 1, "float32", layout) for layout in LAYOUTS for c, s in DECODER]
    half = [Workload(c, s, 8, "bfloat16", layout) for layout in LAYOUTS for c, s in DECODER]
    large = [Workload(c, s, b, "float32", layout) for c, s, b in LARGE for layout in LAYOUTS]
    if not full:
        return training + inference + half + large
    half_inference = [Workload(c, s, 1, "bfloat16", layout) for layout in LAYOUTS for c, s in DECODER]
    large_half = [Workload(c, s, b, "bfloat16", layout) for c, s, b in LARGE for layout in LAYOUTS]
    return training + inference + half + large + half_inference + large_half


def gpu_workloads(*, quick: bool, full: bool) -> list[Workload]:
    """``quick``: the decoder in float32, channels_last, at B = 8 and 128; ``full``: the longest search everywhere."""
    first = [Workload(c, s, b) for b in (128, 8) for c, s in DECODER]
    if quick:
        return first
    batches = [Workload(c, s, b) for b in (32, 1) for c, s in DECODER]
    half = [Workload(c, s, b, "bfloat16") for b in (128, 8) for c, s in DECODER]
    contiguous = [Workload(c, s, b, "float32", False) for b in (128, 8) for c, s in DECODER]
    large = [Workload(c, s, b) for c, s, b in LARGE]
    searched = [Workload(c, s, b, max_autotune=True) for b in (8, 128) for c, s in DECODER]
    rest = [
        Workload(c, s, b, dtype, layout)
        for b, dtype, layout in (
            (32, "bfloat16", True),
            (1, "bfloat16", True),
            (128, "bfloat16", False),
            (8, "bfloat16", False),
            (32, "float32", False),
            (1, "float32", False),
        )
        for c, s in DECODER
    ]
    large_rest = [
        Workload(c, s, b, dtype, layout)
        for dtype, layout in (("bfloat16", True), ("float32", False), ("bfloat16", False))
        for c, s, b in LARGE
    ]
    if not full:
        return first + batches + half + contiguous + searched + large + rest + large_rest
    more = [Workload(c, s, b, max_autotune=True) for b in (32, 1) for c, s in DECODER]
    return first + batches + half + contiguous + searched + large + rest + large_rest + more


def directions(workload: Workload, device: str) -> tuple[str, ...]:
    """On the CPU, inference has no backward worth timing; on a GPU its launches are."""
    return (FORWARD,) if workload.inference and device == "cpu" else (FORWARD, BOTH)
