"""`Recipe`: everything that decides a training run, one flat record, without models and data."""

import ast
import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from linsight.errors import LinsightError, UnknownNameError


def _field(group: str, default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"group": group, "help": help, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_MODEL, _DATA, _AUGMENT, _OPTIMISE, _RUN = "Model", "Data", "Augmentation", "Optimisation", "Run"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run. Every field is an option of `linsight train` and a key of the run's config.json."""

    model: str = _field(_MODEL, "vit_tiny", "a variant, a host, or a model of timm that linsight has a host for")
    attention: str | None = _field(_MODEL, None, "a mechanism, or one a stage; none: the model's own")
    attention_options: Mapping[str, Any] = _field(_MODEL, {}, "options of the mechanism")
    model_args: Mapping[str, Any] = _field(_MODEL, {}, "other arguments of the model, as in depth=6,embed_dim=96")
    img_size: tuple[int, ...] = _field(_MODEL, (), "side, or height and width; empty: the model's own")
    in_chans: int = _field(_MODEL, 3, "3 reads images as RGB, 1 as grey, 4 as RGB and opacity", ("1", "3", "4"))
    num_classes: int | None = _field(_MODEL, None, "none: as many as the data has")
    drop_path: float = _field(_MODEL, 0.0, "stochastic depth of the last block")
    init: str | None = _field(_MODEL, None, "weights to start from, published or one's own: a run, a file, an address")
    init_partial: bool = _field(_MODEL, False, "what init lacks stays as initialised, as with another mechanism")
    from_size: tuple[int, ...] = _field(_MODEL, (), "size of the images that init was made for, if it does not tell")

    data: str = _field(
        _DATA, "digits", "a folder, a tar or zip, Parquet files, 'digits', or a name of timm's: torch/cifar10"
    )
    data_dir: str | None = _field(_DATA, None, "where the data of a torch/ or hfds/ name is kept")
    train_split: str = _field(_DATA, "train", "the split trained on")
    val_split: str | None = _field(_DATA, None, "the split evaluated; none: validation, else test, else held out")
    val_fraction: float = _field(_DATA, 0.1, "what is held out of each class, where there is no split to evaluate")
    image_key: str | None = _field(_DATA, None, "the image column of a Hugging Face data set; none: found by its type")
    label_key: str | None = _field(_DATA, None, "the label column of a Hugging Face data set; none: found by its type")
    on_bad_image: str = _field(
        _DATA, "skip", "an unreadable image is left out and counted, or ends the run", ("skip", "refuse")
    )
    fill: float | None = _field(_DATA, None, "the value of pixels that are no number; none: such images are bad")
    workers: int | None = _field(_DATA, None, "processes that read images; none: chosen by the number of cores")
    cache: bool = _field(_DATA, False, "keep decoded images in memory")

    crop_mode: str = _field(
        _AUGMENT,
        "rrc",
        "rrc: random resized crop; pad: pad and crop; rkrc, rkrr: as in timm",
        ("rrc", "rkrc", "rkrr", "pad", "none"),
    )
    crop_padding: int = _field(_AUGMENT, 4, "pixels on each side, for crop_mode pad")
    scale: tuple[float, ...] = _field(_AUGMENT, (0.08, 1.0), "smallest and largest area of a random resized crop")
    ratio: tuple[float, ...] = _field(_AUGMENT, (0.75, 1.3333), "smallest and largest aspect ratio of it")
    hflip: float = _field(_AUGMENT, 0.5, "probability of a mirror image")
    color_jitter: float = _field(_AUGMENT, 0.0, "change of brightness, contrast and saturation")
    auto_augment: str | None = _field(_AUGMENT, None, "timm's policy, as in rand-m9-mstd0.5-inc1")
    re_prob: float = _field(_AUGMENT, 0.0, "probability of random erasing")
    re_mode: str = _field(_AUGMENT, "pixel", "what erased pixels become", ("const", "rand", "pixel"))
    mixup: float = _field(_AUGMENT, 0.0, "alpha of mixup, 0 is off")
    cutmix: float = _field(_AUGMENT, 0.0, "alpha of cutmix, 0 is off")
    mixup_prob: float = _field(_AUGMENT, 1.0, "share of batches that are mixed")
    mixup_switch_prob: float = _field(_AUGMENT, 0.5, "share of those that get cutmix, where both are on")
    smoothing: float = _field(_AUGMENT, 0.0, "label smoothing")
    aug_repeats: int = _field(_AUGMENT, 1, "copies of an image in an epoch, which has as many times fewer images")
    interpolation: str = _field(
        _AUGMENT, "bicubic", "how images are resized", ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
    )
    mean: tuple[float, ...] = _field(_AUGMENT, (), "of each channel, in 0..1; empty: ImageNet's, 0.5 for grey")
    std: tuple[float, ...] = _field(_AUGMENT, (), "of each channel; empty: ImageNet's, 0.5 for grey")
    crop_pct: float = _field(_AUGMENT, 0.875, "centre crop of evaluation; 1: the whole image")
    eval_crop: str = _field(
        _AUGMENT,
        "squash",
        "what happens to the aspect ratio before that crop, as in timm",
        ("squash", "center", "border"),
    )

    opt: str = _field(_OPTIMISE, "adamw", "an optimiser of timm")
    opt_args: Mapping[str, Any] = _field(_OPTIMISE, {}, "its other arguments, as in betas=(0.9,0.95)")
    lr: float = _field(_OPTIMISE, 1e-3, "peak learning rate")
    lr_base_batch: int = _field(_OPTIMISE, 0, "rates are for this batch and scale with it; 0: used as they are")
    new_lr_scale: float = _field(_OPTIMISE, 1.0, "times the learning rate, for what init did not fill")
    freeze: bool = _field(_OPTIMISE, False, "train a new head alone; with init_partial, what init did not fill")
    weight_decay: float = _field(_OPTIMISE, 0.05, "not applied to vectors and what the model exempts")
    clip_grad: float = _field(_OPTIMISE, 0.0, "largest norm of the gradient, 0 is off")
    sched: str = _field(
        _OPTIMISE, "cosine", "course of the learning rate, by update", ("cosine", "tanh", "poly", "step", "none")
    )
    sched_args: Mapping[str, Any] = _field(_OPTIMISE, {}, "other arguments of timm's schedule")
    epochs: int = _field(_OPTIMISE, 10, "with the warm-up, without the cool-down")
    warmup_epochs: int = _field(_OPTIMISE, 0, "epochs of linear warm-up")
    warmup_lr: float = _field(_OPTIMISE, 0.0, "learning rate it starts from")
    min_lr: float = _field(_OPTIMISE, 0.0, "learning rate at the end")
    cooldown_epochs: int = _field(_OPTIMISE, 0, "more epochs at that rate")
    ema: float = _field(_OPTIMISE, 0.0, "decay of the averaged weights, which are then the ones evaluated; 0 is off")
    ema_warmup: bool = _field(_OPTIMISE, False, "let that decay grow from 0")
    ema_base_batch: int = _field(_OPTIMISE, 0, "the decay is for this batch, a larger one takes its power; 0: as it is")
    mesa: float = _field(_OPTIMISE, 0.0, "weight of a second loss, against what the averaged weights say; 0 is off")
    mesa_start: float = _field(_OPTIMISE, 0.25, "share of the epochs after which that loss sets in")

    batch_size: int = _field(_RUN, 128, "images of one update")
    seed: int = _field(_RUN, 0, "decides initial weights, order and augmentation")
    device: str = _field(_RUN, "auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    amp: str = _field(
        _RUN,
        "auto",
        "mixed precision; auto: bf16 where the device computes in it, fp16 on older GPUs",
        ("auto", "off", "bf16", "fp16"),
    )
    compile: bool = _field(_RUN, False, "torch.compile the model")
    channels_last: bool = _field(_RUN, False, "keep image tensors in channels-last order")
    grad_checkpointing: bool = _field(_RUN, False, "recompute activations, for less memory")
    threads: int | None = _field(_RUN, None, "CPU threads of the training process; none: PyTorch's choice")
    save_every: int = _field(_RUN, 0, "steps between saved states within an epoch; 0: at the end of each epoch")
    figures: bool = _field(_RUN, True, "draw curves.png and predictions.png (needs matplotlib)")


HINTS: dict[str, Any] = typing.get_type_hints(Recipe)
FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Recipe)}
# Names of the fields that tell of the images.
DATA_FIELDS = {name for name, field in FIELDS.items() if field.metadata["group"] == _DATA}
# Fields that may change when a run goes on: none that its result depends on.
RESUMABLE = {"device", "workers", "cache", "threads", "save_every", "compile", "figures"}

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def parse(field: str, value: Any) -> Any:
    """`value`, perhaps text, as the type of `field`; raises with the field's name."""
    if field not in FIELDS:
        raise UnknownNameError("recipe field", field, FIELDS)
    hint = HINTS[field]
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "")):
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        text = value.strip("()[] ") if isinstance(value, str) else ""
        parts = re.split(r"[,\sx]+", text.rstrip(", ")) if text else () if isinstance(value, str) else value
        parts = parts if isinstance(parts, list | tuple) else [parts]
        try:
            return tuple(_scalar(field, typing.get_args(hint)[0], part) for part in parts)
        except LinsightError:
            raise LinsightError(f"{field}={value!r} is not understood: write numbers, as in 224 or 0.5,0.5") from None
    if typing.get_origin(hint) is Mapping:
        return _options(field, value)
    return _scalar(field, hint, value)


def _scalar(field: str, kind: type, value: Any) -> Any:
    wrong = LinsightError(f"{field}={value!r} is not {_KINDS[kind]}")
    if kind is bool:
        flags = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in flags:
            raise wrong
        return flags[str(value).lower()]
    if kind is not str and isinstance(value, bool):
        raise wrong
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise wrong
    if kind is str and not isinstance(value, str | os.PathLike):
        raise wrong
    try:
        return os.fspath(value) if kind is str else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _options(field: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(name): _tuples(item) for name, item in value.items()}
    options = {}
    for part in re.split(r",(?=\s*\w+\s*=)", value) if str(value).strip() else []:
        name, equals, text = part.partition("=")
        if not equals:
            raise LinsightError(f"{field}={value!r} is not understood: write name=value,name=value")
        try:
            options[name.strip()] = _tuples(ast.literal_eval(text.strip()))
        except (SyntaxError, ValueError):
            lowered = text.strip().lower()
            options[name.strip()] = {"true": True, "false": False}.get(lowered, text.strip())
    return options


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: what JSON made of them."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def averaged(recipe: Recipe, in_chans: int) -> dict[str, tuple[float, ...]]:
    """The fields mean and std of `recipe` for images of `in_chans` channels: each channel has the average of its own.

    Empty where they are for that many already.
    """
    values = {name: getattr(recipe, name) for name in ("mean", "std")}
    other = {name: numbers for name, numbers in values.items() if len(numbers) not in (0, in_chans)}
    return {name: (round(sum(numbers) / len(numbers), 6),) * in_chans for name, numbers in other.items()}


_SHARES = ("val_fraction", "hflip", "re_prob", "mixup_prob", "mixup_switch_prob", "smoothing", "drop_path", "ema")
_POSITIVE = ("epochs", "batch_size", "aug_repeats", "new_lr_scale", "ratio", "std")
_LEAST, _MOST = 1e-9, 1e9
# The smallest and the largest value of a number, where they are not 0 and `_MOST`.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*_SHARES, "mesa_start"), (0, 1)),
    **dict.fromkeys(_POSITIVE, (_LEAST, _MOST)),
    **dict.fromkeys(("warmup_lr", "min_lr"), (0, 1e38)),
    "lr": (1e-38, 1e38),
    "img_size": (1, 65536),
    "from_size": (1, 65536),
    "fill": (-_MOST, _MOST),
    "num_classes": (1, 10**7),
    "threads": (1, 4096),
    "workers": (0, 4096),
    "crop_padding": (0, 65536),
    "crop_pct": (0.01, 1),
    "scale": (_LEAST, 1),
    "mean": (-_MOST, _MOST),
    "seed": (-(2**63), 2**64 - 1),
}


def _limit(low: float, high: float) -> str:
    if high >= _MOST:
        return "0 or more" if not low else "positive" if low < 1 else f"{low:g} or more"
    return f"between {low if low > _LEAST else 0:g} and {high:g}"


def change(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """`recipe` with some fields changed, values perhaps text, and all of them of their types and within their limits.

    Raises:
        UnknownNameError: no such field or choice; the nearest is offered.
        LinsightError: a value of the wrong kind or out of range.
    """
    values = {name: getattr(recipe, name) for name in FIELDS}
    return check(Recipe(**{name: parse(name, value) for name, value in {**values, **given}.items()}))


def check_value(name: str, value: Any) -> None:
    """Raise unless the field `name` can have this value, as `parse` gives it, whatever the other fields have."""
    choices = FIELDS[name].metadata["choices"]
    if choices and str(value) not in choices:
        raise UnknownNameError(name, str(value), choices)
    low, high = LIMITS.get(name, (0, _MOST))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not low <= number <= high:
            raise LinsightError(f"{name}={number!r:.24} is out of range: it must be {_limit(low, high)}")


def check(recipe: Recipe) -> Recipe:
    """`recipe` itself, if its values can be used; raises otherwise."""
    for name in FIELDS:
        check_value(name, getattr(recipe, name))
    from timm.optim import list_optimizers  # not for the sake of a command's help

    if recipe.opt not in list_optimizers():
        raise UnknownNameError("optimiser (opt)", recipe.opt, list_optimizers())
    for name, lengths in (
        ("img_size", (0, 1, 2)),
        ("from_size", (0, 1, 2)),
        ("scale", (2,)),
        ("ratio", (2,)),
        ("mean", (0, recipe.in_chans)),
        ("std", (0, recipe.in_chans)),
    ):
        if len(getattr(recipe, name)) not in lengths:
            wanted = " or ".join(str(n) for n in lengths if n)
            raise LinsightError(f"{name} takes {wanted} numbers, not {len(getattr(recipe, name))}")
    for name in ("scale", "ratio"):
        low, high = getattr(recipe, name)
        if low > high:
            raise LinsightError(f"{name}={low:g},{high:g}: the first number is the smaller one")
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise LinsightError(f"mixup and cutmix pair the images of a batch: batch_size={recipe.batch_size} must be even")
    if recipe.mesa and not recipe.ema:
        raise LinsightError(f"mesa={recipe.mesa:g} learns from averaged weights: set their decay, as in ema=0.9999")
    return recipe
