"""How tasks are weighted: by hand, by float64 mathematics, and what TorchJD makes of gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from btinet.training.balancing import (
    AGGREGATORS,
    REGULARISATION,
    GradientBalancer,
    aggregator,
    project_onto_dual_cone,
)
from btinet.training.weighting import (
    WEIGHTINGS,
    DynamicAverageWeighting,
    ScheduledWeighting,
    UncertaintyWeighting,
    Weighting,
)

INITIAL = {"seg": 0.8, "clf": 0.2}


def losses(seg: float, clf: float) -> dict[str, Tensor]:
    return {"seg": torch.tensor(seg, requires_grad=True), "clf": torch.tensor(clf, requires_grad=True)}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_all_begin_with_the_given_weights(name: str) -> None:
    weighting = WEIGHTINGS[name]({"seg": 0.5, "clf": 0.25})
    if name != "scheduled":  # which moves from the first epoch on
        weighting.begin(0, [])
    of = losses(3.0, 5.0)
    total = weighting(of)
    gradients = torch.autograd.grad(total, list(of.values()))
    assert [g.item() for g in gradients] == pytest.approx([0.5, 0.25], rel=1e-6)


def test_fixed() -> None:
    assert Weighting(INITIAL)(losses(2.0, 10.0)).item() == pytest.approx(3.6)


def test_schedule_moves_weight_for_fifteen_epochs_and_goes_back() -> None:
    weighting = ScheduledWeighting({"seg": 0.82, "clf": 0.18})
    seen = []
    for epoch in range(17):
        weighting.begin(epoch, [])
        seen.append((weighting.weights["seg"], weighting.weights["clf"]))
    assert seen[0] == pytest.approx((0.827, 0.173))
    assert seen[13] == pytest.approx((0.918, 0.082))
    assert seen[14] == pytest.approx((0.92, 0.08))  # both at their ends
    assert seen[15] == seen[16] == (0.82, 0.18)


def test_dynamic_average_is_the_formula() -> None:
    weighting = DynamicAverageWeighting(INITIAL)
    rows = [{"train_seg_loss": s, "train_clf_loss": c} for s, c in ((2.0, 1.0), (1.0, 0.9), (0.9, 0.1))]
    for epoch in (0, 1):
        weighting.begin(epoch, rows[:epoch])
        assert weighting.weights == INITIAL
    for epoch, rates in ((2, (1 / 2, 0.9)), (3, (0.9, 0.1 / 0.9))):
        weighting.begin(epoch, rows[:epoch])
        scaled = np.exp(np.array(rates) / 2)
        wanted = 2 * scaled / scaled.sum() * np.array([0.8, 0.2])
        assert list(weighting.weights.values()) == pytest.approx(wanted.tolist(), rel=1e-12)


def test_dynamic_average_survives_a_task_without_loss() -> None:
    weighting = DynamicAverageWeighting(INITIAL)
    weighting.begin(2, [{"train_seg_loss": 1.0, "train_clf_loss": 0.0}] * 2)
    assert all(math.isfinite(weight) for weight in weighting.weights.values())


def test_uncertainty_is_the_formula_and_learns_the_scale_of_a_loss() -> None:
    weighting = UncertaintyWeighting(INITIAL)
    of = {"seg": torch.tensor(2.0), "clf": torch.tensor(0.1)}
    s = {task: -math.log(weight) for task, weight in INITIAL.items()}
    wanted = sum(math.exp(-s[task]) * of[task].item() + s[task] / 2 for task in s)
    assert weighting(of).item() == pytest.approx(wanted, rel=1e-6)
    optimizer = torch.optim.Adam(weighting.parameters(), 0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weighting(of).backward()
        optimizer.step()
    weighting.begin(1, [])
    # The minimum of exp(−s)·L + s/2 is where exp(−s) = 1/(2L).
    assert weighting.weights == pytest.approx({"seg": 0.25, "clf": 5.0}, rel=1e-3)


def test_what_uncertainty_learned_is_part_of_the_state() -> None:
    learned, restored = UncertaintyWeighting(INITIAL), UncertaintyWeighting(INITIAL)
    with torch.no_grad():
        learned.log_variances["seg"].fill_(3.0)
    restored.load_state_dict(learned.state_dict())
    restored.begin(5, [])
    assert restored.weights["seg"] == pytest.approx(math.exp(-3))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.unused = nn.Linear(2, 2)

    def losses(self, x: Tensor) -> list[Tensor]:
        features = self.shared(x).mean((2, 3))
        return [(head(features) * sign).square().mean() for head, sign in zip(self.heads, (1, -2), strict=True)]


def by_hand(network: TwoHeads, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """The tasks' gradients of the shared parameters ``[2, P]``, and of each head."""
    rows, own = [], []
    for head, loss in zip(network.heads, network.losses(x), strict=True):
        shared = torch.autograd.grad(loss, list(network.shared.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in shared]))
        own.append(list(torch.autograd.grad(loss, list(head.parameters()))))
    return torch.stack(rows), own


@pytest.mark.parametrize("method", AGGREGATORS)
def test_balancer_aggregates_shared_parameters_alone(method: str) -> None:
    pytest.importorskip("torchjd")
    network, x = TwoHeads(), torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    matrix, own = by_hand(network, x)
    balancer = GradientBalancer(method, list(network.parameters()))
    torch.manual_seed(7)  # PCGrad draws an order
    balancer.add(network.losses(x), 1.0)
    balancer.finish()
    torch.manual_seed(7)
    wanted = aggregator(method)(matrix)
    found = torch.cat([p.grad.flatten() for p in network.shared.parameters() if p.grad is not None])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for head, gradients in zip(network.heads, own, strict=True):
        for parameter, gradient in zip(head.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    assert network.unused.weight.grad is None
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in network.parameters())


def test_balancer_sums_the_batches_of_a_step_before_it_aggregates() -> None:
    pytest.importorskip("torchjd")
    network, x = TwoHeads(), torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(4))
    whole = GradientBalancer("upgrad", list(network.parameters()))
    whole.add(network.losses(x), 1.0)
    whole.finish()
    wanted = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    parts = GradientBalancer("upgrad", list(network.parameters()))
    for chosen, share in ((slice(0, 2), 2 / 6), (slice(2, 6), 4 / 6)):
        parts.add(network.losses(x[chosen]), share)
    parts.finish()
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_projection_onto_the_dual_cone_is_optimal(tasks: int, scale: float) -> None:
    """The conditions of Karush, Kuhn and Tucker: v ≥ u, no conflict left, and only what conflicted was changed."""
    random = np.random.default_rng(tasks)
    for _ in range(20):
        gradients = random.normal(size=(tasks, 7)) + random.normal(size=7) * random.choice([-1, 1], size=(tasks, 1))
        gramian, given = scale * gradients @ gradients.T, random.uniform(size=(tasks, tasks))
        found = project_onto_dual_cone(given, gramian)
        products = found @ (gramian / np.trace(gramian) + REGULARISATION * np.eye(tasks))
        assert (found >= given).all()
        assert (products > -1e-12).all()
        assert np.abs((found - given) * products).max() < 1e-12


def test_two_conflicting_gradients_are_made_perpendicular() -> None:
    a, b = np.array([1.0, 0.2]), np.array([-0.8, 0.3])
    gradients = np.stack([a, b])
    projected = project_onto_dual_cone(np.eye(2), gradients @ gradients.T) @ gradients
    exact = np.stack([a - a @ b / (b @ b) * b, b - a @ b / (a @ a) * a])
    np.testing.assert_allclose(projected, exact, atol=3e-4)  # what is added for parallel gradients


def test_gradients_that_are_zero_or_parallel() -> None:
    given = np.array([0.3, 0.7])
    assert (project_onto_dual_cone(given, np.zeros((2, 2))) == given).all()
    assert (project_onto_dual_cone(given, np.ones((2, 2))) == given).all()
    opposite = project_onto_dual_cone(given, np.array([[1.0, -1.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(opposite, [0.7, 0.7], atol=1e-3)  # they cancel each other


def test_upgrad_conflicts_with_no_task() -> None:
    pytest.importorskip("torchjd")
    shared = nn.Parameter(torch.tensor([1.0, 1.0]))
    balancer = GradientBalancer("upgrad", [shared])
    balancer.add([shared @ torch.tensor([1.0, 0.1]), shared @ torch.tensor([-0.9, 0.2])], 1.0)
    balancer.finish()
    assert shared.grad is not None
    assert shared.grad @ torch.tensor([1.0, 0.1]) >= -1e-4
    assert shared.grad @ torch.tensor([-0.9, 0.2]) >= -1e-4
