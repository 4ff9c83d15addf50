"""How fast training images come, decoded once or every time, beside how fast a training step takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from network import SIZE, TRAINING, NetworkCase, NetworkProblem
from PIL import Image
from timing import Sample as TimedSample
from timing import cpu_sample
from torch.utils.data import DataLoader

from btinet.data import Augmentation, EpochBatches, Sample, SegmentationDataset, default_preprocessing
from btinet.models.network import BTINetConfig

HEIGHT, WIDTH = 500, 600  # as BUSI's images
IMAGES, BATCH = 256, 8
WORKERS = (0, 2)
MODELS = ("btinet_efficientnet_b4", "btinet_resnet18")
LOADING = f"training images, {WIDTH}x{HEIGHT} PNG → {SIZE}x{SIZE}, augmented, B={BATCH}"


def write_images(folder: Path) -> list[Sample]:
    """Write speckled discs as RGB PNG files, each with its mask as a grey one."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    samples = []
    for number in range(IMAGES):
        centre, radius = random.integers(150, 350, 2), random.integers(40, 120)
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        speckle = np.kron(random.normal(90, 25, (HEIGHT // 4, WIDTH // 4)), np.ones((4, 4)))
        pixels = (speckle + random.normal(0, 4, (HEIGHT, WIDTH)) - 60 * disc).clip(0, 255).astype(np.uint8)
        image, mask = folder / f"{number}.png", folder / f"{number}_mask.png"
        Image.fromarray(pixels).convert("RGB").save(image)
        Image.fromarray(disc.astype(np.uint8) * 255).save(mask)
        samples.append(Sample(str(number), image, (mask,), number % 3))
    return samples


def epochs(samples: list[Sample]) -> dict[str, Callable[[], int]]:
    """What goes through one epoch of ``btinet train``'s images, per place they come from and number of workers."""
    preprocessing = default_preprocessing((SIZE, SIZE), 3)
    runs = {}
    for place, share in (("in memory", 0.5), ("from files", 0.0)):
        dataset = SegmentationDataset(samples, preprocessing, augmentation=Augmentation(), memory_share=share)
        assert dataset.in_memory == (share > 0)
        for workers in WORKERS:
            batches = EpochBatches(len(dataset), BATCH, shuffle=True)
            loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
            runs[f"{place}, {workers} workers"] = lambda loader=loader: sum(len(batch["label"]) for batch in loader)
    return runs


def training_step(model: str) -> TimedSample:
    """What times a step of ``btinet train``, once its loss agrees with eager PyTorch."""
    case = NetworkCase(TRAINING, BATCH, BTINetConfig.dropout, model)
    return NetworkProblem(case, ("eager", "ours")).samples(TRAINING)["ours"]


def epoch_samples(samples: list[Sample]) -> dict[str, TimedSample]:
    """What times each of ``epochs``."""
    return {name: cpu_sample(run) for name, run in epochs(samples).items()}
