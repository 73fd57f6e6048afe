"""Transformer blocks of diffusion models: which modules are such, where their tokens lie, attention by their layers."""

import math
from typing import Any

from torch import Tensor, nn

from linsight.attention import merge_heads, split_heads
from linsight.errors import LinsightError

from .merging import Size, agent_attention

BLOCK = "BasicTransformerBlock"
PARTS = ("to_q", "to_k", "to_v", "to_out", "heads")  # of an attention
AROUND = ("norm_q", "norm_k", "group_norm", "spatial_norm")  # what one may have beside these


def blocks(model: nn.Module) -> dict[str, Any]:
    """The modules of a model whose class, or an ancestor of it, is named BasicTransformerBlock, by name.

    Raises:
        LinsightError: there are none, or their self-attention `attn1` is of another build.
    """
    if not isinstance(model, nn.Module):
        raise LinsightError(f"{type(model).__name__} is no module: give the network of a pipeline, as pipe.unet")
    found = {
        name: module
        for name, module in model.named_modules()
        if any(kind.__name__ == BLOCK for kind in type(module).__mro__)
    }
    if not found:
        raise LinsightError(f"{type(model).__name__} has no {BLOCK} inside, in which tokens could be merged")
    for name, block in found.items():
        attn: Any = getattr(block, "attn1", None)
        lacks = [part for part in PARTS if not hasattr(attn, part)]
        more = [part for part in AROUND if getattr(attn, part, None) is not None]
        if lacks or more:
            wrong = f"lacks {', '.join(lacks)}" if lacks else f"has {', '.join(more)}"
            raise LinsightError(f"{name}.attn1 {wrong}: tokens are merged for attentions of {', '.join(PARTS)} alone")
    return found


def level(size: Size, tokens: int) -> tuple[Size, int] | None:
    """The grid of `tokens` tokens in a latent of `size`, and how many latent pixels a side a token is.

    Sides are rounded up, as strided convolutions do; None where no level has as many tokens.
    """
    for factor in range(1, max(size) + 1):
        grid = math.ceil(size[0] / factor), math.ceil(size[1] / factor)
        if grid[0] * grid[1] <= tokens:
            return (grid, factor) if grid[0] * grid[1] == tokens else None
    return None


def attend(attn: Any, x: Tensor, agents: Tensor | None) -> Tensor:
    """Attention of the tokens `x` `(B, N, C)` by the layers of `attn`, by way of agents `(B, n, C)`.

    Without agents it is the zero control, the mean of all values.
    """
    v = _heads(attn, attn.to_v(x))
    if agents is None:
        out = v.mean(dim=2, keepdim=True).expand_as(v)
    else:
        out = agent_attention(
            _heads(attn, attn.to_q(x)), _heads(attn, attn.to_k(x)), v, _heads(attn, attn.to_q(agents))
        )
    out = merge_heads(out.transpose(1, 2))
    for layer in attn.to_out if isinstance(attn.to_out, nn.ModuleList) else [attn.to_out]:
        out = layer(out)
    return out


def _heads(attn: Any, x: Tensor) -> Tensor:
    """`(B, N, C)` -> `(B, H, N, d)`."""
    return split_heads(x, attn.heads).transpose(1, 2)
