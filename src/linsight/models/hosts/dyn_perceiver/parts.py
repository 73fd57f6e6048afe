"""The layers of Dynamic Perceiver's latent branch, and how it meets the convolutional one. x: map; z: latents."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Rename, Tokens, create_core, merge_heads, split_heads
from linsight.ops import Grid, Layout, Tile, pool_tokens, unflatten


class CrossAttention(nn.Module):
    """Our softmax between projections of `dim` tokens and of `kv_dim` tokens, `inner` wide.

    O = softmax(Q (K + R)^T / sqrt(d)) V, R one learned embedding for each of `keys` keys (0: none).
    """

    published = tuple(Rename(f"{a}_proj.", f"{b}.") for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "proj")))
    published += (Rename("relative_position_bias", "key_embed"),)

    def __init__(self, dim: int, kv_dim: int, inner: int, num_heads: int = 1, keys: int = 0, **factory: Any) -> None:
        super().__init__()
        self.core = create_core("softmax", inner, num_heads, **factory)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, inner, bias=False, **factory)
        self.k = nn.Linear(kv_dim, inner, bias=False, **factory)
        self.v = nn.Linear(kv_dim, inner, bias=False, **factory)
        self.key_embed = nn.Parameter(torch.zeros(1, keys, inner, **factory)) if keys else None
        self.proj = nn.Linear(inner, dim, **factory)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`(B, N, dim)` and `(B, M, kv_dim)` to `(B, N, dim)`; a batch of one x serves all contexts."""
        q, k, v = self.q(x), self.k(context), self.v(context)
        if self.key_embed is not None:
            k = k + self.key_embed
        q = q.expand(k.shape[0], -1, -1)
        tokens = Tokens(*(split_heads(t, self.num_heads) for t in (q, k, v)))
        return self.proj(merge_heads(self.core(tokens, Layout(Grid(1, q.shape[1])))))


class Mlp(nn.Module):
    """W2 GELU(W1 LN(x)), `ratio` times as wide inside."""

    published = (Rename("layernorm.", "norm."),)

    def __init__(self, dim: int, ratio: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.fc1 = nn.Linear(dim, ratio * dim, **factory)
        self.fc2 = nn.Linear(ratio * dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` to `(B, N, dim)`."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class CrossLayer(nn.Module):
    """a = x + attention(LN(x), LN(context)); a + MLP(a). Arguments as of `CrossAttention`."""

    published = (
        Rename("cross_attn.q_norm.", "norm."),
        Rename("cross_attn.kv_norm.", "norm_context."),
        Rename("cross_attn.attention.", "attn."),
    )

    def __init__(self, dim: int, kv_dim: int, inner: int, *, keys: int = 0, mlp_ratio: int = 1, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.norm_context = nn.LayerNorm(kv_dim, **factory)
        self.attn = CrossAttention(dim, kv_dim, inner, keys=keys, **factory)
        self.mlp = Mlp(dim, mlp_ratio, **factory)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`(B, N, dim)` and `(B, M, kv_dim)` to `(B, N, dim)`."""
        x = x + self.attn(self.norm(x), self.norm_context(context))
        return x + self.mlp(x)


class SelfLayer(nn.Module):
    """a = z + attention(LN(z)); a + MLP(a)."""

    published = (Rename("self_attn.norm.", "norm."), Rename("self_attn.attention.", "attn."))

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.attn = CrossAttention(dim, dim, dim, num_heads, **factory)
        self.mlp = Mlp(dim, mlp_ratio, **factory)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, L, dim)` to `(B, L, dim)`."""
        y = self.norm(z)
        z = z + self.attn(y, y)
        return z + self.mlp(z)


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm of features; in training, the one image of a batch of one is normed by the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C)` to `(B, C)`."""
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Writer(CrossLayer):
    """Latents to a map, z -> x: each cell reads the latents through a bottleneck of an eighth of its channels."""

    def __init__(self, dim: int, latent_dim: int, **factory: Any) -> None:
        super().__init__(dim, latent_dim, dim // 8, **factory)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """`(B, dim, H, W)` and `(B, L, latent_dim)` to `(B, dim, H, W)`."""
        tokens = super().forward(x.flatten(2).transpose(1, 2), z)
        return unflatten(tokens.transpose(1, 2), 2, x.shape[2:])


class Exchange(nn.Module):
    """The exchange of both branches before a stage of the network, whose maps are `dim` wide.

    z is fitted to the stage (fewer tokens, mixed; more channels); x reads z; z reads x, pooled to
    `pool` x `pool` cells, after a depthwise 7x7 convolution; self-attention on z.

    latents, before: tokens and channels of z, here and at the stage before (None at the first).
    """

    def __init__(
        self,
        dim: int,
        latents: int,
        before: tuple[int, int] | None,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: int,
        pool: int,
        dwc: bool = True,
        x2z: bool = True,
        z2x: bool = True,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.mix = self.widen = self.write = self.dwc = self.read = None
        if before is not None:
            self.mix = nn.Sequential(nn.LayerNorm(before[0]), nn.Linear(before[0], latents))
            self.widen = nn.Sequential(nn.LayerNorm(before[1]), nn.Linear(before[1], dim))
            if z2x:
                self.write = Writer(dim, dim)
        if x2z:
            self.dwc = nn.Conv2d(dim, dim, 7, padding=3, groups=dim) if dwc else None
            self.read = CrossLayer(dim, dim, dim, keys=pool * pool)
        self.layers = nn.Sequential(*(SelfLayer(dim, num_heads, mlp_ratio) for _ in range(depth)))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, dim, H, W)` and `(B, L, C)`, both after the exchange."""
        if self.mix is not None and self.widen is not None:
            z = self.mix(z.transpose(1, 2)).transpose(1, 2)
            z = self.widen(z)
        if self.write is not None:
            x = self.write(x, z)
        if self.read is not None:
            seen = x if self.dwc is None else x + self.dwc(x)
            tile = Tile.whole(Grid(*x.shape[2:]))
            pooled = pool_tokens(seen.flatten(2).transpose(1, 2), tile, (self.pool, self.pool))
            z = self.read(z, pooled.to(x.dtype))
        return x, self.layers(z)
