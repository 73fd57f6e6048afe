"""Nystrom attention: softmax attention through m landmarks, the means of m segments of the sequence.

Xiong et al., "Nystromformer: A Nystrom-based Algorithm for Approximating Self-Attention", AAAI 2021 (arXiv
2102.03902), by its published code for text and for T2T-ViT. Q~ and K~ are the means of m runs of consecutive tokens, of
s = floor(N / m) tokens the first (s + 1) m - N of them, of s + 1 the others. Per head, with c = d^(-1/2),

    o = softmax(c q K~^T) Z softmax(c Q~ k^T) v + conv(v),   Z ~ A^+,   A = softmax(c Q~ K~^T)
    Z <- Z (13 - A Z (15 - A Z (7 - A Z))) / 4, six times, from A^T / max_j (sum_i A_ij)

where the maximum is that of each image and head ("exact"), or one of the whole batch ("original", as published for
text: an image's output then depends on the others, so padded and packed batches are refused). Six steps do not
converge: the start is part of the function. With N <= m it is softmax attention, as published for N = m. The
convolution is depthwise, along the sequence, one kernel a head. Everything is computed in float32 (float64 for
float64).

The sequence is the grid row by row, prefix tokens in front, and tokens of a tile know their place in it. It has no
neighbours that a tile's halo could reach, so with a convolution there are no tiles and no padded batches. Dropped
tokens are refused: the segments of those that are left would depend on all of them.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Tile, accumulator, full_precision, mask_tokens, outer_sum, read_pooled, spread, take_tokens

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..parts.pooled import Gather
from ..parts.sequence import places
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads

_STEPS = 6


class SegmentSums(NamedTuple):
    """total: `(B, m, C)`, heads merged.  count: `(B or 1, m)` tokens of each segment."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class Segments(Round):
    """The landmarks of queries or keys `(B, m, H, D)`; 0 where an image has fewer tokens than landmarks."""

    placed = True

    def __init__(self, of: Literal["keys", "queries"]) -> None:
        super().__init__()
        self.of = of

    def absorb(self, core: "Nystrom", tokens: Tokens, tile: Tile, done: Done) -> SegmentSums:
        """Sums of the tile's tokens."""
        x = merge_heads(mask_tokens(tokens.q if self.of == "queries" else tokens.k, tokens.keep))
        x = x.to(accumulator(x.dtype))
        segment = segments(*places(tile, x.device), core.landmarks)
        member = mask_tokens((segment[..., None] == torch.arange(core.landmarks, device=x.device)).to(x), tokens.keep)
        with full_precision(x):
            each = spread(member, x.shape[0])
            return SegmentSums(outer_sum(each[:, :, None], x[:, :, None])[:, 0], member.sum(dim=1))

    def finish(self, core: "Nystrom", state: SegmentSums, done: Done) -> Tensor:
        """Their means; those of queries with the scale."""
        means = split_heads(state.total / state.count.clamp(min=1)[..., None], core.num_heads)
        return means * core.factor if self.of == "queries" else means


class Answers(NamedTuple):
    """own: what the landmarks gather.  spread: that, through Z. Both `(B, H, m, E)`."""

    own: Tensor
    spread: Tensor


class GatherInverse(Gather):
    """The values that the landmarks gather, also through the pseudo-inverse of their scores."""

    def values(self, core: Any, mean: Tensor, done: Done) -> Answers:
        """B v and Z B v."""
        k, q = (landmarks.transpose(1, 2) for landmarks in done)
        with full_precision(mean):
            scores = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
            return Answers(mean, pseudo_inverse(scores, core.start) @ mean)


@register(
    "nystrom",
    formula="o = softmax(q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ k^T) v + conv(v), Q~, K~ = means of m segments",
    latex=r"\begin{aligned} o &= \mathrm{softmax}(c q \tilde K^\top) Z \mathrm{softmax}(c \tilde Q k^\top) v + "
    r"\mathrm{conv}(v), \quad c = d^{-1/2} \cr "
    r"Z &\approx A^+, \quad A = \mathrm{softmax}(c \tilde Q \tilde K^\top) \cr "
    r"Z &\leftarrow \tfrac{1}{4} Z (13 - A Z (15 - A Z (7 - A Z))) \text{ six times, from } "
    r"\frac{A^\top}{\max_j \sum_i A_{ij}} \end{aligned}",
    family="low rank",
    also=("Nystromformer",),
    complexity="O(N m d + m^3)",
    paper=Paper("Nystromformer: A Nystrom-based Algorithm for Approximating Self-Attention", "2102.03902", "AAAI 2021"),
)
class Nystrom(Core):
    """Softmax attention through landmarks, the means of segments of the sequence.

    Args:
        landmarks: m.
        start: of the pseudo-inverse: "exact" scales each image and head, "original" the whole batch by one number.
        conv: length of the convolution of v along the sequence, odd; 0 for none.
        scale: c; None is d^(-1/2). T2T-ViT has the width of the layer's input in the place of d.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True)
    turns = "tokens"
    published = (Rename("conv.", "core.conv."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmarks: int = 64,
        start: Literal["exact", "original"] = "exact",
        conv: int = 0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if landmarks < 1:
            raise LinsightError(f"landmarks={landmarks} of 'nystrom' must be 1 or more")
        if conv < 0 or (conv and conv % 2 == 0):
            raise LinsightError(f"conv={conv} of 'nystrom' must be odd, so that it has a middle, or 0 for none")
        width = dim // num_heads
        self.num_heads = num_heads
        self.landmarks, self.start = landmarks, start
        self.factor = 1.0 if scale is None else scale * width**0.5  # products have d^(-1/2) where they are made
        self.rounds = (Segments("keys"), Segments("queries"), GatherInverse())
        self.conv: nn.Conv2d | None = None
        if conv:
            factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
            self.conv = nn.Conv2d(num_heads, num_heads, (conv, 1), groups=num_heads, **factory)
            self.structure = self.structure._replace(stream=False)
        if conv or start == "original":
            self.capabilities = self.capabilities._replace(sizes=False, packed=start == "exact")

    def start_neutral(self) -> None:
        """See `Core`."""
        if self.conv is not None:
            nn.init.zeros_(self.conv.weight)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Means that queries read of the landmarks; with as many landmarks as tokens, those that their own gathered."""
        k, _, answers = done
        out = read_pooled(tokens.q.to(k.dtype) * self.factor, k, answers.spread, None)
        place, total = places(tile, out.device)
        own = take_tokens(answers.own.transpose(1, 2), place % self.landmarks)
        out = torch.where((total <= self.landmarks)[..., None, None], own, out)
        if self.conv is not None:
            v, weight = (x.to(out.dtype) for x in (tokens.v.transpose(1, 2), self.conv.weight))
            with full_precision(v):
                pad = (weight.shape[2] // 2, 0)
                out = out + F.conv2d(v, weight, padding=pad, groups=self.num_heads).transpose(1, 2)
        return out.to(tokens.v.dtype)


def segments(place: Tensor, total: Tensor, count: int) -> Tensor:
    """The segment of each place of a sequence of `total` tokens, out of `count`; its own where there are enough."""
    short = (total // count).clamp(min=1)  # the length of the first ones
    first = (short + 1) * count - total  # how many those are
    behind = first + (place - first * short) // (short + 1)
    return torch.where(place < first * short, place // short, behind)


def pseudo_inverse(a: Tensor, start: Literal["exact", "original"]) -> Tensor:
    """Z `(B, H, m, m)` of row-stochastic matrices `a`: six steps of third order towards the pseudo-inverse."""
    sums = a.sum(dim=-2)
    most = F.pad(sums.flatten(), (0, 1)).amax(dim=0) if start == "original" else sums.amax(dim=-1)[..., None, None]
    z = a.transpose(-1, -2) / most
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(_STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z
