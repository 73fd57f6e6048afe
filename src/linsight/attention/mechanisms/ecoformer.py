"""EcoFormer: kernel attention whose features are b bits, the signs of a hash of queries, which are the keys, too.

Liu et al., "EcoFormer: Energy-Saving Attention with Linear Complexity", NeurIPS 2022 (arXiv 2209.09004), by its
published code. Per head, with x^ = x / |x|, m anchors a_j and c = b + 1,

    D_nj = |x^_n - a_j|^2,   s = mean D over the tokens and anchors of an image
    y_n = sign(A kappa_n),   kappa_nj = exp(-D_nj / (2 s)) - mu_j
    o_i = (y_i sum_j y_j v_j^T + c v_i) / (y_i . sum_j y_j + N c)

Above the line is c v_i, the value of the token itself, as published; the exact kernel y_i . y_j + c would have
c sum_j v_j there. Gradients pass a sign as if it were not there where what it is of lies between -1 and 1, and are 0
elsewhere. A token of length 0 is left as it is.

The hash (a, mu, A) is no parameter: it is held in buffers. It starts at random, may be drawn anew by `redraw()`, and is
fitted to tokens by `fit(tokens)`, which training does every 300 updates, as published:
kernel-supervised hashing (Liu et al., CVPR 2012), which is told of each token x_n the 10 that are nearest to it,
S_nj = b, and the 10 that are farthest, S_nj = -b, as in its paper (EcoFormer's code has 1 and -1). Bit after bit, with
N tokens,

    a_r = argmax of sigma(kappa a)^T S sigma(kappa a) / (N b),   y = sign(kappa a_r),   S <- S - y y^T

where sigma goes smoothly from -1 to 1, by 100 steps from the solution for sigma(x) = x, which is kept where its signs
are better. `projection_matrix` is in published checkpoints, and nothing reads it. As every output has its own value,
keys lie on the grid of the queries.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Features,
    LinearState,
    Tile,
    accumulator,
    apply_state,
    count_tokens,
    full_precision,
    mask_tokens,
)

from ..capabilities import Capabilities, Structure
from ..core import Rename, Renews
from ..parts.kernel import CountedSums, KernelCore, KernelMeans
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_TOLD = 10  # tokens that each is told to be near, and as many far from it
_FITTED = 1024  # most tokens that a hash is fitted to: pairs of them are made


class Distances(NamedTuple):
    """total: `(B, H)` sum D.  count: `(B,)` tokens absorbed."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class MeanDistance(Round):
    """The mean distance s of tokens from anchors."""

    def absorb(self, core: "EcoFormer", tokens: Tokens, tile: Tile, done: Done) -> Distances:
        """The sum over the tile's tokens."""
        distances = mask_tokens(core.distances(tokens.k), tokens.keep)
        return Distances(distances.sum(dim=(1, 3)), count_tokens(tokens.k, tokens.keep))

    def finish(self, core: "EcoFormer", state: Distances, done: Done) -> Tensor:
        """s `(B, 1, H, 1)`; 1 where there are no tokens."""
        mean = state.total / (state.count.clamp(min=1) * core.anchor.shape[2])[:, None]
        return mean.masked_fill(mean == 0, 1)[:, None, :, None]


class Bits(NamedTuple):
    """means: those of y v^T and y.  share: `(B, 1, 1, 1)` 1 / N."""

    means: LinearState
    share: Tensor


class BitMeans(KernelMeans):
    """The means of y v^T and y over the tokens."""

    def finish(self, core: "EcoFormer", state: CountedSums, done: Done) -> Bits:  # type: ignore[override]
        """Divided by the number of tokens."""
        share = 1 / state.count.clamp(min=1)[:, None, None, None]
        return Bits(super().finish(core, state, done), share)


@register(
    "ecoformer",
    formula="o_i = (y_i sum_j y_j v_j^T + c v_i) / (y_i . sum_j y_j + N c), y = sign(A kappa(q / |q|)), c = b + 1",
    latex=r"\begin{aligned} o_i &= \frac{y_i \sum_j y_j v_j^\top + c v_i}{y_i \cdot \sum_j y_j + N c}, \quad c = b + 1 "
    r"\cr y_n &= \mathrm{sign}(A \kappa_n), \quad \kappa_{nj} = \exp \left( - \frac{D_{nj}}{2 \bar D} \right) - \mu_j, "
    r"\quad D_{nj} = \left\lVert \frac{q_n}{\lVert q_n \rVert} - a_j \right\rVert^2 \end{aligned}",
    family="feature map",
    complexity="O(N m d + N b d)",
    paper=Paper("EcoFormer: Energy-Saving Attention with Linear Complexity", "2209.09004", "NeurIPS 2022"),
)
class EcoFormer(KernelCore):
    """Kernel attention with hashed queries, which are the keys, too.

    Args:
        bits: b, of the hash.
        anchors: m, tokens that others are compared with.
    """

    A: Tensor
    mvec: Tensor
    anchor: Tensor
    projection_matrix: Tensor
    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (MeanDistance(), BitMeans())
    projections = "q_v"
    held = "the signs of its bits"
    renews = Renews("fitted", 300)
    steps = "signs"
    published = (
        Rename("to_qk.", "q."),
        Rename("to_v.", "v."),
        Rename("fast_attention.", "core."),
        Rename("fast_attention.ksh.A", "core.A"),
        Rename("fast_attention.ksh.mvec", "core.mvec"),
        Rename("fast_attention.ksh.anchor", "core.anchor"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        bits: int = 16,
        anchors: int = 25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("bits", bits), ("anchors", anchors)):
            if value < 1:
                raise LinsightError(f"{name}={value} of 'ecoformer' must be 1 or more, as the published 16 and 25")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        self.num_heads = num_heads
        self.constant = bits + 1.0  # c
        self.register_buffer("A", torch.empty(num_heads, bits, anchors, **factory))
        self.register_buffer("mvec", torch.empty(1, num_heads, 1, anchors, **factory))
        self.register_buffer("anchor", torch.empty(1, num_heads, anchors, width, **factory))
        unread = torch.zeros(max(1, int(width * math.log(width))), width, **factory)
        self.register_buffer("projection_matrix", unread)
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw the hash anew: anchors of length 1, and bits that are as often 1 as -1 at the mean distance."""
        if not self.A.is_meta:
            self.A.normal_()
            self.mvec.fill_(math.exp(-0.5))
            self.anchor.copy_(F.normalize(torch.randn(self.anchor.shape), dim=-1))

    @torch.no_grad()
    def fit(self, tokens: Tokens) -> None:
        """Fit the hash to the queries of the first image that has any, to 1,024 of them at most, drawn at random."""
        for image, q in enumerate(tokens.q):
            x = q if tokens.keep is None else q[tokens.keep[image]]
            if len(x):
                break
        else:
            return
        wide = accumulator(x.dtype)
        x = F.normalize(x[torch.randperm(len(x))[:_FITTED].to(x.device)].to(wide), dim=-1)
        # of fewer tokens than anchors, some are anchors twice
        at = torch.arange(self.anchor.shape[2], device=x.device) % len(x)
        self.anchor.copy_(x[at].transpose(0, 1)[None])
        distances = self.distances(x[None])[0].transpose(0, 1)  # (H, n, m)
        mean = distances.mean(dim=(1, 2), keepdim=True)
        kappa = torch.exp(distances / (-2 * mean.masked_fill(mean == 0, 1)))
        self.mvec.copy_(kappa.mean(dim=1)[None, :, None])
        with full_precision(x):
            self.A.copy_(supervised_bits(kappa - kappa.mean(dim=1, keepdim=True), x.transpose(0, 1), self.A.shape[1]))

    def distances(self, x: Tensor) -> Tensor:
        """D `(B, n, H, m)` of queries or keys `(B, n, H, D)`, in the accumulator's dtype."""
        x = F.normalize(x.to(accumulator(x.dtype)), dim=-1)
        anchors = self.anchor.to(x.dtype).transpose(-1, -2)
        with full_precision(x):
            lengths = x.square().sum(dim=-1, keepdim=True) + anchors.square().sum(dim=2)[:, None]
            return (lengths - 2 * apply_state(x, anchors)).clamp(min=0)

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """y."""
        distances = self.distances(x)
        kappa = torch.exp(distances / (-2 * done[0])) - self.mvec.to(distances.dtype).transpose(1, 2)
        with full_precision(kappa):
            sums = apply_state(kappa, self.A.to(kappa.dtype).transpose(-1, -2)[None])
        passing = sums.clamp(-1, 1)
        return Features(sums.sign().detach() + (passing - passing.detach()))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Bits of the queries against both means, and the value of the token itself."""
        (kv, k), share = done[-1]
        y = self.features("q", tokens.q, tile, done).x
        with full_precision(y):
            above = apply_state(y, kv) + self.constant * share * tokens.v.to(y.dtype)
            return (above / (apply_state(y, k[..., None]) + self.constant)).to(tokens.q.dtype)


def supervised_bits(kappa: Tensor, x: Tensor, bits: int) -> Tensor:
    """A `(H, bits, m)`, fitted to tokens `x` `(H, n, D)` of length 1 and their kappa `(H, n, m)`, whose mean is 0."""
    n = x.shape[1]
    cosines, count = x @ x.transpose(1, 2), min(_TOLD, n // 2)
    wanted = torch.zeros_like(cosines)
    wanted.scatter_(2, cosines.topk(count, dim=2).indices, float(bits))
    wanted.scatter_(2, cosines.topk(count, dim=2, largest=False).indices, -float(bits))
    spread = kappa.transpose(1, 2) @ kappa / n + 1e-6 * torch.eye(kappa.shape[2], dtype=x.dtype, device=x.device)
    inverse = torch.linalg.inv(torch.linalg.cholesky(spread))
    rows = []
    for _ in range(bits):
        pull = kappa.transpose(1, 2) @ wanted @ kappa
        whitened = inverse @ ((pull + pull.transpose(1, 2)) / 2) @ inverse.transpose(1, 2)
        start = (torch.linalg.eigh(whitened).eigenvectors[..., -1:].transpose(1, 2) @ inverse).transpose(1, 2)
        found = start.clone()  # (H, m, 1)
        steps = torch.optim.SGD([found], lr=5e-4, momentum=0.9, nesterov=True)
        for _ in range(100):
            y = 2 * torch.sigmoid(kappa @ found) - 1
            slope = (wanted @ y + wanted.transpose(1, 2) @ y) * (1 - y.square()) / 2
            found.grad = kappa.transpose(1, 2) @ slope / (-n * bits)
            steps.step()
        last, first = ((kappa @ a).sign() for a in (found, start))
        better = (last * (wanted @ last)).sum(dim=1, keepdim=True) > (first * (wanted @ first)).sum(dim=1, keepdim=True)
        rows.append(torch.where(better, found, start))
        y = torch.where(better, last, first)
        wanted = wanted - y @ y.transpose(1, 2)
    return torch.cat(rows, dim=2).transpose(1, 2)
