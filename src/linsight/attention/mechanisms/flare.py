"""FLARE: latents learned for each head gather from all keys by softmax, and every token reads them by the same scores.

Puri et al., "FLARE: Fast Low-rank Attention Routing Engine", arXiv 2508.12594, by its published code. Per head, with
M latents l_a that do not depend on the input,

    z_a = sum_j softmax_j(l_a . k_j) v_j          over the tokens
    o_i = sum_a softmax_a(k_i . l_a) z_a          over the latents

with a scale of 1, not d^(-1/2). Keys and values come from deep residual projections (`depth`),

    u = act(W x) + x, depth times u <- u + act(W u), then W u + u,     act = GELU by its tanh

or from one linear map each ("depth=-1"). Latents and keys may be normed over a head (`norm`). The published table of
latents (C, M) is read as (heads, M, d) as its numbers lie, so it is not transposed. There is no head in common use for
images; what reads is the keys of a token, so another sequence may be gathered from. SiLU in the projections, another
width inside them, and rotated keys, all of them published options, are left out.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Layout, LogSumExp, Tile, accumulator, gather_pooled, gather_state, read_pooled

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..parts.pooled import Gather
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, split_heads

_EPS = {"layer": 1e-5, "rms": torch.finfo(torch.float32).eps}


class ResidualMLP(nn.Module):
    """A deep projection: a residual stream of `hidden` channels between two linear maps.

    Args:
        dim, hidden, out: widths. The input is added where it is as wide as the stream, the stream where the output is.
        depth: linear maps inside the stream; -1 for one linear map in the place of all, to which the input is added.
        residual: of the first and the last map.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int,
        depth: int,
        *,
        residual: tuple[bool, bool] = (True, True),
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.first, self.last = residual[0] and dim == hidden, residual[1] and hidden == out
        if depth < 0:
            self.fc = nn.Linear(dim, out, **factory)
            self.first = all(residual) and dim == out
        else:
            self.fc1 = nn.Linear(dim, hidden, **factory)
            self.fcs = nn.ModuleList(nn.Linear(hidden, hidden, **factory) for _ in range(depth))
            self.fc2 = nn.Linear(hidden, out, **factory)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to `(..., out)`."""
        if self.depth < 0:
            return self.fc(x) + x if self.first else self.fc(x)
        u = F.gelu(self.fc1(x), approximate="tanh")
        u = u + x if self.first else u
        for linear in self.fcs:
            u = u + F.gelu(linear(u), approximate="tanh")
        return self.fc2(u) + u if self.last else self.fc2(u)


class Encode(Gather):
    """The means z that latents gather."""

    def absorb(self, core: "Flare", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """Sums of the tile's keys, relative to their largest score."""
        k = core.normed(tokens.k, core.k_norm)
        return gather_state(core.latents(k), k, tokens.v, None, tokens.keep)

    def at_once(self, core: "Flare", tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """By scaled dot-product attention."""
        k = core.normed(tokens.k, core.k_norm)
        return gather_pooled(core.latents(k), k, tokens.v, None, tokens.keep)


class DeepAttention(Attention):
    """A layer whose keys, which are queries too, and values are projected by `ResidualMLP`."""

    def __init__(
        self,
        core: "Flare",
        dim: int,
        *,
        qkv_bias: bool = True,
        projections: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        if projections not in (None, "none"):
            raise LinsightError(f"projections={projections!r}: 'flare' has deep projections of its own, leave it out")
        super().__init__(core, dim, device=device, dtype=dtype, **layer)
        for name in ("k_proj", "v_proj"):
            made = ResidualMLP(dim, dim, dim, core.depth, bias=qkv_bias, device=device, dtype=dtype)
            self.add_module(name, made)

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """Keys and values of `source`; keys of `x` read."""
        k, v = (split_heads(self.get_submodule(name)(source), self.num_heads) for name in ("k_proj", "v_proj"))
        q = k if source is x else split_heads(self.get_submodule("k_proj")(x), self.num_heads)
        return Tokens(q, k, v, x, keep)


@register(
    "flare",
    formula="o_i = sum_a softmax_a(k_i . l_a) z_a, z_a = sum_j softmax_j(l_a . k_j) v_j, latents l learned",
    latex=r"o_i = \sum_a \mathrm{softmax}_a(k_i \cdot l_a) z_a, \quad z_a = \sum_j \mathrm{softmax}_j(l_a \cdot k_j) "
    r"v_j, \quad l \text{ learned}",
    family="low rank",
    complexity="O(N M d)",
    paper=Paper("FLARE: Fast Low-rank Attention Routing Engine", "2508.12594"),
)
class Flare(Core):
    """Attention routed through learned latents.

    Args:
        latents: M, of each head.
        depth: of the projections of keys and values, 0 or more; -1 for one linear map each.
        norm: of latents and keys, over a head.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (Encode(),)
    projections = "none"
    layer = DeepAttention
    published = (
        Rename("latent_q", "core.latent_q"),
        Rename("q_norm.", "core.q_norm."),
        Rename("k_norm.", "core.k_norm."),
        Rename("out_proj.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        latents: int = 64,
        depth: int = 3,
        norm: Literal["none", "layer", "rms"] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if latents < 1:
            raise LinsightError(f"latents={latents} of 'flare' must be 1 or more")
        if depth < -1:
            raise LinsightError(f"depth={depth} of 'flare' must be 0 or more, or -1 for one linear map")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.count, self.depth, self.norm = num_heads, latents, depth, norm
        self.latent_q = nn.Parameter(torch.empty(dim, latents, **factory))
        nn.init.normal_(self.latent_q, std=0.1)
        kinds: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.q_norm, self.k_norm = (
            None if norm == "none" else kinds[norm](dim // num_heads, eps=_EPS[norm], **factory) for _ in range(2)
        )

    def normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Latents or keys `(..., D)` in the accumulator's dtype, normed if they are to be."""
        x = x.to(accumulator(x.dtype))
        if norm is None:
            return x
        weight: Tensor = norm.weight  # type: ignore[assignment]
        if self.norm == "rms":
            return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + _EPS["rms"]) * weight.to(x.dtype)
        bias: Tensor = norm.bias  # type: ignore[assignment]
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), _EPS["layer"])

    def latents(self, like: Tensor) -> Tensor:
        """The latents `(B, M, H, D)` for the batch of `like`; times d^(1/2), which products are divided by."""
        table = self.latent_q.flatten().reshape(self.num_heads, self.count, -1).transpose(0, 1)
        table = self.normed(table, self.q_norm).to(like.dtype) * like.shape[-1] ** 0.5
        return table[None].expand(like.shape[0], -1, -1, -1)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Means of z under softmax over the latents."""
        q = self.normed(tokens.q, self.k_norm)
        return read_pooled(q, self.latents(q), done[0], None).to(tokens.q.dtype)
