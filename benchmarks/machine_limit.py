"""How fast a level could run here at best, from the machine's own copy bandwidth and arithmetic rate.

The limit of a case is the sum over its unavoidable passes of ``max(bytes / bandwidth, product flops / product peak +
vector flops / vector peak)``; with D the dense tensor [B, C, N], h = C/2 and P the parameters:

    forward   reduce         reads D                     product 2·B·N·C·h, vector 7·B·N·C + 3·B·N·h
              vectors        reads P                     product 2·B·|P|
              apply          reads D, writes D           vector B·N·C
    backward  channel dots   reads dD_out and D          vector 2·B·N·C
              vectors        reads P, writes dP          product 4·B·|P|
              apply          reads dD_out and D, writes  two products, together 4·B·N·C·h, vector 11·B·N·C
                             dD

Bandwidth is that of ``dst.copy_(src)``, bytes read plus bytes written, at the size of the case's dense tensor, repeated
on the same buffers: small tensors are copied within the caches, so the limit of a small case assumes warm caches.
On the CPU the peak is that of multiply-adds on registers (``fma_peak.cpp``; without a compiler that of a float32 matrix
product), for bfloat16 that of a bfloat16 product if it is higher. On a GPU the peaks are those of large products of
matrices: TF32 for float32, as in PyTorch's own convolutions, bfloat16 for bfloat16, and float32 for vector work.
A kernel may come closer than seems possible: sums over saved one-bit ReLU masks need fewer operations than the two
products of the backward that are counted here. Rates are the best of two moments, so that load from elsewhere does not
make the limit easier to reach.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import BOTH, DECODER, FORWARD, VECTOR, Workload

from btinet.allocator import keep_pages

FORMULA = "sum over passes of max(bytes / bandwidth, product_flops / product_peak + vector_flops / vector_peak)"
REPEATS, MIN_SECONDS = 20, 0.05
PROJECTION, HIDDEN = 64, 32  # of the gate's network


@dataclass(frozen=True)
class Pass:
    """What one pass has to move and compute."""

    bytes: float
    product_flops: float = 0
    vector_flops: float = 0


@dataclass(frozen=True)
class Limit:
    """Of one case."""

    bytes: float
    flops: float
    ms: float


@dataclass
class Machine:
    """Its rates, measured when first asked for: bytes/s and flop/s."""

    device: str
    bandwidths: dict[int, float] = field(default_factory=dict)  # by size of the copied tensor in bytes
    peaks: dict[str, float] = field(default_factory=dict)

    def bandwidth(self, size: int) -> float:
        if size not in self.bandwidths:
            self.bandwidths[size] = copy_bandwidth(size, self.device)
        return self.bandwidths[size]

    def peak(self, dtype: torch.dtype) -> tuple[float, float]:
        """Of products with this dtype's operands, and of vector work."""
        if not self.peaks:
            self.peaks = gpu_peaks() if self.device == "cuda" else cpu_peaks()
        vector = self.peaks.get("fma_float32") or self.peaks["product_float32"]
        if self.device == "cuda":
            return self.peaks["product_tf32" if dtype == torch.float32 else "product_bfloat16"], vector
        return max(vector, self.peaks["product_bfloat16"]) if dtype == torch.bfloat16 else vector, vector

    def limit(self, workload: Workload, direction: str) -> Limit:
        product_peak, vector_peak = self.peak(workload.dtype)
        bandwidth = self.bandwidth(workload.dense_bytes)
        steps = passes(workload, direction)
        seconds = sum(
            max(p.bytes / bandwidth, p.product_flops / product_peak + p.vector_flops / vector_peak) for p in steps
        )
        flops = sum(p.product_flops + p.vector_flops for p in steps)
        return Limit(sum(p.bytes for p in steps), flops, seconds * 1e3)

    def measure_again(self) -> None:
        """Keep the better rate of two moments: load from elsewhere would make the limit too easy to reach."""
        again = Machine(self.device)
        for size, rate in self.bandwidths.items():
            self.bandwidths[size] = max(rate, again.bandwidth(size))
        again.peak(torch.float32)
        self.peaks = {name: max(rate, again.peaks.get(name, 0)) for name, rate in self.peaks.items()}

    def as_dict(self) -> dict[str, Any]:
        return {
            "formula": FORMULA,
            "copy_gb_per_s": {str(size): round(rate / 1e9, 1) for size, rate in sorted(self.bandwidths.items())},
            "peak_gflop_per_s": {name: round(rate / 1e9, 1) for name, rate in self.peaks.items()},
        }


def passes(workload: Workload, direction: str) -> list[Pass]:
    """The unavoidable ones; see the module's docstring."""
    elements, dense, width = workload.elements, workload.dense_bytes, workload.channels // 2
    product = 2.0 * elements * width
    count = parameters(workload)
    weights = count * workload.dtype.itemsize
    forward = [
        Pass(dense, product, 7.0 * elements + 3.0 * elements / workload.channels * width),
        Pass(weights, 2.0 * workload.batch * count),
        Pass(2 * dense, 0, elements),
    ]
    if direction != BOTH:
        return forward
    backward = [
        Pass(2 * dense, 0, 2.0 * elements),
        Pass(2 * weights, 4.0 * workload.batch * count),
        Pass(3 * dense, 2 * product, 11.0 * elements),
    ]
    return forward + backward


def parameters(workload: Workload) -> int:
    """How many the level has, without the few of the biases and of the gate's last two layers."""
    c, width = workload.channels, workload.channels // 2
    return c * width + width * VECTOR + VECTOR * VECTOR + c * c + VECTOR * c + PROJECTION * (c + VECTOR)


def copy_bandwidth(size: int, device: str) -> float:
    """Of ``dst.copy_(src)`` with ``size`` bytes each: bytes read and written per second."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def product_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """Of a square matrix product, flop/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), device, repeats=5)


def cpu_peaks() -> dict[str, float]:
    peaks = {f"product_{name}": product_rate(1024, getattr(torch, name), "cpu") for name in ("float32", "bfloat16")}
    registers = fma_rate(torch.get_num_threads())
    return peaks if registers is None else {"fma_float32": registers, **peaks}


def gpu_peaks() -> dict[str, float]:
    peaks = {"product_bfloat16": product_rate(8192, torch.bfloat16, "cuda")}
    before = torch.get_float32_matmul_precision()
    for name, precision in (("float32", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        peaks[f"product_{name}"] = product_rate(8192, torch.float32, "cuda")
    torch.set_float32_matmul_precision(before)
    return peaks


def fma_rate(threads: int) -> float | None:
    """Of multiply-adds on registers, flop/s; None where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        source = Path(__file__).with_name("fma_peak.cpp")
        if subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=False).returncode:
            return None
        multiply_add = ctypes.CDLL(str(library)).multiply_add
    multiply_add.restype = ctypes.c_double
    multiply_add.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    iterations = 2_000_000

    def one_thread(_: int) -> float:
        return multiply_add(iterations, ctypes.c_float())

    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter's lock
        flops = sum(pool.map(one_thread, range(threads)))
        return flops / _fastest(lambda: list(pool.map(one_thread, range(threads))), "cpu")


def _fastest(run: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """The shortest time of a call in seconds: a limit should not contain somebody else's load."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - start < MIN_SECONDS:
        times.append(_gpu_seconds(run) if device == "cuda" else _cpu_seconds(run))
    return min(times[1:])


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_seconds(run: Callable[[], object], calls: int = 10) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


if __name__ == "__main__":
    keep_pages()
    here = Machine("cuda" if torch.cuda.is_available() else "cpu")
    for shape in DECODER:
        for direction in (FORWARD, BOTH):
            workload = Workload(*shape)
            print(f"{workload.name}, {direction}: {here.limit(workload, direction)}")
    print(here.as_dict())
