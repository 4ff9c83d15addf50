"""Samples as tensors: decoded once, augmented reproducibly, put into batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from btinet.data.images import map_in_threads, read_image
from btinet.data.masks import MaskFormat
from btinet.data.preprocessing import Preprocessing, resize_image, resize_mask
from btinet.data.samples import Sample
from btinet.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images and their masks; the defaults are the official code's.

    Attributes:
        horizontal_flip: probability of a left-right flip.
        vertical_flip: probability of an upside-down flip.
        rotation_probability: probability of a rotation.
        rotation_degrees: the angle is uniform within ± this, in degrees; uncovered corners become 0.
        elastic: also deform elastically, half of the time.
        copies: 0: every epoch each image is augmented anew. n > 0: an epoch holds each image once untouched
            and n augmented copies, the same in every epoch (3: the official offline augmentation ×4).

    Raises:
        UserError: a probability outside [0, 1], an angle outside [0, 180], a negative number of copies.
    """

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    rotation_probability: float = 0.7
    rotation_degrees: float = 15.0
    elastic: bool = False
    copies: int = 0

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "vertical_flip", "rotation_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augmentation: {name} is {getattr(self, name)}, expected a probability in [0, 1].")
        if not 0 <= self.rotation_degrees <= 180:
            raise UserError(f"augmentation: rotation_degrees is {self.rotation_degrees}, expected 0 to 180.")
        if self.copies < 0:
            raise UserError(f"augmentation: copies is {self.copies}, expected 0 or more.")


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images with lesion mask and class, all decoded up front, so that a bad file shows at once.

    The resized pixels stay in memory if they take at most ``memory_share`` of what is free; else each access reads
    its files again.

    An item is a dict of ``image`` float32 [C, H, W] (normalised), ``mask`` float32 [classes, H, W] in {0, 1},
    ``has_mask`` bool scalar (False: nobody drew one, ``mask`` is all 0), ``label`` int64 scalar (-1: not labelled) and
    ``index`` int (position in ``samples``). The key is (index,
    epoch), or an index alone for epoch 0. Augmentation depends on (seed, epoch, index) only: not on workers,
    order or the global random state, which stays untouched. With ``copies`` = n the length is (1 + n) ·
    len(samples); items from len(samples) on are the augmented copies.

    Args:
        samples: what to load.
        preprocessing: size, channels and normalisation.
        augmentation: None: none.
        seed: of the augmentation, not negative.
        mask_format: how masks are read.
        memory_share: of the free memory that the pixels may take; 0: none.

    Attributes:
        in_memory: whether the pixels are kept.

    Raises:
        UserError: an image or mask cannot be read.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocessing: Preprocessing,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        mask_format: MaskFormat = MaskFormat(),  # noqa: B008
        memory_share: float = 0.5,
    ) -> None:
        self.samples = tuple(samples)
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self._copies = augmentation.copies if augmentation else 0
        self._transform = _transform(augmentation) if augmentation else None
        self._mask_format = mask_format
        self._numbers = torch.arange(1, len(mask_format.classes) + 1, dtype=torch.uint8).view(-1, 1, 1)
        height, width = preprocessing.image_size
        self.in_memory = len(samples) * (preprocessing.channels + 1) * height * width <= memory_share * free_memory()
        if not self.in_memory:
            check_files(self.samples, preprocessing.channels, mask_format)
            return
        self._images = torch.empty((len(samples), preprocessing.channels, height, width), dtype=torch.uint8)
        self._masks = torch.empty((len(samples), 1, height, width), dtype=torch.uint8)
        for index, (image, mask) in enumerate(map_in_threads(self._load, self.samples)):
            self._images[index], self._masks[index] = image, mask

    def _load(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return the resized image uint8 [C, H, W] and mask uint8 [1, H, W], which holds numbers of classes."""
        image, mask = _read(sample, self.preprocessing.channels, self._mask_format)
        size = self.preprocessing.image_size
        pixels = torch.from_numpy(resize_image(image, size)).permute(2, 0, 1)
        return pixels, torch.from_numpy(resize_mask(mask, size)).unsqueeze(0)

    def __len__(self) -> int:
        return len(self.samples) * (1 + self._copies)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        item, epoch = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= item < len(self):
            raise IndexError(f"index {item} is outside 0..{len(self) - 1}")
        copy, index = divmod(item, len(self.samples))
        if self.in_memory:
            image, mask = self._images[index], self._masks[index]
        else:
            image, mask = self._load(self.samples[index])
        if self._transform is not None and (copy or not self._copies):
            image, mask = self._augmented(image, mask, (0 if copy else epoch, index, copy))
        return {
            "image": self.preprocessing.normalise(image),
            "mask": (mask == self._numbers).to(torch.float32),
            "has_mask": torch.tensor(self.samples[index].masks is not None),
            "label": torch.tensor(self.samples[index].label, dtype=torch.int64),
            "index": index,
        }

    def _augmented(self, image: Tensor, mask: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        assert self._transform is not None
        # Only the CPU generator: torch.manual_seed would also reseed every accelerator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mixed_seed(self.seed, *key))
            image, mask = self._transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def check_files(samples: Sequence[Sample], channels: int, mask_format: MaskFormat) -> None:
    """Read every image and mask once; raises ``UserError`` at the first that cannot be used."""

    def check(sample: Sample) -> None:
        _read(sample, channels, mask_format)

    for _ in map_in_threads(check, samples):
        pass


def free_memory() -> int:
    """Return how many bytes of memory this process may still take: of the machine, and of its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def _read(sample: Sample, channels: int, mask_format: MaskFormat) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(sample.image, channels)
    return image, mask_format.read(sample.masks or (), *image.shape[:2])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, epoch) for a ``DataLoader``'s ``batch_sampler``.

    Args:
        length: number of items, ``len(dataset)``.
        batch_size: items per batch, at least 1.
        shuffle: True: a permutation that depends on (seed, epoch) only, and a last batch that would leave a process
            with one item is merged into the one before it (batch normalisation of vectors needs two). False: in
            order, nothing merged.
        seed: of the permutation, not negative.
        rank: which of ``processes`` this is.
        processes: how many share the items. Shuffled, each step takes ``processes`` · ``batch_size`` items and gives
            every process its share of them; in order, the processes take whole batches in turn.

    Raises:
        UserError: ``batch_size`` below 1.
    """

    def __init__(
        self, length: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}, expected at least 1.")
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0 or more) that the next iteration belongs to."""
        self.epoch = epoch

    def _starts(self) -> list[int]:
        step = self.batch_size * self.processes if self.shuffle else self.batch_size
        starts = list(range(0, self.length, step))
        too_few = self.batch_size > 1 and len(starts) > 1 and self.length - starts[-1] < 2 * self.processes
        return starts[:-1] if self.shuffle and too_few else starts

    def __len__(self) -> int:
        return len(self._starts()) if self.shuffle else len(self._starts()[self.rank :: self.processes])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mixed_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        batches = [[(i, epoch) for i in order[a:b]] for a, b in pairwise([*self._starts(), self.length])]
        if self.shuffle:
            return iter([batch[self.rank :: self.processes] for batch in batches])
        return iter(batches[self.rank :: self.processes])


def _transform(augmentation: Augmentation) -> v2.Transform:
    rotation = v2.RandomRotation(augmentation.rotation_degrees, interpolation=v2.InterpolationMode.BILINEAR)
    steps: list[v2.Transform] = [
        v2.RandomHorizontalFlip(augmentation.horizontal_flip),
        v2.RandomVerticalFlip(augmentation.vertical_flip),
        v2.RandomApply([rotation], p=augmentation.rotation_probability),
    ]
    if augmentation.elastic:
        steps.append(v2.RandomApply([v2.ElasticTransform()], p=0.5))
    return v2.Compose(steps)


def _mixed_seed(*numbers: int) -> int:
    """Mix non-negative integers into one 63-bit seed; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
