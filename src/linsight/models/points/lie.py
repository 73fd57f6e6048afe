"""LieTransformer: attention among points on which a group acts; a motion of all points changes no score.

Hutchinson et al., "LieTransformer: Equivariant Self-Attention for Lie Groups", ICML 2021 (arXiv 2012.10885). Points are
lifted to elements g_i of the group, told by their coordinates in its Lie algebra. A query i sees of a key j the pair

    P_ij = log(g_j^-1 g_i)

which is the same for h g_i and h g_j, and features f by q_i . k_j. The scores of a head are

    mlp         d^(-1/2) q_i . k_j + MLP(P_ij),   of 16, 16 and 1 channels, swish after each
    relative    d^(-1/2) (q_i . k_j + (q_i + b) . l_ij + c . k_j),   l_ij = W P_ij + w

and are made weights by softmax, by exp over the number of keys, or are divided by that number. The cost is O(N^2 d).

Groups are T(n), P_ij = x_i - x_j, and SE(2), of coordinates (angle, two of translation). Not here: SO(3) and SE(3),
groups that do not act transitively, whose pairs have orbits beside them, and neighbours that are drawn.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Rename, held, merge_heads, split_heads
from linsight.errors import LinsightError, UnknownNameError
from linsight.ops import accumulator, full_precision, mask_tokens, traced

from ..doors import check_whole
from ..parts.sets import check_kept, check_members, check_same_place

KERNELS = ("mlp", "relative")
WEIGHTS = ("softmax", "exp", "mean")
PUBLISHED = (
    Rename("ema.kernel.location_kernel.LinNormAct_1.linear.module.", "attn.place.0."),
    Rename("ema.kernel.location_kernel.LinNormAct_2.linear.module.", "attn.place.1."),
    Rename("ema.kernel.location_kernel.LinNormAct_3.linear.module.", "attn.place.2."),
    Rename("ema.kernel.feature_kernel.fc_q.", "attn.q."),
    Rename("ema.kernel.feature_kernel.fc_k.", "attn.k."),
    Rename("ema.kernel.W_q.", "attn.q."),
    Rename("ema.kernel.W_k.", "attn.k."),
    Rename("ema.kernel.W_l.", "attn.place."),
    Rename("ema.kernel.u", "attn.key_bias"),
    Rename("ema.kernel.v", "attn.place_bias"),
    Rename("ema.input_linear.", "attn.v."),
    Rename("ema.output_linear.", "attn.proj."),
    Rename("ln_ema.", "norm1."),
    Rename("ln_mlp.", "norm2."),
    Rename("mlp.LinNormAct_1.linear.module.", "mlp.0."),
    Rename("mlp.LinNormAct_2.linear.module.", "mlp.2."),
)
_SMALL = 1e-3  # an angle below which its series are taken


def translations(elements: Tensor) -> Tensor:
    """Pairs `(B, N, N, n)` of a query and a key of T(n): `elements` `(B, N, n)`, the one less the other."""
    return elements[:, :, None] - elements[:, None]


def rigid_motions(elements: Tensor) -> Tensor:
    """Pairs `(B, N, N, 3)` of a query and a key of SE(2): `elements` `(B, N, 3)`, an angle and two of translation."""
    angle = elements[..., 0]
    moved = _exp(elements)
    turn = angle[:, :, None] - angle[:, None]
    turn = torch.atan2(turn.sin(), turn.cos())
    x, y = (moved[:, :, None] - moved[:, None]).unbind(-1)
    sine, cosine = (part[:, None] for part in (angle.sin(), angle.cos()))  # of the keys
    return _log(turn, torch.stack([cosine * x + sine * y, cosine * y - sine * x], dim=-1))


def lift(points: Tensor, lifts: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Elements of SE(2) `(B, N * lifts, 3)` that move the origin to `points` `(B, N, 2)`: of each, evenly turned ones.

    The first of them is turned at random, so that an answer is one in expectation.
    """
    check_whole(lifts=lifts)
    if points.ndim != 3 or points.shape[2] != 2 or not points.is_floating_point():
        raise LinsightError(
            f"points are {points.dtype} of shape {tuple(points.shape)}: give (batch, points, 2) in floating point"
        )
    where = points.device if generator is None else generator.device
    start = torch.rand(points.shape[:2], generator=generator, dtype=points.dtype, device=where).to(points.device)
    turn = start[..., None] + torch.arange(lifts, dtype=points.dtype, device=points.device) / lifts  # (B, N, lifts)
    turn = 2 * math.pi * turn
    turn = torch.atan2(turn.sin(), turn.cos())
    return _log(turn, points[:, :, None].expand(-1, -1, lifts, -1)).flatten(1, 2)


GROUPS: Mapping[str, Callable[[Tensor], Tensor]] = {"T": translations, "SE2": rigid_motions}


def _exp(elements: Tensor) -> Tensor:
    """The translations `(..., 2)` of elements `(..., 3)` of SE(2)."""
    angle, a, b = elements.unbind(-1)
    small = angle.abs() < _SMALL
    safe = angle.masked_fill(small, 1.0)
    along = torch.where(small, 1 - angle.square() / 6, safe.sin() / safe)
    beside = torch.where(small, angle / 2, 2 * (safe / 2).sin().square() / safe)
    return torch.stack([along * a - beside * b, beside * a + along * b], dim=-1)


def _log(angle: Tensor, moved: Tensor) -> Tensor:
    """Elements `(..., 3)` of SE(2) of angles within pi and translations `(..., 2)`."""
    small = angle.abs() < _SMALL
    half = angle.masked_fill(small, 1.0) / 2
    along = torch.where(small, 1 - angle.square() / 12, half / half.tan())
    x, y = moved.unbind(-1)
    return torch.stack([angle, along * x + angle / 2 * y, along * y - angle / 2 * x], dim=-1)


class HeadLinear(nn.Module):
    """A linear map of each head's own."""

    def __init__(self, heads: int, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, in_dim, dim, **factory))
        self.bias = nn.Parameter(torch.zeros(heads, dim, **factory))
        nn.init.uniform_(self.weight, -(in_dim**-0.5), in_dim**-0.5)  # as a linear map's

    def forward(self, x: Tensor) -> Tensor:
        """`(..., H or 1, in)` to `(..., H, out)`."""
        return torch.einsum("...hi,hio->...ho", x.expand(*x.shape[:-2], len(self.weight), -1), self.weight) + self.bias


class LieAttention(nn.Module):
    """Attention among points: see the module.

    Args:
        dim, num_heads: channels and heads of features.
        group: of `GROUPS`.
        axes: n of T(n); SE(2) has 3 coordinates, whatever is given.
        kernel: how places are scored, of `KERNELS`.
        weights: how scores are made weights, of `WEIGHTS`.
        kernel_dim: channels of the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group: str = "T",
        axes: int = 2,
        kernel: Literal["mlp", "relative"] = "mlp",
        weights: Literal["softmax", "exp", "mean"] = "softmax",
        kernel_dim: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        known = {"group": (group, tuple(GROUPS)), "kernel": (kernel, KERNELS), "weights": (weights, WEIGHTS)}
        for name, (value, choices) in known.items():
            if value not in choices:
                raise UnknownNameError(name, str(value), choices)
        check_whole(dim=dim, num_heads=num_heads, axes=axes, kernel_dim=kernel_dim)
        if dim % num_heads:
            raise LinsightError(f"num_heads={num_heads} does not divide dim={dim}: choose a divisor of {dim}")
        self.num_heads, self.group, self.weights, self.kernel = num_heads, group, weights, kernel
        self.axes = 3 if group == "SE2" else axes
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, **factory) for _ in range(4))
        if kernel == "mlp":
            sizes = (self.axes, kernel_dim, kernel_dim, 1)
            pairs = itertools.pairwise(sizes)
            self.place: nn.Module = nn.ModuleList(HeadLinear(num_heads, *pair, **factory) for pair in pairs)
        else:
            self.place = nn.Linear(self.axes, dim, **factory)
            shape = (num_heads, 1, dim // num_heads)
            self.key_bias, self.place_bias = (nn.Parameter(torch.zeros(shape, **factory)) for _ in range(2))

    def forward(self, elements: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Elements `(B, N, axes)` with features `(B, N, C)` to `(B, N, C)`, of all points.

        keep: `(B, N)`, the points that are seen; others must be finite.

        Raises:
            LinsightError: elements of another group, or of other points; features or `keep` of another kind.
        """
        if not traced(x):
            check_members(x, self.v.in_features, held(self.v), name="features", of="points")
            self.check(elements, x, keep)
        q, k, v = (split_heads(part(x), self.num_heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        dtype, like = accumulator(v.dtype), held(self.v)
        pairs = GROUPS[self.group](elements.to(dtype)).to(x.dtype if like is None else like.dtype)
        with full_precision(v):
            out = self._weights(self._scores(q.to(dtype), k.to(dtype), pairs), keep) @ v.to(dtype)
        return self.proj(merge_heads(out.transpose(1, 2)).to(x.dtype))

    def check(self, elements: Tensor, x: Tensor, keep: Tensor | None) -> None:
        """Raise a LinsightError unless elements and `keep` are those of the points with features `x` `(B, N, ...)`."""
        check_same_place(x, elements=elements)
        if elements.ndim != 3 or elements.shape[:2] != x.shape[:2] or elements.shape[2] != self.axes:
            raise LinsightError(
                f"elements are of shape {tuple(elements.shape)}: features {tuple(x.shape)} and the group "
                f"{self.group} ask for {(*x.shape[:2], self.axes)}"
            )
        check_kept(keep, x, "points")

    def _scores(self, q: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
        """`(B, H, N, N)` of queries and keys `(B, H, N, d)`, and pairs `(B, N, N, axes)`."""
        scale = q.shape[-1] ** -0.5
        if isinstance(self.place, nn.ModuleList):
            far = pairs[..., None, :]
            for layer in self.place:
                far = F.silu(layer(far))
            return scale * (q @ k.transpose(-1, -2)) + far[..., 0].permute(0, 3, 1, 2).to(q.dtype)
        far = self.place(pairs).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4).to(q.dtype)  # B, H, N, N, d
        beside = ((q + self.place_bias.to(q.dtype))[..., None, :] @ far.transpose(-1, -2))[..., 0, :]
        return scale * ((q + self.key_bias.to(q.dtype)) @ k.transpose(-1, -2) + beside)

    def _weights(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        if self.weights == "softmax":
            if keep is not None:
                scores = scores.masked_fill(~keep[:, None, None], torch.finfo(scores.dtype).min)
            return scores.softmax(-1)
        weights = scores.exp() if self.weights == "exp" else scores
        if keep is None:
            return weights / scores.shape[-1]
        return weights.masked_fill(~keep[:, None, None], 0) / keep.sum(-1).clamp(min=1)[:, None, None, None]

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"group={self.group!r}, axes={self.axes}, kernel={self.kernel!r}, weights={self.weights!r}"


class LieBlock(nn.Module):
    """f + attention(LN f), then f + MLP(LN f), whose two layers are both followed by swish.

    Args:
        dim, num_heads, options: as of `LieAttention`.
    """

    published = PUBLISHED

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.attn = LieAttention(dim, num_heads, **options)
        self.mlp = nn.Sequential(nn.Linear(dim, dim, **factory), nn.SiLU(), nn.Linear(dim, dim, **factory), nn.SiLU())

    def forward(self, elements: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `LieAttention`."""
        x = x + self.attn(elements, self.norm1(x), keep)
        return x + self.mlp(self.norm2(x))


class LieTransformer(nn.Module):
    """Points with features to one answer that a motion of all points leaves as it is.

    A linear map, blocks, the mean over points, and an MLP.

    Args:
        in_features: channels of the features of points.
        num_classes: numbers of an answer.
        dim, depth, num_heads, options: of the blocks, as of `LieAttention`.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, dim: int = 128, depth: int = 4, num_heads: int = 8, **options: Any
    ) -> None:
        super().__init__()
        check_whole(in_features=in_features, num_classes=num_classes, dim=dim, depth=depth)
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.embed = nn.Linear(in_features, dim, **factory)
        self.blocks = nn.ModuleList(LieBlock(dim, num_heads, **options) for _ in range(depth))
        layers = [nn.Linear(dim, out, **factory) for out in (dim, dim, num_classes)]
        self.head = nn.Sequential(*(part for layer in layers for part in (nn.SiLU(), layer)))

    def forward(self, elements: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Elements `(B, N, axes)`, features `(B, N, F)`, and which points there are `(B, N)`, to `(B, classes)`."""
        if not traced(x):
            check_members(x, self.embed.in_features, held(self.embed), name="features", of="points")
            self.blocks[0].attn.check(elements, x, keep)  # type: ignore[operator,union-attr]
        elements, x = mask_tokens(elements, keep), self.embed(mask_tokens(x, keep))
        for block in self.blocks:
            x = block(elements, x, keep)
        if keep is None:
            return self.head(x.mean(1))
        return self.head(mask_tokens(x, keep).sum(1) / keep.sum(1, keepdim=True).clamp(min=1))
