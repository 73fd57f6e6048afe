"""The doors of every model: one line for images, maps and pooling that it cannot take or give."""

from collections.abc import Collection
from typing import Any, NoReturn

from torch import Tensor

from linsight.attention import check_kind
from linsight.errors import LinsightError
from linsight.ops import traced

from .indices import Indices, in_order


def check_images(model: Any, x: Tensor) -> None:
    """Raise a LinsightError unless `x` is `(B, in_chans, H, W)` with the model's dtype, on its device."""
    if traced(x):
        return
    channels = model.in_chans
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.shape[2] * x.shape[3]:
        said = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise LinsightError(f"images are {said}: this model takes (batch, {channels}, height, width)")
    check_kind(x, next(model.parameters(), None), "images", "model")


def check_format(output_fmt: str, known: Collection[str] = ("NCHW",)) -> None:
    """Raise unless maps are asked for in a format that a host has."""
    if output_fmt not in known:
        raise LinsightError(f"output_fmt='{output_fmt}' is not one of {', '.join(known)}")


POOLS = ("avg", "max", "avgmax", "catavgmax", "")  # timm's, of maps
_FAST = ("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")  # the same, written otherwise


def check_pool(name: Any, known: Collection[str] = POOLS) -> None:
    """Raise, naming the `known` ones, unless `name` is a way to pool the last map."""
    if name not in known and not (known is POOLS and name in _FAST):
        raise LinsightError(f"global_pool={name!r} is not one of {', '.join(map(repr, known))}")


def check_pooled(name: str, num_classes: int) -> None:
    """Raise where classes are asked of a map that is not pooled."""
    if not name and num_classes:
        raise LinsightError("global_pool='' leaves a map, which the classifier cannot take: pass num_classes=0, too")


def refuse_fx(what: str) -> NoReturn:
    """Raise for a `Proxy` that has come to what torch.fx cannot follow."""
    raise LinsightError(
        f"torch.fx cannot follow {what}: take features by forward_intermediates or features_only=True, or a graph by "
        f"torch.export"
    )


class CheckedImages:
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
        """As timm's; maps come in the order of their places."""
        check_images(self, x)
        check_format(output_fmt)
        taken = in_order(indices, self.maps)
        return super().forward_intermediates(x, taken, norm, stop_early, output_fmt, intermediates_only)  # type: ignore[misc]

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need; their places, in order."""
        taken: list[int] = super().prune_intermediate_layers(in_order(indices, self.maps), prune_norm, prune_head)  # type: ignore[misc]
        return taken
