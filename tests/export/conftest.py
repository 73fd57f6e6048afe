"""Runs on three colours, a model that is exported quickly, and a stand-in of the Hub."""

import numpy as np
import pytest
import torch
from hub_server import TOKEN, serving
from huggingface_hub import constants
from PIL import Image
from small_runs import Small, write_run

from linsight.export import Facts
from linsight.train import resolve, train

TINY = {
    "model": "compact_pico",
    "attention": "linear",
    "model_args": "stem=((8,1),),stages=((16,1,2),)",
    "img_size": 16,
    "mean": (0.4, 0.5, 0.6),
    "device": "cpu",
    "amp": "off",
    "figures": False,
    "workers": 0,
    "epochs": 4,
    "warmup_epochs": 0,
    "threads": 1,
    "batch_size": 8,
    "in_chans": 3,
    "lr": 0.01,
}
CLASSES = ("blue", "green", "red $1")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of a folder for each class, of images of many sizes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for level, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 40, (17 + i, 23, 3)) + np.eye(3, dtype=int)[2 - level] * 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, data):
    """A run folder; weights as good as its few steps make them."""
    folder = tmp_path_factory.mktemp("runs") / "colours"
    torch.manual_seed(0)
    train(resolve("digits", {**TINY, "data": str(data)}), out=folder)
    return folder


@pytest.fixture
def small():
    torch.manual_seed(1)
    return Small().eval()


@pytest.fixture
def facts():
    return Facts(model="small", classes=("a", "b", "c", "d"), input_size=(3, 16, 16))


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
