"""A run on three colours, and a stand-in of the Hub."""

import json
import pathlib
import sys

import pytest
import torch
from huggingface_hub import constants

from linsight.recipe import Recipe
from linsight.train.model import build, save

sys.path.append(str(pathlib.Path(__file__).parent))  # the stand-in is beside this file
from hub_server import TOKEN, serving

CLASSES = ("blue", "green", "red")
SMALL = Recipe(
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
SUMMARY = {"top1": 91.25, "top5": 100.0, "epochs": 3, "train_images": 300, "folder": "/data/secret/run", "classes": 3}


def write_run(folder, recipe=SMALL, classes=CLASSES, summary=SUMMARY):
    """A finished run, of weights that nobody trained."""
    folder.mkdir(parents=True)
    model = build(recipe, len(classes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    save(folder / "best.safetensors", model.state_dict(), recipe, classes)
    (folder / "config.json").write_text(json.dumps({"name": "x", "recipe": vars(recipe), "data": {}, "threads": 1}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    torch.manual_seed(0)
    return write_run(tmp_path_factory.mktemp("runs") / "colours")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, which huggingface_hub takes for the Hub, and who is logged in."""
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
