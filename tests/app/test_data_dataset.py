from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from btinet.data import (
    Augmentation,
    EpochBatches,
    MaskFormat,
    Preprocessing,
    Sample,
    SegmentationDataset,
    default_preprocessing,
    resize_image,
    resize_mask,
)
from btinet.data.dataset import free_memory
from btinet.errors import UserError

PLAIN = Preprocessing((32, 48), 3, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NONE = Augmentation(horizontal_flip=0, vertical_flip=0, rotation_probability=0)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Images whose red channel is 200 times the mask, so that the two can be compared after a change."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(5):
        image = generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        mask = np.zeros((32, 48), dtype=bool)
        mask[8 : 16 + index, 10:30] = True
        image[..., 0] = mask * 200
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / f"{index}_mask.png")
        found.append(Sample(str(index), tmp_path / f"{index}.png", (tmp_path / f"{index}_mask.png",), index - 1))
    return found


def pixels(sample: Sample) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(sample.image))).permute(2, 0, 1).float()


def test_items(samples: list[Sample]) -> None:
    dataset = SegmentationDataset(samples, PLAIN)
    assert len(dataset) == 5
    item = dataset[(2, 7)]
    assert torch.equal(item["image"], pixels(samples[2]))
    assert item["image"].dtype == item["mask"].dtype == torch.float32
    assert item["mask"].shape == (1, 32, 48)
    assert torch.equal(item["mask"][0] * 200, item["image"][0])
    assert item["label"].dtype == torch.int64
    assert item["label"].shape == ()
    assert item["label"] == 1
    assert item["index"] == 2
    assert dataset[0]["label"] == -1
    with pytest.raises(IndexError):
        dataset[5]


def test_no_masks_is_an_empty_mask_and_bad_files_stop_at_once(samples: list[Sample]) -> None:
    bare = Sample("bare", samples[0].image, (), 0)
    assert not SegmentationDataset([bare], PLAIN)[0]["mask"].any()
    samples[3].masks[0].write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3_mask\.png"):
        SegmentationDataset(samples, PLAIN)


@pytest.mark.parametrize("augmentation", [None, Augmentation(elastic=True), Augmentation(copies=2)])
def test_what_does_not_fit_in_memory_is_read_again_and_is_the_same(
    samples: list[Sample], augmentation: Augmentation | None
) -> None:
    square = default_preprocessing((40, 40), 3)
    kept = SegmentationDataset(samples, square, augmentation=augmentation)
    read = SegmentationDataset(samples, square, augmentation=augmentation, memory_share=0)
    assert kept.in_memory
    assert not read.in_memory
    for key in [(item, epoch) for item in range(len(kept)) for epoch in (0, 3)]:
        for name in ("image", "mask", "label", "index"):
            assert torch.equal(torch.as_tensor(kept[key][name]), torch.as_tensor(read[key][name]))
    samples[3].masks[0].write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3_mask\.png"):
        SegmentationDataset(samples, square, memory_share=0)


def test_the_share_of_free_memory_decides(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 5 * 4 * 32 * 48
    monkeypatch.setattr("btinet.data.dataset.free_memory", lambda: 2 * needed)
    assert SegmentationDataset(samples, PLAIN).in_memory
    monkeypatch.setattr("btinet.data.dataset.free_memory", lambda: 2 * needed - 1)
    assert not SegmentationDataset(samples, PLAIN).in_memory


def test_free_memory_is_that_of_the_machine_or_of_the_control_group() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 2**20 < free_memory() <= total


def test_mask_threshold_reaches_the_reader(samples: list[Sample]) -> None:
    path = samples[0].masks[0]
    grey = np.where(np.array(Image.open(path)), 200, 50).astype(np.uint8)
    Image.fromarray(grey).save(path)
    with pytest.raises(UserError, match="mask_threshold"):
        SegmentationDataset(samples, PLAIN)
    mask = SegmentationDataset(samples, PLAIN, mask_format=MaskFormat(127))[0]["mask"]
    assert torch.equal(mask[0] * 200, pixels(samples[0])[0])


@pytest.mark.parametrize(
    ("change", "dims"),
    [({}, ()), ({"horizontal_flip": 1.0}, (-1,)), ({"vertical_flip": 1.0}, (-2,))],
)
def test_flips_move_image_and_mask_together(
    samples: list[Sample], change: dict[str, float], dims: tuple[int, ...]
) -> None:
    augmentation = Augmentation(**{"horizontal_flip": 0.0, "vertical_flip": 0.0, "rotation_probability": 0.0} | change)
    item = SegmentationDataset(samples, PLAIN, augmentation=augmentation)[1]
    assert torch.equal(item["image"], pixels(samples[1]).flip(dims))
    assert torch.equal(item["mask"][0] * 200, item["image"][0])


def test_rotation_keeps_masks_binary_and_aligned(samples: list[Sample]) -> None:
    turn = Augmentation(horizontal_flip=0, vertical_flip=0, rotation_probability=1, rotation_degrees=15)
    dataset = SegmentationDataset(samples, PLAIN, augmentation=turn)
    changed = 0
    for epoch in range(6):
        item = dataset[(4, epoch)]
        assert set(item["mask"].unique().tolist()) == {0.0, 1.0}
        red = item["image"][0]
        assert len(red.unique()) > 2, "the image is interpolated, so edges are between 0 and 200"
        assert torch.equal(red > 100, item["mask"][0] > 0) or ((red > 100) != (item["mask"][0] > 0)).sum() < 30
        changed += int((item["mask"] != dataset.__class__(samples[4:], PLAIN)[0]["mask"]).sum())
    assert changed > 100


def test_rotation_angle_stays_within_its_limit(samples: list[Sample]) -> None:
    """The lesion is a bar; its direction after the rotation says the angle."""
    bar = np.zeros((64, 64), dtype=bool)
    bar[28:36, 8:56] = True
    Image.fromarray(bar).save(samples[0].masks[0])
    Image.fromarray(bar.astype(np.uint8)).save(samples[0].image)
    turn = Augmentation(horizontal_flip=0, vertical_flip=0, rotation_probability=1, rotation_degrees=15)
    dataset = SegmentationDataset(samples[:1], default_preprocessing((64, 64), 1), augmentation=turn)
    angles = []
    for epoch in range(40):
        y, x = np.nonzero(dataset[(0, epoch)]["mask"][0].numpy())
        covariance = np.cov(x, y)
        angles.append(np.degrees(0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))
    assert max(map(abs, angles)) < 17
    assert min(angles) < -8
    assert max(angles) > 8


def test_elastic_deforms(samples: list[Sample]) -> None:
    dataset = SegmentationDataset(
        samples,
        PLAIN,
        augmentation=Augmentation(horizontal_flip=0, vertical_flip=0, rotation_probability=0, elastic=True),
    )
    untouched = pixels(samples[0])
    same = [torch.equal(dataset[(0, epoch)]["image"], untouched) for epoch in range(20)]
    assert 3 <= sum(same) <= 17, "about half of the time"
    assert all(set(dataset[(0, epoch)]["mask"].unique().tolist()) == {0.0, 1.0} for epoch in range(5))


def test_augmentation_depends_on_seed_epoch_and_index_only(samples: list[Sample]) -> None:
    dataset = SegmentationDataset(samples, PLAIN, augmentation=Augmentation(), seed=5)
    twice = [samples[0], samples[0]]
    first = {(index, epoch): dataset[(index, epoch)]["image"] for index in range(5) for epoch in range(4)}
    torch.manual_seed(99)
    again = SegmentationDataset(samples, PLAIN, augmentation=Augmentation(), seed=5)
    for key in reversed(first):
        assert torch.equal(again[key]["image"], first[key])
    assert torch.equal(dataset[3]["image"], first[(3, 0)]), "an index alone is epoch 0"

    def differ(other: SegmentationDataset, epoch: int, offset: int) -> int:
        base = SegmentationDataset(twice, PLAIN, augmentation=Augmentation(), seed=5)
        return sum(not torch.equal(base[(0, e)]["image"], other[(offset, e + epoch)]["image"]) for e in range(20))

    pair = SegmentationDataset(twice, PLAIN, augmentation=Augmentation(), seed=5)
    assert differ(pair, 0, 0) == 0
    assert differ(pair, 1, 0) > 10, "another epoch"
    assert differ(pair, 0, 1) > 10, "another index of the same image"
    assert differ(SegmentationDataset(twice, PLAIN, augmentation=Augmentation(), seed=6), 0, 0) > 10


def test_global_random_state_is_untouched(samples: list[Sample]) -> None:
    dataset = SegmentationDataset(samples, PLAIN, augmentation=Augmentation(elastic=True))
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.get_rng_state(), random.getstate()
    for epoch in range(5):
        dataset[(0, epoch)]
    list(EpochBatches(7, 2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]


def test_fixed_copies(samples: list[Sample]) -> None:
    dataset = SegmentationDataset(samples, PLAIN, augmentation=Augmentation(copies=3), seed=1)
    assert len(dataset) == 20
    images = [dataset[(item, 0)]["image"] for item in range(20)]
    for item in range(20):
        entry = dataset[(item, 9)]
        assert torch.equal(entry["image"], images[item]), "the same in every epoch"
        assert entry["index"] == item % 5
        assert entry["label"] == samples[item % 5].label
        if item < 5:
            assert torch.equal(images[item], pixels(samples[item]))
    changed = [not torch.equal(images[item], images[item % 5]) for item in range(5, 20)]
    assert sum(changed) > 8
    assert any(not torch.equal(images[item], images[item + 5]) for item in range(5, 15))


def test_augmentation_is_validated() -> None:
    for wrong in ({"horizontal_flip": 1.5}, {"rotation_degrees": 200.0}, {"copies": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Augmentation(**wrong)


def test_workers_do_not_change_what_is_loaded(samples: list[Sample]) -> None:
    dataset = SegmentationDataset(samples, PLAIN, augmentation=Augmentation(copies=1))
    batches = EpochBatches(len(dataset), 3, shuffle=True, seed=2)
    batches.set_epoch(3)
    alone = list(DataLoader(dataset, batch_sampler=batches))
    shared = list(DataLoader(dataset, batch_sampler=batches, num_workers=2))
    assert [len(batch["index"]) for batch in alone] == [3, 3, 4]
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "mask", "label", "index"))


def test_batches_cover_every_item_once_and_never_leave_one_alone() -> None:
    for length, size, expected in (
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (8, 4, [4, 4]),
        (1, 4, [1]),
        (3, 1, [1] * 3),
    ):
        batches = EpochBatches(length, size, shuffle=True)
        batches.set_epoch(6)
        found = list(batches)
        assert [len(batch) for batch in found] == expected
        assert len(batches) == len(expected)
        assert sorted(key for batch in found for key in batch) == [(index, 6) for index in range(length)]
    assert list(EpochBatches(5, 4, shuffle=False)) == [[(0, 0), (1, 0), (2, 0), (3, 0)], [(4, 0)]]
    assert list(EpochBatches(0, 4, shuffle=True)) == []
    with pytest.raises(UserError, match="batch_size"):
        EpochBatches(3, 0, shuffle=True)


def test_batches_are_shuffled_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = EpochBatches(50, 8, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return [index for batch in batches for index, _ in batch]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) != list(range(50))


def test_normalise_by_hand() -> None:
    image = torch.tensor([[[0, 255]], [[51, 102]], [[204, 153]]], dtype=torch.uint8)
    standard = default_preprocessing((32, 32), 3)
    expected = [
        [(0 - 0.485) / 0.229, (1 - 0.485) / 0.229],
        [(0.2 - 0.456) / 0.224, (0.4 - 0.456) / 0.224],
        [(0.8 - 0.406) / 0.225, (0.6 - 0.406) / 0.225],
    ]
    assert torch.allclose(standard.normalise(image)[:, 0], torch.tensor(expected), atol=1e-6)
    batch = standard.normalise(image.expand(2, 4, 3, 1, 2))
    assert batch.dtype == torch.float32
    assert torch.equal(batch[1, 2], standard.normalise(image))
    twice = default_preprocessing((32, 32), 3, double_scaled=True).normalise(image)
    assert twice[0, 0, 1] == pytest.approx((1 / 255 - 0.485) / 0.229)
    grey = default_preprocessing((32, 40), 1)
    assert grey.mean == pytest.approx((0.449,), abs=1e-3)
    assert grey.normalise(image[:1])[0, 0, 1] == pytest.approx((1 - 0.449) / 0.226, rel=1e-5)
    with pytest.raises(UserError, match=r"shape \(3, 1, 2\), expected \[\.\.\., 1, H, W\]"):
        grey.normalise(image)


def test_preprocessing_round_trip_and_defects() -> None:
    original = default_preprocessing((64, 96), 1)
    values = json.loads(json.dumps(original.to_dict()))
    assert Preprocessing.from_dict(values) == original
    for change, pattern in (
        ({"image_size": [64]}, "image_size"),
        ({"image_size": [64, 16]}, "image_size.*at least 32"),
        ({"image_size": [64.0, 96]}, "image_size"),
        ({"image_size": "64"}, "image_size"),
        ({"channels": 2}, "channels is 2, expected 1 or 3"),
        ({"channels": True}, "channels"),
        ({"channels": 3}, r"mean.*expected 3 number\(s\)"),
        ({"scale": 0}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"mean": [float("nan")]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"std": 1.0}, "std"),
        ({"gamma": 1}, "field 'gamma' is not known"),
    ):
        with pytest.raises(UserError, match=pattern):
            Preprocessing.from_dict(values | change)
    with pytest.raises(UserError, match="field 'std' is missing"):
        Preprocessing.from_dict({name: value for name, value in values.items() if name != "std"})
    with pytest.raises(UserError, match="expected an object"):
        Preprocessing.from_dict([1, 2])  # type: ignore[arg-type]


def test_resizing() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, :4, 1] = 200
    small = resize_image(image, (2, 2))
    assert small.shape == (2, 2, 3)
    # Antialiasing: a half-width triangle of 4 source pixels reaches over the edge.
    assert 150 < small[0, 0, 1] < 200
    assert 0 < small[0, 1, 1] < 50
    assert not small[..., (0, 2)].any()
    grey = resize_image(image[..., 1:2], (8, 16))
    assert grey.shape == (8, 16, 1)
    assert grey[0, 0, 0] == 200
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2, 2:] = True
    assert np.array_equal(resize_mask(mask, (2, 2)), [[False, True], [False, False]])
    assert np.array_equal(resize_mask(mask, (8, 8)), mask.repeat(2, 0).repeat(2, 1))
    assert resize_mask(mask, (3, 5)).dtype == bool
