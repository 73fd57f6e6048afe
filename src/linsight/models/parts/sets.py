"""The doors of models of sets, as of points and of bags: one line for what they cannot take."""

from typing import Any

import torch
from torch import Tensor

from linsight.attention import check_kind
from linsight.errors import LinsightError


def check_members(x: Any, width: int, weight: Any, *, name: str, of: str, axes: int = 3) -> None:
    """Raise a LinsightError unless `x` is `(batch, N, width)`, or `(N, width)` by `axes`, in the dtype of `weight`.

    name, of: what `x` is called, and its members. An empty batch is none; a set without a member has no answer.
    """
    if not isinstance(x, Tensor) or x.ndim != axes or x.shape[-1] != width or (axes == 3 and not x.shape[1]):
        said = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        wanted = f"(batch, {of}, {width}), of one or more {of}" if axes == 3 else f"({of}, {width})"
        raise LinsightError(f"{name} are {said}: this model takes {wanted}")
    check_kind(x, weight, name, "model")


def check_same_place(x: Tensor, **others: Any) -> None:
    """Raise a LinsightError unless what comes beside `x` is a tensor on its device."""
    for name, other in others.items():
        if not isinstance(other, Tensor) or other.device != x.device:
            where = f"on {other.device}" if isinstance(other, Tensor) else f"a {type(other).__name__}"
            raise LinsightError(f"{name} is {where}: pass a tensor on {x.device}, as the others")


def check_kept(keep: Any, x: Tensor, of: str) -> None:
    """Raise a LinsightError unless `keep`, if there is one, is `(batch, N)` bool, beside `x` `(batch, N, ...)`."""
    if keep is None:
        return
    check_same_place(x, keep=keep)
    if keep.dtype != torch.bool or keep.shape != x.shape[:2]:
        raise LinsightError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}: it must be bool of (batch, {of}), {tuple(x.shape[:2])}"
        )
