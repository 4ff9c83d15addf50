"""Which implementation serves a call, and why the others do not.

Every operator has a ``reference`` in plain PyTorch that serves any device and dtype. Faster backends serve what they
can; ``auto`` takes the fastest of those. Asking for a backend by name that cannot serve raises ``BackendError``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch  # before the extensions, which then share its OpenMP thread pool
from torch import Tensor

BACKENDS = ("native", "triton", "cuda", "reference")
# Every public operator and the backends that have kernels for it; the reference has them all.
OPERATORS: dict[str, tuple[str, ...]] = {
    "fused_tim": ("native", "triton", "cuda"),
    "fused_upa": ("native", "triton", "cuda"),
    "fused_task_interaction": ("native", "triton", "cuda"),
    "fused_multi_scale": ("native", "triton"),
    "fused_separable_conv": ("native", "triton"),
    "fused_dual_path_attention": ("native", "triton"),
    "fused_squeeze_excite": ("native", "triton", "cuda"),
    "fused_segmentation_loss": ("native", "triton"),
    "fused_upsample_twice": ("native",),
    "fused_joint_projection": ("native",),
    "fused_position_gate": ("native", "triton"),
    "fused_batch_norm_act": ("native", "triton"),
    "fused_depthwise_conv": ("native", "triton"),
    "fused_dropout": ("native", "triton"),
}
ENVIRONMENT_VARIABLE = "BTINET_BACKEND"

# Read once: constants of the process, which a compiler can rely on.
_environment_request = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_triton_interprets = os.environ.get("TRITON_INTERPRET") == "1"
_missing: dict[str, str] = {}  # backend → why it cannot be used in this process


def _extension(backend: str, name: str, advice: str) -> Any:
    try:
        return importlib.import_module(f"btinet_kernels.{name}")
    except ImportError as error:
        _missing[backend] = f"the compiled part is missing ({error}); {advice}"
        return None


native_module = _extension("native", "_cpu", "install with `pip install .` and a C++17 compiler.")
cuda_module = _extension("cuda", "_cuda", "it is built by `pip install .` where nvcc is found.")
if importlib.util.find_spec("triton") is None:
    _missing["triton"] = "the package triton is not installed; `pip install triton`."

_SERVES = {
    "native": ("cpu", (torch.float32, torch.float64, torch.bfloat16)),
    "triton": ("cpu" if _triton_interprets else "cuda", (torch.float32, torch.float16, torch.bfloat16)),
    "cuda": ("cuda", (torch.float32, torch.float16, torch.bfloat16)),
}
# Operators whose Triton kernels know two spatial dimensions only.
_PLANAR_IN_TRITON = ("fused_multi_scale", "fused_separable_conv")
# What `auto` takes, by device: the fastest in benchmarks/results. The reference takes the rest.
_AUTOMATIC = {"cpu": "native", "cuda": "triton"}

_logger = logging.getLogger("btinet_kernels")
_requested: str | None = None  # set by use_backend, for the whole process
_announced: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this call; the message says why and what to do."""


def backends(*, verbose: bool = True) -> dict[str, dict[str, str]]:
    """Report, for every operator, each backend and what keeps it from serving here.

    Returns a dictionary ``operator → backend → "serves …" or the reason it does not`` and prints it as a table unless
    ``verbose`` is False.
    """
    request = requested_backend()
    report = {
        operator: {
            backend: _describe(backend, operator)
            if _request_for(operator) in ("auto", backend)
            else f"not used: {request!r} was asked for"
            for backend in BACKENDS
        }
        for operator in OPERATORS
    }
    if verbose:
        print(f"btinet_kernels backends (torch {torch.__version__}, asked for: {request})")
        for operator, lines in report.items():
            print(f"  {operator}")
            for backend, line in lines.items():
                print(f"    {backend:<10} {line}")
    return report


def _describe(backend: str, operator: str) -> str:
    if backend == "reference":
        return "serves every device and dtype that no other backend takes"
    if backend not in OPERATORS[operator]:
        return f"it has no kernels for {operator}."
    if backend in _missing:
        return _missing[backend]
    device, dtypes = _SERVES[backend]
    automatic = _AUTOMATIC.get(device) == backend
    notes = [] if automatic else ["when asked for"]
    if backend == "native":
        notes.append(instruction_set())
    if backend == "triton" and _triton_interprets:
        notes.append("interpreted")
    if device == "cuda" and not torch.cuda.is_available():
        notes.append("there is no such device here")
    names = _listed([_name(dtype) for dtype in dtypes])
    return f"serves {device.upper()} tensors of {names}" + (f" ({', '.join(notes)})" if notes else "")


def instruction_set() -> str:
    """The instruction set the native kernels use on this machine: ``avx512``, ``avx2`` or ``portable``."""
    return str(native_module.instruction_set())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by ``name`` (``auto`` or one of ``BACKENDS``) inside the block, in the whole process.

    Operators that the backend has no kernels for are served as by ``auto``. ``reference`` runs plain ATen operations:
    what export, ONNX, double backward and debugging need.

    Raises:
        BackendError: there is no such backend, or it is not available here.
    """
    global _requested
    _check_name(name, "use_backend")
    if name in _missing:
        raise BackendError(f"use_backend({name!r}): {_missing[name]}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def requested_backend() -> str:
    """``use_backend``'s choice, else ``BTINET_BACKEND``, else ``auto``."""
    if _requested is not None:
        return _requested
    _check_name(_environment_request, ENVIRONMENT_VARIABLE)
    return _environment_request


def _request_for(operator: str) -> str:
    """What was asked for, as far as it concerns this operator."""
    request = requested_backend()
    return request if request in ("auto", "reference", *OPERATORS[operator]) else "auto"


def choose(operator: str, *dense: Tensor) -> str:
    """The backend that serves ``operator`` on these dense tensors.

    Raises:
        BackendError: the backend asked for by name cannot serve them.
    """
    chosen, reason = serving(*dense, operator=operator)
    request = _request_for(operator)
    if reason is not None and request != "auto":
        raise BackendError(f"{operator}: the {request} backend was asked for, but {reason}")
    if not torch.compiler.is_compiling() and (operator, chosen) not in _announced:
        _announced.add((operator, chosen))
        _logger.debug("%s is served by %s%s", operator, chosen, f": {reason}" if reason else "")
    return chosen


def serving(*dense: Tensor, operator: str = "fused_task_interaction") -> tuple[str, str | None]:
    """The backend for these dense tensors, and, where that is the reference for want of a better one, the reason."""
    request = _request_for(operator)
    if request == "reference":
        return "reference", None
    backend = _AUTOMATIC.get(dense[0].device.type, "native") if request == "auto" else request
    reason = unsuitable(backend, *dense, operator=operator)
    return ("reference", reason) if reason else (backend, None)


def kernels_for(x: Tensor, operator: str) -> str:
    """``native`` or ``triton``; also in the backward of what kernels served before the reference was asked for."""
    backend = serving(x, operator=operator)[0]
    if backend == "reference":
        return "native" if x.device.type == "cpu" else "triton"
    return backend


def unsuitable(backend: str, *dense: Tensor, operator: str = "fused_task_interaction") -> str | None:
    """Why ``backend`` cannot take these tensors here, or None."""
    if backend not in OPERATORS[operator]:
        return f"it has no kernels for {operator}."
    if backend in _missing:
        return _missing[backend]
    device, dtypes = _SERVES[backend]
    for tensor in dense:
        if tensor.device.type != device:
            return f"it serves {device.upper()} tensors only (got {tensor.device}); move them or use the reference."
        if tensor.dtype not in dtypes:
            names = _listed([_name(dtype) for dtype in dtypes])
            return f"it serves {names} only (got {_name(tensor.dtype)}); convert the tensor or use the reference."
        if 0 in tensor.shape[1:]:
            return f"it needs at least one channel and one position (got shape {tuple(tensor.shape)})."
        if backend == "triton" and operator in _PLANAR_IN_TRITON and tensor.ndim != 4:
            return f"it serves [B, C, height, width] only (got shape {tuple(tensor.shape)}); use the reference."
    return None


def _check_name(name: str, origin: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"{origin}: there is no backend {name!r}; choose auto, {_listed(BACKENDS, 'or')}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Sequence[str], last: str = "and") -> str:
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
