"""The steps that a host tells of itself, by which an image of any size can go through it in tiles.

A host that defines `stream_plan(self) -> StreamPlan` streams. Everything here is of one image, B = 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from linsight.ops import Tile


class Sample(NamedTuple):
    """A step from the image, or from the map of the step before, to tokens of a grid.

    run: a crop `(1, C, h, w)` that begins at multiples of `stride` -> `(1, h', w', C')`, as of the whole map.
    size: height and width of the grid, of a map of a height and width.
    stride: pixels, or old tokens, for each new token along both sides.
    margin: how many new tokens at a side the edge of a crop spoils, where the map goes on behind it.
    dim: C'.
    place: new tokens `(1, n, C')` and their tile -> the same with what depends on where they are, a position table.
    prefix: `(1, P, C')`, tokens that stand in front from here on; those of the step before end here.
    """

    run: Callable[[Tensor], Tensor]
    size: Callable[[tuple[int, int]], tuple[int, int]]
    stride: tuple[int, int]
    margin: int
    dim: int
    place: Callable[[Tensor, Tile], Tensor] | None = None
    prefix: Tensor | None = None


class Mix(NamedTuple):
    """A block of the shape of `Block`: `block(x, grid)` on tokens `(1, P + h*w, width)`.

    What mixes tokens in it are convolutions of stride 1 and cores with rounds, nothing else. Channels behind the
    first `width` pass by.
    """

    block: nn.Module
    width: int


class MapEnd(NamedTuple):
    """A map on the way of an image, for dense tasks.

    steps: how many steps are done when it is there.  norm: of its tokens `(1, n, C)`; None where it is given as it is.
    """

    steps: int
    norm: Callable[[Tensor], Tensor] | None = None


class Decode(NamedTuple):
    """A way from maps to an answer for each pixel, which sees a few tokens around.

    run: parts of the maps `(1, C_i, h_i, w_i)`, and height and width of the part of the image that they are of
        -> `(1, K, h, w)`.
    strides: of these maps, in pixels.
    step: parts of an image begin at whole multiples of it, in pixels.
    margin: how many steps at a side the edge of a part spoils, where the image goes on behind it.
    classes: K.
    begin: the last map, whole `(1, C, h, w)` -> what stands in its place.
    """

    run: Callable[[Sequence[Tensor], tuple[int, int]], Tensor]
    strides: tuple[int, ...]
    step: int
    margin: int
    classes: int
    begin: Callable[[Tensor], Tensor] | None = None


class StreamPlan(NamedTuple):
    """The way of an image through a host.

    steps: what happens in order, from a `Sample`.
    norm: the last norm, of tokens `(1, n, C)`.
    head: logits, or with True the features before the classifier, of the normed prefix `(1, P, C)` and the mean of
        the other normed tokens `(1, 1, C)`; None where the host pools in another way.
    pooled: normed tokens `(1, n, C)` -> those of which `head` takes the mean, where they are others.
    maps: those that `features_only` gives, in order.
    decode: what makes of them the answer of a dense task.
    """

    steps: tuple[Sample | Mix, ...]
    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor, Tensor, bool], Tensor] | None
    pooled: Callable[[Tensor], Tensor] | None = None
    maps: tuple[MapEnd, ...] = ()
    decode: Decode | None = None


@runtime_checkable
class Streams(Protocol):
    """A host that tells its steps."""

    def stream_plan(self) -> StreamPlan:
        """The steps; raises a CapabilityError for a form of the host that cannot stream."""
        ...


def sampled(*modules: nn.Module) -> tuple[tuple[int, int], int]:
    """Stride and margin of the convolutions in `modules`, which are run in their order."""
    convs = [part for module in modules for part in module.modules() if isinstance(part, nn.Conv2d)]
    strides, worst = [], 0
    for axis in (0, 1):
        jump, before, behind = 1, 0, 0  # of an output at j: it reads from j * jump - before to j * jump + behind
        for conv in convs:
            padding = conv.padding[axis]
            assert isinstance(padding, int)
            before += jump * padding
            behind += jump * ((conv.kernel_size[axis] - 1) * conv.dilation[axis] - padding)
            jump *= conv.stride[axis]
        worst = max(worst, -(-before // jump), -((jump - 1 - behind) // jump))
        strides.append(jump)
    return (strides[0], strides[1]), worst
