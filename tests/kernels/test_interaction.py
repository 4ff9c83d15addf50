"""The fused interaction against float64 mathematics: values, gradients, layouts, edges, repeats."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import fused_task_interaction, fused_tim, fused_upa, use_backend
from btinet_kernels.interaction import native, reference
from btinet_kernels.interaction.level_op import level as level_op
from btinet_kernels.interaction.level_op import level_gradient
from btinet_kernels.interaction.passes_op import channel_dot, pack, statistics_backward
from btinet_kernels.interaction.reference import Context
from btinet_kernels.interaction.upa_op import interpolation
from btinet_kernels.nn import TaskInteractionLevel

BACKENDS = ["reference", "native"]
POOLS = ["gap", "softmax"]
SIGNALS = ["proxies", "variance"]
# One tile holds 48 positions and one vector 16 channels: sizes below, at and above both, in 1, 2 and 3 dimensions.
SHAPES = [
    (2, 3, 9),
    (3, 16, 8, 6),
    (2, 17, 9, 11),
    (3, 5, 8, 3, 4),
    (4, 33, 13, 8),
    (2, 6, 1, 1),
    (2, 4, 5, 7),
]


def level(channels: int, pool: str = "gap", signals: str = "proxies", seed: int = 0) -> TaskInteractionLevel:
    torch.manual_seed(seed)
    module = TaskInteractionLevel(channels, 7, pool=pool, signals=signals).double()
    for parameter in module.parameters():  # biases and pooling logits start at zero, where errors could hide
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.uniform_(module.tim.norm.running_var, 0.5, 2)
    torch.nn.init.normal_(module.tim.norm.running_mean)
    return module


def dense(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def run(module: TaskInteractionLevel, seg: Tensor, clf: Tensor, cotangents: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, then gradients of both inputs and every parameter."""
    seg, clf = seg.detach().requires_grad_(), clf.detach().requires_grad_()
    outputs = list(module(seg, clf))
    torch.manual_seed(1)
    cotangents = cotangents or [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [seg, clf, *module.parameters()], cotangents)]


def largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Relative to each tensor's largest magnitude, or to 1 where that is below 1: gradients may vanish exactly."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item()
        for a, b in zip(ours, exact, strict=True)
        if b.numel()
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference(shape: tuple[int, ...], training: bool, channels_last: bool) -> None:
    for pool, signals in itertools.product(POOLS, SIGNALS):
        module = level(shape[1], pool, signals).train(training)
        seg, clf = dense(shape, channels_last), torch.randn(shape[0], 7, dtype=torch.float64)
        with use_backend("reference"):
            exact = run(module, seg, clf)
        with use_backend("native"):
            ours = run(module, seg, clf)
        assert largest_error(ours, exact) < 1e-12, (pool, signals)
        assert ours[0].stride() == seg.stride()
        assert ours[4].stride() == seg.stride()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("short", ["seg_projection", "clf_projection"])
def test_projections_too_short_to_be_normalised(short: str, training: bool) -> None:
    module = level(6).train(training)
    projection = getattr(module.upa, short).weight
    projection.data *= 1e-8  # squared norms far below the 1e-12 at which they are clipped
    seg, clf = dense((3, 6, 9, 10), True), torch.randn(3, 7, dtype=torch.float64)
    with use_backend("reference"):
        exact = run(module, seg, clf)
    with use_backend("native"):
        ours = run(module, seg, clf)
    assert largest_error(ours, exact) < 1e-12


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("pool", "signals"), list(itertools.product(POOLS, SIGNALS)))
def test_float32_is_as_exact_as_float32_can_be(pool: str, signals: str, channels_last: bool) -> None:
    shape = (4, 48, 40, 40)
    module = level(48, pool, signals).train()
    seg, clf = dense(shape, channels_last, torch.float32), torch.randn(4, 7)
    with use_backend("reference"):
        exact = run(module, seg.double(), clf.double())
    with use_backend("native"):
        ours = run(module.float(), seg, clf)
    # Sums of N terms in float32 err by about sqrt(N) half-ulps; a few such sums follow one another, and the largest
    # (the context's weight gradient) runs over the 6400 positions of the batch: 8 · sqrt(6400) · 2^-24.
    assert largest_error(ours, exact) < 8 * 80 * 2.0**-24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("pool", "signals"), list(itertools.product(POOLS, SIGNALS)))
def test_gradcheck(backend: str, training: bool, pool: str, signals: str) -> None:
    module = level(4, pool, signals).train(training)
    names = [name for name, _ in module.named_parameters()]
    seg = dense((3, 4, 8, 2), channels_last=True).requires_grad_()
    clf = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def function(seg: Tensor, clf: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (seg, clf))

    with use_backend(backend):
        assert gradcheck(function, (seg, clf, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("signals", SIGNALS)
def test_level_is_tim_then_upa(backend: str, signals: str) -> None:
    module = level(6, signals=signals).eval()
    seg, clf = dense((3, 6, 9, 10), True), torch.randn(3, 7, dtype=torch.float64)
    with use_backend(backend):
        fused = module(seg, clf)
        enhanced = module.tim(seg, clf)
        apart = module.upa(seg, enhanced[0], clf, enhanced[1])
    for a, b in zip(fused, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("signals", SIGNALS)
def test_upa_of_unrelated_tensors(backend: str, signals: str) -> None:
    gate = level(5, signals=signals).upa
    base, enhanced = dense((3, 5, 9, 4), True), dense((3, 5, 9, 4), False)  # formats differ
    clf, clf_enhanced = torch.randn(2, 3, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (base, enhanced, clf.clone(), clf_enhanced.clone())]
    names = [name for name, _ in gate.named_parameters()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(gate, dict(zip(names, tensors[4:], strict=True)), tensors[:4])

    with use_backend(backend):
        assert gradcheck(function, (*inputs, *gate.parameters()), fast_mode=True)


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("result", ["seg", "clf", "gates", "proxies"])
def test_a_loss_of_one_result_alone(result: str, signals: str) -> None:
    module = level(6, signals=signals).train()
    seg, clf = dense((3, 6, 9, 10), True).requires_grad_(), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    gradients = []
    for backend in BACKENDS:
        with use_backend(backend):
            loss = getattr(module(seg, clf), result).square().sum()
            gradients.append(torch.autograd.grad(loss, [seg, clf, module.tim.context.weight]))
    assert gradients[1][0].stride() == seg.stride()
    assert largest_error(gradients[1], gradients[0]) < 1e-12


def test_softmax_pooling_with_zero_logits_is_average_pooling() -> None:
    module = level(6, "softmax")
    torch.nn.init.zeros_(module.tim.pool_weight)
    average = level(6, "gap")
    average.load_state_dict({k: v for k, v in module.state_dict().items() if k != "tim.pool_weight"})
    seg, clf = dense((3, 6, 9, 10), True), torch.randn(3, 7, dtype=torch.float64)
    for a, b in zip(module.eval()(seg, clf), average.eval()(seg, clf), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_softmax_pooling_survives_large_logits() -> None:
    module = level(6, "softmax").eval().float()
    module.tim.pool_weight.data.mul_(1e4)
    seg, clf = dense((3, 6, 9, 10), True, torch.float32), torch.randn(3, 7)
    with use_backend("reference"):
        exact = run(module.double(), seg.double(), clf.double())
    ours = run(module.float(), seg, clf)
    assert all(t.isfinite().all() for t in ours)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-5)


def test_ties_have_zero_slope() -> None:
    """Maps of few integers have many equal neighbours, where sign(0) = 0 decides."""
    module = level(4).eval()
    seg = torch.randint(-1, 2, (3, 4, 9, 10)).double()
    clf = torch.randn(3, 7, dtype=torch.float64)
    with use_backend("reference"):
        exact = run(module, seg, clf)
    for channels_last in (False, True):
        x = seg.contiguous(memory_format=torch.channels_last) if channels_last else seg
        assert largest_error(run(module, x, clf), exact) < 1e-12


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
        lambda x: x.flip(0).transpose(1, 3),
    ],
)
def test_strides_are_honoured(view) -> None:  # type: ignore[no-untyped-def]
    seg = view(torch.randn(3, 10, 10, 10, dtype=torch.float64))
    clf = torch.randn(3, 7, dtype=torch.float64)
    module = level(seg.shape[1]).train()
    cotangents = [
        view(torch.randn(3, 10, 10, 10, dtype=torch.float64)),
        torch.ones(1, 1).double().expand(3, 7),
    ]
    cotangents += [torch.randn(3, 2).double(), torch.randn(3, 3).double()]
    with use_backend("reference"):
        exact = run(module, seg, clf, cotangents)
    with use_backend("native"):
        assert largest_error(run(module, seg, clf, cotangents), exact) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_lower_than_eight_have_no_edge_energy(backend: str) -> None:
    module = level(4)
    clf = torch.randn(3, 7, dtype=torch.float64)
    with use_backend(backend):
        assert (module(dense((3, 4, 7, 9), True), clf).proxies[:, 1] == 0).all()
        assert (module(dense((3, 4, 8, 9), True), clf).proxies[:, 1] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", POOLS)
def test_nan_is_not_hidden(backend: str, pool: str) -> None:
    module = level(4, pool).eval()
    seg = dense((2, 4, 9, 9), True)
    seg[0, 1, 3, 3] = torch.nan
    with use_backend(backend):
        result = module(seg, torch.randn(2, 7, dtype=torch.float64))
    for broken, sound in result:
        assert broken.isnan().any()
        assert sound.isfinite().all()


@pytest.mark.parametrize("batch", [0, 1])
def test_tiny_batches(batch: int) -> None:
    module = level(4).eval()
    seg = torch.randn(batch, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    result = module(seg, torch.randn(batch, 7, dtype=torch.float64))
    result.seg.sum().backward()
    assert seg.grad is not None
    assert seg.grad.shape == seg.shape
    assert result.gates.shape == (batch, 2)


def test_one_sample_trains() -> None:
    """Its batch variance is zero: the normalised context is the BatchNorm's bias, nothing is undefined."""
    module = level(4).train()
    assert all(t.isfinite().all() for t in run(module, dense((1, 4, 9, 9), True), torch.randn(1, 7).double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_with_float32_weights(dtype: torch.dtype) -> None:
    module = level(8).eval()
    seg, clf = dense((3, 8, 12, 12), True, dtype), torch.randn(3, 7).to(dtype)
    exact = module(seg.double(), clf.double())
    result = module.float()(seg, clf)
    assert result.seg.dtype == result.clf.dtype == dtype
    assert result.gates.dtype == torch.float32
    # one rounding of the result to half precision
    torch.testing.assert_close(result.seg.double(), exact.seg, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(result.gates.double(), exact.gates, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_mathematics_in_float32() -> None:
    module = level(8).eval().float()
    seg, clf = dense((3, 8, 12, 12), True, torch.float32), torch.randn(3, 7)
    plain = run(module, seg, clf)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(run(module, seg, clf), plain, strict=True):
            assert torch.equal(a, b)


def test_repeats_are_bit_identical() -> None:
    module = level(24, "softmax").float().eval()
    seg, clf = dense((5, 24, 31, 17), True, torch.float32), torch.randn(5, 7)
    first = run(module, seg, clf)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(module, seg, clf), first, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_passes_do_not_depend_on_the_number_of_threads(channels_last: bool) -> None:
    shape = (5, 24, 31, 17)
    seg, grad = dense(shape, channels_last, torch.float32), dense(shape, channels_last, torch.float32)
    context = Context(torch.randn(12, 24), torch.randn(12), torch.randn(12))
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            stats = native.statistics(seg, context, variance=True, edges=True)
            out, weights = native.statistics_backward(seg, grad, stats.mean, context, stats, stats)
            runs.append([*stats, native.channel_dot(grad, seg), out, *weights])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


def test_running_statistics_move_as_in_keras() -> None:
    module = level(6).train()
    norm = module.tim.norm
    before = norm.running_mean.clone(), norm.running_var.clone()
    seg, clf = dense((5, 6, 9, 9), True), torch.randn(5, 7, dtype=torch.float64)
    pooled = torch.relu(
        torch.einsum("jc,bchw->bjhw", module.tim.context.weight, seg) + module.tim.context.bias[:, None, None]
    )
    hidden = torch.relu(module.tim.dense(pooled.mean((2, 3))))
    module(seg, clf)
    torch.testing.assert_close(norm.running_mean, before[0] * 0.99 + 0.01 * hidden.mean(0))
    torch.testing.assert_close(norm.running_var, before[1] * 0.99 + 0.01 * hidden.var(0, unbiased=False))


@pytest.mark.parametrize(
    ("dtype", "training", "softmax", "signals"),
    [
        (torch.float64, True, True, "proxies"),
        (torch.float64, False, False, "variance"),
        (torch.float32, False, True, "none"),
        (torch.bfloat16, True, False, "proxies"),
        (torch.bfloat16, False, True, "variance"),
    ],
)
def test_opcheck(dtype: torch.dtype, training: bool, softmax: bool, signals: str) -> None:
    module = level(6, "softmax" if softmax else "gap", "proxies" if signals == "none" else signals).float()
    gate = None if signals == "none" else module.upa.weights()
    weights = pack(module.tim.weights(), gate)
    seg = dense((3, 6, 9, 4), True, dtype).requires_grad_()
    clf = torch.randn(3, 7).to(dtype).requires_grad_()
    options = (signals, 0.7, training, 1e-3)
    opcheck(level_op, (seg, clf, *weights, *options))
    with torch.no_grad():
        outputs = level_op(seg, clf, *weights, *options)
        upstream = [torch.randn_like(out) for out in outputs[:4]]
        opcheck(level_gradient, (*upstream, seg, clf, *outputs[6:], *weights, *options))


@pytest.mark.parametrize("signals", SIGNALS)
def test_opcheck_of_the_other_operators(signals: str) -> None:
    gate = level(6, signals=signals).upa.weights()
    seg = dense((3, 6, 9, 4), True).requires_grad_()
    other = dense((3, 6, 9, 4), False).requires_grad_()
    clf, clf_enhanced = torch.randn(2, 3, 7, dtype=torch.float64)
    opcheck(interpolation, (seg, other, clf, clf_enhanced, *gate, signals))
    with torch.no_grad():
        opcheck(channel_dot, (seg, other))
        vectors, none = torch.randn(3, 6).double(), seg.new_empty(0)
        opcheck(statistics_backward, (seg, other, vectors, vectors, vectors, none, none))


@pytest.mark.slow
def test_compiles_as_one_graph_for_any_batch() -> None:
    module = level(16, "softmax").train().float()

    def loss(seg: Tensor, clf: Tensor) -> Tensor:
        result = module(seg, clf)
        return result.seg.square().sum() + result.clf.pow(3).sum() + result.gates.sum() + result.proxies.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7):
            seg = dense((batch, 16, 9, 10), True, torch.float32).requires_grad_()
            clf = torch.randn(batch, 7, requires_grad=True)
            inputs = [seg, clf, *module.parameters()]
            eager = torch.autograd.grad(loss(seg, clf), inputs)
            for a, b in zip(torch.autograd.grad(compiled(seg, clf), inputs), eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    module = level(6).eval().float()
    inputs = (dense((2, 6, 9, 4), True, torch.float32), torch.randn(2, 7))
    with use_backend(backend):
        program = torch.export.export(module, inputs)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("btinet_kernels" in call for call in calls) == (backend == "native")
    for a, b in zip(program.module()(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_double_backward_is_served_by_the_reference_only() -> None:
    module = level(4).eval()
    seg, clf = dense((2, 4, 8, 3), False).requires_grad_(), torch.randn(2, 7, dtype=torch.float64)

    def twice() -> Tensor:
        first = torch.autograd.grad(module(seg, clf).seg.square().sum(), seg, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), seg)[0]

    with use_backend("native"), pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
        twice()
    with use_backend("reference"):
        assert twice().isfinite().all()


def test_wrong_arguments_are_explained() -> None:
    module = level(4)
    seg, clf = torch.randn(2, 4, 8, 8), torch.randn(2, 7)
    tim, gate = module.tim.weights(), module.upa.weights()
    with pytest.raises(ValueError, match="with the same B"):
        fused_tim(seg, clf[:1], tim)
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        fused_tim(seg[..., 0, 0], clf, tim)
    with pytest.raises(ValueError, match="signals must be"):
        fused_task_interaction(seg, clf, tim, gate, signals="entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit the gate's weights"):
        fused_task_interaction(seg, clf, tim, gate, signals="variance")
    with pytest.raises(ValueError, match="agree in shape"):
        fused_upa(seg, seg[:, :2], clf, clf, gate)


def test_edge_energy_by_hand() -> None:
    seg = torch.tensor([[[[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]]])
    # down: 2 + 1 + 1, right: 1 + 2 + 0 + 0; six positions, one channel
    assert reference.edge_energy(seg).item() == pytest.approx(7 / 6)
