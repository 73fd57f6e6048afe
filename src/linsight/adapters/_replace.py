"""Surgery on a model: its attentions replaced, its weights kept."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from linsight.errors import LinsightError

from ._multihead import MultiheadAttention
from ._place import GridLike


def replace_attention(
    model: nn.Module,
    attention: str = "inline",
    *,
    grid: GridLike | None = None,
    prefix: int = 0,
    keep_weights: bool = True,
    where: Callable[[str], bool] | None = None,
    **options: Any,
) -> list[str]:
    """Replace every `torch.nn.MultiheadAttention` of `model` by ours, in place; the names of those replaced.

    They are on the same device, in the same dtype and mode. `grid` and `prefix` say where the model's tokens lie,
    as of `MultiheadAttention`: a ViT-B/16 with a class token has grid=(14, 14), prefix=1 at 224 x 224.

    Args:
        model: a model that has such attentions inside.
        keep_weights: the new projections are the old ones; parameters of the mechanism's own are always fresh.
        where: which to replace, by name; all, if None.
        options: of the mechanism.

    Raises:
        LinsightError: none is there, or one cannot be replaced. Nothing has been then.
    """
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention) and name and (where is None or where(name))
    ]
    if not found:
        raise LinsightError(
            f"{type(model).__name__} has no torch.nn.MultiheadAttention inside to replace: timm's vision "
            f"transformers take attn_layer=attention_class(...), other models a layer of create_attention"
        )
    made: dict[nn.Module, MultiheadAttention] = {}  # of the old one: a model may use one twice
    for name, old in found:
        if old not in made:
            made[old] = _successor(
                name, old, keep_weights, attention=attention, grid=grid, prefix=prefix, index=len(made), **options
            )
    dropped = sorted({old.dropout for _, old in found if old.dropout})
    if dropped:
        warnings.warn(
            f"attention dropout ({', '.join(map(str, dropped))}) is gone: '{attention}' is given no scores to drop",
            stacklevel=2,
        )
    for name, old in found:
        model.set_submodule(name, made[old])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return [name for name, _ in found]


def _successor(name: str, old: nn.MultiheadAttention, keep_weights: bool, **ours: Any) -> MultiheadAttention:
    asked = {"add_bias_kv": old.bias_k is not None, "add_zero_attn": old.add_zero_attn}
    weight = old.out_proj.weight
    try:
        new = MultiheadAttention(
            old.embed_dim,
            old.num_heads,
            bias=old.out_proj.bias is not None,
            batch_first=old.batch_first,
            device=weight.device,
            dtype=weight.dtype,
            kdim=old.kdim,
            vdim=old.vdim,
            **asked,
            **ours,
        )
    except LinsightError as error:
        error.args = (f"{name}: {error}",)
        raise
    if keep_weights:
        new.load_state_dict(old.state_dict(), strict=False)
        trained = {key: parameter.requires_grad for key, parameter in old.named_parameters()}
        for key, parameter in new.named_parameters():
            parameter.requires_grad_(trained.get(key, True))
    return new.train(old.training)
