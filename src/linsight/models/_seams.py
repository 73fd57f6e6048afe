"""What mechanisms and hosts may ask of each other, without knowing names."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from linsight.attention import Block, Core, Layer, create_attention, create_block, is_block, mechanism
from linsight.errors import CapabilityError, LinsightError

from ._plan import Choice


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

    projections: those of the host's published keys; a mechanism with some of its own keeps them.
    reduction, pool: how the host reduces keys and values where the cost is quadratic; a mechanism that takes no
        reduced keys sees all.
    shared: `grid`, `qkv_bias`, `device` ... as of `create_attention`.
    """
    entry = mechanism(choice.name)
    if entry.kind == "core":
        if projections and getattr(entry.factory, "projections", None) == "qkv":
            shared["projections"] = projections
        if entry.quadratic and entry.structure.reduced:
            shared |= {"reduction": reduction, "pool": pool}
    return create_attention(choice.name, dim, num_heads, index=choice.index, **{**shared, **choice.options})


def make_block(choice: Choice, dim: int, num_heads: int, **shared: Any) -> Block | None:
    """The whole block, of a mechanism that is one; None for those that go into the host's own."""
    if not is_block(choice.name):
        return None
    return create_block(choice.name, dim, num_heads, index=choice.index, **shared, **choice.options)


def refuse_prefix(choices: Iterable[Choice], way: str) -> None:
    """Raise, naming the way out, where a mechanism has no place for the class token of a host."""
    for name in dict.fromkeys(choice.name for choice in choices):
        if not mechanism(name).capabilities.prefix:
            raise CapabilityError(f"'{name}' works on a grid, which a class token has no place on (prefix): {way}")


def refuse_dropped_scores(attention: Any) -> None:
    """Raise where an attention of timm drops scores, which no layer of ours does."""
    if attention.attn_drop.p:
        raise LinsightError("linear attention has no score matrix to drop from: pass attn_drop_rate=0")


def inherit(new: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights whose name and shape `new` has."""
    own = new.state_dict()
    new.load_state_dict({k: t for k, t in weights.items() if k in own and own[k].shape == t.shape}, strict=False)


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
