"""The rotary embedding against its published table, in tiles, and what it is for: relative positions."""

import pytest
import torch

from golden.constants import rotary_table
from linsight.errors import LinsightError
from linsight.ops import Grid, Tile, Turn, check_rotary, rotate, tiles

F64 = torch.float64


def test_is_the_published_table():
    grid, x = Grid(5, 7, 2), torch.randn(2, 2 + 35, 16)
    cos, sin = torch.from_numpy(rotary_table(5, 7, 16)).flatten(0, 1).unbind(-1)
    a, b = x[:, 2:].unflatten(-1, (8, 2)).unbind(-1)
    wanted = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(2)
    out = rotate(x, Tile.whole(grid))
    torch.testing.assert_close(out[:, 2:], wanted)
    assert torch.equal(out[:, :2], x[:, :2])


def test_tiles_have_their_own_positions():
    grid = Grid(6, 9, 1)
    x = torch.randn(1, grid.tokens, 8, dtype=F64)
    whole = rotate(x, Tile.whole(grid))
    for tile in tiles(grid, 4, 5, halo=1):
        torch.testing.assert_close(rotate(tile.take(x), tile), tile.take(whole))


def test_products_depend_on_offsets_alone():
    q, k = torch.randn(2, 1, 1, 8, dtype=F64).expand(2, 1, 30, 8)
    whole = Tile.whole(Grid(5, 6))
    scores = (rotate(q, whole) @ rotate(k, whole).mT)[0].unflatten(0, (5, 6)).unflatten(2, (5, 6))
    torch.testing.assert_close(scores[1, 2, 3, 4], scores[0, 1, 2, 3])
    assert not torch.allclose(scores[1, 2, 3, 4], scores[0, 1, 3, 3])


@pytest.mark.parametrize("width", [8, 7, 10], ids=str)
def test_heads_are_turned_each_alone(width):
    """Each as if it were all; what a multiple of four channels leaves over is not turned."""
    tile, x, where = Tile(Grid(9, 9, 1), 2, 3, 4, 5, 1), torch.randn(2, 42, 3 * width, dtype=F64), torch.device("cpu")
    out = Turn.of(tile, 3 * width, heads=3, base=50.0, device=where, dtype=F64).rotate(x)
    for head, ours in zip(x.split(width, -1), out.split(width, -1), strict=True):
        turning = width // 4 * 4
        alone = Turn.of(tile, turning, base=50.0, device=where, dtype=F64).rotate(head[..., :turning])
        torch.testing.assert_close(ours, torch.cat([alone, head[..., turning:]], dim=-1), rtol=0, atol=0)


def test_half_tokens_are_turned_in_float32():
    x = torch.randn(1, 6, 8, dtype=torch.bfloat16)
    out = rotate(x, Tile.whole(Grid(2, 3)))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), rotate(x.double(), Tile.whole(Grid(2, 3))), rtol=0, atol=1e-5)


def test_widths_that_cannot_be_turned():
    with pytest.raises(LinsightError, match="divisible by 4, not 6"):
        check_rotary(6)


@pytest.mark.parametrize("grid", [Grid(5, 7), Grid(6, 1, 2)], ids=["", "prefix"])
def test_without_gradients_it_is_the_same(grid):
    """Then it is one complex product; by its definition otherwise."""
    x = torch.randn(2, grid.tokens, 16)
    with torch.no_grad():
        free = rotate(x, Tile.whole(grid))
    torch.testing.assert_close(free, rotate(x, Tile.whole(grid)))
