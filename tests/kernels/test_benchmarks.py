"""The benchmarks' own parts: the baseline computes the same, the gate closes, the limit is the one of the study."""

import pytest
import torch
from cases import BOTH, FORWARD, Workload, cpu_workloads, gpu_workloads
from eager_modules import eager_twin
from machine_limit import Machine, passes
from timing import Summary, interleaved, order_of_round
from variants import GateError, Problem, Variant, compare, named_results

from btinet_kernels import use_backend
from btinet_kernels.nn import TaskInteractionLevel


@pytest.mark.parametrize("training", [True, False])
def test_eager_modules_equal_the_operator_in_float64(training: bool) -> None:
    torch.manual_seed(0)
    level = TaskInteractionLevel(10, 7).double().train(training)
    for parameter in level.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    seg = torch.randn(3, 10, 9, 8, dtype=torch.float64, requires_grad=True)
    clf = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    upstream = [torch.randn_like(seg), torch.randn_like(clf)]
    twin = eager_twin(level)
    results = []
    for module in (level, twin):
        with use_backend("reference"):
            outputs = module(seg, clf)[:2]
        results.append([*outputs, *torch.autograd.grad(outputs, [seg, clf, *module.parameters()], upstream)])
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in level.named_parameters()]
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(eager.reshape(ours.shape), ours, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(Workload(8, 12, 3), "cpu")


@pytest.mark.parametrize("name", ["seg", "clf", "d seg", "d clf", "tim.context.weight", "upa.hidden.weight"])
def test_the_gate_sees_a_perturbed_result(problem: Problem, name: str) -> None:
    variant = problem.variants[0]
    results = named_results(variant, problem.inputs[0], BOTH, inference=False)
    compare(variant, results, problem.truth.results, problem.workload, "cpu")
    wrong = dict(results)
    wrong[name] = wrong[name] * (1 + 1e-3)
    with pytest.raises(GateError, match=name):
        compare(variant, wrong, problem.truth.results, problem.workload, "cpu")
    wrong[name] = torch.full_like(wrong[name], torch.nan)
    with pytest.raises(GateError, match="nan"):
        compare(variant, wrong, problem.truth.results, problem.workload, "cpu")


def test_nothing_is_sampled_behind_a_red_gate(problem: Problem) -> None:
    good = problem.variants[0]
    bad = Variant("bad", lambda seg, clf: (good.call(seg, clf)[0] * 1.01, clf), good.module, good.backend)
    broken = Problem(problem.workload, "cpu")
    broken.variants = [bad]
    with pytest.raises(GateError, match="bad"):
        broken.samples(FORWARD)


def test_a_baseline_that_does_not_run_costs_its_own_column_only(problem: Problem) -> None:
    def fails(seg: torch.Tensor, clf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no compiler")

    broken = Problem(problem.workload, "cpu")
    broken.variants = [broken.variants[0], Variant("compile", fails, broken.level)]
    assert list(broken.samples(FORWARD)) == [broken.variants[0].name]
    assert broken.unavailable["compile"] == "RuntimeError: no compiler"


def test_rounds_visit_everyone_in_changing_order() -> None:
    orders = [tuple(order_of_round(["a", "b", "c"], turn)) for turn in range(6)]
    assert len(set(orders)) == 6
    calls: list[str] = []

    def sample(name: str) -> float:
        calls.append(name)
        return 2.0

    summaries = interleaved({name: lambda name=name: sample(name) for name in "ab"}, min_rounds=20)
    assert summaries["a"] == Summary(2.0, 2.0, 2.0, 2.0, summaries["b"].rounds)
    assert summaries["a"].rounds >= 20
    after_warm_up = calls[6:]
    assert all(set(after_warm_up[i : i + 2]) == {"a", "b"} for i in range(0, len(after_warm_up), 2))


def test_the_limit_of_four_levels_on_an_h200_is_the_studys() -> None:
    """Bytes alone, 4.3 TB/s: 406 and 677 µs at B=128 in float32."""
    levels = [w for w in gpu_workloads(quick=True, full=False) if w.batch == 128]
    bandwidths = {w.dense_bytes: 4.3e12 for w in levels}
    fast = Machine("cuda", bandwidths, {"product_tf32": 1e18, "product_float32": 1e18})
    forward = sum(fast.limit(w, FORWARD).ms for w in levels)
    both = sum(fast.limit(w, BOTH).ms for w in levels)
    assert forward * 1e3 == pytest.approx(406, rel=0.01)
    assert (both - forward) * 1e3 == pytest.approx(677, rel=0.01)


def test_the_products_are_counted() -> None:
    workload = Workload(48, 112)
    product = 2.0 * 8 * 112 * 112 * 48 * 24
    assert passes(workload, FORWARD)[0].product_flops == product
    assert passes(workload, BOTH)[-1].product_flops == 2 * product


def test_every_workload_is_listed_once() -> None:
    for workloads in (cpu_workloads, gpu_workloads):
        listed = workloads(quick=False, full=True)
        assert len(set(listed)) == len(listed)
        assert set(workloads(quick=False, full=False)) <= set(listed)
        assert set(workloads(quick=True, full=False)) <= set(listed)
