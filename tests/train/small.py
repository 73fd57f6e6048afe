"""A small model and small images."""

import json

import numpy as np
import torch
from PIL import Image

# Two blocks on 16 tokens.
TINY = {
    "model": "vit_tiny",
    "attention": "inline",
    "img_size": 8,
    "model_args": "patch_size=2,embed_dim=16,depth=2,num_heads=2,global_pool=avg,class_token=False",
    "device": "cpu",
    "amp": "off",
    "figures": False,
    "report": False,
    "workers": 0,
    "epochs": 2,
    "warmup_epochs": 1,
}


def colours(folder, counts, size=(12, 10), suffix=".png"):
    """A folder of class folders: images of one colour a class, with a little noise."""
    rng = np.random.default_rng(0)
    for level, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 40, (size[1], size[0], 3)) + np.eye(3, dtype=int)[level % 3] * 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}{suffix}")
    return folder


def truncate(path):
    """A file cut in its middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def assert_same_end(one, other):
    """Two runs have the same metrics, but for times, and bit for bit the same weights."""
    found = []
    for folder in (one, other):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([{name: row[name] for name in row.keys() - {"seconds", "images_per_second"}} for row in rows])
    assert found[0] == found[1]
    ours, theirs = (torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
