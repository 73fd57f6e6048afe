"""Attention of timm's vision transformers: ViT, DeiT, CLIP and DINOv2, and EVA with its rotary embedding.

The replaced module gives its parts to the new one under their names: projections, norms of queries and keys, gate.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import timm
import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import is_model
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Rename, split_heads
from linsight.errors import CapabilityError, LinsightError

from ..mixing import Mixing
from ..place import Place
from .adopt import adopt
from .seam import Heads, Images, Part, Seam, around, keys_and_pairs

_ROLES: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
    **dict.fromkeys(("q", "q_proj", "q_bias"), ("q",)),
    **dict.fromkeys(("k", "k_proj"), ("k",)),
    **dict.fromkeys(("v", "v_proj", "v_bias"), ("v",)),
    **dict.fromkeys(("proj", "gate"), ("out",)),
    **dict.fromkeys(("q_norm", "k_norm", "norm"), ("norm",)),
}


class TimmAttention(nn.Module):
    """An attention of timm's with a mechanism in the place of its softmax; called as timm's is."""

    num_heads: int

    def __init__(self, source: nn.Module, mixing: Mixing, place: Place) -> None:
        super().__init__()
        adopt(self, source)
        for name in ("q_bias", "gate", "qkv"):
            if not hasattr(self, name):
                setattr(self, name, None)
        self.mixing = mixing
        self.place = place

    @property
    def published(self) -> tuple[Rename, ...]:
        """Key map: what the mechanism learns has published names among those of the attention."""
        return self.mixing.published_keys()

    def attend(self, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Mix `x` `(B, N, C)`.

        Args:
            rope: sine and cosine of the tokens behind the prefix, for attentions that turn theirs.
            attn_mask: `(B or 1, H or 1, M or 1, N)`.
        """
        if is_causal and not self.mixing.core.causal:
            raise CapabilityError(f"a causal mask: '{self.mixing.attention}' was not made with causal=True")
        mine: Any = self
        q, k, v = (split_heads(part, self.num_heads) for part in self._project(x))  # (B, N, H, D)
        q, k = mine.q_norm(q), mine.k_norm(k)
        if rope is not None:
            q, k = (self._turned(part, rope).type_as(v) for part in (q, k))
        keep, bias = keys_and_pairs(self.mixing, attn_mask, q)
        out = self.mixing(q, k, v, x, self.place.of(x), keep=keep, score_bias=bias)
        out = mine.norm(out)
        if mine.gate is not None:
            out = out * mine.gate(x).sigmoid()
        out = mine.proj_drop(mine.proj(out))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        mine: Any = self
        if mine.qkv is None:
            return mine.q_proj(x), mine.k_proj(x), mine.v_proj(x)
        if mine.q_bias is None:
            return mine.qkv(x).chunk(3, dim=-1)
        bias = torch.cat((mine.q_bias, mine.k_bias, mine.v_bias))
        return F.linear(x, mine.qkv.weight, bias).chunk(3, dim=-1)

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        mine: Any = self
        front, behind = x.transpose(1, 2).tensor_split([mine.num_prefix_tokens], dim=2)  # (B, H, N, D)
        behind = apply_rot_embed_cat(behind, rope, half=getattr(mine, "rotate_half", False))
        return torch.cat([front, behind], dim=2).transpose(1, 2)


class Flat(TimmAttention):
    """An attention without a rotary embedding."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See `TimmAttention.attend`."""
        return self.attend(x, None, attn_mask, is_causal)


class Turned(TimmAttention):
    """An attention whose blocks give it a rotary embedding."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See `TimmAttention.attend`."""
        return self.attend(x, rope, attn_mask, is_causal)


class TimmViT(Seam):
    """See the module."""

    library: ClassVar[str] = "timm"
    kinds: ClassVar[Mapping[type[nn.Module], type[TimmAttention]]] = {
        Attention: Flat,
        AttentionRope: Turned,
        EvaAttention: Turned,
    }

    def knows(self, module: nn.Module) -> bool:
        """See `Seam`."""
        return isinstance(module, (*self.kinds, ParallelScalingBlock))

    def heads(self, module: Any) -> Heads:
        """See `Seam`."""
        if isinstance(module, ParallelScalingBlock):
            raise LinsightError("one projection makes queries, keys, values and the MLP of this block: it has no seam")
        if getattr(module, "num_kv_heads", module.num_heads) != module.num_heads:
            raise LinsightError(f"{module.num_heads} heads of queries share {module.num_kv_heads} of keys and values")
        first = module.qkv if module.qkv is not None else module.q_proj
        return Heads(module.num_heads, module.num_heads * module.head_dim, first.in_features, module.scale)

    def parts(self, module: Any) -> Mapping[str, tuple[Part, ...]]:
        """See `Seam`."""
        return rows(module, module.num_heads * module.head_dim)

    def images(self, model: nn.Module, name: str) -> Images | None:
        """See `Seam`."""
        owner: Any = around(model, name, lambda module: hasattr(module, "patch_embed"))
        if owner is None:
            return None
        patches = owner.patch_embed
        if not hasattr(patches, "patch_size"):
            return None
        return Images(
            owner,
            tuple(patches.patch_size),
            int(getattr(owner, "num_prefix_tokens", 0)),
            padded=bool(getattr(patches, "dynamic_img_pad", False)),
        )

    def dropout(self, module: Any) -> float:
        """See `Seam`."""
        return float(module.attn_drop.p)

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Seam`."""
        return described(model)

    def rebuild(self, described: Mapping[str, Any]) -> nn.Module:
        """See `Seam`."""
        return rebuilt(described)

    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """See `Seam`."""
        source = model.get_submodule(name)
        make = next(make for kind, make in self.kinds.items() if isinstance(source, kind))
        model.set_submodule(name, make(source, mixing, place))


def rows(module: nn.Module, dim: int, inside: str = "") -> dict[str, tuple[Part, ...]]:
    """The tensors of an attention of timm's by what they do, see `Seam.parts`.

    dim: of queries, keys and values each, where one map makes several.  inside: the attention's name in the module.
    """
    found: dict[str, list[Part]] = {"q": [], "k": [], "v": [], "out": [], "norm": []}
    for name, _ in module.named_parameters():
        top = name.removeprefix(inside).partition(".")[0]
        if not name.startswith(inside) or top not in _ROLES:
            continue
        roles = _ROLES[top]
        for place, role in enumerate(roles):
            part = Part(name) if len(roles) == 1 else Part(name, slice(place * dim, (place + 1) * dim))
            found[role].append(part)
    return {role: tuple(parts) for role, parts in found.items() if parts}


def described(model: Any) -> dict[str, Any] | None:
    """Arguments by which `timm.create_model` makes such a model; those that leave no trace in it are not told."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, first = cfg.get("architecture"), cfg.get("first_conv")
    if name is None or not is_model(name):
        return None
    found = {"model_name": name, "num_classes": model.num_classes}
    if isinstance(first, str):
        found["in_chans"] = model.get_submodule(first).in_channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        found["img_size"] = list(size)
    if isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList):
        found["depth"] = len(model.blocks)
    pool = getattr(model, "global_pool", None)
    return found | ({"global_pool": pool} if isinstance(pool, str) else {})


def rebuilt(described: Mapping[str, Any]) -> nn.Module:
    """The model that `described` tells of, with fresh weights."""
    return timm.create_model(**described)
