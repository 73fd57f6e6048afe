"""Models and runs that nobody trained, small and quick to make."""

import json

import torch
from torch import nn

from linsight.tasks import ClassifyRecipe, record_of, task_of
from linsight.train.model import save

CLASSES = ("blue", "green", "red")
SMALL = ClassifyRecipe(
    model="vit_tiny",
    attention="agent",
    attention_options={"agents": 4},
    model_args={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    img_size=(24, 16),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    interpolation="bilinear",
    crop_pct=0.9,
    eval_crop="center",
    fill=3.0,
    data="/data/secret/colours",
    data_dir="/data/secret/cache",
    init="/data/secret/runs/old/best.safetensors",
    epochs=3,
)
# One map of 16 channels.
TINY = {
    "model": "compact_pico",
    "attention": "linear",
    "model_args": {"stem": ((8, 1),), "stages": ((16, 1, 2),)},
    "in_chans": 3,
    "mean": (0.4, 0.5, 0.6),
    "interpolation": "bilinear",
}
SEGMENT = record_of("segment")(**TINY, decoder_width=8, img_size=(24, 32), ignore=None)
DETECT = record_of("detect")(
    **TINY, pyramid_width=8, head_width=16, detections=30, eval_side=40, longest=64, least_score=0.3, shown_score=0.3
)
SUMMARY = {"top1": 91.25, "top5": 100.0, "epochs": 3, "train_images": 300, "folder": "/data/secret/run", "classes": 3}


def write_run(folder, recipe=SMALL, classes=CLASSES, summary=SUMMARY):
    """A finished run, of weights that nobody trained."""
    folder.mkdir(parents=True)
    model = task_of(recipe, {"classes": classes}).build()
    for p in model.parameters():
        if p.ndim > 1 or recipe.task == "classify":
            torch.nn.init.normal_(p, std=0.2)
    save(folder / "best.safetensors", model.state_dict(), recipe, {"classes": classes})
    (folder / "config.json").write_text(json.dumps({"name": "x", "recipe": recipe.values(), "data": {}, "threads": 1}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Small(nn.Module):
    """A classifier of any image, in three operators."""

    def __init__(self, channels=3, classes=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))
