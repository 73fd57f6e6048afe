"""Token-level multi-head linear attention: each block of tokens reads its own mix of the sums of all blocks.

Zhang et al., "MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head", ICLR 2026 (arXiv
2601.07832), by its published code for images. The grid is cut into M = g x g blocks. With f(x) = relu(x) + e, e = 1e-6,
q and k first normed over all channels (RMSNorm, `qk_norm`), W (M, M) learned and shared by all heads, for a token i of
block a, the w-th one of it,

    S_b = sum_{t in b} f(k_t) v_t^T,   z_b = sum_{t in b} f(k_t)
    o_i = f(q_i) sum_b W_ab S_b / (D_i + e) + conv5x5(v)_i
    D_i = f(q_i) . sum_b W_ab z_b          "paper"
    D_i = sum_b W_ab f(q_bw) . z_b         "published": q_bw is the w-th query of block b, not that of token i

and the layer norms its input (LayerNorm) before it projects it, beside the norm of the block around it. The published
denominator asks for queries of all blocks, so only that of the paper streams. Weights do not tell which one they were
trained with; released ones were with "published".

Released models have grids that g divides. Here block a has the rows y with floor((2 y + 1) g / (2 H)) = a, columns
alike: the same where g divides, and elsewhere a row more or less, none where there are fewer rows than blocks. A place
that a smaller block lacks adds nothing to the published denominator. Prefix tokens, which are in no block, are absorbed
by all blocks, and read all blocks, with the weight 1 / M. Blocks are those of the whole grid, so to drop a token is not
to remove it: dropped tokens are refused. Padded images have blocks of their own size. The causal form, of language, and
that of videos are left out.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    Layout,
    LinearState,
    Tile,
    accumulator,
    apply_state,
    at_most,
    full_precision,
    outer_sum,
    spread,
    take_tokens,
    traced,
    unflatten,
)

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..parts.token_conv import TokenConv, add_behind, convolved_values
from ..parts.wide import WideRMSNorm
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_EPS = 1e-6
_NORM_EPS = torch.finfo(torch.float32).eps


class Blocks(NamedTuple):
    """How the grid tokens of a tile fall into blocks; rows of 1, or one for each image of a padded batch.

    take: `(B or 1, M * S)` the token in each of S slots of a block.  inside: alike, False where there is none.
    slot: `(B or 1, n)` the slot of each token, of all M * S.  slots: S.
    """

    take: Tensor
    inside: Tensor
    slot: Tensor
    slots: Any

    @classmethod
    def of(cls, tile: Tile, side: int, device: torch.device) -> "Blocks":
        """Cut a tile without a halo, of a grid of `side * side` blocks."""
        sides: Any = tile.grid[:2] if tile.sizes is None else tile.sizes.to(device)[..., None].unbind(1)
        y, x = (
            _along(length, whole, side, start, count, device)
            for length, whole, start, count in zip(
                sides, tile.grid[:2], (tile.top, tile.left), (tile.height, tile.width), strict=True
            )
        )
        (line, row_in, row_block, row_slot), (column, column_in, column_block, column_slot) = y, x
        high, wide = row_in.shape[-1], column_in.shape[-1]
        take = line[:, :, None, :, None] * tile.width + column[:, None, :, None, :]
        inside = row_in[:, :, None, :, None] & column_in[:, None, :, None, :]
        block = row_block[:, :, None] * side + column_block[:, None]
        slot = (block * high + row_slot[:, :, None]) * wide + column_slot[:, None]
        return cls(take.flatten(1), inside.flatten(1), slot.flatten(1), high * wide)

    def gather(self, x: Tensor, blocks: int) -> Tensor:
        """`x` `(B, n, H, D)` of the tile's grid tokens by blocks `(B, M, H, S, D)`, zero in empty slots."""
        found = take_tokens(x, self.take).masked_fill(~self.inside[..., None, None], 0)
        return unflatten(found, 1, (blocks, self.slots)).transpose(2, 3)

    def scatter(self, x: Tensor) -> Tensor:
        """`x` `(B, M, H, S, E)` of blocks as tokens `(B, n, H, E)`."""
        return take_tokens(x.transpose(2, 3).flatten(1, 2), self.slot)


def _along(length: Any, whole: Any, side: int, start: Any, count: Any, device: torch.device) -> tuple[Tensor, ...]:
    """One side cut: the line in each slot `(B or 1, g, s)`, if there is one; block and slot of each line."""
    first = (2 * torch.arange(side + 1, device=device)[None] * length + side - 1).div(2 * side, rounding_mode="floor")
    first = first.clamp(min=start)
    # A graph holds one slot more: it would ask whether there is only one.
    slots = (whole + side - 1) // side + 1 if traced() else at_most((whole + side - 1) // side, count)
    lines = torch.arange(slots, device=device)
    line = first[:, :-1, None] + lines
    inside = (line < first[:, 1:, None]) & (line < start + count)
    own = torch.arange(count, device=device)[None] + start
    block = ((2 * own + 1) * side).div(2 * length, rounding_mode="floor").clamp(max=side - 1)  # beyond an image's size
    slot = own - first.gather(1, block.expand(first.shape[0], -1))
    line = torch.minimum((line - start).clamp(min=0), torch.ones_like(line) * (count - 1))
    return line, inside, block, torch.minimum(slot, torch.ones_like(slot) * (slots - 1))


class BlockState(NamedTuple):
    """Sums of blocks `(B, M, H, D, E)` and `(B, M, H, D)`; those of prefix tokens, without M."""

    kv: Tensor
    k: Tensor
    prefix: LinearState


class Mixed(NamedTuple):
    """Sums as blocks read them, mixed; as prefix tokens do; and as they were."""

    blocks: LinearState
    prefix: LinearState
    own: BlockState


class BlockSums(Round):
    """The sums of each block, then mixed by W."""

    placed = True

    def absorb(self, core: "MHLA", tokens: Tokens, tile: Tile, done: Done) -> BlockState:
        """Sums over the tile's tokens."""
        k, v = core.mapped(tokens.k, core.k_norm), tokens.v.to(accumulator(tokens.v.dtype))
        cut, prefix = Blocks.of(tile, core.side, k.device), tile.prefix
        with full_precision(k):
            turned = core.by_place(k, tile)
            keys = cut.gather(k[:, prefix:], core.side**2)
            placed = keys if turned is k else cut.gather(turned[:, prefix:], core.side**2)
            kv = placed.transpose(-1, -2) @ cut.gather(v[:, prefix:], core.side**2)
            ahead = LinearState(outer_sum(k[:, :prefix], v[:, :prefix]), k[:, :prefix].sum(dim=1))
            return BlockState(kv, keys.sum(dim=-2), ahead)

    def finish(self, core: "MHLA", state: BlockState, done: Done) -> Mixed:
        """Mixed for each block; all of it for prefix tokens."""
        mix, share = core.mix.to(state.kv.dtype), core.side**-2
        with full_precision(mix):
            kv, k = (torch.einsum("ab,bn->an", mix, x.transpose(0, 1).flatten(1)) for x in state[:2])
            kv, k = (
                unflatten(x, 1, (y.shape[0], *y.shape[2:])).transpose(0, 1) + ahead[:, None] * share
                for x, y, ahead in zip((kv, k), state[:2], state.prefix, strict=True)
            )
        whole = LinearState(*((x.sum(dim=1) + ahead) * share for x, ahead in zip(state[:2], state.prefix, strict=True)))
        return Mixed(LinearState(kv, k), whole, state)


class NormedAttention(Attention):
    """The usual layer behind a norm of its own."""

    def __init__(
        self,
        core: Core,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(core, dim, device=device, dtype=dtype, **layer)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """Queries, keys and values of the normed input."""
        normed = self.norm(x)
        return super().tokens(normed, normed if source is x else self.norm(source), layout, keep)


@register(
    "mhla",
    formula="o_i = f(q_i) sum_b W_ab S_b / (f(q_i) . sum_b W_ab z_b + eps) + conv5x5(v)_i, S_b, z_b sums of block b",
    latex=r"\begin{aligned} o_i &= \frac{f(q_i) \sum_b W_{ab} S_b}{f(q_i) \cdot \sum_b W_{ab} z_b + 10^{-6}} + "
    r"\mathrm{conv}_{5 \times 5}(v)_i, \quad i \in a \cr S_b &= \sum_{t \in b} f(k_t) v_t^\top, \quad z_b = \sum_{t "
    r"\in b} f(k_t), \quad f = \mathrm{relu} + 10^{-6} \end{aligned}",
    family="feature map",
    complexity="O(N d^2 + M^2 d^2)",
    paper=Paper(
        "MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head", "2601.07832", "ICLR 2026"
    ),
)
class MHLA(Core):
    """Linear attention in blocks, each of which reads a learned mix of all blocks' sums.

    Args:
        blocks: M, a square number.
        denominator: "paper" is made of a token's own query, and streams; "published", as in released models, is not.
        transform: the start of W by the distances of blocks.
        exp_sigma: of the transform "exp".
        qk_norm: queries and keys are normed over all channels.
        kernel_size: of the convolution of v, odd. Released image classifiers have 5, the DiTs 3.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True)
    turns = "features"
    rounds = (BlockSums(),)
    layer = NormedAttention
    published = (
        Rename("to_qkv.", "qkv."),
        Rename("to_out.0.", "proj."),
        Rename("q_norm.", "core.q_norm."),
        Rename("k_norm.", "core.k_norm."),
        Rename("lepe.", "core.lepe."),
        Rename("piece_attn.conv.weight", "core.mix", ones=2),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        blocks: int = 16,
        denominator: Literal["paper", "published"] = "paper",
        transform: Literal["linear", "cos", "exp", "local", "gaussian"] = "linear",
        exp_sigma: float = 1.0,
        qk_norm: bool = True,
        kernel_size: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        side = math.isqrt(max(blocks, 0))
        if blocks < 1 or side * side != blocks:
            raise LinsightError(f"blocks={blocks} of 'mhla' must be a square number, as 4 or 16")
        if not exp_sigma > 0:
            raise LinsightError(f"exp_sigma={exp_sigma} of 'mhla' must be above 0")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise LinsightError(f"kernel_size={kernel_size} of 'mhla' must be odd, so that it has a middle")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.side, self.denominator = num_heads, side, denominator
        self.halo = kernel_size // 2
        self.q_norm, self.k_norm = (WideRMSNorm(dim, eps=_NORM_EPS, **factory) if qk_norm else None for _ in range(2))
        self.mix = nn.Parameter(torch.empty(blocks, blocks, **factory))
        with torch.no_grad():
            self.mix.copy_(mixing(side, transform, exp_sigma))
        self.lepe = TokenConv(dim, kernel_size, **factory)
        if denominator == "published":
            self.structure = self.structure._replace(stream=False)

    def mapped(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """f of queries or keys `(B, n, H, D)`, in the accumulator's dtype."""
        x = x.to(accumulator(x.dtype))
        if norm is not None:
            x = unflatten(norm(x.flatten(-2)), -1, (self.num_heads, -1))  # over all channels, of all heads
        return x.relu() + _EPS

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The mix of the token's block, and the convolution of v."""
        mixed: Mixed = done[0]
        q, prefix = self.mapped(tile.inner(tokens.q), self.q_norm), tile.prefix
        own = dataclasses.replace(tile, halo=0)
        cut, turned = Blocks.of(own, self.side, q.device), self.by_place(q, own)
        with full_precision(q):
            ahead = apply_state(q[:, :prefix], mixed.prefix.kv)
            ahead = ahead / (apply_state(q[:, :prefix], mixed.prefix.k[..., None]) + _EPS)
            queries = cut.gather(q[:, prefix:], self.side**2)
            below = self.below(queries, mixed) + _EPS
            # Slots without a token have queries of 0, and an output that nobody reads.
            placed = queries if turned is q else cut.gather(turned[:, prefix:], self.side**2)
            out = placed @ spread(mixed.blocks.kv, q.shape[0]) / torch.where(below == 0, 1, below)
        out = torch.cat([ahead, cut.scatter(out)], dim=1) if prefix else cut.scatter(out)
        return add_behind(out, convolved_values(self.lepe, tokens, tile), prefix).to(tokens.q.dtype)

    def below(self, q: Tensor, mixed: Mixed) -> Tensor:
        """D of queries by blocks `(B, M, H, S, D)`: `(B, M, H, S, 1)`."""
        if self.denominator == "paper":
            return q @ mixed.blocks.k[..., None]
        each = (q @ mixed.own.k[..., None]).transpose(0, 1)
        each = unflatten(self.mix.to(q.dtype) @ each.flatten(1), 1, each.shape[1:]).transpose(0, 1)
        return each + q @ mixed.own.prefix.k[:, None, :, :, None] * self.side**-2


def mixing(side: int, transform: str, sigma: float) -> Tensor:
    """W `(M, M)` at its start, by the distances of blocks, in float32 on the CPU; columns of most sum to 1."""
    line = torch.arange(side, dtype=torch.float32, device="cpu")
    places = torch.cartesian_prod(line, line).reshape(-1, 2)
    distance = torch.linalg.vector_norm(places[:, None] - places, dim=-1)
    most = distance.max().clamp(min=1)
    if transform == "gaussian":
        return torch.exp(-(distance**2) / (2 * (most / 3) ** 2))
    start = {
        "linear": 1 - distance / most,
        "cos": torch.cos(distance / most * (math.pi / 4)),
        "exp": torch.exp(-distance / sigma),
        "local": (distance <= 1.5).float(),
    }[transform]
    return start / start.sum(dim=0, keepdim=True)
