"""Packed batches: images of different grids one behind the other in one sequence, without padding.

    pack      images (N_0, C), (N_1, C) ...  ->  x (1, N_0 + N_1 + ..., C) and its layout

Layers that mix tokens run on the images of equal grids as one batch, one call for each distinct grid: so every image
gets what it gets alone, whatever is computed. Grids are Python numbers, so no step waits for a device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linsight.errors import LinsightError

from .layout import Grid, Layout
from .sizes import traced, unflatten


def pack(images: Sequence[Tensor], grids: Sequence[Grid | tuple[int, int]]) -> tuple[Tensor, Layout]:
    """Sequences `(N_i, C)` and the grid of each -> `(1, sum of N_i, C)` and its layout.

    Raises:
        LinsightError: an image has not as many tokens as its grid.
    """
    layout = Layout.packed(grids)
    if len(images) != len(layout.grids):
        raise LinsightError(f"{len(images)} images, but {len(layout.grids)} grids: give each image its own")
    for i, (image, grid) in enumerate(zip(images, layout.grids, strict=True)):
        if image.ndim != 2 or image.shape[0] != grid.tokens:
            raise LinsightError(f"image {i} has shape {tuple(image.shape)}, but its grid needs ({grid.tokens}, C)")
    return torch.cat(list(images))[None], layout


def unpack(x: Tensor, layout: Layout) -> list[Tensor]:
    """Cut `(1, sum of N_i, ...)` into the `(N_i, ...)` of each image, in order."""
    return list(x.squeeze(0).split([grid.tokens for grid in layout.grids]))


class Groups:
    """The images of a packed batch by their grids: those of one group are stacked.

    Of several layouts, as those of queries and of their context, the i-th images of all belong together.

    Raises:
        LinsightError: the layouts have not as many images.
    """

    def __init__(self, *layouts: Layout) -> None:
        counts = [len(layout.grids) for layout in layouts]
        if not counts[0] or len(set(counts)) > 1:
            said = " and ".join(str(count or "none") for count in counts)
            raise LinsightError(f"the i-th packed image reads the i-th packed context, but their images are {said}")
        found: dict[tuple[Grid, ...], list[int]] = {}
        for i, grids in enumerate(zip(*(layout.grids for layout in layouts), strict=True)):
            found.setdefault(grids, []).append(i)
        self.grids = list(found)  # one of each layout, for each group
        self._members = list(found.values())
        self._lengths = [[grid.tokens for grid in layout.grids] for layout in layouts]

    def split(self, x: Tensor, side: int = 0) -> list[Tensor]:
        """Cut `(1, sum of N_i, ...)`, which lies as layout `side` says, into `(images, N, ...)` of each group."""
        lengths = self._lengths[side]
        if not traced() and x.shape[:2] != (1, sum(lengths)):
            raise LinsightError(
                f"a tensor of shape {tuple(x.shape)} came with packed images: give (1, {sum(lengths)}, ...)"
            )
        if len(self._members) == 1:
            return [unflatten(x, 1, (len(lengths), lengths[0])).squeeze(0)]
        pieces = x.split(lengths, dim=1)  # at once: the gradient of slices would be as many whole sequences
        return [torch.cat([pieces[i] for i in group]) if group[1:] else pieces[group[0]] for group in self._members]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join `(images, n, ...)` of each group to `(1, sum of n_i, ...)`, images in their order."""
        if len(parts) == 1:
            return parts[0].flatten(0, 1)[None]
        pieces: dict[int, Tensor] = {}
        for group, part in zip(self._members, parts, strict=True):
            pieces.update(zip(group, part.split(1), strict=True))
        return torch.cat([pieces[i] for i in range(len(pieces))], dim=1)


def each_grid(run: Callable[[Tensor, Layout], Tensor], x: Tensor, layout: Layout) -> Tensor:
    """`run(x, layout)`; of a packed batch, `run` on each group of images with equal grids, joined in order."""
    if not layout.is_packed:
        return run(x, layout)
    groups = Groups(layout)
    return groups.join([run(part, Layout(grid)) for part, (grid,) in zip(groups.split(x), groups.grids, strict=True)])
