"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, spills nothing and fits the shared memory.

The launches are those of the operators at the decoder's shapes, on tensors without data, but for the last step.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton")

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
REGISTERS = 65536  # of a multiprocessor: a program that needs more does not start
SHAPES = [(384, 14), (192, 28), (96, 56), (48, 112)]
KERNELS = {
    "apply_to_tiles",
    "channel_dot_of_parts",
    "columns_gradient",
    "columns_of_context",
    "columns_of_inputs",
    "combine_moments",
    "combine_sums",
    "convolution_gradient_of_parts",
    "convolved_gradient_of_tiles",
    "depthwise_input_gradient",
    "depthwise_of_parts",
    "depthwise_weight_gradient_of_parts",
    "dropout_of_places",
    "gate_gradient",
    "gate_gradients_of_tiles",
    "gate_tiles",
    "input_gradient",
    "input_gradient_of_tiles",
    "logit_gradient_of_tiles",
    "maps_gradient_of_tiles",
    "maps_of_scale",
    "mask_statistics_of_images",
    "mask_sums_of_tiles",
    "moments_of_parts",
    "norm_gradient_of_parts",
    "norm_input_gradient_of_tiles",
    "normalise_tiles",
    "pointwise_gradient_of_parts",
    "position_gate_gradient_of_tiles",
    "position_gate_of_tiles",
    "product_of_tiles",
    "products_of_level",
    "response_gradients_of_tiles",
    "results_of_samples",
    "softmax_context_gradient",
    "spatial_gate_of_tiles",
    "statistics_gradient",
    "statistics_of_samples",
    "statistics_of_tiles",
    "summaries_of_tiles",
}
# Compiled for one of the architectures by default, and for all with the slow tests.
LESS_OFTEN = {
    "depthwise_input_gradient",
    "depthwise_of_parts",
    "depthwise_weight_gradient_of_parts",
    "logit_gradient_of_tiles",
    "mask_statistics_of_images",
    "mask_sums_of_tiles",
    "position_gate_gradient_of_tiles",
    "position_gate_of_tiles",
    "response_gradients_of_tiles",
}
WORKER = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoDevice:
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

capability, folder, *cases = int(sys.argv[1]), sys.argv[2], *sys.argv[3:]
driver.set_active(NoDevice())
launch, seen = JITFunction.run, {}

def compile_only(self, *arguments, grid, warmup, **options):
    kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
    if kernel.hash not in seen:
        seen[kernel.hash] = path = f"{folder}/{len(seen)}.cubin"
        open(path, "wb").write(kernel.asm["cubin"])
        print(self.__name__, case, kernel.metadata.num_warps, kernel.metadata.shared, path)

JITFunction.run = compile_only
from btinet_kernels.depthwise import triton as depthwise
from btinet_kernels.depthwise.reference import Geometry
from btinet_kernels.dropout import triton as dropout
from btinet_kernels.gates import attention_triton
from btinet_kernels.gates import triton as gates
from btinet_kernels.gates.reference import DualPathWeights
from btinet_kernels.interaction import triton as passes
from btinet_kernels.interaction.passes_op import LevelOptions
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Statistics
from btinet_kernels.losses import triton as losses
from btinet_kernels.multi_scale import triton as multi_scale
from btinet_kernels.normalization import triton as normalization
from btinet_kernels.separable import triton as separable
from btinet_kernels.separable.reference import SeparableWeights

def norm_of(x, vector):
    weights, moments = ([vector(x.shape[1]) for _ in range(2)] for _ in range(2))
    for training in (True, False):
        normalization.batch_norm(x, weights, None if training else moments, 1e-3, "silu")
        normalization.batch_norm_backward(x, x, weights, moments, training=training, eps=1e-3, act="silu")
    normalization.batch_norm_backward(x, x, (None, None), moments, training=True, eps=1e-3, act="identity")

def separable_of(x, vector, outputs, dilation):
    channels, of_outputs = x.shape[1], [vector(outputs) for _ in range(3)]
    weights = SeparableWeights(vector(channels, 1, 3, 3), vector(outputs, channels, 1, 1), vector(outputs))
    separable.separable(x, weights, dilation, True, affine=of_outputs[:2])
    value = separable.separable(x, weights, dilation, True, moments=of_outputs[:2])
    separable.separable_backward(x, value, value, weights, dilation, True, of_outputs)
    separable.separable_backward(x, value, value.new_empty(0), weights, dilation, False)

def depthwise_of(x, vector, kernel, stride):
    weight, bias = vector(x.shape[1], 1, kernel, kernel), vector(x.shape[1])
    geometry = Geometry([stride] * 2, [kernel // 2] * 2, [1, 1])
    depthwise.depthwise_backward(x, depthwise.depthwise(x, weight, bias, geometry), weight, geometry)

def loss_of(logits, target):
    statistics, mean = losses.statistics(logits, target, hard_boundary=False, cross_entropy=True)
    losses.statistics_backward(statistics, logits, target, mean, hard_boundary=False)

def scales_of(x, vector):
    batch, channels = x.shape[:2]
    taps, matrices = [vector(channels, 1, 3, 3) for _ in range(3)], [vector(channels, channels) for _ in range(3)]
    kernels = multi_scale.Kernels(taps, matrices, vector(batch, 3), vector(batch, channels), None, None)
    multi_scale.multi_scale(x, kernels)
    multi_scale.multi_scale_backward(x, x, x, kernels)

def gates_of(x, vector):
    channels, hidden = x.shape[1], max(8, x.shape[1] // 16)
    path = vector(hidden, channels), vector(hidden), vector(channels, hidden), vector(channels)
    weights = DualPathWeights(*path, vector(1, 2, *[7] * (x.ndim - 2)), vector(1))
    for residual in (None, x):
        out, saved = gates.dual_path(x, residual, weights)
        gates.dual_path_backward(x, x, None if residual is None else out, saved, weights)

def level_of(batch, channels, features, hidden, projection, gate_hidden, vector):
    weights = InteractionWeights(
        *(vector(hidden, channels), vector(hidden), None, vector(features, hidden), *[vector(features)] * 5),
        *(vector(features, features), vector(features), vector(channels, channels), vector(channels)),
        *(vector(channels, features), vector(channels)),
    )
    for signals, width in {"none": 0, "proxies": 3, "variance": 2}.items():
        gate, proxies, empty = None, width == 3, vector(0)
        if width:
            projections = [vector(projection, n) if proxies else None for n in (channels, features)]
            network = vector(gate_hidden, width), vector(gate_hidden), vector(2, gate_hidden), vector(2)
            gate = GateWeights(*projections, *network)
        variance, edges = vector(batch, channels) if width == 2 else empty, vector(batch) if proxies else empty
        stats = Statistics(vector(batch, channels), variance, edges, vector(batch, hidden), empty, empty)
        for training in (True, False):
            given = stats, vector(batch, features), weights, gate, LevelOptions(signals, 0.5, training, 1e-3)
            scale, clf, gates, proxies_of, *_ = passes.level_vectors(*given)
            passes.level_backward(*given, d_scale=scale, d_clf_out=clf, d_gates=gates, d_proxies=proxies_of)

for case in cases:
    channels, side, batch, dtype, layout, pool = case.split(",")
    seg = torch.empty(int(batch), int(channels), int(side), int(side), dtype=getattr(torch, dtype), device="meta")
    seg = seg.to(memory_format=getattr(torch, layout))
    vector = lambda *shape: torch.empty(*shape, device="meta")
    hidden = max(1, int(channels) // 2)
    if pool == "vectors":  # between the passes: those of BTI-Net's levels, or all of size one
        more = (256, hidden, 64, 32) if int(channels) > 1 else (1, 1, 1, 1)
        level_of(int(batch), int(channels), *more, vector)
        continue
    if pool == "separable":
        separable_of(seg, vector, int(channels), 1)
        continue
    if pool == "depthwise":
        depthwise_of(seg, vector, 5, 2)
        continue
    if pool == "position_gate":
        weight = vector(int(channels))
        _, gate = attention_triton.position_gate(seg, seg, weight, vector(1))
        attention_triton.position_gate_backward(seg, seg, seg, gate, weight)
        continue
    if pool == "loss":
        loss_of(seg, vector(*seg.shape))
        continue
    if pool == "more":
        depthwise_of(seg, vector, 3, 1)
        loss_of(seg[:, :1], torch.empty(seg[:, :1].shape, dtype=torch.bool, device="meta"))
        continue
    if pool == "modules":
        scales_of(seg, vector)
        dropout.dropout(seg, torch.empty(1, dtype=torch.int64, device="meta"), 0.3)
        norm_of(seg, vector)
        separable_of(seg, vector, max(1, int(channels) // 4), 2)
        for x in (seg, seg[..., 0], seg[..., None]) if int(channels) == 1 else (seg,):
            gates_of(x, vector)
        continue
    context = None
    if pool != "none":
        context = Context(vector(hidden, int(channels)), vector(hidden), vector(hidden) if pool == "softmax" else None)
    stats = passes.statistics(seg, context, variance=pool == "softmax", edges=pool != "softmax", active=True)
    passes.scale_channels(seg, stats.mean)
    passes.interpolate(seg, seg, stats.mean[:, 0])
    passes.channel_dot(seg, seg)
    passes.statistics_backward(seg, seg, stats.mean, context, stats, stats)
"""


class Compiled(NamedTuple):
    kernel: str
    case: str
    warps: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes


def compiled(capability: int, cases: list[tuple[object, ...]], folder: Path) -> Iterator[Compiled]:
    arguments = [",".join(map(str, case)) for case in cases]
    command = [sys.executable, "-c", WORKER, str(capability), str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-5000:]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for line in result.stdout.splitlines():
        kernel, case, warps, shared, path = line.split()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())  # type: ignore[union-attr]
        yield Compiled(kernel, case, int(warps), registers, stack, int(shared))


def check(capability: int, cases: list[tuple[object, ...]], folder: Path, kernels: set[str] = KERNELS) -> None:
    table = list(compiled(capability, cases, folder))
    print(f"\nsm_{capability}: kernel, case, warps, registers per thread, bytes spilled, bytes of shared memory")
    for row in table:
        print(f"  {row.kernel:<26}{row.case:<40}{row.warps:>3}{row.registers:>5}{row.spilled:>5}{row.shared:>8}")
    assert {row.kernel for row in table} == kernels
    assert not [row for row in table if row.spilled]
    assert max(row.shared for row in table) <= SHARED_MEMORY[capability]
    assert max(32 * row.warps * row.registers for row in table) <= REGISTERS


@pytest.mark.parametrize("capability", [90])
def test_a_few_of_the_launches_compile(capability: int, tmp_path: Path) -> None:
    cases: list[tuple[object, ...]] = [
        (384, 14, 8, "float32", "channels_last", "gap"),
        (48, 112, 8, "bfloat16", "contiguous_format", "gap"),
        (96, 56, 8, "float32", "contiguous_format", "softmax"),
        (1792, 7, 8, "float32", "channels_last", "gap"),
        (1, 1, 1, "float32", "contiguous_format", "gap"),  # sizes of one are constants to the compiler
        (384, 14, 8, "float32", "channels_last", "vectors"),
        (48, 112, 128, "float32", "channels_last", "vectors"),
        (1, 1, 1, "float32", "channels_last", "vectors"),
        (96, 56, 8, "bfloat16", "contiguous_format", "modules"),
        (1, 1, 1, "float32", "channels_last", "modules"),
    ]
    kernels = KERNELS
    if capability == 90:
        cases += [
            (48, 112, 8, "bfloat16", "channels_last", "depthwise"),
            (48, 112, 8, "bfloat16", "channels_last", "position_gate"),
            (1, 224, 8, "float32", "contiguous_format", "loss"),
        ]
    else:
        kernels = KERNELS - LESS_OFTEN
    check(capability, cases, tmp_path, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_all_of_the_launches_compile(capability: int, tmp_path: Path) -> None:
    layouts, dtypes = ["channels_last", "contiguous_format"], ["float32", "bfloat16"]
    pools = ["none", "gap", "softmax"]
    # All of it takes minutes, so that two of the architectures get the batch and the sizes that differ most.
    batches, modules = (8,), [(48, 112, 8), (1792, 7, 8)]
    if capability == 90:
        batches, modules = (8, 128), [*modules, (144, 112, 64), (336, 28, 8)]
    cases = [
        (*shape, batch, *rest) for shape in SHAPES for batch in batches for rest in product(dtypes, layouts, pools)
    ]
    # The few above have the widest and the narrowest level's vectors; a level takes minutes.
    cases += [(*shape, "float32", "channels_last", "vectors") for shape in ((192, 28, 8), (96, 56, 128))]
    cases += [(*shape, *rest) for shape in modules for rest in product(dtypes, layouts, ("modules", "separable"))]
    newer = ("depthwise", "position_gate", "more")
    cases += [(*shape, *rest) for shape in modules for rest in product(dtypes, layouts, newer)]
    cases += [(1, 1, 1, "float32", "contiguous_format", pool) for pool in (*newer, "loss")]
    check(capability, [*cases, (192, 28, 8, "float16", "channels_last", "gap")], tmp_path)


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """A program far too large for its registers is reported as spilling."""
    code = """
import torch
from btinet_kernels.interaction import triton as passes
passes.channel_block = lambda channels: 256
"""
    global_worker = WORKER.replace("for case in cases:", code + "\nfor case in cases:", 1)
    command = [sys.executable, "-c", global_worker, "90", str(tmp_path), "384,14,128,float32,channels_last,none"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-5000:]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    stacks = []
    for path in tmp_path.glob("*.cubin"):
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        stacks += [int(size) for size in re.findall(r"STACK:(\d+)", usage.stdout)]
    assert max(stacks) > 0
