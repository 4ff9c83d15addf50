"""Images with lesion masks and classes: reading, checking, grouping, splitting, augmenting."""

from btinet.data.audit import Audit, Finding, audit
from btinet.data.dataset import Augmentation, EpochBatches, SegmentationDataset, check_files
from btinet.data.groups import near_duplicate_groups, read_groups, straddling_groups, without_prescribed, write_groups
from btinet.data.images import read_image, read_mask
from btinet.data.layout_options import LayoutOptions
from btinet.data.layouts import DATASETS, check_trainable, read_collection
from btinet.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from btinet.data.masks import MaskFormat
from btinet.data.preprocessing import Preprocessing, default_preprocessing, resize_image, resize_mask
from btinet.data.sample import sample_csv
from btinet.data.samples import Collection, Sample
from btinet.data.source import DataSource
from btinet.data.splits import (
    SPLITS,
    fold_collection,
    number_of_folds,
    read_split,
    split_collection,
    write_folds,
    write_split,
)

__all__ = [
    "DATASETS",
    "MANIFEST_NAME",
    "SPLITS",
    "Audit",
    "Augmentation",
    "Collection",
    "DataSource",
    "EpochBatches",
    "Finding",
    "LayoutOptions",
    "MaskFormat",
    "Preprocessing",
    "Sample",
    "SegmentationDataset",
    "audit",
    "check_files",
    "check_trainable",
    "default_preprocessing",
    "fold_collection",
    "near_duplicate_groups",
    "number_of_folds",
    "read_collection",
    "read_groups",
    "read_image",
    "read_manifest",
    "read_mask",
    "read_split",
    "resize_image",
    "resize_mask",
    "sample_csv",
    "split_collection",
    "straddling_groups",
    "without_prescribed",
    "write_folds",
    "write_groups",
    "write_manifest",
    "write_split",
]
