"""The depthwise convolution of values that many mechanisms add to what they read."""

from torch import Tensor, nn

from linsight.ops import Tile, depthwise_conv, full_precision, mask_tokens, pad_prefix

from ._core import Tokens, merge_heads, split_heads


def grid_values(tokens: Tokens, tile: Tile) -> Tensor:
    """v of what `tile` sees of the grid: `(B, n, C)`, zero where a token is not kept."""
    return mask_tokens(merge_heads(tokens.v), tokens.keep)[:, tile.prefix :]


def add_local(out: Tensor, v: Tensor, conv: nn.Conv2d, tile: Tile) -> Tensor:
    """`out` `(B, P + h*w, H, E)` of `tile` plus the depthwise `conv` of `v` `(B, n, C)`, what it sees of the grid.

    In the dtype of `out`. Prefix tokens get nothing.
    """
    assert conv.bias is not None
    weight, bias = conv.weight.to(out.dtype), conv.bias.to(out.dtype)
    with full_precision(out):
        local = tile.inner_grid(depthwise_conv(v.to(out.dtype), tile.seen, weight, bias))
    return out + split_heads(pad_prefix(local, tile.prefix), out.shape[-2])
