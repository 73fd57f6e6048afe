"""The door of every model: one line for images that it cannot take."""

from typing import Any, NoReturn

from torch import Tensor

from linsight.attention import check_kind
from linsight.errors import LinsightError
from linsight.ops import traced


def check_images(model: Any, x: Tensor) -> None:
    """Raise a LinsightError unless `x` is `(B, in_chans, H, W)` with the model's dtype, on its device."""
    if traced(x):
        return
    channels = model.in_chans
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.shape[2] * x.shape[3]:
        said = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise LinsightError(f"images are {said}: this model takes (batch, {channels}, height, width)")
    check_kind(x, next(model.parameters(), None), "images", "model")


def refuse_fx(what: str) -> NoReturn:
    """Raise for a `Proxy` that has come to what torch.fx cannot follow."""
    raise LinsightError(
        f"torch.fx cannot follow {what}: take features by forward_intermediates or features_only=True, or a graph by "
        f"torch.export"
    )


class CheckedImages:
    """A class of timm behind this one sees images that were looked at."""

    def forward_features(self, x: Tensor, *others: Any, **named: Any) -> Any:
        """As timm's."""
        check_images(self, x)
        return super().forward_features(x, *others, **named)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *others: Any, **named: Any) -> Any:
        """As timm's."""
        check_images(self, x)
        return super().forward_intermediates(x, *others, **named)  # type: ignore[misc]
