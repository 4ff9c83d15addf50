"""Which implementation serves a call, and why the others do not.

Every operator has a ``reference`` in plain PyTorch that serves any device and dtype. Faster backends serve what they
can; ``auto`` takes the fastest of those. Asking for a backend by name that cannot serve raises ``BackendError``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # before the extension, which then shares its OpenMP thread pool
from torch import Tensor

# Read once: constants of the process, which a compiler can rely on.
native_module: Any = None
_native_failure: str | None = None
try:
    native_module = importlib.import_module("btinet_kernels._cpu")
except ImportError as error:
    _native_failure = f"the compiled part is missing ({error}); install with `pip install .` and a C++17 compiler."

OPERATORS = ("fused_tim", "fused_upa", "fused_task_interaction")
BACKENDS = ("native", "reference")  # fastest first
ENVIRONMENT_VARIABLE = "BTINET_BACKEND"
_environment_request = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"

NATIVE_DTYPES = (torch.float32, torch.float64)

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
    report: dict[str, dict[str, str]] = {}
    for operator in OPERATORS:
        missing = native_missing()
        report[operator] = {
            "native": missing or f"serves CPU tensors of float32 and float64 ({instruction_set()})",
            "reference": "serves every other device and dtype" if missing is None else "serves every device and dtype",
        }
        if request != "auto":
            for backend in BACKENDS:
                if backend != request:
                    report[operator][backend] = f"not used: {request!r} was asked for"
    if verbose:
        print(f"btinet_kernels backends (torch {torch.__version__}, asked for: {request})")
        for operator, lines in report.items():
            print(f"  {operator}")
            for backend, line in lines.items():
                print(f"    {backend:<10} {line}")
    return report


def instruction_set() -> str:
    """The instruction set the native kernels use on this machine: ``avx512``, ``avx2`` or ``portable``."""
    return str(native_module.instruction_set())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by ``name`` (``auto``, ``native``, ``reference``) inside the block, in the whole process.

    ``reference`` runs plain ATen operations: what export, ONNX, double backward and debugging need.

    Raises:
        BackendError: there is no such backend, or it is not available here.
    """
    global _requested
    _check_name(name, "use_backend")
    if name == "native" and (reason := native_missing()):
        raise BackendError(f"use_backend('native'): {reason}")
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


def choose(operator: str, *dense: Tensor) -> str:
    """The backend that serves ``operator`` on these dense tensors.

    Raises:
        BackendError: the backend asked for by name cannot serve them.
    """
    request = requested_backend()
    if request == "reference":
        return "reference"
    reason = native_missing() or native_unsuitable(*dense)
    if request == "native" and reason is not None:
        raise BackendError(f"{operator}: the native backend was asked for, but {reason}")
    chosen = "native" if reason is None else "reference"
    if not torch.compiler.is_compiling() and (operator, chosen) not in _announced:
        _announced.add((operator, chosen))
        _logger.debug("%s is served by %s%s", operator, chosen, f": {reason}" if reason else "")
    return chosen


def native_unsuitable(*dense: Tensor) -> str | None:
    """Why the native kernels cannot take these tensors, or None."""
    for tensor in dense:
        if tensor.device.type != "cpu":
            return f"it serves CPU tensors only (got {tensor.device}); move the tensor or use the reference."
        if tensor.dtype not in NATIVE_DTYPES:
            return f"it serves float32 and float64 only (got {tensor.dtype}); convert the tensor or use the reference."
        if 0 in tensor.shape[1:]:
            return f"it needs at least one channel and one position (got shape {tuple(tensor.shape)})."
    return None


def native_missing() -> str | None:
    """Why the compiled extension cannot be used here, or None."""
    return _native_failure


def _check_name(name: str, origin: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"{origin}: there is no backend {name!r}; choose auto, {' or '.join(BACKENDS)}.")
