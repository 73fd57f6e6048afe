"""The first convolution of a checkpoint, for images of another number of channels."""

from typing import Any

from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn


def adapt_stem(model: nn.Module, key: str, tensor: Tensor, target: Tensor) -> tuple[Tensor, str] | None:
    """Filters of other channels as timm makes them of those for RGB, and a line that says so; None for all else.

    Filters for RGB are summed for one channel, else repeated and scaled by 3 / channels. Those for grey images are
    repeated, each the nth part, so that a grey image in n equal channels gives what it gave.
    """
    old, new = (t.shape[1] if t.ndim == 4 else 0 for t in (tensor, target))
    if old == new or old not in (1, 3) or not _is_stem(model, key):
        return None
    if tensor.shape[:1] + tensor.shape[2:] != target.shape[:1] + target.shape[2:]:
        return None
    adapted = adapt_input_conv(new, tensor, base_chans=old)
    how = "summed" if new == 1 else f"repeated, times {old}/{new}"
    return adapted, f"from {old} to {new} channels ({how})"


def stem_clue(model: nn.Module, key: str, old: str, new: str) -> str:
    """The way out where the filters of a first convolution, of two shapes, cannot be adapted; or nothing."""
    given, wanted = old.split("x"), new.split("x")
    if len(given) != 4 or len(wanted) != 4 or given[1] == wanted[1] or not _is_stem(model, key):
        return ""
    return (
        f"{given[1]} channels of images in the checkpoint, {wanted[1]} in the model: build it with in_chans={given[1]}"
    )


def _is_stem(model: nn.Module, key: str) -> bool:
    """True for the weight of a convolution that sees images, by timm's configuration of the model."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("first_conv") or ()
    names = [names] if isinstance(names, str) else names
    return key.removeprefix("model.") in {f"{name}.weight" for name in names}
