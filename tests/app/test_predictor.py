from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from btinet.data.preprocessing import default_preprocessing
from btinet.errors import UserError
from btinet.models import create_model
from btinet.models.checkpoint import Checkpoint
from btinet.serving.predictor import Predictor, signal_columns


def left_bright(height: int, width: int, columns: int) -> np.ndarray:
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, :columns] = 255
    return image


def test_mask_and_probabilities_at_the_size_of_the_network(brightness_checkpoint: Checkpoint) -> None:
    (prediction,) = Predictor(brightness_checkpoint)([left_bright(32, 32, 12)])
    expected = np.zeros((32, 32), dtype=bool)
    expected[:, :12] = True
    np.testing.assert_array_equal(prediction.mask, expected)
    assert prediction.lesion_probability.dtype == np.float32
    np.testing.assert_allclose(prediction.lesion_probability[expected], 1 / (1 + np.exp(-20)), rtol=1e-5)
    mean = 12 / 32
    bright = 1 / (1 + np.exp(-20 * (mean - 0.25)))
    np.testing.assert_allclose(prediction.class_probabilities, [1 - bright, bright], rtol=1e-5)
    assert prediction.gates["d1"] == pytest.approx((mean, 1 - mean))
    assert prediction.gates["d2"] == pytest.approx((mean / 2, (1 - mean) / 2))
    assert prediction.proxies == {"d1": pytest.approx((mean, mean, mean))}


def test_masks_come_back_at_the_size_of_each_image(brightness_checkpoint: Checkpoint) -> None:
    images = [left_bright(64, 96, 48), left_bright(20, 50, 25), left_bright(301, 17, 17)]
    predictions = Predictor(brightness_checkpoint)(images)
    for image, prediction in zip(images, predictions, strict=True):
        assert prediction.mask.shape == prediction.lesion_probability.shape == image.shape[:2]
        np.testing.assert_array_equal(prediction.mask, image[..., 0] > 0)


def test_logits_are_upsampled_before_the_threshold() -> None:
    class Ramp(nn.Module):
        def forward(self, image: Tensor) -> object:
            logits = torch.full((len(image), 1, 32, 32), -3.0)
            logits[..., 4:] = 1.0
            classes = torch.zeros(len(image), 2)
            return SimpleNamespace(seg_logits=logits, cls_logits=classes, gates={}, proxies={})

    checkpoint = Checkpoint(
        model=Ramp(),  # type: ignore[arg-type]
        classes=("a", "b"),
        preprocessing=default_preprocessing((32, 32), 3),
        proxy_names=(),
        config={},
    )
    (prediction,) = Predictor(checkpoint)([np.zeros((256, 256, 3), dtype=np.uint8)])
    # The logit rises from -3 at x = 27.5 to 1 at x = 35.5, so it crosses 0 at 33.5. An upsampled mask would
    # have its edge at 32, upsampled probabilities at 32.8; with aligned corners the logit crosses 0 at 30.8.
    assert prediction.mask[0].argmax() == 34
    assert prediction.mask[:, 34:].all()
    assert prediction.gates == prediction.proxies == {}
    assert signal_columns(prediction, ()) == {}


def test_predictions_do_not_depend_on_the_batch(brightness_checkpoint: Checkpoint) -> None:
    images = [left_bright(40, 40, n) for n in (3, 20, 37)]
    predictor = Predictor(brightness_checkpoint)
    together = predictor(images)
    for image, prediction in zip(images, together, strict=True):
        (alone,) = predictor([image])
        np.testing.assert_array_equal(alone.lesion_probability, prediction.lesion_probability)
        np.testing.assert_array_equal(alone.class_probabilities, prediction.class_probabilities)
    assert predictor([]) == []


def test_threshold_moves_the_mask(brightness_checkpoint: Checkpoint) -> None:
    image = np.full((32, 32, 3), 130, dtype=np.uint8)  # probability sigmoid(40 * (130/255 - 0.5)) = 0.597
    (default,) = Predictor(brightness_checkpoint)([image])
    (strict,) = Predictor(brightness_checkpoint, threshold=0.6)([image])
    assert default.mask.all()
    assert not strict.mask.any()
    for threshold in (0.0, 1.0, 50.0):
        with pytest.raises(UserError, match="threshold"):
            Predictor(brightness_checkpoint, threshold=threshold)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 1), dtype=np.uint8),
        np.zeros((32, 32, 4), dtype=np.uint8),
        np.zeros((32, 32), dtype=np.uint8),
        np.zeros((32, 32, 3), dtype=np.float32),
        np.zeros((0, 32, 3), dtype=np.uint8),
    ],
)
def test_images_that_do_not_fit_the_network_are_refused(brightness_checkpoint: Checkpoint, image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"Image 1 of the batch.*\[height, width, 3\]"):
        Predictor(brightness_checkpoint)([left_bright(32, 32, 4), image])


def test_output_that_is_not_finite_is_an_error(brightness_checkpoint: Checkpoint) -> None:
    broken = replace(brightness_checkpoint.preprocessing, scale=1e38)
    predictor = Predictor(replace(brightness_checkpoint, preprocessing=broken))
    with pytest.raises(UserError, match="nan or infinite"):
        predictor([left_bright(32, 32, 4)])


def test_bfloat16_changes_little_but_the_time(brightness_checkpoint: Checkpoint) -> None:
    (prediction,) = Predictor(brightness_checkpoint, precision="bfloat16")([left_bright(32, 32, 12)])
    assert prediction.lesion_probability.dtype == np.float32
    assert prediction.class_probabilities.dtype == np.float64
    np.testing.assert_array_equal(prediction.mask, np.broadcast_to(np.arange(32) < 12, (32, 32)))

    torch.manual_seed(0)
    network = create_model("btinet_mobilenetv3_small_050", 3).eval()
    checkpoint = replace(brightness_checkpoint, model=network, preprocessing=default_preprocessing((64, 64), 3))
    images = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(4)]
    for ours, wanted in zip(
        Predictor(checkpoint, precision="bfloat16")(images), Predictor(checkpoint)(images), strict=True
    ):
        np.testing.assert_allclose(ours.class_probabilities, wanted.class_probabilities, atol=0.02)
        np.testing.assert_allclose(ours.lesion_probability, wanted.lesion_probability, atol=0.02)
        assert not np.array_equal(ours.lesion_probability, wanted.lesion_probability)  # it did compute in bfloat16


def test_unusable_devices_are_named(brightness_checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="gpu"):
        Predictor(brightness_checkpoint, device="gpu")
    with pytest.raises(UserError, match="cuda:99"):
        Predictor(brightness_checkpoint, device="cuda:99")
