"""`Recipe`: everything that decides a run, one flat record in groups, without models and data.

A task adds fields of its own by a subclass (`linsight.tasks`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from linsight.errors import LinsightError, UnknownNameError
from linsight.records import (
    NONE,
    Areas,
    Classes,
    Count,
    Crop,
    Images,
    Levels,
    NotNegative,
    Number,
    Options,
    Padding,
    Positive,
    PositiveRate,
    Rate,
    Ratios,
    Record,
    Seed,
    Share,
    Sides,
    Spreads,
    Text,
    Threads,
    Whole,
    Workers,
    whole,
)

GROUPS = ("", "Model", "Data", "Augmentation", "Optimisation", "Run")  # in this order they are shown


TASK = "what is learned"


class ModelFields(Record):
    """The model."""

    group = "Model"

    model: Text = Field(
        default="vit_tiny", description="a variant, a host, or a model of timm that linsight has a host for"
    )
    attention: Annotated[Text | None, NONE] = Field(
        default=None, description="a mechanism, or one a stage; none: the model's own"
    )
    attention_options: Options = Field(default={}, description="options of the mechanism")
    model_args: Options = Field(default={}, description="other arguments of the model, as in depth=6,embed_dim=96")
    img_size: Sides = Field(default=(), description="side, or height and width; empty: the model's own")
    in_chans: Annotated[Literal[1, 3, 4], whole] = Field(
        default=3, description="3 reads images as RGB, 1 as grey, 4 as RGB and opacity"
    )
    num_classes: Annotated[Classes | None, NONE] = Field(default=None, description="none: as many as the data has")
    drop_path: Share = Field(default=0.0, description="stochastic depth of the last block")
    init: Annotated[Text | None, NONE] = Field(
        default=None, description="weights to start from: a run, a file, an address, or a model of timm as timm/NAME"
    )
    init_partial: bool = Field(
        default=False, description="what init lacks stays as initialised, as with another mechanism"
    )
    from_size: Sides = Field(default=(), description="size of the images that init was made for, if it does not tell")


def _former_cache(value: Any) -> Any:
    """The word for a value of before the field had words: true or false."""
    former = dict.fromkeys(("true", "yes", "1"), "memory") | dict.fromkeys(("false", "no", "0"), "off")
    return former.get(str(value).lower(), value)


class DataFields(Record):
    """Images, and where they are."""

    group = "Data"

    data: Text = Field(
        default="digits",
        description="a folder, a tar or zip, shards, Parquet files, 'digits', or a name: torch/cifar10, hfds/NAME",
    )
    data_dir: Annotated[Text | None, NONE] = Field(
        default=None, description="where the data of a torch/, hfds/ or hfids/ name is kept"
    )
    train_split: Text = Field(default="train", description="the split trained on")
    val_split: Annotated[Text | None, NONE] = Field(
        default=None, description="the split evaluated; none: validation, else test, else held out"
    )
    val_fraction: Share = Field(
        default=0.1, description="what is held out of each class, where there is no split to evaluate"
    )
    image_key: Annotated[Text | None, NONE] = Field(
        default=None, description="the image column of a Hugging Face data set; none: found by its type"
    )
    label_key: Annotated[Text | None, NONE] = Field(
        default=None, description="the label column of a Hugging Face data set; none: found by its type"
    )
    on_bad_image: Literal["skip", "refuse"] = Field(
        default="skip", description="an unreadable image is left out and counted, or ends the run"
    )
    fill: Annotated[Number | None, NONE] = Field(
        default=None, description="the value of pixels that are no number; none: such images are bad"
    )
    workers: Annotated[Workers | None, NONE] = Field(
        default=None, description="processes that read images; none: chosen by the number of cores"
    )
    draft: Count = Field(
        default=0,
        description="training decodes JPEGs at 1/2, 1/4 or 1/8, the shorter side of this many pixels or more; 0: whole",
    )
    order: Literal["full", "shards"] = Field(
        default="full", description="of training; shards: a few shards at a time, for disks that read in sequence"
    )
    epoch_images: Annotated[Images | None, NONE] = Field(
        default=None, description="images of an epoch; none: all, of a stream as many as it tells"
    )
    cache: Annotated[Literal["off", "memory", "disk"], BeforeValidator(_former_cache)] = Field(
        default="off", description="keep decoded images in memory, or in files of the folder cache_dir"
    )
    cache_dir: Annotated[Text | None, NONE] = Field(
        default=None, description="the folder for cache=disk; none: linsight/images in the user's cache"
    )


class ImageFields(Record):
    """From images to what a model is given."""

    group = "Augmentation"

    crop_mode: Literal["rrc", "rkrc", "rkrr", "pad", "none"] = Field(
        default="rrc", description="rrc: random resized crop; pad: pad and crop; rkrc, rkrr: as in timm"
    )
    crop_padding: Padding = Field(default=4, description="pixels on each side, for crop_mode pad")
    scale: Areas = Field(default=(0.08, 1.0), description="smallest and largest area of a random resized crop")
    ratio: Ratios = Field(default=(0.75, 1.3333), description="smallest and largest aspect ratio of it")
    hflip: Share = Field(default=0.5, description="probability of a mirror image")
    color_jitter: NotNegative = Field(default=0.0, description="change of brightness, contrast and saturation")
    auto_augment: Annotated[Text | None, NONE] = Field(
        default=None, description="timm's policy, as in rand-m9-mstd0.5-inc1"
    )
    re_prob: Share = Field(default=0.0, description="probability of random erasing")
    re_mode: Literal["const", "rand", "pixel"] = Field(default="pixel", description="what erased pixels become")
    aug_repeats: Whole = Field(
        default=1, description="copies of an image in an epoch, which has as many times fewer images"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = Field(
        default="bicubic", description="how images are resized"
    )
    mean: Levels = Field(default=(), description="of each channel, in 0..1; empty: ImageNet's, 0.5 for grey")
    std: Spreads = Field(default=(), description="of each channel; empty: ImageNet's, 0.5 for grey")
    crop_pct: Crop = Field(default=0.875, description="centre crop of evaluation; 1: the whole image")
    eval_crop: Literal["squash", "center", "border"] = Field(
        default="squash", description="what happens to the aspect ratio before that crop, as in timm"
    )


class OptimiserFields(Record):
    """How weights are updated."""

    group = "Optimisation"

    opt: Text = Field(default="adamw", description="an optimiser of timm")
    opt_args: Options = Field(default={}, description="its other arguments, as in betas=(0.9,0.95)")
    lr: PositiveRate = Field(default=1e-3, description="peak learning rate")
    lr_base_batch: Count = Field(
        default=0, description="rates are for this batch and scale with it; 0: used as they are"
    )
    new_lr_scale: Positive = Field(default=1.0, description="times the learning rate, for what init did not fill")
    layer_decay: Share = Field(
        default=0.0, description="times the learning rate, for each layer group below the last; 0 or 1 is off"
    )
    freeze: bool = Field(default=False, description="train a new head alone; with init_partial, what init did not fill")
    freeze_layers: Count = Field(
        default=0, description="layer groups, from the first, where only what init did not fill is trained"
    )
    freeze_stages: Count = Field(default=0, description="the same by stages, which in a ViT are its layer groups")
    weight_decay: NotNegative = Field(default=0.05, description="not applied to vectors and what the model exempts")
    clip_grad: NotNegative = Field(default=0.0, description="largest norm of the gradient, 0 is off")
    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "none"] = Field(
        default="cosine", description="course of the learning rate, by update"
    )
    sched_args: Options = Field(default={}, description="other arguments of timm's schedule")
    on_bad_loss: Literal["stop", "skip"] = Field(
        default="stop", description="a loss or gradient that is no number ends the run, or its update is left out"
    )
    epochs: Whole = Field(default=10, description="with the warm-up, without the cool-down")
    warmup_epochs: Count = Field(default=0, description="epochs of linear warm-up")
    warmup_updates: Count = Field(default=0, description="the same in updates, where an epoch is too long; 0: epochs")
    warmup_lr: Rate = Field(default=0.0, description="learning rate it starts from")
    min_lr: Rate = Field(default=0.0, description="learning rate at the end")
    cooldown_epochs: Count = Field(default=0, description="more epochs at that rate")
    ema: Share = Field(
        default=0.0, description="decay of the averaged weights, which are then the ones evaluated; 0 is off"
    )
    ema_warmup: bool = Field(default=False, description="let that decay grow from 0")
    ema_base_batch: Count = Field(
        default=0, description="the decay is for this batch, a larger one takes its power; 0: as it is"
    )
    redraw_every: Annotated[Count | None, NONE] = Field(
        default=None,
        description="updates after which random features and hashes are drawn anew; none: as published, 0: never",
    )


class RunFields(Record):
    """Where and how it runs."""

    group = "Run"

    batch_size: Whole = Field(default=128, description="images of one update")
    accumulate: Whole = Field(default=1, description="parts that a batch is computed in, for less memory")
    seed: Seed = Field(default=0, description="decides initial weights, order and augmentation")
    device: Text = Field(default="auto", description="cpu, cuda, cuda:1, mps; auto: the best there is")
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="what each of several processes holds: the whole model, or a part of each block"
    )
    image_ranks: Whole = Field(default=1, description="processes that share each image, in bands of its rows")
    deterministic: bool = Field(
        default=False, description="operations of a GPU that give the same numbers every time, slower ones too"
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        default="auto", description="mixed precision; auto: bf16 where the device computes in it, fp16 on older GPUs"
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    channels_last: bool = Field(default=False, description="keep image tensors in channels-last order")
    grad_checkpointing: bool = Field(default=False, description="recompute activations, for less memory")
    threads: Annotated[Threads | None, NONE] = Field(
        default=None, description="CPU threads of the training process; none: PyTorch's choice"
    )
    save_every: Count = Field(
        default=0, description="steps between saved states within an epoch; 0: at the end of each epoch"
    )
    keep_states: Whole = Field(
        default=1, description="saved states that are kept: the last one as state.pt, those before it by epoch and step"
    )
    report: bool = Field(
        default=True, description="write report.html at the end, a page on the run; one more evaluation"
    )
    track: Annotated[Text | None, NONE] = Field(
        default=None, description="logs besides: tensorboard, wandb, trackio; several with commas"
    )
    figures: bool = Field(default=True, description="draw curves.png and predictions.png (needs matplotlib)")


class Recipe(ModelFields, DataFields, ImageFields, OptimiserFields, RunFields):
    """One run. Every field is an option of `linsight train` and a key of the run's config.json."""

    kind = "recipe"
    START: ClassVar[str] = "init"  # the field that names the weights a run starts from
    # Fields that may change when a run goes on: none that its result depends on.
    RESUMABLE: ClassVar[frozenset[str]] = frozenset(
        (
            *("device", "parallel", "image_ranks", "workers", "cache", "cache_dir", "threads", "compile"),
            *("save_every", "keep_states", "figures", "report", "track"),
        )
    )

    # Fields of a task, beyond those of all, that it takes to use a trained model.
    KEPT: ClassVar[frozenset[str]] = frozenset()
    # Fields of all tasks that this one does not use, and what it has in their place, in words.
    UNUSED: ClassVar[Mapping[str, str]] = {}

    task: Text = Field(default="classify", description=TASK)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            if count not in (0, self.in_chans):
                raise LinsightError(f"{name} takes {self.in_chans} numbers, not {count}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise LinsightError(f"{name}={low:g},{high:g}: the first number is the smaller one")
        if self.accumulate > self.batch_size:
            raise LinsightError(
                f"accumulate={self.accumulate} parts of a batch need as many images: batch_size={self.batch_size} has "
                "fewer"
            )
        return self

    @classmethod
    def kept(cls) -> list[str]:
        """The fields that it takes to use a trained model: which it is, and how images are prepared for it."""
        return [
            name
            for name, group in cls.groups().items()
            if (group == "Model" and not name.startswith(("init", "from"))) or name in _KEPT or name in cls.KEPT
        ]

    @classmethod
    def in_group(cls, *groups: str) -> list[str]:
        """The fields of these groups."""
        return [name for name, group in cls.groups().items() if group in groups]


_KEPT = ("task", "mean", "std", "interpolation", "crop_pct", "eval_crop", "fill")


def require_known(recipe: Recipe) -> None:
    """Raise an UnknownNameError unless timm has the optimiser of a recipe."""
    from timm.optim import list_optimizers  # not for the sake of a command's help

    if recipe.opt not in list_optimizers():
        raise UnknownNameError("optimiser (opt)", recipe.opt, list_optimizers())


def averaged(recipe: Recipe, in_chans: int) -> dict[str, tuple[float, ...]]:
    """The fields mean and std of `recipe` for images of `in_chans` channels: each channel has the average of its own.

    Empty where they are for that many already.
    """
    values = {name: getattr(recipe, name) for name in ("mean", "std")}
    other = {name: numbers for name, numbers in values.items() if len(numbers) not in (0, in_chans)}
    return {name: (round(sum(numbers) / len(numbers), 6),) * in_chans for name, numbers in other.items()}
