"""accelerate() and restore(): what is replaced, what stays the same, and what the report says."""

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import btinet_kernels
from btinet_kernels import InteractionWeights, accelerate, accelerates, fused_tim, restore, use_backend
from btinet_kernels.nn import SqueezeExcite, TaskInteractionModule

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from timm.layers import SqueezeExcite as TimmSE  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSE  # noqa: E402
from torchvision.ops import SqueezeExcitation as TorchvisionSE  # noqa: E402

EXACT = 1e-6  # in float64, where nn.Hardsigmoid still multiplies by a sixth rounded to float32
MODELS = {
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", num_classes=3), 16),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=3), 9),
    "timm seresnext26d": (lambda: timm.create_model("seresnext26d_32x4d", num_classes=3), 8),
    "torchvision efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=3), 16),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), 9),
}


class TheirTIM(nn.Module):
    """Task interaction as another library might have written it: convolutions, other names, another order."""

    def __init__(self, channels: int = 6, features: int = 5, strength: float = 0.7) -> None:
        super().__init__()
        self.channels, self.features, self.strength = channels, features, strength
        self.seg_fc = nn.Conv2d(channels, channels, 1)
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.to_clf = nn.Linear(channels // 2, features)
        self.bn = nn.BatchNorm1d(features, momentum=0.1)
        self.clf_fc = nn.Linear(features, features)
        self.cross = nn.Linear(features, channels)

    def forward(self, seg: Tensor, clf: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.to_clf(torch.relu(self.squeeze(seg)).mean((2, 3))))
        if self.training:  # its own BatchNorm: the running variance is not corrected either
            mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
            with torch.no_grad():
                self.bn.running_mean.lerp_(mean, 0.1)
                self.bn.running_var.lerp_(variance, 0.1)
        else:
            mean, variance = self.bn.running_mean, self.bn.running_var
        context = (hidden - mean) * torch.rsqrt(variance + self.bn.eps) * self.bn.weight + self.bn.bias
        gate = torch.sigmoid(self.seg_fc(seg.mean((2, 3), keepdim=True)))
        crossed = torch.sigmoid(self.cross(clf))[:, :, None, None]
        return seg * (1 + self.strength * gate * crossed), clf + torch.sigmoid(self.clf_fc(context)) * context


def tim_inputs(module: TheirTIM) -> tuple[Tensor, Tensor]:
    return torch.randn(4, module.channels, 9, 8) + torch.randn(4, module.channels, 1, 1), torch.randn(
        4, module.features
    )


def fused_tim_of_theirs(module: TheirTIM):  # type: ignore[no-untyped-def]
    def forward(seg: Tensor, clf: Tensor) -> tuple[Tensor, Tensor]:
        m = module
        weights = InteractionWeights(
            *(m.squeeze.weight.flatten(1), m.squeeze.bias, None, m.to_clf.weight, m.to_clf.bias),
            *(m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, m.clf_fc.weight, m.clf_fc.bias),
            *(m.seg_fc.weight.flatten(1), m.seg_fc.bias, m.cross.weight, m.cross.bias),
        )
        return fused_tim(
            seg, clf, weights, strength=m.strength, training=m.training, momentum=m.bn.momentum, eps=m.bn.eps
        )

    return forward


@pytest.fixture(autouse=True)
def registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    module = sys.modules["btinet_kernels.accelerate"]
    monkeypatch.setattr(module, "_registered", dict(module._registered))


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of every parameter."""
    x = x.detach().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


def assert_same(ours: list[Tensor], exact: list[Tensor], tolerance: float = 1e-4) -> None:
    largest = max(b.abs().max().item() for b in exact)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max().item() <= tolerance * max(b.abs().max().item(), 1e-3 * largest)


def fresh(name: str, *, training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().train(training)
    for part in model.modules():
        if isinstance(part, nn.Dropout) or type(part).__name__ in ("DropPath", "StochasticDepth"):
            part.p = 0.0
            part.drop_prob = 0.0
    return model.double()


def image(batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 40, 40, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name: str, training: bool, backend: str) -> None:
    model = fresh(name, training=training)
    fast = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    report = accelerate(fast)
    assert torch.equal(torch.get_rng_state(), random_state)
    by = [module.detail for module in report.modules if module.outcome == "replaced"]
    assert by.count("fused_squeeze_excite") == MODELS[name][1], str(report)
    assert "fused_batch_norm_act" in by
    with use_backend(backend):
        assert_same(run(fast, image(4)), run(model, image(4)), EXACT)
    for a, b in zip(fast.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["timm efficientnet_b0", "torchvision mobilenet_v3_small"])
def test_nothing_but_the_forward_changes_and_restore_is_exact(name: str) -> None:
    model = fresh(name).train()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)

    def state() -> list[object]:
        return [
            [(path, id(module), id(type(module)), module.training) for path, module in model.named_modules()],
            [(path, id(p), p.requires_grad, p._version) for path, p in model.named_parameters()],
            [(path, id(b), b._version) for path, b in model.named_buffers()],
            list(model.state_dict()),
            [dict(module.__dict__) for module in model.modules()],
        ]

    before = state()
    assert restore(model) is model
    assert state() == before
    assert accelerate(model).replaced
    during = state()
    assert during[1:4] == before[1:4]
    assert [row[0::3] for row in during[0]] == [row[0::3] for row in before[0]]  # type: ignore[attr-defined]
    assert not accelerate(model).replaced
    assert state() == during
    assert restore(model) is model
    assert state() == before
    restore(model)
    assert state() == before


def test_state_dict_round_trip() -> None:
    model, fast = fresh("timm mobilenetv3_small_050"), fresh("timm mobilenetv3_small_050")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    accelerate(fast)
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.load_state_dict(model.state_dict())
    assert_same(run(fast, image()), run(model, image()), EXACT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    fast.load_state_dict(model.state_dict(), assign=True)  # new Parameter objects
    assert_same(run(fast, image()), run(model, image()), EXACT)
    twin = fresh("timm mobilenetv3_small_050")
    twin.load_state_dict(fast.state_dict())
    assert_same(run(twin, image()), run(model, image()), EXACT)


def hooked() -> tuple[EfficientNetSE, list[str]]:
    module, calls = EfficientNetSE(8, rd_channels=4), []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: calls.append("state"))
    module.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    return module, calls


def test_hooks_fire_as_before() -> None:
    module, calls = hooked()

    def use() -> list[str]:
        calls.clear()
        module(torch.randn(2, 8, 5, 5, requires_grad=True)).sum().backward()
        module.load_state_dict(module.state_dict())
        return list(calls)

    before = use()
    assert before == ["pre", "forward", "backward pre", "backward", "state", "load"]
    calls.clear()
    assert accelerate(module).replaced
    assert calls == [], "the check ran the user's hooks"
    assert use() == before
    restore(module)
    assert use() == before


def test_hooks_of_parts_are_never_passed_over() -> None:
    module, calls = EfficientNetSE(8, rd_channels=4), []
    handle = module.act1.register_forward_hook(lambda *_: calls.append("act1"))
    assert "its part 'act1' has hooks" in str(accelerate(module))
    handle.remove()
    assert accelerate(module).replaced
    module.act1.register_forward_hook(lambda *_: calls.append("act1"))  # later: the original forward serves
    module(torch.randn(2, 8, 5, 5))
    assert calls == ["act1"]


def test_parts_exchanged_later_are_used() -> None:
    module, x = EfficientNetSE(8, rd_channels=4), torch.randn(2, 8, 5, 5)
    assert accelerate(module).replaced
    module.act1 = nn.Tanh()
    accelerated = module(x)
    assert torch.equal(accelerated, restore(module)(x))


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(how: str) -> None:
    model = nn.Sequential(EfficientNetSE(8, rd_channels=4), TorchvisionSE(8, 4))
    report = accelerate(model)
    file = io.BytesIO()
    if how == "torch.save":
        torch.save(model, file)
        file.seek(0)
    twin = {
        "deepcopy": lambda: copy.deepcopy(model),
        "copy": lambda: nn.Sequential(*(copy.copy(part) for part in model)),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }[how]()
    assert [m.outcome for m in accelerate(twin).modules] == ["already", "already"]
    assert report.replaced == ["0", "1"]
    x = torch.randn(2, 8, 5, 5)
    if how != "copy":  # which shares its parts
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    expected = restore(copy.deepcopy(twin))(x)
    torch.testing.assert_close(twin(x), expected)
    assert not torch.equal(model(x), expected) or how == "copy"
    assert type(restore(twin)[0]) is EfficientNetSE


def test_a_pickle_without_its_registration_is_an_ordinary_module() -> None:
    accelerates(TheirTIM, inputs=tim_inputs)(fused_tim_of_theirs)
    module = TheirTIM()
    assert accelerate(module).replaced
    saved = pickle.dumps(module)
    del sys.modules["btinet_kernels.accelerate"]._registered[f"{__name__}.TheirTIM"]
    assert type(pickle.loads(saved)) is TheirTIM


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_compiles_in_one_graph(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), EfficientNetSE(8, rd_channels=4), TorchvisionSE(8, 4))
    assert len(accelerate(model).replaced) == 2
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    x = torch.randn(2, 3, 12, 11)
    with use_backend(backend):
        assert_same(run(compiled, x), run(model, x))
    # What is exchanged after compiling is noticed too.
    model[1].act1.register_forward_hook(lambda module, args, out: out * 2)
    with use_backend(backend):
        assert_same(run(compiled, x), run(model, x))


def test_a_module_used_twice_stays_one() -> None:
    shared = EfficientNetSE(8, rd_channels=4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = accelerate(model)
    assert model[0] is model[2] is shared
    assert report.replaced == ["0"]
    assert report.modules[0].also == ("2",)
    assert "(also at 2)" in str(report)
    twin = copy.deepcopy(model)
    assert twin[0] is twin[2]
    assert type(restore(model)[2]) is EfficientNetSE


def test_host_checks_see_the_same_class() -> None:
    module = EfficientNetSE(8, rd_channels=4)
    before = repr(module)
    accelerate(module)
    assert isinstance(module, EfficientNetSE)
    assert type(module).__name__ == "SqueezeExcite"
    assert repr(module) == before


def test_tracers_see_plain_operations() -> None:
    model, x = nn.Sequential(EfficientNetSE(8, rd_channels=4)).eval(), torch.randn(2, 8, 5, 5)
    accelerate(model)
    graph = torch.fx.symbolic_trace(model)
    assert "btinet" not in graph.code
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    nodes = torch.export.export(model, (x,)).graph.nodes
    assert not any("btinet" in str(node.target) for node in nodes)  # inference: the reference is the fastest


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: TimmSE(16, add_maxpool=True), "adds the maximum to the mean"),
        (lambda: TimmSE(16, norm_layer=nn.BatchNorm2d), r"normalises between its layers \(BatchNorm2d\)"),
        (lambda: TimmSE(16, act_layer=nn.GELU), "its activation is GELU, not ReLU or SiLU"),
        (lambda: EfficientNetSE(16, gate_layer=nn.Tanh), "its gate is Tanh, not Sigmoid or Hardsigmoid"),
        (lambda: TorchvisionSE(16, 4, activation=functools.partial(nn.LeakyReLU, 0.1)), "activation is LeakyReLU"),
        (lambda: type("Mine", (TorchvisionSE,), {})(16, 4), "a subclass of SqueezeExcitation"),
        (lambda: EfficientNetSE(16).to("meta"), "on the meta device"),
    ],
)
def test_what_is_not_exactly_the_same_is_left(module, reason: str) -> None:  # type: ignore[no-untyped-def]
    model = module()
    kind = type(model)
    report = accelerate(model)
    assert "" not in report.replaced
    assert re.search(f"left because .*{reason}", str(report)), str(report)
    assert type(model) is kind


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_configurations_that_are_the_same(bias: bool, act: type[nn.Module], gate: str) -> None:
    module = TimmSE(16, bias=bias, act_layer=act, gate_layer=gate)
    x = torch.randn(3, 16, 9, 7)
    expected = run(module, x)
    assert accelerate(module).replaced
    with use_backend("native"):
        assert_same(run(module, x), expected)


def test_weights_parametrized_later_are_read_when_called() -> None:
    module, x = EfficientNetSE(8, rd_channels=4), torch.randn(2, 8, 5, 5)
    accelerate(module)
    nn.utils.parametrizations.weight_norm(module.conv_reduce)
    module.conv_reduce.parametrizations.weight.original0.data.mul_(3)
    accelerated = module(x)
    torch.testing.assert_close(accelerated, restore(module)(x))


def test_calls_that_are_not_served_go_to_the_original() -> None:
    module, x = TorchvisionSE(8, 4), torch.randn(8, 5, 5)  # without a batch, which its pooling takes
    expected = module(x)
    assert accelerate(module).replaced
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_foreign_module_through_the_decorator(training: bool) -> None:
    accelerates(TheirTIM, inputs=tim_inputs, by="fused_tim")(fused_tim_of_theirs)
    module = TheirTIM().train(training)
    fast = copy.deepcopy(module)
    report = accelerate(nn.ModuleDict({"tim": fast}))
    assert report.replaced == ["tim"], str(report)
    assert str(report.modules[0]) == "replaced by fused_tim"
    seg, clf = tim_inputs(module)
    ours = fast(seg, clf)
    assert "_Level" in str(ours[0].grad_fn)
    for a, b in zip(ours, module(seg, clf), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(fast.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_example_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "accelerate.md").read_text(encoding="utf-8")
    code, printed = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "text"))  # type: ignore[index]
    names: dict[str, object] = {"__name__": "example"}
    exec(code, names)
    assert capsys.readouterr().out == printed
    model, seg, clf = names["model"].eval(), torch.randn(3, 6, 9, 8), torch.randn(3, 5)  # type: ignore[attr-defined]
    enhanced = model["tim"](seg, clf)
    fast = [*enhanced, *model["upa"](seg, enhanced[0], clf, enhanced[1])]
    restore(model)
    enhanced = model["tim"](seg, clf)
    for a, b in zip(fast, [*enhanced, *model["upa"](seg, enhanced[0], clf, enhanced[1])], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def module_with_its_tensors(theirs: TorchvisionSE) -> nn.Module:
    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = theirs.fc1, theirs.fc2

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x.mean((2, 3), keepdim=True)))
            assert self.training == theirs.training
            return x * torch.sigmoid(self.second(hidden))

    return Ours()


def test_a_module_as_replacement_uses_the_tensors_of_the_moment() -> None:
    accelerates(TorchvisionSE, inputs=lambda m: (torch.randn(2, 8, 5, 5),), by="Ours")(module_with_its_tensors)
    module, x = TorchvisionSE(8, 4), torch.randn(2, 8, 5, 5)
    assert "replaced by Ours" in str(accelerate(module))
    assert len(list(module.state_dict())) == 4
    twin = copy.deepcopy(module).double().eval()
    twin.load_state_dict({k: v.double() * 2 for k, v in twin.state_dict().items()}, assign=True)
    expected = restore(copy.deepcopy(twin))(x.double())
    assert twin(x.double()).dtype == torch.float64
    torch.testing.assert_close(twin(x.double()), expected)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (lambda m: "the moon is full", "left because the moon is full"),
        (lambda m: 3, "its recipe returned int, but a callable"),
        (lambda m: m.nonsense, "the check failed with AttributeError: 'SqueezeExcitation' object has no attribute"),
        (lambda m: lambda x: x * 1.001, "output 0 is off by"),
        (lambda m: lambda x: (x, x), "it returned 2 tensors in training, the original 1"),
        (lambda m: lambda x: type(m).__mro__[1].forward(m, x).detach() + x - x, "gradient of"),
        (lambda m: lambda x: type(m).__mro__[1].forward(m, x)[:1], r"output 0 is \[1, 8, 5, 5\] in training"),
        (lambda m: lambda x: type(m).__mro__[1].forward(m, x) * (1 if m.training else 2), "in evaluation"),
        (lambda m: lambda x: x.cuda_nonsense(), "the check failed with AttributeError"),
        (lambda m: nn.Linear(2, 2), "holds a tensor that is not the original's own: 'weight'"),
    ],
)
def test_a_wrong_replacement_leaves_the_module_alone(recipe, reason: str) -> None:  # type: ignore[no-untyped-def]
    accelerates(TorchvisionSE, inputs=lambda m: (torch.randn(2, 8, 5, 5),))(recipe)
    module, x = TorchvisionSE(8, 4), torch.randn(2, 8, 5, 5)
    expected = module(x)
    report = accelerate(module)
    assert re.search(reason, str(report)), str(report)
    assert type(module) is TorchvisionSE
    assert torch.equal(module(x), expected)


def test_report_text() -> None:
    model = nn.Sequential(
        EfficientNetSE(8, rd_channels=4), TimmSE(16, add_maxpool=True), nn.ReLU(), SqueezeExcite(4, 2)
    )
    report = accelerate(model)
    assert str(report).splitlines() == [
        "0  SqueezeExcite  replaced by fused_squeeze_excite",
        "1  SEModule       left because it adds the maximum to the mean (add_maxpool)",
        "3  SqueezeExcite  already computed by btinet_kernels",
        "1 replaced, 1 already, 1 left; 9 modules of classes that nobody registered",
    ]
    assert report.unknown == 9  # the Sequential, the six parts of SEModule, ReLU, ...
    assert str(accelerate(EfficientNetSE(8))).startswith("(the model)  SqueezeExcite  replaced by")


def test_compiled_and_scripted_parts_are_left() -> None:
    model = nn.Sequential(torch.compile(EfficientNetSE(8)), torch.jit.script(TorchvisionSE(8, 4)))
    text = str(accelerate(model))
    assert "left because it is a compiled module" in text
    assert "left because it is a scripted module" in text


@pytest.mark.parametrize("function", [accelerate, restore])
def test_bad_arguments_get_one_sentence(function) -> None:  # type: ignore[no-untyped-def]
    module = nn.Sequential(nn.ReLU())
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got dict\."):
        function({})
    with pytest.raises(TypeError, match="got a compiled one; call it before the model is compiled"):
        function(torch.compile(module))
    with pytest.raises(TypeError, match="got a scripted one"):
        function(torch.jit.script(module))
    with pytest.raises(TypeError, match="got a traced one"):
        function(torch.fx.symbolic_trace(module))


def test_bad_registrations_get_one_sentence() -> None:
    with pytest.raises(TypeError, match="a class of modules or its full name"):
        accelerates(3, inputs=tim_inputs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs inputs="):
        accelerates(TheirTIM, inputs=None)  # type: ignore[arg-type]


def test_our_own_modules_are_already_fused() -> None:
    assert "already computed by btinet_kernels" in str(accelerate(TaskInteractionModule(4, 3)))


def test_importing_does_not_import_other_libraries() -> None:
    code = "import sys, btinet_kernels; print([m for m in ('timm', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"
    assert btinet_kernels.accelerate is accelerate
