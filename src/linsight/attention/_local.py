"""The depthwise convolution of values that many mechanisms add to what they read."""

from torch import Tensor, nn

from linsight.ops import Tile, accumulator, depthwise_conv, full_precision, mask_tokens, pad_prefix

from ._core import Tokens, merge_heads, split_heads


def grid_values(tokens: Tokens, tile: Tile) -> Tensor:
    """v of what `tile` sees of the grid: `(B, n, C)`, zero where a token is not kept."""
    return mask_tokens(merge_heads(tokens.v), tokens.keep)[:, tile.prefix :]


def local_values(v: Tensor, conv: nn.Conv2d, tile: Tile, num_heads: int) -> Tensor:
    """The depthwise `conv` of `v` `(B, n, C)`, what `tile` sees of the grid: `(B, h*w, H, E)` of its own tokens.

    In the accumulator's dtype.
    """
    assert conv.bias is not None
    dtype = accumulator(v.dtype)
    with full_precision(v):
        local = depthwise_conv(v, tile.seen, conv.weight.to(dtype), conv.bias.to(dtype))
    return split_heads(tile.inner_grid(local), num_heads)


def add_local(out: Tensor, v: Tensor, conv: nn.Conv2d, tile: Tile) -> Tensor:
    """`out` `(B, P + h*w, H, E)` of `tile`, in the accumulator's dtype, plus `local_values`; prefix tokens get none."""
    local = merge_heads(local_values(v, conv, tile, out.shape[-2]))
    return out + split_heads(pad_prefix(local, tile.prefix), out.shape[-2])
