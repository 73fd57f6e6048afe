"""The recipes that papers share, and how those of their tables are made of them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from linsight.recipe import Recipe
from linsight.tasks import ClassifyRecipe

if TYPE_CHECKING:
    from linsight.models import Training

GPUS = 8  # GPUs that the published commands are for


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
IMAGENET = ClassifyRecipe(
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

_PVT = {"warmup_lr": 1e-6, "min_lr": 1e-5, "warmup_epochs": 5, "cooldown_epochs": 10, "clip_grad": 0.0}
# DeiT's own (arXiv 2012.12877), at a batch of 1024; its warm-up and last rate do not scale with the batch.
_DEIT = {
    "color_jitter": 0.3,
    "warmup_epochs": 5,
    "warmup_lr": 5e-7,
    "min_lr": 5e-6,
    "clip_grad": 0.0,
    "aug_repeats": 3,
    "amp": "auto",
}
_CSWIN = {**_PVT, "warmup_epochs": 20}
# Changes of it by hosts and families; `_384` is fine-tuning at 384 pixels.
BASES: dict[str, Mapping[str, Any]] = {
    "imagenet": {},
    "deit": _DEIT,
    # RALA's (arXiv 2411.07635), at a batch of 1024; of DeiT's script, so its warm-up and last rate do not scale either.
    "rala": {**_DEIT, "color_jitter": 0.4},
    "pvt": _PVT,
    "pvt_deep": {**_PVT, "clip_grad": 1.0},
    "swin_384": {
        "lr": 2e-5,
        "warmup_lr": 2e-8,
        "min_lr": 2e-7,
        "epochs": 30,
        "warmup_epochs": 5,
        "weight_decay": 1e-8,
    },
    "cswin": _CSWIN,
    "cswin_base": {**_CSWIN, "weight_decay": 0.1},
    "cswin_384": {
        "lr": 5e-6,
        "warmup_lr": 5e-6,
        "min_lr": 5e-7,
        "epochs": 20,
        "warmup_epochs": 0,
        "cooldown_epochs": 10,
        "weight_decay": 1e-8,
        "clip_grad": 0.0,
    },
    "dyn_perceiver": {
        "lr": 1e-3,
        "lr_base_batch": 1024,
        "warmup_lr": 0.0,
        "min_lr": 1e-6,
        "clip_grad": 0.0,
        "ema": 0.9999,
        "amp": "off",
    },
}


def published() -> Iterator[tuple[str, Shipped]]:
    """The recipes of all papers, by name."""
    from linsight.models import ARCHITECTURES, VARIANTS, default_config  # a command's help goes without

    for model, entry in (VARIANTS | ARCHITECTURES).items():
        config = default_config(model)
        seen = {"crop_pct": config["crop_pct"], "eval_crop": config["crop_mode"]}
        for row in entry.training:
            changes = {**seen, **BASES[row.base], "drop_path": row.drop_path, **row.changes}
            recipe = IMAGENET.changed(model=model, batch_size=GPUS * row.batch, **changes)
            name = row.name or model
            yield name, Shipped(_about(name, row, recipe, entry.published), recipe, published=True)


def _about(name: str, row: "Training", recipe: Recipe, known: Mapping[str, Any]) -> str:
    top1 = known.get("top1") if row.best else row.top1
    about = "about " if known.get("plotted") else ""
    result = f"{about}{top1} % top-1" if top1 else "top-1 not published"
    return (
        f"{name} on ImageNet-1K{row.start and f', from {row.start}'}: {result}{row.note and f', {row.note}'}, "
        f"{recipe.epochs} epochs at a batch of {recipe.batch_size} ({GPUS} GPUs of {row.batch}). "
        f"linsight train --recipe {name} --data IMAGENET{' --init WEIGHTS' if row.start else ''}"
    )
