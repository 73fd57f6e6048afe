"""Pieces of OverLoCK (arXiv 2502.20087) on tokens: a convolution by kernels of each token, and what is around it.

Batch norms are of tokens. A kernel is made of how much a token has in common with 7 x 7 means of the whole map, so it
is global; softmax over its taps makes it a mean of the window around the token, as in neighbourhood attention.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Grid,
    Tile,
    accumulator,
    at_least,
    at_most,
    full_precision,
    leaves,
    neighbourhood_mean,
    pool_matrix,
    pool_tokens,
    resize_matrix,
    separable,
    traced,
    unflatten,
)

from ..core import Rename
from ..fusing import Fusable
from ..tokens import merge_heads, split_heads
from .token_conv import TokenConv
from .wide import WideLinear

_CELLS = 7  # of the context, a side
# Kernels and dilations beside the one of a `RepConv` of this side.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm, of tokens `(B, N, C)`."""
    return unflatten(norm(x.flatten(0, 1)), 0, x.shape[:2])


class LinearNorm(nn.Module):
    """A linear layer without a bias, and batch norm."""

    def __init__(self, dim: int, out_dim: int, **factory: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False, **factory)
        self.norm = nn.BatchNorm1d(out_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` to `(B, N, out_dim)`."""
        return normed(self.norm, self.linear(x))


class ResidualConv(TokenConv):
    """x + conv(x), depthwise."""

    def forward(self, x: Tensor, size: tuple[int, int], **how: Any) -> Tensor:  # type: ignore[override]
        """`x` `(B, h*w, C)`; `size` (h, w)."""
        return x + super().forward(x, size, **how)


class GlobalResponseNorm(nn.Module):
    """x (1 + gamma n) + beta, with n the norm of a channel over the tokens, divided by the mean of all channels'.

    Woo et al., "ConvNeXt V2", CVPR 2023 (arXiv 2301.00808).
    """

    published = (Rename("gamma", "gamma", ones=2), Rename("beta", "beta", ones=2))

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim, **factory))
        self.beta = nn.Parameter(torch.zeros(1, dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C)`; the shape is kept."""
        share = x.norm(dim=1, keepdim=True, dtype=accumulator(x.dtype))
        share = (share / (share.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        return (self.gamma * share + 1) * x + self.beta


class Affine(nn.Module):
    """A factor and a bias for each channel."""

    published = (Rename("weight", "weight", ones=2),)

    def __init__(self, dim: int, value: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1), value, **factory))
        self.bias = nn.Parameter(torch.zeros(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)`; the shape is kept."""
        return x * self.weight[:, 0] + self.bias


class SqueezeExcite(nn.Module):
    """x sigmoid(fc2(GELU(fc1(mean x))))."""

    published = (Rename("proj.1.", "fc1.", ones=2), Rename("proj.3.", "fc2.", ones=2))

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        hidden = max(16, dim // 8)
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C)`; the shape is kept."""
        mean = x.mean(dim=1, keepdim=True, dtype=accumulator(x.dtype)).to(x.dtype)
        return x * self.fc2(F.gelu(self.fc1(mean))).sigmoid()


class GRNMlp(nn.Module):
    """fc2(GRN(u + conv3x3(u))), u = GELU(fc1 x)."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.dwconv = ResidualConv(hidden, **factory)
        self.grn = GlobalResponseNorm(hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, h*w, C)`; the shape is kept."""
        return self.fc2(self.grn(self.dwconv(F.gelu(self.fc1(x)), size)))


class RepConv(Fusable):
    """A depthwise convolution with batch norm, and further ones, smaller or dilated, that are added to it.

    For inference they are one: see `merged`. Checkpoints of such ones have the names `MERGED`.
    """

    MERGED = ("lk_origin.weight", "lk_origin.bias")

    def __init__(self, dim: int, kernel_size: int, **factory: Any) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise LinsightError(
                f"kernel_size={kernel_size}: no branches are published of it, take one of {[*BRANCHES]}"
            )
        self.kernel_size = kernel_size
        self.lk_origin = TokenConv(dim, kernel_size, bias=False, **factory)
        self.origin_bn = nn.BatchNorm1d(dim, **factory)
        for side, dilation in BRANCHES[kernel_size]:
            conv = TokenConv(dim, side, dilation=dilation, bias=False, **factory)
            self.add_module(f"dil_conv_k{side}_{dilation}", conv)
            self.add_module(f"dil_bn_k{side}_{dilation}", nn.BatchNorm1d(dim, **factory))

    def branches(self) -> list[tuple[Any, Any]]:
        """All convolutions, each with its norm."""
        names = [f"k{side}_{dilation}" for side, dilation in BRANCHES[self.kernel_size]]
        rest = [(getattr(self, f"dil_conv_{name}"), getattr(self, f"dil_bn_{name}")) for name in names]
        return [(self.lk_origin, self.origin_bn), *rest]

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, h*w, C)`; the shape is kept."""
        (conv, norm), *rest = self.branches()
        out = normed(norm, conv(x, size))
        for conv, norm in rest:
            out = out + normed(norm, conv(x, size))
        return out

    def merged(self) -> tuple[Tensor, Tensor]:
        """The kernels `(C, 1, k, k)` and biases `(C,)` of one convolution that is all of them, in evaluation mode."""
        kernels, biases = [], []
        for conv, norm in self.branches():
            share = norm.weight / (norm.running_var + norm.eps).sqrt()
            wide = conv.dilation[0] * (conv.weight.shape[-1] - 1) + 1
            kernel = conv.weight.new_zeros(*conv.weight.shape[:2], wide, wide)
            kernel[..., :: conv.dilation[0], :: conv.dilation[0]] = conv.weight * share[:, None, None, None]
            kernels.append(F.pad(kernel, [(self.kernel_size - wide) // 2] * 4))
            biases.append(norm.bias - norm.running_mean * share)
        return torch.stack(kernels).sum(dim=0), torch.stack(biases).sum(dim=0)

    def unmerged(self, kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """A state that computes what one convolution does: it is the first branch, and the others are 0."""
        found = {name: torch.zeros_like(value) for name, value in self.state_dict().items()}
        for name in found:
            if name.endswith("running_var"):
                found[name].fill_(1)
        share = found["origin_bn.weight"].fill_(1 + self.origin_bn.eps).sqrt()  # of a norm that changes nothing
        return found | {"lk_origin.weight": kernel, "origin_bn.weight": share, "origin_bn.bias": bias}


class ContextMix(nn.Module):
    """The operator ContMix: means of a small and of a large window, by kernels that each token makes of the context.

    Half of the channels of the values see the small window, the other half the large one; each half has
    2 * num_heads groups with a kernel each. With q of a token and k of a cell of 7 x 7 means, of a group, without a
    softmax over cells, the taps are the softmax over a window of W (q . k_1 ... q . k_49) + b + a bias of the distance.

    A map with a side shorter than the large window is enlarged to it (bilinear), and what comes out averaged again.

    Args:
        dim: C, of queries and values.
        key_dim: of keys.
        kernel_size: of the large window.
        small_size: of the small window.
        values: with a linear layer and batch norm of the values.
    """

    rpb1: nn.Parameter
    rpb2: nn.Parameter

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        kernel_size: int,
        small_size: int,
        *,
        values: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        if dim % (4 * num_heads):
            raise LinsightError(
                f"num_heads={num_heads} does not do for dim={dim}: a half of the channels has twice as many kernels, "
                f"so {4 * num_heads} must divide it"
            )
        for size in (small_size, kernel_size):
            if size < 1 or size % 2 == 0:
                raise LinsightError(f"a window of side {size}: it must be odd, a token is in the middle")
        self.groups, self.scale = 2 * num_heads, (dim // (2 * num_heads)) ** -0.5
        self.sides = (small_size, kernel_size)
        self.query = LinearNorm(dim, dim // 2, **factory)
        self.key = LinearNorm(key_dim, dim // 2, **factory)
        self.value = LinearNorm(dim, dim, **factory) if values else None
        self.taps = WideLinear(_CELLS**2, small_size**2 + kernel_size**2, **factory)
        for name, side in zip(("rpb1", "rpb2"), self.sides, strict=True):
            shape = (self.groups, 2 * side - 1, 2 * side - 1)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, **factory)))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens that queries, keys and values are made of, `(B, h*w, ...)`, to `(B, h*w, C)`."""
        wide = enlarged(size, max(self.sides))
        q, k, v = (resized(x, size, wide) for x in (query, key, value))
        tile, dtype = Tile.whole(Grid(*(size if wide is None else wide))), v.dtype
        q = split_heads(self.query(q), self.groups)
        k = split_heads(self.key(pool_tokens(k, tile, (_CELLS, _CELLS)).to(k.dtype)), self.groups)
        v = v if self.value is None else self.value(v)
        with full_precision(q):
            common = torch.einsum("bnhd,blhd->bnhl", *(x.to(accumulator(x.dtype)) for x in (q * self.scale, k)))
            scores = self.taps(common).split([side**2 for side in self.sides], dim=-1)
        halves = (split_heads(half, self.groups) for half in v.chunk(2, dim=-1))
        outs = [
            merge_heads(neighbourhood_mean(some, half, tile, side, table))
            for some, half, side, table in zip(scores, halves, self.sides, (self.rpb1, self.rpb2), strict=True)
        ]
        out = torch.cat(outs, dim=-1)
        return (out if wide is None else averaged(out, wide, size)).to(dtype)


class ContextMixer(nn.Module):
    """`ContextMix` beside a convolution, behind both a gate: BN, linear (gate * SE(BN W mix + BN RepConv(u)))."""

    def __init__(self, dim: int, key_dim: int, out_dim: int, num_heads: int, kernel_size: int, **mix: Any) -> None:
        factory = {key: mix[key] for key in ("device", "dtype") if key in mix}
        super().__init__()
        self.gate = LinearNorm(dim, dim, **factory)
        self.lepe = RepConv(dim, kernel_size, **factory)
        self.lepe_norm = nn.BatchNorm1d(dim, **factory)
        self.mix = ContextMix(dim, key_dim, num_heads, kernel_size, **mix)
        self.fuse = LinearNorm(dim, dim, **factory)
        self.se = SqueezeExcite(dim, **factory)
        self.proj_norm = nn.BatchNorm1d(dim, **factory)
        self.proj = nn.Linear(dim, out_dim, **factory)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, size: tuple[int, int]) -> Tensor:
        """`x` `(B, h*w, dim)`, and what queries and keys are made of, to `(B, h*w, out_dim)`."""
        local = normed(self.lepe_norm, self.lepe(x, size))
        out = self.se(self.fuse(self.mix(query, key, x, size)) + local)
        return self.proj(normed(self.proj_norm, F.silu(self.gate(x)) * out))


def mixer_names(fuse: str) -> tuple[Rename, ...]:
    """Published names of the parts of a `ContextMixer` that is a block's `mixer`, and of a `GRNMlp`, its `mlp`.

    fuse: the published name of that part.
    """
    pairs = {
        "gate": ("gate", 0),
        "weight_query": ("mix.query", 0),
        "weight_key": ("mix.key", 1),
        "weight_value": ("mix.value", 0),
        fuse: ("fuse", 0),
    }
    return (
        *(Rename(f"{old}.{i}.", f"mixer.{new}.linear.", ones=2) for old, (new, i) in pairs.items()),
        *(Rename(f"{old}.{i + 1}.", f"mixer.{new}.norm.") for old, (new, i) in pairs.items()),
        Rename("weight_proj.", "mixer.mix.taps.", ones=2),
        *(Rename(name, f"mixer.mix.{name}") for name in ("rpb1", "rpb2")),
        Rename("lepe.0.", "mixer.lepe."),
        Rename("lepe.1.", "mixer.lepe_norm."),
        Rename("se_layer.", "mixer.se."),
        Rename("proj.0.", "mixer.proj_norm."),
        Rename("proj.1.", "mixer.proj.", ones=2),
        *mlp_names("mlp", 0),
    )


def mlp_names(published: str, first: int) -> tuple[Rename, ...]:
    """Published names of the parts of a `GRNMlp` that is a block's `mlp`, numbered from `first` on."""
    return (
        Rename(f"{published}.{first}.", "mlp.fc1.", ones=2),
        Rename(f"{published}.{first + 2}.", "mlp.dwconv."),
        Rename(f"{published}.{first + 3}.", "mlp.grn."),
        Rename(f"{published}.{first + 4}.", "mlp.fc2.", ones=2),
    )


def enlarged(size: tuple[int, int], least: int) -> tuple[int, int] | None:
    """Height and width of a map whose shorter side is to be `least`, in proportion, rounded down; None if none is.

    The published code divides first: of a map nine times as long as wide, or more, it may have one row less.
    """
    height, width = size
    if leaves():  # one graph for all sizes, which takes long to make
        short = at_most(height, width)
        most = at_least(short, least)
        return height * most // short, width * most // short
    if height >= least and width >= least:  # a compiled graph of its own
        return None
    short = at_most(height, width)
    return height * least // short, width * least // short


def resized(x: Tensor, size: tuple[int, int], new: tuple[int, int] | None) -> Tensor:
    """Tokens `(B, h*w, C)` of a map of `size`, bilinear to one of the size `new`, if there is one."""
    if new is None or (not traced() and size == new):
        return x
    factory: dict[str, Any] = {"device": x.device, "dtype": accumulator(x.dtype)}
    rows, columns = (resize_matrix(a, b, "bilinear", **factory) for a, b in zip(size, new, strict=True))
    return separable(unflatten(x.to(factory["dtype"]), 1, size), rows, columns).flatten(1, 2).to(x.dtype)


def averaged(x: Tensor, size: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Tokens `(B, h*w, C)` of a map of `size`, by adaptive average pooling to one of the size `new`."""
    rows, columns = (pool_matrix(a, b, device=x.device, dtype=x.dtype) for a, b in zip(size, new, strict=True))
    return separable(unflatten(x, 1, size), rows, columns).flatten(1, 2)
