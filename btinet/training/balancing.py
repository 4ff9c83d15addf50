"""Gradient balancing: the tasks' gradients are combined, not their losses. TorchJD has the methods.

Source: Quinton and Rey, arXiv 2406.16232 (TorchJD and UPGrad); its documentation names the papers of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
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
REGULARISATION = 1e-4  # of the gradients' inner products over their trace, as in TorchJD: parallel gradients are one
PROJECTING = ("upgrad", "dualproj")  # those that project onto the gradients' dual cone


def aggregator(method: str) -> Any:
    """TorchJD's aggregator of a method in ``AGGREGATORS``.

    Raises:
        ImportError: TorchJD is not installed.
    """
    from torchjd import aggregation
    from torchjd.linalg import DualConeProjector

    class Projector(DualConeProjector):
        """TorchJD's own needs quadprog, which is under the GPL."""

        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            weights = project_onto_dual_cone(U.detach().double().cpu().numpy(), G.detach().double().cpu().numpy())
            return torch.as_tensor(weights, dtype=G.dtype, device=G.device)

    options = {"projector": Projector()} if method in PROJECTING else {}
    return getattr(aggregation, AGGREGATORS[method])(**options)


def project_onto_dual_cone(weights: np.ndarray, gramian: np.ndarray) -> np.ndarray:
    """Weights v of the vector that conflicts with no gradient and lies nearest to the sum weighted by u.

    Args:
        weights: u, ``[..., m]``.
        gramian: the gradients' inner products ``[m, m]``.

    Returns:
        v, of the shape of ``weights``.

    Source: arXiv 2406.16232, proposition 1: v ≥ u minimises vᵀ G v. With v = u + z that is least squares in z ≥ 0.
    """
    size = np.trace(gramian)
    if not 0 < size < np.inf:
        return weights
    root = np.linalg.cholesky(gramian / size + REGULARISATION * np.eye(len(gramian))).T
    return np.apply_along_axis(lambda u: u + nnls(root, -root @ u)[0], -1, weights)


class GradientBalancer:
    """Gives parameters that several tasks share the aggregate of the tasks' gradients.

    As in multi-task learning everywhere, parameters that one task alone uses get the gradient of that task.

    Args:
        method: one of ``AGGREGATORS``.
        parameters: those that are trained.

    Raises:
        UserError: TorchJD is not installed.
    """

    def __init__(self, method: str, parameters: Sequence[nn.Parameter]) -> None:
        try:
            self._aggregate = aggregator(method)
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
