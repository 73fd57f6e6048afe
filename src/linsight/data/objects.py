"""Objects in images: boxes, classes and outlines, as a data set for detection tells them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from linsight.errors import ImageError, MissingExtraError

from .readers import TURNS, upright

Outline = list[list[float]] | dict[str, Any]  # polygons, or COCO's run lengths


class Objects(NamedTuple):
    """The objects of an image, in the pixels of its file.

    boxes: `(N, 4)` float32, as x1, y1, x2, y2.  labels: `(N,)` int64, 0 .. K - 1.
    crowds: `(N,)` bool, of those that stand for many: they are neither learned nor counted, nor is what lies in them.
    areas: `(N,)` float32, in pixels.  size: height and width of the image.
    outlines: of each, as polygons or run lengths; empty where masks were not asked for.
    """

    boxes: Tensor
    labels: Tensor
    crowds: Tensor
    areas: Tensor
    size: tuple[int, int]
    outlines: tuple[Outline, ...] = ()

    def learned(self) -> "Objects":
        """The objects without the crowds."""
        kept = ~self.crowds
        outlines = tuple(own for own, keep in zip(self.outlines, kept.tolist(), strict=bool(self.outlines)) if keep)
        return Objects(self.boxes[kept], self.labels[kept], self.crowds[kept], self.areas[kept], self.size, outlines)

    def upright(self, orientation: int) -> "Objects":
        """The objects in the pixels of the upright image, of those that were told in pixels as they are stored.

        Raises:
            MissingExtraError: there are run lengths, and pycocotools is not installed.
        """
        turn = _Turn(self.size, orientation)
        corners = self.boxes.reshape(-1, 2, 2)
        ends = turn.points(corners)
        boxes = torch.cat([ends.amin(1), ends.amax(1)], dim=1)
        return self._replace(boxes=boxes, size=turn.size, outlines=tuple(map(turn.outline, self.outlines)))

    def runs(self) -> list[dict[str, Any]]:
        """The masks as COCO's compressed run lengths, `size` and `counts`.

        Raises:
            MissingExtraError: pycocotools is not installed.
            ImageError: an outline is damaged.
        """
        return [run_lengths(outline, self.size) for outline in self.outlines]

    def masks(self) -> Tensor:
        """The masks, uint8 `(N, H, W)` of 0 and 1; raises as `runs` does."""
        return unpacked_masks(self.runs()) if self.outlines else torch.zeros((0, *self.size), dtype=torch.uint8)


class _Turn:
    """Places in an image of `size` that is stored by an orientation, in the upright one."""

    def __init__(self, size: tuple[int, int], orientation: int) -> None:
        self.stored, self.orientation = size, orientation
        self.swapped, self.up, self.back = TURNS[orientation]
        self.size = size[::-1] if self.swapped else size

    def points(self, points: Tensor) -> Tensor:
        """Points `(..., 2)`, x and y."""
        x, y = points.flip(-1).unbind(-1) if self.swapped else points.unbind(-1)
        height, width = self.size
        return torch.stack([width - x if self.back else x, height - y if self.up else y], dim=-1)

    def outline(self, outline: Outline) -> Outline:
        if isinstance(outline, list):
            parts = (torch.tensor(part, dtype=torch.float64).reshape(-1, 2) for part in outline)
            return [self.points(part).flatten().tolist() for part in parts]
        (mask,) = unpacked_masks([run_lengths(outline, self.stored)])
        (run,) = packed_masks(torch.from_numpy(upright(mask.numpy(), self.orientation).copy())[None])
        return {**run, "counts": run["counts"].decode("ascii")}


def mask_tools() -> Any:
    """The masks of pycocotools.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingExtraError("pycocotools", "dense", "masks of objects") from error
    return mask


def run_lengths(outline: Outline, size: tuple[int, int]) -> dict[str, Any]:
    """An outline as COCO's compressed run lengths, for an image of `size`, height and width."""
    tools = mask_tools()
    if isinstance(outline, dict) and isinstance(outline["counts"], str):
        return {"size": list(size), "counts": outline["counts"].encode("ascii", "replace")}
    try:
        found = tools.frPyObjects(outline, *size)
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"an outline of an object cannot be read: {error}") from error
    return tools.merge(found) if isinstance(found, list) else found


def packed_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks `(N, H, W)`, bool or of 0 and 1, as COCO's compressed run lengths."""
    columns = np.asfortranarray(masks.to(torch.uint8).permute(1, 2, 0).cpu().numpy())  # (H, W, N)
    return mask_tools().encode(columns) if len(masks) else []


def unpacked_masks(runs: Sequence[Mapping[str, Any]]) -> Tensor:
    """Masks `(N, H, W)` of 0 and 1, uint8, of one or more of COCO's compressed run lengths.

    Raises:
        MissingExtraError: pycocotools is not installed.
        ImageError: they are damaged.
    """
    tools = mask_tools()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, about pycocotools
            found = tools.decode(list(runs))  # (H, W, N)
    except ValueError as error:
        raise ImageError(f"a mask has damaged run lengths: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(found.transpose(2, 0, 1)))


def whole_outline(outline: Any, size: tuple[int, int]) -> bool:
    """True for polygons of three points or more near the image, or run lengths that cover it.

    Others make the library that reads them fail, or take all memory.
    """
    height, width = size
    if isinstance(outline, dict):
        counts = outline.get("counts")
        if outline.get("size") != [height, width]:
            return False
        if isinstance(counts, list):
            plain = all(type(count) is int and count >= 0 for count in counts)
            return plain and sum(counts) == height * width
        return isinstance(counts, str) and bool(counts)
    return isinstance(outline, list) and bool(outline) and all(_is_polygon(part, height, width) for part in outline)


def _is_polygon(points: Any, height: int, width: int) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    try:
        found = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        return False
    reach = np.array([width, height])
    return bool((np.abs(found - reach / 2) <= 1.5 * reach).all())  # False for what is no number
