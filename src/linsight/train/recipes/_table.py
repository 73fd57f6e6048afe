"""What the tables of published recipes are made of: the recipe that most share, and a row for each model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._recipe import Recipe

GPUS = 8  # that the published commands are for


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A recipe and what is known of its result.

    published: it is for a published model, and that of its paper where `about` says nothing else.
    """

    about: str
    recipe: Recipe
    published: bool = False


# ImageNet-1K from scratch, as in most of the papers. Evaluated on the centre of a square of 256/224 of the side; rates
# are for a batch of 512.
IMAGENET = Recipe(
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

# What hosts and families change of it.
Change = dict[str, Any]
DEIT: Change = {}
SWIN: Change = {}
PVT: Change = {"warmup_lr": 1e-6, "min_lr": 1e-5, "warmup_epochs": 5, "cooldown_epochs": 10, "clip_grad": 0.0}
PVT_DEEP: Change = {**PVT, "clip_grad": 1.0}
CSWIN: Change = {**PVT, "warmup_epochs": 20}
CSWIN_BASE: Change = {**CSWIN, "weight_decay": 0.1}
# Fine-tuning at 384 pixels; Swin's images go straight to the square.
SWIN_384: Change = {"lr": 2e-5, "warmup_lr": 2e-8, "min_lr": 2e-7, "epochs": 30, "warmup_epochs": 5}
SWIN_384 |= {"weight_decay": 1e-8, "crop_pct": 1.0}
CSWIN_384: Change = {"lr": 5e-6, "warmup_lr": 5e-6, "min_lr": 5e-7, "epochs": 20, "warmup_epochs": 0}
CSWIN_384 |= {"cooldown_epochs": 10, "weight_decay": 1e-8, "clip_grad": 0.0}
# Evaluated on the centre of an image whose short side is 256/224 of the side.
CENTRE: Change = {"eval_crop": "center"}
# DeiT's own (arXiv 2012.12877), at a batch of 1024; its warm-up and last rate do not scale with the batch.
DEIT_PIPELINE: Change = {
    "color_jitter": 0.3,
    "warmup_epochs": 5,
    "warmup_lr": 5e-7,
    "min_lr": 5e-6,
    "clip_grad": 0.0,
}
DEIT_PIPELINE |= {"aug_repeats": 3, "amp": "auto", **CENTRE}
# The published rule for the decay of averages: 0.9996 ** (batch of all GPUs / 4096).
AVERAGED: Change = {"ema": 0.9996, "ema_base_batch": 4096}


class Row(NamedTuple):
    """change: of `IMAGENET`.  batch: images of one GPU.  top1: in percent; "about" where it was read off a plot.
    note: what there is to say instead of a top-1, or beside it.  start: what the weights of `--init` are, where it
    starts from some.  model: the model, where it has another name.
    """

    change: Change
    batch: int
    drop_path: float
    top1: str = ""
    note: str = ""
    start: str = ""
    model: str = ""


def published(rows: Mapping[str, Row], **shared: Any) -> dict[str, Shipped]:
    """Recipes by name; `shared` is what the authors set in all of them."""
    table = {}
    for name, row in rows.items():
        changes = {**shared, **row.change, "drop_path": row.drop_path}
        recipe = dataclasses.replace(IMAGENET, model=row.model or name, batch_size=GPUS * row.batch, **changes)
        table[name] = Shipped(_about(name, row, recipe), recipe, published=True)
    return table


def _about(name: str, row: Row, recipe: Recipe) -> str:
    result = f"{row.top1} % top-1" if row.top1 else "top-1 not published"
    return (
        f"{name} on ImageNet-1K{f', from {row.start}' if row.start else ''}: {result}{row.note and f', {row.note}'}, "
        f"{recipe.epochs} epochs at a batch of {recipe.batch_size} ({GPUS} GPUs of {row.batch}). "
        f"linsight train --recipe {name} --data IMAGENET{' --init WEIGHTS' if row.start else ''}"
    )
