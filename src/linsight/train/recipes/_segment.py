"""Recipes of the task `segment`: the published schedules on ADE20K, and our own for a few photographs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from linsight.tasks.records import SegmentRecipe

from ._base import Shipped

MASKS = "masks"  # the recipe of a run that learns masks and names none
_IMAGES, _BATCH = 20_210, 16  # images of ADE20K to train on, and of an update, on 8 GPUs

# With AdamW, from the weights of a classifier; crops of 512 pixels, images whose shorter side is 512 are evaluated.
ADE20K = SegmentRecipe(
    data="ade20k",
    ignore=0,
    img_size=(512,),
    interpolation="bilinear",
    color_jitter=0.4,
    eval_side=512,
    opt="adamw",
    lr_base_batch=_BATCH,
    batch_size=_BATCH,
    sched="poly",
    init_partial=True,
    amp="off",
)
# Updates, and how they go. The fresh norms of maps are not in the weights of a classifier.
_SCHEDULES: dict[str, dict[str, Any]] = {
    "upernet": {"updates": 160_000, "lr": 6e-5, "weight_decay": 0.01, "warmup_updates": 1500, "warmup_lr": 6e-11},
    "semantic_fpn": {"updates": 40_000, "lr": 2e-4, "weight_decay": 1e-4, "sched_args": {"decay_rate": 0.9}},
}
_SHORT = {"upernet": "upernet", "semantic_fpn": "fpn"}


class Row(NamedTuple):
    """A published segmenter: mean intersection over union on ADE20K's validation images, in percent."""

    model: str
    decoder: str
    drop_path: float
    miou: float


ROWS = (
    Row("agent_pvt_tiny_dense", "semantic_fpn", 0.1, 40.18),
    Row("agent_pvt_small_dense", "semantic_fpn", 0.1, 44.18),
    Row("agent_pvt_medium_dense", "semantic_fpn", 0.2, 44.30),
    Row("agent_pvt_large_dense", "semantic_fpn", 0.1, 46.52),
    Row("agent_swin_tiny_dense", "upernet", 0.3, 46.68),
    Row("agent_swin_small_dense", "upernet", 0.3, 48.08),
    Row("agent_swin_base_dense", "upernet", 0.5, 48.73),
    Row("mlla_base_dense", "upernet", 0.5, 51.9),
    Row("h_vittt_tiny_dense", "upernet", 0.2, 48.0),
    Row("h_vittt_small_dense", "upernet", 0.4, 50.2),
    Row("h_vittt_base_dense", "upernet", 0.5, 51.7),
)

# From scratch, on a few hundred images of some hundred pixels. Maps at strides 4, 8 and 16.
_MASKS = SegmentRecipe(
    model="compact_nano",
    attention="inline",
    model_args={"stem": ((32, 2),), "stages": ((64, 1, 2), (128, 2, 4), (256, 2, 8))},
    decoder_width=128,
    data="masks",
    img_size=(256,),
    resize=(0.5, 1.5),
    interpolation="bilinear",
    color_jitter=0.3,
    class_weights="balanced",
    opt="nmuon",
    lr=2e-3,
    weight_decay=0.05,
    epochs=100,
    warmup_epochs=3,
    batch_size=8,
    channels_last=True,
    cache="memory",
)


def published_segmenters() -> Iterator[tuple[str, Shipped]]:
    """The recipes of published segmenters, by name."""
    for row in ROWS:
        name = f"{row.model.removesuffix('_dense')}_{_SHORT[row.decoder]}"
        schedule = dict(_SCHEDULES[row.decoder])
        updates = schedule.pop("updates")
        epochs = round(updates * _BATCH / _IMAGES)
        recipe = ADE20K.changed(
            model=row.model, decoder=row.decoder, drop_path=row.drop_path, epochs=epochs, **schedule
        )
        about = (
            f"{row.model.removesuffix('_dense')} with {row.decoder} on ADE20K: {row.miou} % mIoU, {updates // 1000}k "
            f"updates at a batch of {_BATCH}. linsight train --recipe {name} --data ADE20K --init WEIGHTS"
        )
        yield name, Shipped(about, recipe, published=True)


OWN_SEGMENTERS = {
    MASKS: Shipped(
        "a class for each pixel of a few hundred photographs of one's own, from scratch, on one device. "
        "linsight train --recipe masks --data FOLDER",
        _MASKS,
    )
}
