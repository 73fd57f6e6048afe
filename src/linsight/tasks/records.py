"""The recipes of tasks: what every run has, and what a task adds. Without torch, for the help of a command."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from linsight.errors import LinsightError, UnknownNameError
from linsight.recipe import TASK, Recipe
from linsight.records import (
    NONE,
    Count,
    NotNegative,
    Pixel,
    Positive,
    Ratios,
    Record,
    Share,
    ShorterSides,
    Sides,
    Text,
    Whole,
    shown,
)

# What is done with images that have one class each, in training and in evaluation.
_AUGMENTED = ("crop_mode", "crop_padding", "scale", "ratio", "auto_augment", "re_prob", "re_mode")
_EVALUATED = ("crop_pct", "eval_crop")


class MixFields(Record):
    """Mixed images, and soft labels."""

    group = "Augmentation"

    mixup: NotNegative = Field(default=0.0, description="alpha of mixup, 0 is off")
    cutmix: NotNegative = Field(default=0.0, description="alpha of cutmix, 0 is off")
    mixup_prob: Share = Field(default=1.0, description="share of batches that are mixed")
    mixup_switch_prob: Share = Field(default=0.5, description="share of those that get cutmix, where both are on")
    smoothing: Share = Field(default=0.0, description="label smoothing")


class MesaFields(Record):
    """Learning from the averaged weights."""

    group = "Optimisation"

    mesa: NotNegative = Field(
        default=0.0, description="weight of a second loss, against what the averaged weights say; 0 is off"
    )
    mesa_start: Share = Field(default=0.25, description="share of the epochs after which that loss sets in")


class ClassifyRecipe(Recipe, MixFields, MesaFields):
    """A run of the task `classify`."""

    task: Literal["classify"] = Field(default="classify", description=TASK)

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise LinsightError(
                f"mixup and cutmix pair the images of a batch: batch_size={self.batch_size} must be even"
            )
        if self.mesa and not self.ema:
            raise LinsightError(f"mesa={self.mesa:g} learns from averaged weights: set their decay, as in ema=0.9999")
        return self


class BudgetRecipe(ClassifyRecipe):
    """A run of the task `budget`."""

    task: Literal["budget"] = Field(default="budget", description=TASK)  # type: ignore[assignment]


class DistilFields(Record):
    """Learning from another model."""

    group = "Optimisation"

    teacher: Annotated[Text | None, NONE] = Field(
        default=None, description="who is learned from: a run, a model of linsight or timm by name, hf-hub:OWNER/NAME"
    )
    teacher_checkpoint: Annotated[Text | None, NONE] = Field(
        default=None, description="published weights of a teacher given by name: a file or an address"
    )
    teacher_size: Sides = Field(default=(), description="side, or height and width, that it sees; empty: its own")
    distil_kind: Literal["soft", "hard", "features", "map"] = Field(
        default="soft",
        description="learned from it: its probabilities, its decision, its pooled features, its last map of them",
    )
    distil_weight: Share = Field(default=0.5, description="share of that in the loss; the rest is that of the labels")
    distil_temperature: Positive = Field(default=2.0, description="logits are divided by it, for distil_kind soft")
    distil_distance: Literal["mse", "cosine"] = Field(
        default="mse", description="between features, each set standardised: squared error, or 1 minus the cosine"
    )


class DistilRecipe(ClassifyRecipe, DistilFields):
    """A run of the task `distil`."""

    task: Literal["distil"] = Field(default="distil", description=TASK)  # type: ignore[assignment]


class LinearizeFields(Record):
    """A trained softmax model whose attention is replaced."""

    group = "Optimisation"

    layers: Text = Field(
        default="", description="attentions to convert, by patterns with spaces between, as 'blocks.1?.*'; empty: all"
    )
    neutral: bool = Field(default=True, description="what a mechanism adds locally starts at zero, and its gate open")
    transfer_steps: Count = Field(
        default=200, description="batches by which each new layer first learns what the old one gave; 0: none"
    )
    transfer_lr: Positive = Field(default=1e-2, description="learning rate of that, of AdamW with a cosine")
    hidden: NotNegative = Field(
        default=1.0, description="weight of the relative distance to the teacher's hidden states, added to the loss"
    )


class LinearizeRecipe(DistilRecipe, LinearizeFields):
    """A run of the task `linearize`."""

    START = "teacher"
    KEPT = frozenset(("layers",))
    UNUSED = {"drop_path": "the model is the teacher's, of which no path is dropped"}  # noqa: RUF012

    task: Literal["linearize"] = Field(default="linearize", description=TASK)  # type: ignore[assignment]


class MaskFields(Record):
    """Masks, and how images with masks are cropped."""

    group = "Data"

    ignore: Annotated[Pixel | None, NONE] = Field(
        default=255,
        description="value of pixels of no class in masks; 0: the first class is 1; none: all have one",
    )


class DenseImageFields(Record):
    """From images with masks to what a model is given."""

    group = "Augmentation"

    resize: Ratios = Field(
        default=(0.5, 2.0),
        description="smallest and largest scale of training images, of which img_size is cropped",
    )
    crop_share: Share = Field(
        default=0.75, description="largest share of one class in a crop, of which ten are tried; 1 takes the first"
    )
    eval_side: Count = Field(
        default=0, description="shorter side of images that are evaluated or predicted; 0: as they are"
    )
    eval_mode: Literal["whole", "slide"] = Field(
        default="whole", description="such images are seen whole, or in overlapping windows of img_size"
    )
    eval_stride: Share = Field(default=0.667, description="step of these windows, as a share of their side")
    smoothing: Share = Field(default=0.0, description="label smoothing")


class SegmentFields(Record):
    """The decoder."""

    group = "Model"

    decoder: Text = Field(default="mlp", description="what makes a class for each pixel of a backbone's maps")
    decoder_width: Count = Field(default=0, description="channels in the decoder; 0: its own")


class SegmentLossFields(Record):
    """The loss of segmentation."""

    group = "Optimisation"

    dice: NotNegative = Field(default=0.0, description="weight of the Dice loss, added to the cross-entropy")
    ohem: Share = Field(
        default=0.0, description="share of the pixels, the hardest, that the cross-entropy is of; 0: all"
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="of the cross-entropy; balanced: rare classes weigh more, by a logarithm",
    )
    auxiliary: NotNegative = Field(
        default=0.4, description="weight of the auxiliary head's loss, of decoders that have one"
    )


class SegmentRecipe(Recipe, SegmentFields, MaskFields, DenseImageFields, SegmentLossFields):
    """A run of the task `segment`."""

    KEPT = frozenset(("ignore", "eval_side", "eval_mode", "eval_stride"))
    UNUSED = dict.fromkeys(_AUGMENTED, "see resize and crop_share") | dict.fromkeys(_EVALUATED, "see eval_side")

    task: Literal["segment"] = Field(default="segment", description=TASK)
    batch_size: Whole = Field(default=8, description="images of one update")

    @model_validator(mode="after")
    def _has_masks(self) -> Self:
        if self.draft:
            raise LinsightError(f"draft={self.draft} is not for images with masks: leave it out")
        if self.aug_repeats > 1 and self.order == "shards":
            raise LinsightError("order=shards is not for images with masks: leave it out")
        if not self.eval_stride:
            raise LinsightError("eval_stride=0 never ends: give the step of windows as a share of their side, as 0.667")
        return self


class DetectFields(Record):
    """The detector."""

    group = "Model"

    method: Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "retinanet"] = Field(
        default="faster_rcnn", description="heads: of boxes, or of boxes and masks, in two stages, four, or one"
    )
    pyramid_width: Whole = Field(default=256, description="channels of the pyramid, and of convolutions in heads")
    head_width: Whole = Field(default=1024, description="width of fully connected layers in heads")
    least_score: Share = Field(default=0.05, description="detections of a lower score are left out")
    nms: Share = Field(default=0.5, description="of two detections of a class that overlap more, one is left out")
    detections: Whole = Field(default=100, description="detections of an image, at most")


class DetectImageFields(Record):
    """From images with objects to what a detector is given."""

    group = "Augmentation"

    sides: ShorterSides = Field(
        default=tuple(range(480, 801, 32)), description="shorter sides of training images, of which one is drawn"
    )
    longest: Whole = Field(default=1333, description="longer side of images, at most; the shorter one gives way")
    part: Share = Field(
        default=0.0, description="share of training images that are made small and cut first, as in DETR's training"
    )
    eval_side: Count = Field(
        default=800, description="shorter side of images that are evaluated or predicted; 0: as they are"
    )
    shown_score: Share = Field(default=0.5, description="least score of what predict and pictures show")


class DetectRecipe(Recipe, DetectFields, DetectImageFields):
    """A run of the task `detect`."""

    KEPT = frozenset(("longest", "eval_side", "shown_score"))
    UNUSED = dict.fromkeys(_AUGMENTED, "see sides, longest and part") | dict.fromkeys(_EVALUATED, "see eval_side")

    task: Literal["detect"] = Field(default="detect", description=TASK)
    batch_size: Whole = Field(default=16, description="images of one update")
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = Field(
        default="bilinear", description="how images are resized"
    )

    @model_validator(mode="after")
    def _has_objects(self) -> Self:
        for name, plain in (("draft", 0), ("order", "full"), ("image_ranks", 1)):
            if getattr(self, name) != plain:
                raise LinsightError(f"{name}={getattr(self, name)} is not for images with objects: leave it out")
        if self.compile:
            raise LinsightError("compile: the heads of a detector get another number of boxes each time, leave it out")
        return self


# By the names of their tasks. `linsight.tasks.register` adds others.
RECORDS: dict[str, type[Recipe]] = {
    "classify": ClassifyRecipe,
    "budget": BudgetRecipe,
    "distil": DistilRecipe,
    "linearize": LinearizeRecipe,
    "segment": SegmentRecipe,
    "detect": DetectRecipe,
}


def record_of(task: Any) -> type[Recipe]:
    """The kind of recipe of a task; an UnknownNameError offers the nearest."""
    if not isinstance(task, str) or task not in RECORDS:
        raise UnknownNameError("task", shown(task, str), RECORDS)
    return RECORDS[task]


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of its values, as `Recipe.values` gives them or as text; without a task it is of `classify`.

    Raises:
        LinsightError: see `linsight.records.Record`.
    """
    return record_of(values.get("task", "classify"))(**values)


def known_fields() -> dict[str, type[Recipe]]:
    """The fields of all tasks, each with the first kind of recipe that has it."""
    found: dict[str, type[Recipe]] = {}
    kinds: list[type[Recipe]] = [Recipe, *RECORDS.values()]  # whose first has any task
    for kind in kinds:
        for name in kind.model_fields:
            found.setdefault(name, kind)
    return found


def field_of(name: str) -> type[Recipe]:
    """A kind of recipe that has the field `name`; an UnknownNameError offers the nearest of all."""
    known = known_fields()
    if name not in known:
        raise UnknownNameError("recipe field", shown(name, str), known)
    return known[name]
