"""Questions that mechanisms and hosts may ask of each other, without knowing names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from linsight.attention import Block, Core, Layer, create_attention, create_block, is_block, mechanism
from linsight.errors import CapabilityError, LinsightError

from .plan import Choice, named

NO_DROPPED_SCORES = "no mechanism here drops scores: pass attn_drop_rate=0, perhaps proj_drop_rate= in its place"
# What hosts ask of a layer that nobody asked of them.
_USUAL = {"qkv_bias": True, "proj_bias": True, "proj_drop": 0.0}


def make_layer(
    choice: Choice,
    dim: int,
    num_heads: int,
    *,
    projections: str | None = None,
    reduction: int = 1,
    pool: int = 0,
    **shared: Any,
) -> Layer:
    """The layer of a block.

    projections: those of the host's published keys; a mechanism with some of its own keeps them, or takes those that
        it has for reduced keys.
    reduction, pool: how the host reduces keys and values where the cost is quadratic; a mechanism that takes no
        reduced keys sees all.
    shared: `grid`, `qkv_bias`, `device` ... as of `create_attention`.
    """
    entry = mechanism(choice.name)
    shared = {key: value for key, value in shared.items() if key not in _USUAL or value != _USUAL[key]}
    if entry.kind == "core":
        own, split = (getattr(entry.factory, name, None) for name in ("projections", "reduced_projections"))
        if projections and (own == "qkv" or split != Core.reduced_projections):
            shared["projections"] = projections if own == "qkv" else split
        if entry.quadratic and entry.structure.reduced:
            shared |= {"reduction": reduction, "pool": pool}
    return create_attention(choice.name, dim, num_heads, index=choice.index, **{**shared, **choice.options})


def make_block(choice: Choice, dim: int, num_heads: int, **shared: Any) -> Block | None:
    """The whole block, of a mechanism that is one; None for those that go into the host's own."""
    if not is_block(choice.name):
        return None
    return create_block(choice.name, dim, num_heads, index=choice.index, **shared, **choice.options)


def refuse_for_block(choice: Choice, asked: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Raise where what is `asked` of blocks is not `usual`, and `choice` is a whole block that does not take it."""
    if not is_block(choice.name):
        return
    takes = mechanism(choice.name).factory.takes  # type: ignore[attr-defined]
    for name, value in asked.items():
        if name not in takes and value != usual.get(name):
            raise LinsightError(
                f"{name}={value}: '{choice.name}' is a whole block, of the host's arguments it takes "
                f"{' and '.join(takes)}: leave {name} out, or take another mechanism"
            )


def refuse_idle(idle: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Raise for the first of the arguments `given` to a host that has no effect; `idle` says why."""
    for name, why in idle.items():
        if name in given:
            raise LinsightError(f"{name}={given[name]} has no effect: {why}")


def refuse_unbiased(attention: str, qkv_bias: bool) -> None:
    """Raise where a host is asked for no bias by `qkv_bias`, and no mechanism of `attention` would have one."""
    if not qkv_bias and not any(getattr(kind.factory, "qkv_bias", True) for kind in named(attention)):
        raise LinsightError(f"qkv_bias={qkv_bias} has no effect: '{attention}' has no such bias, leave it out")


def have_prefix(choices: Iterable[Choice]) -> bool:
    """True where all mechanisms have a place for a class token."""
    return all(mechanism(choice.name).capabilities.prefix for choice in choices)


def refuse_prefix(choices: Iterable[Choice], way: str) -> None:
    """Raise, naming the way out, where a mechanism has no place for the class token of a host."""
    for name in dict.fromkeys(choice.name for choice in choices):
        if not mechanism(name).capabilities.prefix:
            raise CapabilityError(f"'{name}' works on a grid, which a class token has no place on (prefix): {way}")


def in_place_of(
    theirs: Any, choice: Choice, grid: tuple[int, int], make: Callable[..., Layer], init: Callable[[nn.Module], None]
) -> Block | Layer:
    """For the attention of a block of timm: our layer, which goes on with its weights where they fit, or a whole block.

    make: of the choice, dim, heads, and the arguments that timm's attention tells: `make_layer`.
    init: gives a module its initial weights.
    """
    old = theirs.attn
    if old.attn_drop.p:
        raise LinsightError(f"attn_drop_rate={old.attn_drop.p}: {NO_DROPPED_SCORES}")
    if old.proj.in_features != old.dim:
        raise LinsightError(f"head_dim=: heads share the {old.dim} channels here, leave it out")
    projection = old.qkv if hasattr(old, "qkv") else old.q
    biased, norm = projection.bias is not None, theirs.norm1
    asked = {"qkv_bias": biased, "proj_drop_rate": old.proj_drop.p, "norm_layer": type(norm)}
    refuse_for_block(choice, asked, {**_USUAL, "proj_drop_rate": 0.0, "norm_layer": _plain(norm)})
    factory = {"device": old.proj.weight.device, "dtype": old.proj.weight.dtype}
    rate, ratio = getattr(theirs.drop_path1, "drop_prob", 0.0), theirs.mlp.fc1.out_features / old.dim
    whole = make_block(choice, old.dim, old.num_heads, mlp_ratio=ratio, drop_path=rate, grid=grid, **factory)
    if whole is not None:
        return whole.apply(init).apply(init_own)
    shared = {"qkv_bias": biased, "proj_drop": old.proj_drop.p, **factory}
    new = make(choice, old.dim, old.num_heads, **shared).apply(init).apply(init_own)
    own = new.state_dict()
    weights = {re.sub(r"^(sr|norm)\.", r"reduction.\1.", key): tensor for key, tensor in old.state_dict().items()}
    fitting = {key: t for key, t in weights.items() if key in own and own[key].shape == t.shape}
    new.load_state_dict(fitting, strict=False)
    return new


def init_own(module: nn.Module) -> None:
    """Give a part of a mechanism the initial weights that are its own, if it has some, after those of the host.

    For `Module.apply`. It calls `init_weights`, as timm's hosts do.
    """
    own: Callable[[], None] | None = getattr(module, "init_weights", None)
    if own is not None and isinstance(module, Core | Layer | Block):
        own()


def _plain(norm: nn.Module) -> type[nn.Module]:
    """The class of a LayerNorm, torch's own or timm's: that of `norm`, if it is one of them."""
    return type(norm) if type(norm) in (nn.LayerNorm, LayerNorm) else nn.LayerNorm


def set_grid(module: nn.Module, grid: tuple[int, int]) -> None:
    """Tell all that is inside `module` and lies on a grid that it is now `grid`, which resamples tables.

    What has a `set_grid` of its own, as layers and blocks have, answers for its own parts.
    """
    for part in module.children():
        move = getattr(part, "set_grid", None)
        if move is None:
            set_grid(part, grid)
        else:
            move(grid)


def asked_no_weight_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that the mechanisms of `model` want kept from weight decay."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Core | Layer | Block)
        for name in module.no_weight_decay()
    }
