"""Low-rank changes of the linear maps around a mechanism: W + 2 B A (LoRA, arXiv 2106.09685, alpha = 2 r)."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from linsight.errors import LinsightError

from .mixing import Mixing

_FACTOR = 2.0  # alpha / rank


class LowRank(nn.Module):
    """A trainable change of rank `rank` to a weight `(out, in)`, zero at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1], **factory))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, **factory))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + _FACTOR * (self.b @ self.a)


@contextlib.contextmanager
def low_rank(model: nn.Module, layers: Iterable[str], rank: int) -> Iterator[None]:
    """While entered, the linear maps of these attentions, but for what is new in them, change by a low rank alone.

    At the end the changes become part of the weights.

    Raises:
        LinsightError: an attention has no linear map.
    """
    changed: dict[nn.Linear, bool] = {}  # whether it was trained
    for name in layers:
        inside = model.get_submodule(name)
        new = {id(part) for module in inside.modules() if isinstance(module, Mixing) for part in module.modules()}
        found = [part for part in inside.modules() if isinstance(part, nn.Linear) and id(part) not in new]
        if not found:
            raise LinsightError(f"{name} has no linear map inside that a low-rank change could be made of")
        changed |= {linear: linear.weight.requires_grad for linear in found}
    for linear in changed:
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))
    try:
        yield
    finally:
        for linear, trained in changed.items():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            linear.weight.requires_grad_(trained)
