"""Gradient balancing: the tasks' gradients are combined, not their losses. TorchJD has the methods.

Source: Quinton and Rey, arXiv 2406.16232 (TorchJD and UPGrad); its documentation names the papers of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from btinet.errors import UserError

AGGREGATORS = {
    "upgrad": "UPGrad",
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "aligned_mtl": "AlignedMTL",
    "imtl_g": "IMTLG",
    "dualproj": "DualProj",
}


class GradientBalancer:
    """Gives parameters that several tasks share the aggregate of the tasks' gradients.

    As in multi-task learning everywhere, parameters that one task alone uses get the gradient of that task.

    Args:
        method: one of ``AGGREGATORS``.
        parameters: those that are trained.

    Raises:
        UserError: TorchJD is not installed, or not with what the method needs.
    """

    def __init__(self, method: str, parameters: Sequence[nn.Parameter]) -> None:
        try:
            from torchjd import aggregation

            self._aggregate = getattr(aggregation, AGGREGATORS[method])()
        except ImportError as error:
            raise UserError(
                f"--weighting {method}: needs TorchJD; pip install 'btinet-kernels[torchjd]' ({error})."
            ) from error
        self._parameters = list(parameters)
        self._gradients: list[list[Tensor | None]] = []  # of each task, summed over the batches of a step

    def add(self, losses: Sequence[Tensor], scale: float) -> None:
        """Take in the gradients of the losses of a batch, one for each task, times ``scale``."""
        for task, loss in enumerate(losses):
            last = task + 1 == len(losses)
            found = torch.autograd.grad(loss * scale, self._parameters, retain_graph=not last, allow_unused=True)
            if task == len(self._gradients):
                self._gradients.append(list(found))
            else:
                self._gradients[task] = [_sum(a, b) for a, b in zip(self._gradients[task], found, strict=True)]

    def finish(self) -> None:
        """Set the gradients of the parameters for the step."""
        shared: list[tuple[nn.Parameter, list[Tensor]]] = []
        for parameter, *of_tasks in zip(self._parameters, *self._gradients, strict=True):
            found = [gradient for gradient in of_tasks if gradient is not None]
            if len(found) > 1:
                shared.append((parameter, [torch.zeros_like(found[0]) if g is None else g for g in of_tasks]))
            else:
                parameter.grad = _like(parameter, found[0]) if found else None
        if shared:
            rows = [
                torch.cat([gradient.flatten() for gradient in row]) for row in zip(*(g for _, g in shared), strict=True)
            ]
            pieces = self._aggregate(torch.stack(rows)).split([parameter.numel() for parameter, _ in shared])
            for (parameter, _), piece in zip(shared, pieces, strict=True):
                parameter.grad = _like(parameter, piece.view(parameter.shape))
        self._gradients = []


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _like(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """In the strides of the parameter, as the fused Adam wants it."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
