"""The shipped recipes, as data. `about` says what to expect, on what, and the command."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ._recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A recipe and what is known of its result. `published`: it is that of a paper, for the model of its name."""

    about: str
    recipe: Recipe
    published: bool = False


_DIGITS = Recipe(
    model="inline_compact_pico",
    img_size=(8,),
    in_chans=1,
    val_fraction=0.2,
    crop_mode="pad",
    crop_padding=1,
    hflip=0.0,
    interpolation="bilinear",
    mean=(0.3053,),
    std=(0.3763,),
    crop_pct=1.0,
    lr=3e-3,
    epochs=15,
    warmup_epochs=2,
    batch_size=64,
    clip_grad=1.0,
    smoothing=0.1,
    workers=0,
    cache=True,
)

_CIFAR10 = Recipe(
    model="inline_compact_nano",
    img_size=(32,),
    data="torch/cifar10",
    crop_mode="pad",
    crop_padding=4,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
    crop_pct=1.0,
    eval_crop="center",
    opt="nmuon",
    lr=4e-3,
    weight_decay=0.1,
    epochs=16,
    warmup_epochs=2,
    batch_size=256,
    smoothing=0.1,
    channels_last=True,
    cache=True,
)

# What InLine (arXiv 2412.06590) and FLatten (arXiv 2308.00442) share: ImageNet-1K from scratch, on 8 GPUs.
# Evaluated on the centre of a square of 256/224 of the side; rates are for a batch of 512.
_IMAGENET = Recipe(
    model="inline_deit_tiny",
    drop_path=0.1,
    data="imagenet",
    color_jitter=0.4,
    auto_augment="rand-m9-mstd0.5-inc1",
    re_prob=0.25,
    re_mode="pixel",
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    interpolation="bicubic",
    crop_pct=0.875,
    eval_crop="squash",
    opt="adamw",
    lr=5e-4,
    lr_base_batch=512,
    weight_decay=0.05,
    clip_grad=5.0,
    epochs=300,
    warmup_epochs=20,
    warmup_lr=5e-7,
    min_lr=5e-6,
    batch_size=512,
)
_GPUS = 8

# What the hosts change of it.
_DEIT: Mapping[str, Any] = {}
_SWIN: Mapping[str, Any] = {}
_PVT = {"warmup_lr": 1e-6, "min_lr": 1e-5, "warmup_epochs": 5, "cooldown_epochs": 10, "clip_grad": 0.0}
_PVT_DEEP = {**_PVT, "clip_grad": 1.0}
_CSWIN = {**_PVT, "warmup_epochs": 20}
_CSWIN_BASE = {**_CSWIN, "weight_decay": 0.1}
# Fine-tuning at 384 pixels; Swin's images go straight to the square.
_SWIN_384 = {"lr": 2e-5, "warmup_lr": 2e-8, "min_lr": 2e-7, "epochs": 30, "warmup_epochs": 5}
_SWIN_384 |= {"weight_decay": 1e-8, "crop_pct": 1.0}
_CSWIN_384 = {"lr": 5e-6, "warmup_lr": 5e-6, "min_lr": 5e-7, "epochs": 20, "warmup_epochs": 0}
_CSWIN_384 |= {"cooldown_epochs": 10, "weight_decay": 1e-8, "clip_grad": 0.0}


class _Row(NamedTuple):
    """batch: images of one GPU.  top1: in percent; "about" where it was read off a plot.  ema: the decay.
    note: what there is to say instead of a top-1.
    """

    host: Mapping[str, Any]
    batch: int
    drop_path: float
    top1: str
    ema: float = 0.0
    note: str = "top-1 not published"


_INLINE = {
    "inline_deit_tiny": _Row(_DEIT, 512, 0.1, "74.5"),
    "inline_deit_small": _Row(_DEIT, 128, 0.1, "80.2"),
    "inline_deit_base": _Row(_DEIT, 64, 0.1, "82.3"),
    "inline_pvt_tiny": _Row(_PVT, 128, 0.1, "78.2"),
    "inline_pvt_small": _Row(_PVT, 128, 0.1, "82.0"),
    "inline_pvt_medium": _Row(_PVT_DEEP, 128, 0.3, "83.2"),
    "inline_pvt_large": _Row(_PVT_DEEP, 64, 0.3, "83.6"),
    "inline_swin_tiny": _Row(_SWIN, 128, 0.2, "82.4"),
    "inline_swin_small": _Row(_SWIN, 128, 0.3, "83.6"),
    "inline_swin_base": _Row(_SWIN, 64, 0.5, "84.1"),
    "inline_swin_base_384": _Row(_SWIN_384, 32, 0.5, ""),
    # the published rule for the decay: 0.9996 ** (batch of all GPUs / 4096)
    "inline_cswin_tiny": _Row(_CSWIN, 128, 0.2, "83.2", 0.9996 ** (1 / 4)),
    "inline_cswin_small": _Row(_CSWIN, 128, 0.4, "83.8", 0.9996 ** (1 / 4)),
    "inline_cswin_base": _Row(_CSWIN_BASE, 64, 0.5, "84.5", 0.9996 ** (1 / 8)),
    "inline_cswin_base_384": _Row(_CSWIN_384, 32, 0.7, "85.7", 0.9996 ** (1 / 16)),
}

_FLATTEN = {
    "focused_pvt_tiny": _Row(_PVT, 128, 0.1, "77.8"),
    "focused_pvt_small": _Row(_PVT, 64, 0.1, "81.7"),
    "focused_pvt_medium": _Row(_PVT_DEEP, 64, 0.3, "about 83.0"),
    "focused_pvt_large": _Row(_PVT_DEEP, 32, 0.3, "about 83.45"),
    "focused_pvt_v2_b0": _Row(_PVT, 128, 0.1, "71.1"),
    "focused_pvt_v2_b1": _Row(_PVT, 128, 0.1, "79.5"),
    "focused_pvt_v2_b2": _Row(_PVT, 128, 0.1, "82.5"),
    "focused_pvt_v2_b3": _Row(_PVT_DEEP, 128, 0.3, "about 83.7"),
    "focused_pvt_v2_b4": _Row(_PVT_DEEP, 64, 0.3, "about 84.0"),
    "focused_pvt_v2_b5": _Row(_PVT_DEEP, 64, 0.3, "", note="no recipe published, so that of B4"),
    "focused_swin_tiny": _Row(_SWIN, 128, 0.2, "82.1"),
    "focused_swin_small": _Row(_SWIN, 128, 0.3, "83.5"),
    "focused_swin_base": _Row(_SWIN, 64, 0.5, "83.8"),
    "focused_swin_base_384": _Row(_SWIN_384, 32, 0.5, "85.0"),
    "focused_cswin_tiny": _Row(_CSWIN, 256, 0.2, "83.1", 0.99984),
    "focused_cswin_small": _Row(_CSWIN, 128, 0.4, "83.8", 0.99984),
    "focused_cswin_base": _Row(_CSWIN_BASE, 64, 0.5, "84.5", 0.99982),
    "focused_cswin_base_384": _Row(_CSWIN_384, 32, 0.7, "85.5", 0.99982),
}


def _published(rows: Mapping[str, _Row], **shared: Any) -> dict[str, Shipped]:
    """Recipes by the name of their model; `shared` is what the authors set in all of them."""
    table = {}
    for name, row in rows.items():
        recipe = dataclasses.replace(
            _IMAGENET,
            model=name,
            batch_size=_GPUS * row.batch,
            drop_path=row.drop_path,
            ema=row.ema,
            **shared,
            **row.host,
        )
        table[name] = Shipped(_about(name, row, recipe), recipe, published=True)
    return table


def _about(name: str, row: _Row, recipe: Recipe) -> str:
    base = name.removesuffix("_384")
    what = "ImageNet-1K" if name == base else f"ImageNet-1K at 384 pixels, from the weights of {base}"
    result = f"{row.top1} % top-1" if row.top1 else row.note
    return (
        f"{name} on {what}: {result}, {recipe.epochs} epochs at a batch of {recipe.batch_size} ({_GPUS} GPUs of "
        f"{row.batch}). linsight train --recipe {name} --data IMAGENET{'' if name == base else ' --init WEIGHTS'}"
    )


RECIPES: dict[str, Shipped] = {
    "digits": Shipped(
        "InLine on scikit-learn's 8x8 handwritten digits: 99 % top-1, 40 seconds on 2 CPU cores. linsight train",
        _DIGITS,
    ),
    "cifar10": Shipped(
        "InLine on CIFAR-10: 84 % top-1, an hour on 2 CPU cores; a start for other small images. "
        "linsight train --recipe cifar10 --data FOLDER",
        _CIFAR10,
    ),
    "photos": Shipped(
        "InLine-DeiT-T from scratch on photographs of one's own, on one device. "
        "linsight train --recipe photos --data FOLDER",
        dataclasses.replace(_IMAGENET, data="photos", epochs=100, warmup_epochs=5, batch_size=128),
    ),
    **_published(_INLINE),
    **_published(_FLATTEN, amp="off"),  # mixed precision was not used
}
