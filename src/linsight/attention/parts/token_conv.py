"""The depthwise convolution of values that many mechanisms add to what they read."""

from torch import Tensor, nn

from linsight.ops import Convolved, Tile, accumulator, mask_tokens, pad_prefix

from ..core import Tokens, merge_heads, split_heads


def grid_values(tokens: Tokens, tile: Tile) -> Tensor:
    """v of what `tile` sees of the grid: `(B, n, C)`, zero where a token is not kept."""
    return mask_tokens(merge_heads(tokens.v), tokens.keep)[:, tile.prefix :]


def local_values(v: Tensor, conv: nn.Conv2d, tile: Tile, num_heads: int) -> Convolved:
    """The depthwise `conv` of `v` `(B, n, C)`, what `tile` sees of the grid, in the accumulator's dtype."""
    assert conv.bias is not None
    dtype = accumulator(v.dtype)
    return Convolved(v, tile.seen, conv.weight.to(dtype), conv.bias.to(dtype), num_heads)


def on_grid(local: Convolved, tile: Tile) -> Convolved | Tensor:
    """That of the tile's own tokens `(B, h*w, H, E)`; still to be made where they are all that is seen."""
    return local if tile.halo == 0 else tile.inner_grid(local.whole())


def add_local(out: Tensor, v: Tensor, conv: nn.Conv2d, tile: Tile) -> Tensor:
    """`out` `(B, P + h*w, H, E)` of `tile`, in the accumulator's dtype, plus `local_values`; prefix tokens get none."""
    local = merge_heads(tile.inner_grid(local_values(v, conv, tile, out.shape[-2]).whole()))
    return out + split_heads(pad_prefix(local, tile.prefix), out.shape[-2])
