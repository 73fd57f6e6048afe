"""Attention of timm's hierarchical transformers: the blocks of Swin, and the attention of PVTv2.

In Swin a mechanism without scores sees the whole map, as in linsight's own hosts: there are no windows, no shift and no
table of relative positions, which is a term of scores. One with scores stays in its windows, and keeps both. In PVTv2
keys are of the coarser grid that the model reduces them to, where the mechanism has a form for such keys; else of all
tokens, and the reduction is idle.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from timm.models.pvt_v2 import Attention as PyramidAttention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from linsight.attention import split_heads
from linsight.ops import Grid

from ..mixing import Mixing
from ..place import Place
from .adopt import adopt
from .seam import Heads, Images, Part, Seam
from .timm_vits import described, rebuilt, rows


class Windows(WindowAttention):
    """The attention of a Swin block in its windows, by a mechanism with scores."""

    def __init__(self, source: WindowAttention, mixing: Mixing) -> None:
        nn.Module.__init__(self)
        adopt(self, source)
        self._mixing = (mixing,)  # it is the block's

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See timm's: `x` `(windows * B, N, C)`, `mask` `(windows, N, N)`."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        bias = self._get_rel_pos_bias()  # (1, H, N, N)
        if mask is not None:
            bias = bias + mask.repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        out = self._mixing[0](q, k, v, x, Grid(*self.window_size), score_bias=bias.to(q.dtype))
        return self.proj_drop(self.proj(out))


class Block(SwinTransformerBlock):
    """A block of Swin whose attention is a mechanism, in its windows or over the whole map."""

    def __init__(self, source: SwinTransformerBlock, mixing: Mixing) -> None:
        nn.Module.__init__(self)
        adopt(self, source)
        attn: Any = source.attn
        self.mixing = mixing
        self.whole = not mixing.core.capabilities.score_bias
        if self.whole:
            del attn.relative_position_bias_table, attn.relative_position_index
            self.attn_mask = None
        else:
            self.attn = Windows(attn, mixing)

    def _attn(self, x: Tensor) -> Tensor:
        if not self.whole:
            return super()._attn(x)
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        attn: Any = self.attn
        q, k, v = (split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
        out = attn.proj_drop(attn.proj(self.mixing(q, k, v, x, Grid(height, width))))
        return out.reshape(batch, height, width, dim)

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """See timm's; the whole map has no windows to fit."""
        if self.whole:
            self.input_resolution = feat_size
        else:
            super().set_input_size(feat_size, window_size, always_partition)


class Swin(Seam):
    """See the module."""

    library: ClassVar[str] = "timm"

    def knows(self, module: nn.Module) -> bool:
        """See `Seam`."""
        return isinstance(module, SwinTransformerBlock)

    def heads(self, module: Any) -> Heads:
        """See `Seam`."""
        attn = module.attn
        return Heads(attn.num_heads, attn.proj.in_features, attn.dim, attn.scale)

    def parts(self, module: Any) -> Mapping[str, tuple[Part, ...]]:
        """See `Seam`."""
        return rows(module, module.attn.proj.in_features, "attn.")

    def images(self, model: nn.Module, name: str) -> Images | None:
        """See `Seam`: blocks are given maps, so nothing has to be told."""
        return None

    def dropout(self, module: Any) -> float:
        """See `Seam`."""
        return float(module.attn.attn_drop.p)

    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """See `Seam`."""
        source = model.get_submodule(name)
        assert isinstance(source, SwinTransformerBlock)
        model.set_submodule(name, Block(source, mixing))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """See `Seam`."""
        return described(model)

    def rebuild(self, described: Mapping[str, Any]) -> nn.Module:
        """See `Seam`."""
        return rebuilt(described)


class Reduced(PyramidAttention):
    """The attention of a block of PVTv2, by a mechanism."""

    def __init__(self, source: PyramidAttention, mixing: Mixing) -> None:
        nn.Module.__init__(self)
        adopt(self, source)
        for name in ("pool", "sr", "norm", "act"):
            if not hasattr(self, name):
                setattr(self, name, None)
        self.mixing = mixing
        self.reduces = self.sr is not None and mixing.core.structure.reduced

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """See timm's: `x` `(B, H*W, C)`."""
        grid = Grid(*feat_size)
        source, coarse = self._coarser(x, grid) if self.reduces else (x, None)
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(source).chunk(2, dim=-1))
        out = self.mixing(q, k, v, x, grid, key_grid=coarse)
        return self.proj_drop(self.proj(out))

    def _coarser(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        x = x.transpose(1, 2).unflatten(2, (grid.height, grid.width))  # (B, C, H, W)
        x = self.sr(x if self.pool is None else self.pool(x))
        coarse = Grid(x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).transpose(1, 2))
        return (x if self.act is None else self.act(x)), coarse


class PVTv2(Seam):
    """See the module."""

    library: ClassVar[str] = "timm"

    def knows(self, module: nn.Module) -> bool:
        """See `Seam`."""
        return isinstance(module, PyramidAttention)

    def heads(self, module: Any) -> Heads:
        """See `Seam`."""
        return Heads(module.num_heads, module.dim, module.dim, module.scale)

    def parts(self, module: Any) -> Mapping[str, tuple[Part, ...]]:
        """See `Seam`; the norm of the reduction is none of q and k."""
        return {role: parts for role, parts in rows(module, module.dim).items() if role != "norm"}

    def images(self, model: nn.Module, name: str) -> Images | None:
        """See `Seam`: the attention is told the size of its map."""
        return None

    def dropout(self, module: Any) -> float:
        """See `Seam`."""
        return float(module.attn_drop.p)

    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """See `Seam`."""
        source = model.get_submodule(name)
        assert isinstance(source, PyramidAttention)
        model.set_submodule(name, Reduced(source, mixing))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """See `Seam`."""
        return described(model)

    def rebuild(self, described: Mapping[str, Any]) -> nn.Module:
        """See `Seam`."""
        return rebuilt(described)
