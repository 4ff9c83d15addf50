"""The network: size and strides of the official one, any backbone and image size, checkpoints."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from btinet import UserError, create_model, list_models
from btinet.data import default_preprocessing
from btinet.models import BTINet, load_checkpoint, save_checkpoint
from btinet.models.network import UpsampleTwice, class_numbers
from btinet_kernels import restore, use_backend

# Variables per part of the official network as Keras counts them, BatchNorm statistics included (Keras 3.15,
# EfficientNetB4, 224×224×3, 3 classes); the encoder without the 7 numbers of Keras's input normalisation.
OFFICIAL_TOTAL = 57_557_640
OFFICIAL_PARTS = {
    "encoder": 17_673_816,
    "refine.4": 20_179_030,
    "refine.3": 5_818_242,
    "refine.2": 726_051,
    "refine.1": 242_130,
    "refine.0": 138_423,
    "levels.d1.upsample": 6_193_536,
    "levels.d2.upsample": 663_744,
    "levels.d3.upsample": 165_984,
    "levels.d4.upsample": 41_520,
    "levels.d1.skip_gate": 336_193,
    "levels.d1.block": 1_819_779,
    "levels.d2.skip_gate": 71_329,
    "levels.d2.block": 406_323,
    "levels.d3.skip_gate": 19_537,
    "levels.d3.block": 110_067,
    "levels.d4.skip_gate": 6_313,
    "levels.d4.block": 34_443,
    "levels.d1.clf_features": 459_008,
    "levels.d2.clf_features": 246_016,
    "levels.d3.clf_features": 86_272,
    "levels.d4.clf_features": 49_408,
    "levels.d1.interaction.tim": 436_672,
    "levels.d2.interaction.tim": 196_576,
    "levels.d3.interaction.tim": 118_000,
    "levels.d4.interaction.tim": 89_080,
    "levels.d1.interaction.upa": 41_154,
    "levels.d2.interaction.upa": 28_866,
    "levels.d3.interaction.upa": 22_722,
    "levels.d4.interaction.upa": 19_650,
    "clf_head": 1_102_080 + 1_024 + 771,
    "seg_head": 10_392 + 3_472 + 17,
}


def keras_count(module: nn.Module) -> int:
    state = module.state_dict()
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith("num_batches_tracked"))


@pytest.fixture(scope="module")
def official() -> BTINet:
    return create_model("btinet_efficientnet_b4", num_classes=3)


@pytest.fixture(scope="module")
def small() -> BTINet:
    return create_model("btinet_mobilenetv3_small_050", num_classes=3).eval()


def test_size_of_every_part_is_official(official: BTINet) -> None:
    assert {name: keras_count(official.get_submodule(name)) for name in OFFICIAL_PARTS} == OFFICIAL_PARTS
    assert keras_count(official) == sum(OFFICIAL_PARTS.values()) == OFFICIAL_TOTAL
    assert sum(p.numel() for p in official.gate_parameters()) == 112_392


def test_taps_are_official(official: BTINet) -> None:
    with torch.inference_mode():
        taps = official.encoder.eval()(torch.randn(1, 3, 64, 64))
    assert [tuple(t.shape[1:]) for t in taps] == [(144, 32, 32), (192, 16, 16), (336, 8, 8), (960, 4, 4), (1792, 2, 2)]


def test_tapping_does_not_change_the_encoder(official: BTINet) -> None:
    net = timm.create_model("efficientnet_b4", num_classes=0, global_pool="").eval()
    net.load_state_dict(official.encoder.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(official.encoder.eval()(image)[-1], net(image))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (100, 33), (64, 64)])
def test_any_size_from_32_up(small: BTINet, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        output = small(torch.randn(2, 3, *size))
    assert output.seg_logits.shape == (2, 1, *size)
    assert output.cls_logits.shape == (2, 3)
    assert {name: tuple(g.shape) for name, g in output.gates.items()} == dict.fromkeys(("d1", "d2", "d3", "d4"), (2, 2))
    assert {tuple(p.shape) for p in output.proxies.values()} == {(2, 3)}


def test_smaller_images_are_refused(small: BTINet) -> None:
    with pytest.raises(ValueError, match="at least 32×32"):
        small(torch.randn(1, 3, 31, 64))


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "regnetx_002", "efficientnet_b0"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_other_backbones_grey_and_colour(backbone: str, in_chans: int) -> None:
    model = create_model(f"btinet_{backbone}", 2, in_chans=in_chans).train()
    output = model(torch.randn(2, in_chans, 64, 64))
    (output.seg_logits.mean() + output.cls_logits.mean()).backward()
    assert output.seg_logits.shape == (2, 1, 64, 64)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    # Nothing but the last, unused layers of a backbone may be left without a gradient.
    assert all(name.startswith("encoder.") for name in missing)


def test_levels_and_interactions_are_arguments() -> None:
    image = torch.randn(2, 3, 64, 64)
    mixed = create_model("btinet_resnet18", 2, interaction=["none", "fixed", "gated", "gated"])
    assert list(mixed(image).gates) == ["d3", "d4"]
    none = create_model("btinet_resnet18", 2, interaction="none")
    assert none(image).gates == {}
    assert none.gate_parameters() == []
    two = create_model("btinet_resnet18", 2, decoder_channels=[64, 32])
    assert list(two.levels) == ["d1", "d2"]
    assert two(image).seg_logits.shape == (2, 1, 64, 64)
    older = create_model("btinet_resnet18", 2, signals="variance", pool="softmax")
    assert older(image).proxies["d1"].shape == (2, 2)


def test_interaction_connects_the_tasks() -> None:
    """With interaction the classification depends on decoder weights and the mask on vector weights; without, not."""
    image = torch.randn(2, 3, 64, 64)
    for interaction, connected in (("gated", True), ("fixed", True), ("none", False)):
        model = create_model("btinet_resnet18", 2, interaction=interaction).eval()
        decoder, vector = model.levels["d2"].block.conv1.pointwise.weight, model.levels["d2"].clf_features.weight
        (to_class,) = torch.autograd.grad(model(image).cls_logits.sum(), decoder, allow_unused=True)
        (to_mask,) = torch.autograd.grad(model(image).seg_logits.sum(), vector, allow_unused=True)
        assert (to_class is not None and bool(to_class.any())) == connected
        assert (to_mask is not None and bool(to_mask.any())) == connected


def test_upsampling_is_aligned_as_in_tensorflow() -> None:
    """Padding "same" of a transposed convolution: input (i, j) spreads from output (2i, 2j), cut off at the far end."""
    layer = UpsampleTwice(1, 1)
    kernel = torch.arange(1.0, 10.0).reshape(3, 3)
    with torch.no_grad():
        layer.weight.copy_(kernel[None, None])
        layer.bias.zero_()  # type: ignore[union-attr]
        for i, j in ((0, 0), (1, 1)):
            impulse = torch.zeros(1, 1, 2, 2)
            impulse[..., i, j] = 1
            expected = torch.zeros(4, 4)
            expected[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] = kernel[: 4 - 2 * i, : 4 - 2 * j]
            assert torch.equal(layer(impulse)[0, 0], expected)


def test_frozen_norm_stays_in_inference_mode(small: BTINet) -> None:
    model = create_model("btinet_resnet18", 2)
    for parameter in model.encoder.early_parameters():
        parameter.requires_grad_(False)
    model.train()
    training = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert "encoder.net.bn1" not in training
    assert "encoder.net.layer1.0.bn1" not in training
    assert "encoder.net.layer2.0.bn1" in training
    assert "refine.0.norm1" in training


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "names are 'btinet_'"),
        ("btinet_resnet1", {}, "timm knows no backbone 'resnet1'"),
        ("btinet_vit_tiny_patch16_224", {}, "each must be twice"),
        ("btinet_resnet18", {"interaction": "strong"}, "none, fixed, gated"),
        ("btinet_resnet18", {"interaction": ["gated"]}, "or 4 of them"),
        ("btinet_resnet18", {"decoder_channels": [8] * 5}, "1 to 4 positive widths"),
        ("btinet_resnet18", {"in_chans": 4}, "grey .1. or colour .3."),
        ("btinet_resnet18", {"weights": "nowhere.pth"}, "no such file"),
    ],
)
def test_wrong_arguments_are_explained(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, 2, **options)  # type: ignore[arg-type]


def test_imagenet_weights_offline_say_how_to_use_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("btinet.models.encoder.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(UserError, match=r"--weights FILE, or train from scratch with --weights none"):
        create_model("btinet_resnet18", 2, weights="imagenet")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_encoder_weights_from_a_timm_file(tmp_path: Path, backbone: str, suffix: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"weights{suffix}"
    source = timm.create_model(backbone)
    if suffix == ".pth":
        torch.save(source.state_dict(), file)
    else:
        save_file(source.state_dict(), file)
    model = create_model(f"btinet_{backbone}", 2, weights=file)
    first = next(iter(source.parameters()))
    assert torch.equal(next(iter(model.encoder.parameters())), first)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    for name in ("btinet_resnet34", "btinet_mobilenetv3_small_050"):
        with pytest.raises(UserError, match="not timm weights of"):
            create_model(name, 2, weights=file)
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match="not timm weights of"):
        create_model("btinet_resnet18", 2, weights=tmp_path / "noise.pth")


def test_checkpoint_round_trip(small: BTINet, tmp_path: Path) -> None:
    preprocessing = default_preprocessing((64, 48), 3)
    save_checkpoint(tmp_path, small, ("a", "b", "c"), preprocessing)
    image = torch.randn(1, 3, 64, 48)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = load_checkpoint(path)
        assert checkpoint.classes == ("a", "b", "c")
        assert checkpoint.preprocessing == preprocessing
        assert checkpoint.proxy_names == ("alignment", "seg_energy", "clf_energy")
        with torch.inference_mode():
            assert torch.equal(checkpoint.model(image).seg_logits, small(image).seg_logits)
    whole = create_model("btinet_mobilenetv3_small_050", 3, weights=tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), small.state_dict().values(), strict=True))


def test_damaged_and_foreign_checkpoints_are_explained(small: BTINet, tmp_path: Path) -> None:
    def refuse(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(tmp_path)
        assert str(tmp_path) in str(caught.value)

    refuse("expected a run folder with model.safetensors and config.json")
    save_checkpoint(tmp_path, small, ("a", "b", "c"), default_preprocessing((64, 64), 3))
    config = (tmp_path / "config.json").read_text()
    weights = (tmp_path / "model.safetensors").read_bytes()

    (tmp_path / "config.json").write_text(config.replace("mobilenetv3_small_050", "resnet18"))
    refuse("holds the weights of another model than btinet_resnet18")
    (tmp_path / "config.json").write_text(config[:100])
    refuse("not readable as JSON")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"classes": ["a"]}))
    refuse("1 class names for a model of 3 classes")
    (tmp_path / "config.json").write_text(json.dumps({"format": "other"}))
    refuse("not the configuration of a btinet checkpoint")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    refuse("not a readable safetensors file")
    (tmp_path / "model.safetensors").unlink()
    refuse("no such file")


def test_list_models() -> None:
    names = list_models("*resnet*")
    assert "btinet_resnet18" in names
    assert "btinet_efficientnet_b4" in list_models("btinet_efficientnet_b?")
    assert "btinet_vit_base_patch16_224" not in list_models("vit*")


def test_new_networks_repeat_with_the_seed() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_model("btinet_mobilenetv3_small_050", 2).state_dict())
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(states[0].values(), states[1].values()))


def test_the_encoder_is_accelerated_and_its_reference_is_timms() -> None:
    torch.manual_seed(0)
    encoder = create_model("btinet_efficientnet_b0", 3).encoder.double().train()
    for part in encoder.modules():
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
    plain = restore(copy.deepcopy(encoder))
    assert type(plain.bn1) is timm.layers.BatchNormAct2d is not type(encoder.bn1)
    assert list(plain.state_dict()) == list(encoder.state_dict())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def results(model: nn.Module) -> list[torch.Tensor]:
        maps = model(image)
        gradients = torch.autograd.grad(sum(m.square().mean() for m in maps), list(model.parameters()))
        return [*maps, *gradients, *(b.clone() for b in model.buffers())]

    expected = results(plain)
    accelerated = copy.deepcopy(encoder)
    with use_backend("native"):
        for a, b in zip(results(accelerated), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    with use_backend("reference"):
        assert all(torch.equal(a, b) for a, b in zip(results(encoder), expected, strict=True))


def test_pixels_belong_to_the_largest_positive_logit() -> None:
    logits = torch.tensor([[[[3.0, -1.0, 0.0, 1.0]], [[2.0, -2.0, 0.0, 5.0]]]])
    assert class_numbers(logits).tolist() == [[[1, 0, 0, 2]]]
    assert class_numbers(logits, threshold=4.0).tolist() == [[[0, 0, 0, 2]]]
    assert class_numbers(logits).dtype == torch.uint8
