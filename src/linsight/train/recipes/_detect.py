"""Recipes of the task `detect`: the published schedules on COCO, and our own for a few photographs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from linsight.tasks.records import DetectRecipe

from ._base import Shipped

OBJECTS = "objects"  # the recipe of a run that finds objects and names none
_PER_GPU, _GPUS = 2, 8

# With AdamW, at a batch of 16, from the weights of a classifier; images of 800 pixels, in training of 480 and more.
COCO = DetectRecipe(
    data="coco",
    interpolation="bilinear",
    opt="adamw",
    lr=1e-4,
    lr_base_batch=_PER_GPU * _GPUS,
    weight_decay=0.05,
    sched="multistep",
    sched_args={"decay_milestones": (8, 11)},
    epochs=12,
    warmup_updates=500,
    warmup_lr=1e-7,
    batch_size=_PER_GPU * _GPUS,
    init_partial=True,
    amp="off",
)
_SCHEDULES: dict[str, dict[str, Any]] = {
    "1x": {},
    "3x": {"epochs": 36, "sched_args": {"decay_milestones": (27, 33)}},
}
# How those of Swin, PVT and ViTTT train; images of PVT have one size.
_STYLES: dict[str, dict[str, Any]] = {
    "swin": {"part": 0.5},
    "pvt": {"sides": (800,), "lr": 2e-4, "warmup_lr": 2e-7, "weight_decay": 1e-4},
    "pvt_retinanet": {"sides": (800,), "weight_decay": 1e-4},
    "ttt": {"part": 0.5, "lr": 2e-4, "warmup_lr": 2e-7, "warmup_updates": 1000, "amp": "auto"},
}
_SHORT = {"mask_rcnn": "mask", "cascade_mask_rcnn": "cascade", "retinanet": "retinanet"}


class Row(NamedTuple):
    """A published detector: average precision of boxes and masks on COCO val2017, in percent."""

    model: str
    method: str
    schedule: str
    style: str
    drop_path: float
    boxes: float
    masks: float | None = None


def _pvt() -> Iterator[Row]:
    rates = {"tiny": (0.1, 0.1), "small": (0.2, 0.1), "medium": (0.1, 0.2), "large": (0.2, 0.3)}
    masks = {"tiny": (41.4, 38.7), "small": (44.5, 41.2), "medium": (45.9, 42.0), "large": (46.9, 42.8)}
    boxes = {"tiny": 40.3, "small": 44.1, "medium": 45.8, "large": 46.8}
    for size, (with_masks, without) in rates.items():
        name = f"agent_pvt_{size}_dense"
        yield Row(name, "mask_rcnn", "1x", "pvt", with_masks, *masks[size])
        yield Row(name, "retinanet", "1x", "pvt_retinanet", without, boxes[size])


ROWS = (
    Row("agent_swin_tiny_dense", "mask_rcnn", "1x", "swin", 0.1, 44.6, 40.7),
    Row("agent_swin_tiny_dense", "mask_rcnn", "3x", "swin", 0.1, 47.3, 42.7),
    Row("agent_swin_small_dense", "mask_rcnn", "1x", "swin", 0.1, 47.2, 42.7),
    Row("agent_swin_small_dense", "mask_rcnn", "3x", "swin", 0.1, 48.9, 43.8),
    Row("agent_swin_tiny_dense", "cascade_mask_rcnn", "1x", "swin", 0.1, 49.2, 42.7),
    Row("agent_swin_tiny_dense", "cascade_mask_rcnn", "3x", "swin", 0.1, 51.4, 44.5),
    Row("agent_swin_small_dense", "cascade_mask_rcnn", "3x", "swin", 0.1, 52.6, 45.5),
    Row("agent_swin_base_dense", "cascade_mask_rcnn", "3x", "swin", 0.4, 52.6, 45.3),
    *_pvt(),
    Row("mlla_tiny_dense", "mask_rcnn", "1x", "swin", 0.1, 46.8, 42.1),
    Row("mlla_tiny_dense", "mask_rcnn", "3x", "swin", 0.3, 48.8, 43.8),
    Row("mlla_small_dense", "mask_rcnn", "1x", "swin", 0.1, 49.2, 44.2),
    Row("mlla_small_dense", "mask_rcnn", "3x", "swin", 0.3, 50.5, 45.0),
    Row("mlla_base_dense", "mask_rcnn", "1x", "swin", 0.1, 50.5, 45.0),
    Row("h_vittt_tiny_dense", "mask_rcnn", "1x", "ttt", 0.1, 47.3, 42.8),
    Row("h_vittt_tiny_dense", "mask_rcnn", "3x", "ttt", 0.3, 48.9, 44.0),
    Row("h_vittt_small_dense", "mask_rcnn", "1x", "ttt", 0.1, 49.1, 44.1),
    Row("h_vittt_small_dense", "mask_rcnn", "3x", "ttt", 0.4, 50.5, 45.1),
    Row("h_vittt_base_dense", "mask_rcnn", "1x", "ttt", 0.1, 50.0, 44.6),
    Row("h_vittt_base_dense", "mask_rcnn", "3x", "ttt", 0.6, 51.0, 45.3),
)

# From scratch, on images of some hundred pixels; without the wide heads of the published detectors. Maps at strides 4,
# 8, 16 and 32, of which RetinaNet takes the last three.
_OBJECTS = DetectRecipe(
    model="compact_nano",
    attention="inline",
    model_args={"stem": ((32, 2),), "stages": ((64, 1, 2), (128, 2, 4), (256, 2, 8), (256, 1, 8))},
    data="objects",
    method="retinanet",
    pyramid_width=64,
    sides=(192, 224, 256, 288),
    longest=448,
    part=0.5,
    eval_side=256,
    color_jitter=0.3,
    shown_score=0.3,
    opt="nmuon",
    lr=2e-3,
    weight_decay=0.05,
    epochs=50,
    warmup_epochs=3,
    batch_size=8,
    channels_last=True,
)


def published_detectors() -> Iterator[tuple[str, Shipped]]:
    """The recipes of published detectors, by name."""
    for row in ROWS:
        model = row.model.removesuffix("_dense")
        name = f"{model}_{_SHORT[row.method]}_{row.schedule}"
        changes = {**_SCHEDULES[row.schedule], **_STYLES[row.style]}
        recipe = COCO.changed(model=row.model, method=row.method, drop_path=row.drop_path, **changes)
        masks = "" if row.masks is None else f" and {row.masks} % of masks"
        about = (
            f"{model} with {row.method} on COCO: {row.boxes} % AP of boxes{masks}, {recipe.epochs} epochs at a batch "
            f"of {recipe.batch_size} ({_GPUS} GPUs of {_PER_GPU}). linsight train --recipe {name} --data COCO "
            f"--init WEIGHTS"
        )
        yield name, Shipped(about, recipe, published=True)


OWN_DETECTORS = {
    OBJECTS: Shipped(
        "boxes in a few hundred photographs of one's own, from scratch, on one device: RetinaNet, small backbone. "
        "linsight train --recipe objects --data FOLDER",
        _OBJECTS,
    )
}
