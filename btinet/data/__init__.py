"""Images with lesion masks and classes: reading, checking, grouping, splitting, augmenting."""

from btinet.data.dataset import Augmentation, EpochBatches, SegmentationDataset
from btinet.data.groups import near_duplicate_groups, read_groups, write_groups
from btinet.data.images import read_image, read_mask
from btinet.data.layouts import DATASETS, check_trainable, read_collection
from btinet.data.preprocessing import Preprocessing, default_preprocessing, resize_image, resize_mask
from btinet.data.sample import sample_csv
from btinet.data.samples import Collection, Sample
from btinet.data.splits import SPLITS, read_split, split_collection, write_split

__all__ = [
    "DATASETS",
    "SPLITS",
    "Augmentation",
    "Collection",
    "EpochBatches",
    "Preprocessing",
    "Sample",
    "SegmentationDataset",
    "check_trainable",
    "default_preprocessing",
    "near_duplicate_groups",
    "read_collection",
    "read_groups",
    "read_image",
    "read_mask",
    "read_split",
    "resize_image",
    "resize_mask",
    "sample_csv",
    "split_collection",
    "write_groups",
    "write_split",
]
