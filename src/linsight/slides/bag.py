"""From a slide to a bag: tiles that have tissue go through a backbone, one vector each."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data import Picture, opened
from linsight.errors import ImageError, LinsightError
from linsight.runtime.files import replacing, writing
from linsight.runtime.finite import require_finite
from linsight.streaming.source import Source

_GREY = 0.05  # saturation up to which a pixel is glass
_SEEN = 1024  # most pixels of a side of the small picture of a slide
_KEYS = ("features", "places", "picture")


@dataclasses.dataclass(frozen=True)
class Bag:
    """The tiles of a slide that have tissue.

    features: `(N, F)` float32.
    places: `(N, 2)`, row and column of each tile on the grid of all tiles.
    picture: the whole slide, small, `(3, rows * p, columns * p)` uint8: p pixels for the side of a tile.
    grid: rows and columns of tiles.
    tile: side of a tile in pixels of the slide.
    """

    features: Tensor
    places: Tensor
    picture: Tensor
    grid: tuple[int, int]
    tile: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to `path`, a file of safetensors, whole or not at all.

        Raises:
            LinsightError: it cannot be written.
        """
        about = {"tile": str(self.tile), "rows": str(self.grid[0]), "columns": str(self.grid[1])}
        tensors = {name: getattr(self, name).contiguous() for name in _KEYS}
        target = pathlib.Path(path)
        with writing(target), replacing(target) as temporary:
            temporary.write_bytes(save(tensors, about))


def load_bag(path: str | os.PathLike[str]) -> Bag:
    """The bag that `Bag.save` wrote.

    Raises:
        LinsightError: there is no such file, or it is no bag.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _KEYS}
        return Bag(**tensors, grid=(int(about["rows"]), int(about["columns"])), tile=int(about["tile"]))
    except FileNotFoundError:
        raise LinsightError(f"no such bag: '{path}'") from None
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise LinsightError(f"'{path}' is no bag of tiles: make one with embed_slide(...).save(path)") from error


def embed_slide(
    model: nn.Module,
    image: Any,
    *,
    tile: int | None = None,
    size: tuple[int, int] | None = None,
    tissue: float = 0.05,
    batch_size: int = 64,
    level: int | None = None,
    mpp: float | None = None,
    fill: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    report: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Bag:
    """The features of the tiles of a slide, of any size, of which a row of tiles is read at a time.

    Tiles lie on a grid from the top left corner; those at the right and bottom are filled up with white. A tile is kept
    where enough of it is tissue: pixels whose colours differ by more than 5 % of the brightest; images that are not of
    three channels keep all.

    Args:
        model: a backbone in evaluation mode, of linsight or timm: its features before the classifier are taken. Of any
            other module the outputs are, which are to be `(B, F)`.
        image: a file or an array, as of `linsight.stream`.
        tile: side of a tile in pixels of the slide; None: that of the images of the model.
        size: height and width of the images of the model, which tiles are resized to; None: as the model tells.
        tissue: the least share of a tile that is tissue; 0 keeps all tiles.
        batch_size: how many tiles the model sees at a time.
        level, mpp, fill, mean, std, note: as of `linsight.stream`.
        report: called as `report(done, total)` after each row of tiles, with numbers of tiles.

    Raises:
        LinsightError: no tile has tissue, or the model gives no vectors, or what is no number; as an ImageError, the
            image or a part of it cannot be read.
        MissingExtraError: the file needs a package that is not installed.
    """
    if model.training:
        raise LinsightError("the model is in training mode, where layers are random: call model.eval()")
    if (tile is not None and tile < 1) or batch_size < 1 or not 0 <= tissue <= 1:
        raise LinsightError(f"tile={tile}, batch_size={batch_size}, tissue={tissue}: give 1 or more, and a share")
    known = resolve_model_data_config(model)
    channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)
    mean, std = (_statistic(known[key], given, channels) for key, given in (("mean", mean), ("std", std)))
    embedded = getattr(getattr(model, "patch_embed", None), "img_size", None)  # of a model made for another size
    size = size or embedded or tuple(known["input_size"][-2:])
    assert size is not None
    side = tile or max(size)
    like = next(model.parameters())
    features: list[Tensor] = []
    places: list[tuple[int, int]] = []
    with opened(image, channels, level=level, mpp=mpp, fill=fill) as (pixels, name), torch.inference_mode():
        source = Source(pixels, mean, std, name, fill)
        if note is not None and isinstance(pixels, Picture):
            for line in pixels.notes:
                note(f"{name} has {line}")
        grid = (-(-source.size[0] // side), -(-source.size[1] // side))
        small = max(1, min(32, side, _SEEN // max(grid)))
        picture = torch.zeros(3, grid[0] * small, grid[1] * small, dtype=torch.uint8)
        for row in range(grid[0]):
            kept: list[Tensor] = []
            for column, colours in enumerate(_row(source, row, side)):
                spot = F.adaptive_avg_pool2d(colours, small)
                spot = spot if channels == 3 else spot.mean(0, keepdim=True).expand(3, -1, -1)
                down, right = row * small, column * small
                picture[:, down : down + small, right : right + small] = (spot.clamp(0, 1) * 255).round().byte()
                if _tissue(colours) >= tissue:
                    places.append((row, column))
                    kept.append((colours - source.mean) / source.std)
            for first in range(0, len(kept), batch_size):
                batch = torch.stack(kept[first : first + batch_size])
                features.append(require_finite(_features(model, _sized(batch, size).to(like)), name).float().cpu())
            if report is not None:
                report((row + 1) * grid[1], grid[0] * grid[1])
        if not places:
            raise ImageError(f"no tile of {side} pixels of {name} is tissue to a share of {tissue:g}: pass tissue=0")
    return Bag(torch.cat(features).clone(), torch.tensor(places), picture, grid, side)


def _statistic(known: Sequence[float], given: Sequence[float] | None, channels: int) -> tuple[float, ...]:
    """One value a channel, of a model that may know of colours alone."""
    values = tuple(known if given is None else given)
    if given is not None and len(values) != channels:
        raise LinsightError(f"mean= and std= have {len(values)} values, and the model takes {channels} channels")
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _row(source: Source, row: int, side: int) -> Iterator[Tensor]:
    """The tiles `(C, side, side)` of a row in colours of 0 to 1, white where there is no image."""
    height, width = source.size
    rows = (row * side, min((row + 1) * side, height))
    for left in range(0, width, side):
        columns = (left, min(left + side, width))
        colours = source.read(rows, columns)[0] * source.std + source.mean
        yield F.pad(colours, (0, side - (columns[1] - columns[0]), 0, side - (rows[1] - rows[0])), value=1.0)


def _tissue(colours: Tensor) -> float:
    """The share of pixels of `(C, h, w)` that have a colour; 1 where there are no colours."""
    if colours.shape[0] != 3:
        return 1.0
    brightest = colours.amax(0)
    return float((brightest - colours.amin(0) > _GREY * brightest).float().mean())


def _sized(batch: Tensor, size: tuple[int, int]) -> Tensor:
    if batch.shape[-2:] == size:
        return batch
    return F.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)


def _features(model: Any, batch: Tensor) -> Tensor:
    """One vector for each image of a batch."""
    if hasattr(model, "forward_head") and hasattr(model, "forward_features"):
        found: Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)
    else:
        found = model(batch)
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise LinsightError(f"a {type(model).__name__} gives {shape} for tiles: a bag takes one vector each, (B, F)")
    return found
