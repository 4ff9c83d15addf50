"""What can be chosen for a training: the flags of ``btinet train``, and the presets behind ``--preset``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal

Preset = Literal["fixed", "paper", "parity"]


def option(default: Any = MISSING, help: str = "") -> Any:
    """A dataclass field that carries the help text of its command-line flag."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """What the presets disagree about. ``fixed``: what a careful engineer would run; the fields below are its values.

    ``paper`` follows the papers' words, ``parity`` the official code, bug for bug. docs/presets.md lists why.
    """

    false_positive_weight: float = option(0.5, "α of the Tversky index.")
    false_negative_weight: float = option(0.5, "β of the Tversky index.")
    hard_boundary: bool = option(
        False, "Threshold the prediction in the boundary loss, which leaves it without a gradient."
    )
    empty_masks: Literal["cross_entropy", "tversky"] = option("cross_entropy", "Loss of images without a lesion.")
    loss_ceiling: float = option(float("inf"), "An image's loss is cut off here.")
    seg_weight: float = option(0.80, "Weight of the segmentation loss in stage 1.")
    clf_weight: float = option(0.20, "Weight of the classification loss in stage 1.")
    monitor: Literal["thresholded", "keras_truncated"] = option(
        "thresholded",
        "IoU that selects the model: foreground IoU at 0.5, or Keras's MeanIoU of truncated probabilities.",
    )
    double_scaling: bool = option(
        False, "Divide pixels by 255 twice, as the official loaders and Keras's EfficientNet do together."
    )
    offline_copies: int = option(
        0,
        "Augmented copies of each image, the same in every epoch; 0: every image is augmented anew in every epoch.",
    )
    elastic: bool = option(False, "Elastic deformation among the augmentations.")
    norm_momentum: float = option(0.1, "Share of a batch in BatchNorm's running statistics.")


RECIPES: dict[str, Recipe] = {
    "fixed": Recipe(),
    "paper": Recipe(
        false_positive_weight=0.3,
        false_negative_weight=0.7,
        empty_masks="tversky",
        offline_copies=3,
        elastic=True,
        norm_momentum=0.01,
    ),
    "parity": Recipe(
        hard_boundary=True,
        empty_masks="tversky",
        loss_ceiling=10.0,
        seg_weight=0.82,
        clf_weight=0.18,
        monitor="keras_truncated",
        double_scaling=True,
        offline_copies=3,
        norm_momentum=0.01,
    ),
}


# What `btinet ablate` chooses for each of its runs.
CHOSEN_BY_ABLATE = (
    "out",
    "seed",
    "fold",
    "extend_epochs",
    "interaction",
    "signals",
    "pool",
    "multi_scale",
    "directions",
    "tasks",
)


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``btinet train``."""

    data: str = option(help="Folder of the data set, or the CSV file.")
    out: str = option(help="Folder of the run, new or empty.")
    dataset: Literal[
        "auto", "busi", "busi_whu", "ham10000", "isic2018", "isic2017", "brisc", "cheng", "folders", "csv"
    ] = option("auto", "Layout of the data; auto recognises it.")
    model: str = option("btinet_efficientnet_b4", "btinet_ and the name of a timm backbone.")
    preset: Preset = option(
        "fixed",
        "Whose training to repeat: a careful engineer's, the papers' words, or the official code with its bugs.",
    )
    weights: str = option("none", "Start of the encoder: none, imagenet (timm downloads it) or a file.")
    epochs: int = option(50, "Most epochs of stage 1, the whole network.")
    stage2_epochs: int = option(15, "Most epochs of stage 2, the gates alone; 0 skips it.")
    image_size: int = option(224, "Side of the square the images are resized to, in pixels.")
    batch_size: int = option(8, "Images per batch, in each process.")
    accumulate: int = option(1, "Batches whose gradients make one step together.")
    lr: float = option(3e-4, "Initial learning rate of stage 1.")
    stage2_lr: float = option(3e-4, "Learning rate of stage 2.")
    weighting: Literal[
        "fixed",
        "scheduled",
        "uncertainty",
        "dynamic_average",
        "upgrad",
        "pcgrad",
        "mgda",
        "aligned_mtl",
        "imtl_g",
        "dualproj",
    ] = option(
        "fixed",
        "How stage 1 balances the tasks: the recipe's weights, fixed, scheduled as the official code intended, learned "
        "from uncertainty, or averaged dynamically; or a method of TorchJD that combines gradients.",
    )
    class_weights: Literal["balanced"] | list[float] | None = option(
        None, "Weights of the classes in the classification loss: balanced (by their numbers), or one for each class."
    )
    patience: int = option(22, "Epochs of stage 1 without improvement before it stops.")
    stage2_patience: int = option(5, "The same for stage 2.")
    extend_epochs: int = option(
        0, "Epochs of stage 1 that follow however it ended; with --resume, that many more than the run has."
    )
    ema: float | None = option(
        None, "Decay of a moving average of the weights, e.g. 0.999, which is then what is validated and saved."
    )
    seed: int = option(42, "Seed of the split, the weights, the order and the augmentation.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to train.")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = option(
        "auto", "Arithmetic; auto is bf16-mixed on a GPU that has it and 32-true elsewhere."
    )
    compile: bool = option(False, "Compile the network with torch.compile: slow first steps, faster ones after them.")
    memory_format: Literal["channels_last", "contiguous"] = option(
        "channels_last", "How images and feature maps lie in memory."
    )
    deterministic: bool = option(
        False, "Refuse operations that differ from run to run; the same seed then gives the same weights, bit for bit."
    )
    tensorboard: bool = option(False, "Write event files for TensorBoard into the run's folder tensorboard.")
    workers: int = option(0, "Processes that prepare images; 0 prepares them in the training process.")
    channels: Literal[1, 3] = option(3, "Channels of the images, grey or colour.")
    manifest: str | None = option(None, "manifest.json of btinet data check: train on exactly these files.")
    curated: str | None = option(None, "BUSI: table class;id of the images to keep.")
    labels: str | None = option(None, "BUSI-WHU as on Mendeley: table file,label.")
    lesion_groups: str | None = option(None, "ISIC 2018: table image,lesion_id.")
    drop_train_duplicates_of_test: bool = option(
        False, "Leave out images that nearly equal one of the prescribed test images."
    )
    split: str | None = option(None, "A split.csv to reuse instead of making one, or the folds of btinet data split.")
    fold: int | None = option(None, "With folds in --split: the one to test (or to validate, if a test part is given).")
    groups: str | None = option(
        None,
        "CSV group,image of images that must stay together; without it near-duplicates are searched for.",
    )
    mask_threshold: int | None = option(None, "Accept masks that are not binary: foreground is above this grey value.")
    mask_classes: str | None = option(
        None, "Names of several things to segment, separated by commas: masks then hold 1, 2, … for them."
    )
    interaction: str = option(
        "gated", "none, fixed or gated; or one per decoder level, coarse to fine, separated by commas."
    )
    signals: Literal["proxies", "variance"] = option(
        "proxies", "What feeds the gates: BTI-Net's proxies or its predecessor's variances."
    )
    pool: Literal["gap", "softmax"] = option("gap", "How segmentation context is pooled for classification.")
    multi_scale: bool = option(True, "Multi-scale context fusion in the residual blocks.")
    directions: Literal["both", "seg_to_clf", "clf_to_seg"] = option(
        "both", "Which way the interaction works; with one of them, the other stream passes as it is."
    )
    tasks: Literal["both", "segmentation", "classification"] = option(
        "both", "What the network learns; for one task give --interaction none, and its score alone selects the model."
    )
    decoder_channels: list[int] | None = option(None, "Widths of the decoder levels, coarse to fine.")
    freeze_stages: int | None = option(
        None,
        "Keep the encoder's stem and so many of its stages as they are: 1 up to stride 4, 2 up to stride 8, …; 0: "
        "none. The default is 1 when weights were loaded and 0 otherwise.",
    )
    recipe: dict[str, Any] | None = option(None, "Single settings of the preset to change, e.g. {seg_weight: 0.9}.")


def recipe_of(options: TrainOptions) -> Recipe:
    """The preset's recipe with the changes of ``options.recipe``; raises ``TypeError`` for an unknown name."""
    return replace(RECIPES[options.preset], **(options.recipe or {}))
