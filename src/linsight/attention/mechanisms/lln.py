"""Linear log-normal attention: exponential features, as wide as makes their weights spread as those of softmax.

Nahshan et al., "Linear Log-Normal Attention with Unbiased Concentration", ICLR 2024 (arXiv 2311.13541), by its
published code. With s_q and s_k the standard deviations (unbiased) of all numbers in q and in k,

    t = ((s_q^2 s_k^2 - b) / 2a)^(1/2),   a = 0.14855178144710912,   b = -0.35487039130661086
    Q_i = exp(t / s_q q_i - max),   K_j = exp(t / s_k k_j - max)
    o_i = Q_i sum_j K_j v_j^T / (Q_i . sum_j K_j + eps)

where the first maximum is that of each query and the second that of all keys and channels of a head. There is no
d^(-1/2). Gradients do not pass through s_q and s_k, as published, nor here through the maxima, which cancel but for
eps. These are of each image here; published are those
of the whole batch (`statistics="batch"`), with which an image's output depends on the others, so padded and packed
batches are refused. Queries, too, depend on one another, by s_q: so there are no keys of another sequence, and no
causal form, whose statistics would have to grow.

diag=True is the mean with softmax attention inside blocks of d consecutive tokens, d the width of a head, as published
(mode "average"; the last block is shorter). The sequence is the grid row by row, prefix tokens in front. Blocks know
nothing of tiles, and would be others if tokens were dropped. The published modes in which a scale or a ratio of both is
learned are left out.

All is computed in float32 (float64 for float64). Both sums are one slot of a log-sum-exp, so they merge: relative to
the largest number of a head, so far.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Features,
    LinearState,
    LogSumExp,
    Tile,
    accumulator,
    attend,
    count_tokens,
    full_precision,
    mask_tokens,
    outer_sum,
    unflatten,
)

from ..capabilities import Capabilities, Structure
from ..parts.kernel import KernelCore
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_A, _B = 0.14855178144710912, -0.35487039130661086  # fitted by the authors
_NARROWEST = 1e-12  # a standard deviation, of tokens that are all the same


class Spread(NamedTuple):
    """All `(B,)`. count: of numbers.  mean: theirs.  square: the sum of their squared distances from it."""

    count: Tensor  # type: ignore[assignment]  # also a method of tuples
    mean: Tensor
    square: Tensor

    def merge(self, other: "Spread") -> "Spread":
        """The spread of both sets of numbers."""
        return Spread.stacked(*(torch.stack(pair) for pair in zip(self, other, strict=True)))

    @classmethod
    def stacked(cls, count: Tensor, mean: Tensor, square: Tensor) -> "Spread":
        """All sets along the first axis as one (Chan, Golub, LeVeque 1979)."""
        total = count.sum(dim=0)
        middle = (count * mean).sum(dim=0) / total.clamp(min=1)
        return cls(total, middle, (square + count * (mean - middle).square()).sum(dim=0))


class Deviation(Round):
    """The standard deviation of all numbers in the queries or the keys, a constant for autograd."""

    def __init__(self, of: Literal["keys", "queries"]) -> None:
        super().__init__()
        self.of = of

    def absorb(self, core: "LLN", tokens: Tokens, tile: Tile, done: Done) -> Spread:
        """Over the tile's tokens."""
        x = (tokens.q if self.of == "queries" else tokens.k).detach()
        x = mask_tokens(x, tokens.keep).to(accumulator(x.dtype))
        count = count_tokens(x, tokens.keep) * (x.shape[2] * x.shape[3])
        mean = x.mean(dim=(1, 2, 3)) if tokens.keep is None else x.sum(dim=(1, 2, 3)) / count.clamp(min=1)
        apart = mask_tokens(x - mean[:, None, None, None], tokens.keep)
        return Spread(count, mean, apart.square().sum(dim=(1, 2, 3)))

    def finish(self, core: "LLN", state: Spread, done: Done) -> Tensor:
        """`(B or 1, 1, 1, 1)`, of each image or of the batch."""
        if core.statistics == "batch":
            state = Spread(*(x[None] for x in Spread.stacked(*state)))
        variance = state.square / (state.count - 1).clamp(min=1)
        return variance.sqrt().clamp(min=_NARROWEST)[:, None, None, None]


class Exponentials(Round):
    """Both sums over the keys."""

    def absorb(self, core: "LLN", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """One slot a head, whose value is the matrix of the sums side by side, `(B, H, 1, D * (E + 1))`."""
        k, v = tokens.k.to(accumulator(tokens.k.dtype)), mask_tokens(tokens.v, tokens.keep)
        with full_precision(k):
            scores = mask_tokens(k * slope(done[1], done[0]), tokens.keep, float("-inf"))
            top = scores.detach().amax(dim=(1, 3)).clamp(min=torch.finfo(k.dtype).min)  # as in `LogSumExp.absorb`
            k = torch.exp(scores - top[:, None, :, None])
            total = k.sum(dim=1)
            sums = torch.cat([outer_sum(core.by_place(k, tile), v.to(k.dtype)), total[..., None]], dim=-1)
            return LogSumExp(top[..., None], total.sum(dim=-1, keepdim=True), sums.flatten(2)[:, :, None])

    def finish(self, core: "LLN", state: LogSumExp, done: Done) -> LinearState:
        """The sums."""
        sums = unflatten(state.value[:, :, 0], -1, (core.width, -1))
        return LinearState(sums[..., :-1], sums[..., -1])


@register(
    "lln",
    formula="o_i = Q_i sum_j K_j v_j^T / (Q_i . sum_j K_j + eps), Q = exp(t/s_q q - max), K = exp(t/s_k k - max), "
    "t = ((s_q^2 s_k^2 - b) / 2a)^(1/2)",
    latex=r"\begin{aligned} o_i &= \frac{Q_i \sum_j K_j v_j^\top}{Q_i \cdot \sum_j K_j + \varepsilon}, \quad Q_i = "
    r"\exp \left( \tfrac{t}{s_q} q_i - \max \right), \quad K_j = \exp \left( \tfrac{t}{s_k} k_j - \max \right) \cr "
    r"t &= \sqrt{\frac{s_q^2 s_k^2 - b}{2 a}}, \quad s_q = \mathrm{std}(q), \quad s_k = \mathrm{std}(k) \end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("Linear Log-Normal Attention with Unbiased Concentration", "2311.13541", "ICLR 2024"),
)
class LLN(KernelCore):
    """Exponential features with a slope that follows the spread of queries and keys.

    Args:
        statistics: the spread is that of each image, or of the whole batch, as published.
        diag: average with softmax attention inside blocks of consecutive tokens.
        eps: the constant below the line.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    turns = "features"
    rounds = (Deviation("queries"), Deviation("keys"), Exponentials())
    held = "the standard deviations of queries and keys, and their maxima"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        statistics: Literal["image", "batch"] = "image",
        diag: bool = False,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise LinsightError(f"eps={eps} of 'lln' must be above 0: all features of a query may vanish")
        self.num_heads, self.width = num_heads, dim // num_heads
        self.statistics, self.diag, self.eps = statistics, diag, eps
        if statistics == "batch":
            self.capabilities = self.capabilities._replace(sizes=False, packed=False)
        if diag:
            self.capabilities = self.capabilities._replace(keep=False, sizes=False)
            self.structure = self.structure._replace(stream=False, reduced=False)

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """Q."""
        scores = x.to(accumulator(x.dtype)) * slope(done[0], done[1])
        return Features(torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True)))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Q against both sums, and what a block sees of itself."""
        out = super().read(tokens, tile, done)
        if not self.diag:
            return out
        q, k = (self.by_place(x, tile) for x in tokens[:2])
        return (0.5 * (out + in_blocks(q, k, tokens.v))).to(out.dtype)


def slope(own: Tensor, other: Tensor) -> Tensor:
    """t over the deviation of its `own` tokens: no product of deviations, which overflows first."""
    return ((other.square() - _B / own.square()) / (2 * _A)).sqrt()


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention inside blocks of D tokens: `(B, N, H, D)` each, the result in the accumulator's dtype."""
    batch, tokens, _, width = q.shape
    pad, count = -tokens % width, -(-tokens // width)

    def blocks(x: Tensor) -> Tensor:  # (B, N, H, D) -> (B * blocks, H, D, D)
        x = F.pad(x.to(accumulator(x.dtype)), (0, 0, 0, 0, 0, pad))
        return unflatten(x, 1, (count, width)).flatten(0, 1).transpose(1, 2)

    inside = F.pad(q.new_ones(batch, tokens, dtype=torch.bool), (0, pad))
    with full_precision(q):
        out = attend(blocks(q), blocks(k), blocks(v), unflatten(inside, 1, (count, width)).flatten(0, 1)[:, None, None])
    return unflatten(out.transpose(1, 2), 0, (batch, count)).flatten(1, 2)[:, :tokens]
