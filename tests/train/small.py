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
MASKS = {
    "task": "segment",
    "model": "compact_nano",
    "attention": "inline",
    "model_args": "stem=((8,1),(12,2)),stages=((16,1,2),(24,1,2))",
    "in_chans": 3,
    "decoder_width": 16,
    "img_size": 24,
    "resize": "0.9,1.2",
    "mean": "",
    "std": "",
    "device": "cpu",
    "amp": "off",
    "figures": False,
    "report": False,
    "workers": 0,
    "epochs": 20,
    "warmup_epochs": 1,
    "batch_size": 4,
    "lr": 0.01,
}
OBJECTS = {
    "task": "detect",
    "method": "mask_rcnn",
    "model": "compact_nano",
    "attention": "inline",
    "model_args": "stem=((8,1),(12,2)),stages=((16,1,2),(24,1,2))",
    "pyramid_width": 16,
    "head_width": 32,
    "sides": "48",
    "eval_side": 48,
    "longest": 64,
    "least_score": 0.01,
    "shown_score": 0.01,
    "detections": 10,
    "mean": "",
    "std": "",
    "device": "cpu",
    "amp": "off",
    "figures": False,
    "report": False,
    "workers": 0,
    "epochs": 3,
    "batch_size": 4,
    "lr": 0.004,
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


def masked_squares(folder, counts, size=(24, 32)):
    """Images of a red square on green, with a border of no class, and their masks."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = size if number % 2 or split == "train" else size[::-1]
            mask = np.zeros((height, width), np.uint8)
            top, left = rng.integers(2, height - 12), rng.integers(2, width - 12)
            mask[top : top + 10, left : left + 10] = 1
            pixels = np.stack([mask * 180, (1 - mask) * 180, mask * 0], -1) + rng.integers(0, 60, (height, width, 3))
            mask[:, 0] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(folder / "masks" / split / f"{number}.png")
    (folder / "classes.txt").write_text("ground\nsquare\n")
    return folder


def boxed_squares(folder, counts, size=(48, 60)):
    """Images of a bright square on noise, each with its box and outline."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (folder / split).mkdir()
        images, rows = [], []
        for number in range(1, count + 1):
            height, width = size if number % 2 else size[::-1]
            left, top = int(rng.integers(2, width - 26)), int(rng.integers(2, height - 26))
            pixels = rng.integers(0, 60, (height, width, 3))
            pixels[top : top + 24, left : left + 24] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            right, bottom = left + 24, top + 24
            outline = [[left, top, right, top, right, bottom, left, bottom]]
            row = {"id": number, "image_id": number, "category_id": 4, "bbox": [left, top, 24, 24], "iscrowd": 0}
            rows.append({**row, "area": 576, "segmentation": outline})
        said = {"images": images, "annotations": rows, "categories": [{"id": 4, "name": "square"}]}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(said))
    return folder
