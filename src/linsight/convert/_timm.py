"""Mechanisms in the place of the attention of timm's vision transformers."""

import copyreg
import functools
from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from linsight.attention import create_attention, mechanism, require
from linsight.errors import CapabilityError, LinsightError

from ._place import GridLike, check_prefix, locate, refuse, score_bias, table_grid

# Arguments of timm's attention that ours have nothing to do with.
_REFUSED = {
    "qk_norm": "there is no query and key normalisation around linear attention, pass qk_norm=False",
    "scale_norm": "there is no norm before the output projection, pass scale_attn_norm=False",
    "gated": "there is no output gate, pass gated=False",
    "attn_drop": "no mechanism here drops scores, pass attn_drop_rate=0",
    "attn_head_dim": "heads share the channels, pass attn_head_dim=None",
    "dim_out": "as many channels come out as go in, pass dim_out=None",
}
_TAKEN = {"qkv_bias", "proj_bias", "proj_drop", "device", "dtype"}
_IDLE = {"norm_layer", "depth"}  # arguments of norms that are refused, and of other attentions


class _Made(type):
    """The type of classes that `attention_class` makes. timm's models hold theirs, and are to pickle."""

    made: functools.partial[type[nn.Module]]  # the call


copyreg.pickle(_Made, lambda cls: (cls.made, ()))  # type: ignore[arg-type, return-value]


def attention_class(name: str, *, grid: GridLike, prefix: int = 0, **options: Any) -> type[nn.Module]:
    """A class for `attn_layer=`: what it makes are layers of `create_attention` that timm can call.

    timm's vision transformers pass no grid, so the class is told the one of their image size; each layer has it
    as `grid` and `prefix`, which may be set anew. For images of any size, `linsight.create_model` has hosts.
    Keys are timm's (`qkv`, `proj`), and those of the mechanism are added to them.

    >>> attn_layer = attention_class("inline", grid=(14, 14), prefix=1)
    >>> model = timm.create_model("vit_tiny_patch16_224", attn_layer=attn_layer)

    Args:
        name: the mechanism.
        grid: height and width in patches, or "1d" for 1 x N.
        prefix: class and register tokens in front.
        options: as of `create_attention`.

    Raises:
        UnknownNameError: no such mechanism; of its options, when a layer is made.
        CapabilityError: it has no place for prefix tokens.
        LinsightError: when a layer is made, what timm asks of it and it cannot do.
    """
    entry = mechanism(name)
    if entry.kind == "block":
        raise LinsightError(f"'{name}' is a whole block, not an attention layer: use linsight.create_model")
    check_prefix(entry.factory, prefix)
    call = functools.partial(attention_class, name, grid=grid, prefix=prefix, **options)
    if getattr(entry.factory, "projections", None) == "q_k_v":
        options.setdefault("projections", "qkv")

    class LinsightAttention(nn.Module, metaclass=_Made):
        made = call

        def __new__(cls, dim: int, num_heads: int = 8, **timm_args: Any) -> Any:
            refuse(timm_args, _REFUSED)
            unknown = sorted(timm_args.keys() - _REFUSED.keys() - _TAKEN - _IDLE)
            if unknown:
                raise LinsightError(f"attn_layer= is given {', '.join(unknown)}, which linear attention cannot honour")
            shared = {key: value for key, value in timm_args.items() if key in _TAKEN}
            layer = create_attention(name, dim, num_heads, grid=table_grid(grid), **shared, **options)
            layer.grid, layer.prefix = grid, prefix  # type: ignore[assignment]
            layer.register_forward_pre_hook(_place_tokens, with_kwargs=True)
            return layer

    return LinsightAttention


def successor(old: Attention, attention: str, *, grid: GridLike | None, **ours: Any) -> nn.Module:
    """A layer of ours for an attention of timm's; weights are not copied. Its dropout of scores is left out."""
    if grid is None:
        raise LinsightError("timm's blocks do not say where tokens lie: pass grid=(height, width), or '1d'")
    weight, dim = old.qkv.weight, old.qkv.in_features
    return attention_class(attention, grid=grid, **ours)(
        dim,
        old.num_heads,
        qkv_bias=old.qkv.bias is not None,
        proj_bias=old.proj.bias is not None,
        proj_drop=old.proj_drop.p,
        device=weight.device,
        dtype=weight.dtype,
        qk_norm=not isinstance(old.q_norm, nn.Identity),
        scale_norm=not isinstance(old.norm, nn.Identity),
        gated=old.gate is not None,
        attn_head_dim=old.head_dim if old.attn_dim != dim else None,
        dim_out=old.proj.out_features if old.proj.out_features != dim else None,
    )


def _place_tokens(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as timm makes it, `(x, attn_mask=None, is_causal=False)`, as a layer of ours takes it."""
    if len(args) != 1:  # with a layout, as ours are called
        return args, kwargs
    core = getattr(layer, "core", layer)
    x: Tensor = args[0]
    mask: Tensor | None = kwargs.pop("attn_mask", None)
    if kwargs.pop("is_causal", False) and not getattr(core, "causal", False):
        require(type(core), "causal", "a causal mask")
        raise CapabilityError("the layer is causal if it is built so: attention_class(causal=True)")
    if mask is not None:
        require(type(core), "score_bias", "attn_mask, a mask of pairs")
        kwargs["score_bias"] = score_bias(mask, mask.logical_not(), x)
    return (x, locate(layer.grid, layer.prefix, x)), kwargs
