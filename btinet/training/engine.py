"""Where and how a training computes: processes, device, precision, determinism, compilation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from btinet.errors import UserError
from btinet.training.options import TrainOptions

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def launch(options: TrainOptions) -> Fabric:
    """Join the processes that torchrun started, or train in this one alone.

    Raises:
        UserError: torchrun started more processes on this machine than it has GPUs.
    """
    elastic = torch.distributed.is_torchelastic_launched()
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if elastic else 1
    processes = int(os.environ["WORLD_SIZE"]) if elastic else 1
    device = device_of(options)
    if device == "cuda" and local > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {local} processes here, but torch finds {torch.cuda.device_count()} GPU(s); start one "
            "process per GPU, or use --device cpu."
        )
    # Buffers differ between processes until the epoch ends: see average_statistics.
    strategy = DDPStrategy(broadcast_buffers=False) if processes > 1 else "auto"
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=processes // local,
        strategy=strategy,
        precision=precision_of(options),
    )
    fabric.launch()
    return fabric


def is_first_process() -> bool:
    """Whether this process prints and writes; known before ``launch``."""
    return not torch.distributed.is_torchelastic_launched() or os.environ["RANK"] == "0"


def device_of(options: TrainOptions) -> Literal["cuda", "cpu"]:
    """``auto`` is the GPU where there is one."""
    return "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"


def precision_of(options: TrainOptions) -> Precision:
    """``auto`` is bf16-mixed on a GPU that has it; raises ``UserError`` for one that the device lacks."""
    cuda = device_of(options) == "cuda"
    if options.precision == "16-mixed" and not cuda:
        raise UserError("--precision 16-mixed: needs a GPU; use bf16-mixed or 32-true on the CPU.")
    if options.precision == "auto":
        return "bf16-mixed" if cuda and torch.cuda.is_bf16_supported() else "32-true"
    return options.precision


def memory_format_of(options: TrainOptions) -> torch.memory_format:
    """As torch names it."""
    return torch.channels_last if options.memory_format == "channels_last" else torch.contiguous_format


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Within, torch refuses operations whose result may differ from run to run.

    Raises:
        UserError: the network needs one that has no other implementation.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if "deterministic" not in message:
            raise
        raise UserError(f"--deterministic: {message} Train without it, or on another device.") from error
    finally:
        torch.use_deterministic_algorithms(before)


def wrap(fabric: Fabric, network: nn.Module, compiled: bool) -> _FabricModule:
    """The network with its precision and its processes, for the parameters that want gradients now."""
    return fabric.setup_module(torch.compile(network) if compiled else network)  # type: ignore[arg-type]


def reduced(fabric: Fabric, tensor: Tensor, operation: Literal["sum", "mean"]) -> Tensor:
    """The sum or mean of a tensor over the processes, on the device; may change ``tensor``."""
    return cast("Tensor", fabric.all_reduce(tensor, reduce_op=operation))
