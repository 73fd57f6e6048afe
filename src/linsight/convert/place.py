"""The places of the tokens of a model that does not tell its attention of them."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Grid

from ._place import GridLike, locate


@dataclasses.dataclass(eq=False)
class Place:
    """Where the tokens of a model lie, shared by all of its converted layers.

    grid: height and width in tokens, or "1d" for a sequence.  prefix: tokens in front, as a class token.
    """

    grid: GridLike = "1d"
    prefix: int = 0

    def of(self, x: Tensor) -> Grid:
        """The grid of the tokens `x` `(B, N, C)`.

        Raises:
            LinsightError: N tokens do not fit it.
        """
        return locate(self.grid, self.prefix, x)


@dataclasses.dataclass(eq=False)
class Locator:
    """A forward pre-hook of the module that is given images `(B, C, H, W)`: it keeps a `Place` up to date.

    patch: height and width of a token, in pixels.  names: of the argument, where it is given by name.
    padded: images are padded up to whole patches; else what is left over is cut off.
    """

    place: Place
    patch: tuple[int, int]
    names: tuple[str, ...] = ("x", "pixel_values", "hidden_states")
    padded: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the grid by the size of the images."""
        given = [kwargs[name] for name in self.names if kwargs.get(name) is not None]
        images = args[0] if args else (given[0] if given else None)
        if not isinstance(images, Tensor) or images.ndim != 4:
            return
        height, width = (
            -(-side // step) if self.padded else side // step
            for side, step in zip(images.shape[-2:], self.patch, strict=True)
        )
        if height < 1 or width < 1:
            raise LinsightError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels are smaller than a patch of "
                f"{self.patch[0]}x{self.patch[1]}"
            )
        self.place.grid = (height, width)

    def on(self, module: nn.Module) -> None:
        """Begin to listen."""
        module.register_forward_pre_hook(self, with_kwargs=True)
