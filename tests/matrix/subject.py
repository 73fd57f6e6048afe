"""A mechanism under test, with some of its options."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from linsight import create_attention
from linsight.attention import Capabilities, Core, Mechanism, Tokens, create_block, list_attentions, mechanism
from linsight.ops import Grid


class Subject(NamedTuple):
    """A mechanism's name and the options it is made with."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options)])

    @property
    def entry(self) -> Mechanism:
        return mechanism(self.name)

    @property
    def can(self) -> Capabilities:
        """With these options: some take a capability away."""
        return self._owner().capabilities

    @property
    def sort(self) -> tuple[Any, ...]:
        """What mechanisms of one kind have in common."""
        return self.entry.kind, self.entry.can("stream")

    @property
    def family(self) -> type:
        """The class that a mechanism shares its operators with."""
        return self.entry.factory.__mro__[1]

    @property
    def local(self) -> bool:
        """Whether a token's output depends on where others are on the grid."""
        return self.entry.kind != "core" or self.core().halo > 0 or self.core().placed

    def need(self, *capabilities: str) -> None:
        """Skip unless the mechanism declares these."""
        for name in capabilities:
            owner = self._owner()
            if not getattr(owner.capabilities, name, False) and not getattr(owner.structure, name, False):
                pytest.skip(f"{self} declares no '{name}'")

    def _owner(self) -> nn.Module:
        layer = self.layer(device="meta")
        return layer.core if self.entry.kind == "core" else layer

    def layer(self, dim: int = 16, num_heads: int = 2, **options: Any) -> nn.Module:
        """The layer, or the block of a mechanism that is one. Tables are made for a grid of 4x6, and not zero."""
        create = create_block if self.entry.kind == "block" else create_attention
        layer = create(self.name, dim, num_heads, **{"grid": (4, 6), **dict(self.options), **options})
        for parameter in layer.parameters():
            if not parameter.is_meta and not parameter.any():  # a mistake in what starts at zero would not show
                torch.nn.init.trunc_normal_(parameter, std=0.5)
        return layer.eval()

    def core(self, dim: int = 16, num_heads: int = 2, **options: Any) -> Core:
        if self.entry.kind != "core":
            pytest.skip(f"{self.name} is a {self.entry.kind}, without a core")
        return self.layer(dim, num_heads, **options).core


def subjects(variants: bool = False) -> list[Subject]:
    """All registered mechanisms; with `variants`, also one for every other value of their options."""
    found = []
    for entry in list_attentions():
        found.append(Subject(entry.name))
        for option in entry.options if variants else ():
            values = (True, False) if isinstance(option.default, bool) else option.choices
            # The causal form is another function, with a check of its own.
            if option.name != "causal":
                found += [Subject(entry.name, ((option.name, v),)) for v in values if v != option.default]
    return found


def random_tokens(core: Core, batch: int, grid: Grid, dim: int = 16, keep: Tensor | None = None) -> Tokens:
    """Standard normal tokens of `core` in float64."""
    shape = (batch, grid.tokens, core.num_heads, dim // core.num_heads)
    q, k, v = torch.randn(3, *shape, dtype=torch.float64)
    x = torch.randn(batch, grid.tokens, dim, dtype=torch.float64)
    extra = torch.randn(batch, grid.tokens, core.extra_dim, dtype=torch.float64) if core.extra_dim else None
    return Tokens(q, k, v, x, keep, extra)


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The same tokens in another dtype."""
    return Tokens(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tokens))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    """Fail unless a and b agree to `tolerance` of the largest value of b."""
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)
