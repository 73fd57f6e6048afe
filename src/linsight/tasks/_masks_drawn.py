"""Masks beside the images that they are of, as a picture."""

import colorsys
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from linsight.data.dense import collate
from linsight.data.images import Batch
from linsight.data.masks import NONE
from linsight.errors import LinsightError
from linsight.runtime.figures import drawing, new_figure, save_figure
from linsight.runtime.files import replacing, writing
from linsight.runtime.text import folded

_ROWS = 6
_WIDE = 256  # pixels of one of three pictures side by side


def palette(count: int) -> Any:
    """So many colours `(count, 3)` of uint8 that differ from their neighbours: steps of the golden ratio in hue."""
    found = [
        colorsys.hsv_to_rgb(0.618034 * place % 1, (0.65, 0.85, 0.5)[place % 3], (0.95, 0.7)[place % 2])
        for place in range(count)
    ]
    return np.rint(255 * np.array(found).reshape(-1, 3)).astype(np.uint8)


def coloured(mask: Any, count: int) -> Any:
    """A mask `(h, w)` as colours `(h, w, 3)` of uint8; pixels of no class are black."""
    colours = np.concatenate([palette(count), np.zeros((1, 3), np.uint8)])
    return colours[np.where(mask == NONE, count, mask)]


def side_by_side(image: Tensor, truth: Tensor, guess: Tensor, count: int) -> Image.Image:
    """An image `(C, H, W)` of uint8, its mask and a predicted one `(h, w)`, as one picture, small enough for a page."""
    height, width = truth.shape
    scale = min(1.0, _WIDE / width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = image[:3].movedim(0, -1).numpy()
    parts = [pixels if pixels.shape[-1] == 3 else pixels[..., :1].repeat(3, -1)]
    parts += [coloured(mask.numpy(), count) for mask in (truth, guess)]
    found = Image.new("RGB", (3 * size[0], size[1]))
    for place, part in enumerate(parts):
        how = Image.Resampling.NEAREST if place else Image.Resampling.BILINEAR
        found.paste(Image.fromarray(np.ascontiguousarray(part)).resize(size, how), (place * size[0], 0))
    return found


def write_masks(folder: pathlib.Path, found: Sequence[Any], values: Sequence[int]) -> list[pathlib.Path]:
    """Write the masks of predictions as NAME.png, whose values are `values` of classes, in colours; their paths.

    Raises:
        LinsightError: two images would have one name, or the folder cannot be written to.
    """
    names = [f"{pathlib.Path(entry.file).stem}.png" for entry in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LinsightError(f"two images would be written as {twice[0]}: predict them apart, into two folders")
    colours = np.zeros((256, 3), np.uint8)
    small = max(values) < 256
    if small:
        colours[list(values)] = palette(len(values))
    paths = [folder / name for name in names]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for entry, path in zip(found, paths, strict=True):
        mask = np.array(values)[entry.mask]
        image = Image.fromarray(mask.astype(np.uint8 if small else np.uint16))
        if small:
            image.putpalette(colours.tobytes())
        with writing(path), replacing(path) as temporary:
            image.save(temporary, "png")
    return paths


def draw_masks(
    path: pathlib.Path, samples: Any, answers: Callable[[Batch], Sequence[Tensor]], classes: Sequence[str]
) -> None:
    """Draw images spread over `samples`: each, its mask, and what `answers` gives for it, logits `(K, h, w)`."""
    total = len(samples)
    count = min(_ROWS, total)
    found = [samples[0, (2 * place + 1) * total // (2 * count)] for place in range(count)]
    rows = []
    for sample in found:
        if isinstance(sample, str):
            continue  # a line about a bad image
        batch = collate([sample])
        (target,) = batch.targets
        guess = answers(batch)[0].argmax(0).numpy()
        image = F.interpolate(batch.images.float(), target.own, mode="bilinear")[0]
        rows.append((image.round().to(torch.uint8), target.mask, guess))
    if rows:
        _draw(path, rows, classes)


@drawing()
def _draw(path: pathlib.Path, rows: Sequence[Any], classes: Sequence[str]) -> None:
    height = sum(mask.shape[0] / mask.shape[1] for _, _, mask in rows)
    figure = new_figure(9.6, 0.9 + 3 * height + 0.1 * len(rows))
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for line, (image, truth, guess) in zip(grid, rows, strict=True):
        picture = image[:3].permute(1, 2, 0).numpy().squeeze()
        line[0].imshow(picture, cmap="gray" if picture.ndim == 2 else None)
        line[1].imshow(coloured(truth.numpy(), len(classes)))
        shown = coloured(guess, len(classes))
        shown[truth.numpy() == NONE] //= 2
        line[2].imshow(shown)
    for axes, title in zip(grid[0], ("image", "mask", "predicted"), strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid.ravel():
        axes.axis("off")
    colours = palette(len(classes)) / 255
    there = np.unique(np.concatenate([np.unique(mask) for _, *masks in rows for mask in masks]))
    marks = [
        figure.axes[0].scatter([], [], marker="s", color=colours[place], label=folded(classes[place], 18, 1)[0])
        for place in there[there != NONE][:24]
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    save_figure(figure, path)
