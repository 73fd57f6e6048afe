"""Polarized self-attention: a gate for each channel from a softmax over tokens, and a gate for each token.

Liu et al., "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", arXiv 2107.00782, by its published
code. For C channels and half as many hidden ones, with learned vectors w and matrices W,

    channels   a = sigmoid(up(z)),   z = sum_n softmax_n(w . x_n) W_v x_n
    tokens     b_n = sigmoid(s_n),   g = mean_n W_q x_n,   t_n = W_t x_n
               parallel   s_n = softmax_n(g . t_n)
               sequential s_n = g . softmax_n(t_n), of each hidden channel

    parallel     o_n = (a + b_n) x_n,             up(z) = W_u z
    sequential   o_n = b_n (a x_n), b of a x,     up(z) = W_2 relu(LN(W_1 z + b_1)) + b_2

The parallel b_n lies between 0.5 and 0.73, near 0.5 in large images. There is no output projection, and heads have no
effect. Prefix tokens, of which the publication has none, are as all others.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import LogSumExp, Tile, accumulator, count_tokens, full_precision, mask_tokens

from ..capabilities import Capabilities, Structure
from ..checks import held
from ..core import Core, Rename
from ..layer import Attention
from ..parts.wide import WideLayerNorm, WideLinear
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads


class Pooled(NamedTuple):
    """Sums for the gate of channels: x under softmax, and all x `(B, C)` with their count."""

    lse: LogSumExp
    total: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class Gate(NamedTuple):
    """a `(B, 1, C)`.  mean: that of x, `(B, 1, C)`."""

    a: Tensor
    mean: Tensor


class Channels(Round):
    """The gate of channels. W_v is linear, and so is taken of the mean."""

    def absorb(self, core: "Polarized", tokens: Tokens, tile: Tile, done: Done) -> Pooled:
        """Sums over the tile's tokens."""
        x = wide(tokens)
        with full_precision(x):
            lse = LogSumExp.absorb(core.channel_query(x)[..., None], x[:, :, None], tokens.keep)
        return Pooled(lse, x.sum(dim=1), count_tokens(x, tokens.keep))

    def finish(self, core: "Polarized", state: Pooled, done: Done) -> Gate:
        """The gate, and the mean of x."""
        pooled = state.lse.mean()[:, :, 0]  # (B, 1, C)
        with full_precision(pooled):
            z = core.channel_value(pooled)
            a = torch.sigmoid(core.up_projected(z))
        return Gate(a, (state.total / state.count.clamp(min=1)[:, None])[:, None])


class Places(Round):
    """The denominators of the gate of tokens, as sums of exp relative to the largest score."""

    def absorb(self, core: "Polarized", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """Sums over the tile's tokens."""
        scores, _ = core.scored(tokens, done[0])
        return LogSumExp.absorb(scores[:, :, None], torch.ones_like(scores[:, :, None, :1]), tokens.keep)


class Gated(Attention):
    """A layer without an output projection."""

    core: "Polarized"

    def __init__(
        self,
        core: "Polarized",
        dim: int,
        *,
        projections: str | None = None,
        proj_bias: bool = True,
        **layer: Any,
    ) -> None:
        for name, asked in (("projections", projections not in (None, "none")), ("proj_bias", not proj_bias)):
            if asked:
                raise LinsightError(f"{name}= of 'polarized', which has no projections around it: leave it out")
        super().__init__(core, dim, **layer)
        self.proj = nn.Identity()  # type: ignore[assignment]

    def weight(self) -> Tensor | None:
        """See `Attention`."""
        return held(self.core.channel_query)


@register(
    "polarized",
    formula="o_n = (sigmoid(W_u z) + sigmoid(softmax_n(g . W_t x_n))) x_n, z = sum_n softmax_n(w . x_n) W_v x_n, "
    "g = mean_n W_q x_n",
    latex=r"o_n = \left( \sigma(W_u z) + \sigma(\mathrm{softmax}_n(g \cdot W_t x_n)) \right) \odot x_n, \quad z = "
    r"\sum_n \mathrm{softmax}_n(w \cdot x_n) W_v x_n, \quad g = \mathrm{mean}_n W_q x_n",
    family="pooling",
    also=("PSA",),
    complexity="O(N d^2)",
    paper=Paper("Polarized Self-Attention: Towards High-quality Pixel-wise Regression", "2107.00782"),
)
class Polarized(Core):
    """Gates of channels and of tokens.

    Args:
        form: both gates of the same x and added, or the second of what the first lets through.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (Channels(), Places())
    projections = "none"
    qkv_bias = False
    layer = Gated
    published = (
        Rename("conv_q_right.", "core.channel_query.", ones=2),
        Rename("conv_v_right.", "core.channel_value.", ones=2),
        Rename("conv_up.", "core.up.", ones=2),
        Rename("conv_up.1.", "core.up.1.", ones=-1),
        Rename("conv_q_left.", "core.place_query.", ones=2),
        Rename("conv_v_left.", "core.place_value.", ones=2),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Literal["parallel", "sequential"] = "parallel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise LinsightError(f"dim={dim} of 'polarized' has no half: take 2 or more")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.form, hidden = num_heads, form, dim // 2
        self.channel_query, self.channel_value, self.place_query, self.place_value = (
            WideLinear(dim, out, bias=False, **factory) for out in (1, hidden, hidden, hidden)
        )
        self.up: Any
        if form == "parallel":
            self.up = WideLinear(hidden, dim, bias=False, **factory)
        else:
            least = max(1, hidden // 4)
            self.up = nn.Sequential(
                WideLinear(hidden, least, **factory),
                WideLayerNorm((least, 1, 1), **factory),  # the shape of the published one
                nn.ReLU(),
                WideLinear(least, dim, **factory),
            )
        self.init_weights()

    def init_weights(self) -> None:
        """The published start, of maps that are convolutions there."""
        for linear in (self.channel_query, self.channel_value, self.place_query, self.place_value):
            nn.init.kaiming_normal_(linear.weight)
        for module in self.up.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def up_projected(self, z: Tensor) -> Tensor:
        """up of `z` `(B, 1, c)`: `(B, 1, C)`."""
        if self.form == "parallel":
            return self.up(z)
        first, norm, act, last = self.up
        return last(act(norm(first(z)[..., None, None])[..., 0, 0]))

    def scored(self, tokens: Tokens, gate: Gate) -> tuple[Tensor, Tensor]:
        """Numbers whose softmax over tokens is taken, `(B, N, 1)` or `(B, N, c)`, and g `(B, 1, c)`."""
        x, mean = wide(tokens), gate.mean
        if self.form == "sequential":
            x, mean = gate.a * x, gate.a * mean
        with full_precision(x):
            g, scores = self.place_query(mean), self.place_value(x)
            return (scores if self.form == "sequential" else scores @ g.transpose(1, 2)), g

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """x times its gates."""
        gate, sums = done
        scores, g = self.scored(tokens, gate)
        scores = mask_tokens(scores - sums.top, tokens.keep)  # of dropped ones they may be far above it
        weights = scores.exp() / sums.denominator
        x = wide(tokens)
        if self.form == "parallel":
            out = x * (gate.a + torch.sigmoid(weights))
        else:
            out = x * gate.a * torch.sigmoid((weights * g).sum(dim=-1, keepdim=True))
        return split_heads(out, self.num_heads).to(tokens.v.dtype)


def wide(tokens: Tokens) -> Tensor:
    """x `(B, N, C)`, zero where tokens are dropped, in the accumulator's dtype."""
    x = merge_heads(tokens.v)
    return mask_tokens(x.to(accumulator(x.dtype)), tokens.keep)
