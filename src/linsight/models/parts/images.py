"""The doors of every model: one line for images, maps and pooling that it cannot take or give."""

from collections.abc import Collection
from enum import Enum
from typing import Any, NoReturn

from torch import Tensor

from linsight.attention import check_kind
from linsight.errors import LinsightError
from linsight.ops import traced

from ..doors import check_whole
from .indices import Indices, in_order
from .keys import AnyKeys


def check_images(model: Any, x: Tensor) -> None:
    """Raise a LinsightError unless `x` is `(B, in_chans, H, W)` with the model's dtype, on its device."""
    if traced(x):
        return
    channels = model.in_chans
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.shape[2] * x.shape[3]:
        said = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise LinsightError(f"images are {said}: this model takes (batch, {channels}, height, width)")
    check_kind(x, next(model.parameters(), None), "images", "model")


FORMATS = ("NCHW", "NHWC")  # of maps


def check_format(output_fmt: str, known: Collection[str] = FORMATS) -> None:
    """Raise unless maps are asked for in a format that a host has."""
    if output_fmt not in known:
        shown = output_fmt.value if isinstance(output_fmt, Enum) else output_fmt
        raise LinsightError(f"output_fmt={shown!r} is not one of {', '.join(known)}")


def in_format(x: Tensor, output_fmt: str) -> Tensor:
    """A map `(B, C, H, W)` in the format that is asked for."""
    return x.permute(0, 2, 3, 1).contiguous() if output_fmt == "NHWC" else x


POOLS = ("avg", "max", "avgmax", "catavgmax", "")  # timm's, of maps
_FAST = ("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")  # the same, written otherwise


def check_pool(name: Any, known: Collection[str] = POOLS) -> None:
    """Raise, naming the `known` ones, unless `name` is a way to pool the last map."""
    if name not in known and not (known is POOLS and name in _FAST):
        raise LinsightError(f"global_pool={name!r} is not one of {', '.join(map(repr, known))}")


def check_pooled(name: str, num_classes: int) -> None:
    """Raise where classes are no whole number of 0 or more, or are asked of a map that is not pooled."""
    check_whole(0, num_classes=num_classes)
    if not name and num_classes:
        raise LinsightError("global_pool='' leaves a map, which the classifier cannot take: pass num_classes=0, too")


def refuse_fx(what: str) -> NoReturn:
    """Raise for a `Proxy` that has come to what torch.fx cannot follow."""
    raise LinsightError(
        f"torch.fx cannot follow {what}: take features by forward_intermediates or features_only=True, or a graph by "
        f"torch.export"
    )


class CheckedImages(AnyKeys):
    """A class of timm behind this one sees images and places of maps that were looked at.

    `maps` is how many maps it gives.
    """

    @property
    def maps(self) -> int:
        """How many maps there are to be taken."""
        raise NotImplementedError

    def forward_features(self, x: Tensor, *others: Any, **named: Any) -> Any:
        """As timm's."""
        check_images(self, x)
        return super().forward_features(x, *others, **named)  # type: ignore[misc]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's; maps come in the order of their places, `output_fmt="NHWC"` too."""
        check_images(self, x)
        check_format(output_fmt)
        taken = in_order(indices, self.maps)
        found = super().forward_intermediates(x, taken, norm, stop_early, "NCHW", intermediates_only)  # type: ignore[misc]
        final, maps = (None, found) if intermediates_only else found
        maps = [in_format(x, output_fmt) for x in maps]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need; their places, in order."""
        taken: list[int] = super().prune_intermediate_layers(in_order(indices, self.maps), prune_norm, prune_head)  # type: ignore[misc]
        return taken
