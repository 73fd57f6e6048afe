"""The tiled form of the linear family on a CPU is the plain one, cut anywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linsight.ops import (
    Convolved,
    Features,
    Grid,
    Tile,
    Turn,
    affine_read,
    central_absorb,
    focus,
    linear_absorb,
    linear_read,
    use_form,
)
from linsight.ops.cpu import tiled

HEADS, WIDTH = 2, 8


def computed(q, k, v, keep, add, turn):
    """All four operators."""
    state = linear_absorb(Features(k, "elu+1", turn=turn), v, keep)
    out = linear_read(Features(q, "elu+1", turn=turn), state, 1e-6, add=add)
    moments = central_absorb(Features(k, turn=turn), v, keep)
    return [*state, out, *moments, affine_read(Features(q, turn=turn), moments.cross, moments.v, add=add)]


@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    prefix=st.integers(0, 2),
    budget=st.sampled_from([1, 100, 300, 2000]),
    masked=st.booleans(),
    turned=st.sampled_from([0, 1, HEADS]),
    rows=st.integers(0, 3),
)
def test_tiles_change_nothing(batch, height, width, prefix, budget, masked, turned, rows):
    grid = Grid(height, width, prefix)
    q, k, v = torch.randn(3, batch, grid.tokens, HEADS, WIDTH).unbind(0)
    keep = torch.rand(batch, grid.tokens) < 0.7 if masked else None
    add = torch.randn(batch, height * width, HEADS, WIDTH)
    if rows:  # a convolution that is made that many rows at a time; of kernels of each image, for some
        dynamic, channels = rows == 2, HEADS * WIDTH
        weight = torch.randn(batch if dynamic else channels, channels if dynamic else 1, 3, 3)
        bias = None if dynamic else torch.randn(channels)
        add = Convolved(add.flatten(2), (height, width), weight, bias, HEADS, dynamic)
    turn = None
    if turned:
        turn = Turn.of(Tile.whole(grid), HEADS * WIDTH, heads=turned, device=q.device, dtype=q.dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "BUDGET", budget)
        patch.setattr(tiled, "ROWS", rows)
        patch.setattr(tiled, "STEPS", 0)
        ours = computed(q, k, v, keep, add, turn)
        with use_form("plain"):
            plain = computed(q, k, v, keep, add, turn)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_it_runs_without_gradients_alone(monkeypatch):
    """With them, all that lies between steps would be kept."""
    k, v = torch.randn(2, 1, 30, HEADS, WIDTH).unbind(0)
    calls = []
    monkeypatch.setattr(tiled, "BUDGET", 64)
    plain = tiled.plain_absorb
    monkeypatch.setattr(tiled, "plain_absorb", lambda *a: calls.append(a[1].shape[1]) or plain(*a))
    linear_absorb(k, v)
    assert not calls
    with torch.no_grad():
        linear_absorb(k, v)
    assert calls == [4] * 7 + [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(tiled, "BUDGET", 100)
    q = torch.randn(2, 30, HEADS, WIDTH, dtype=dtype)
    matrix, shift = torch.randn(2, HEADS, WIDTH, WIDTH), torch.randn(2, HEADS, WIDTH)
    add = torch.randn(2, 28, HEADS, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = affine_read(q, matrix, shift, add=add, dtype=dtype)
    exact = torch.einsum("bnhd,bhde->bnhe", q.double(), matrix.double()) + shift[:, None]
    exact[:, 2:] += add
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.float().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_powers_are_tiled_too(monkeypatch):
    monkeypatch.setattr(tiled, "BUDGET", 100)
    x, column = torch.randn(2, 30, HEADS, WIDTH), torch.rand(HEADS, WIDTH) + 0.5
    features = Features(x, "positive", 3.0, column, 1 / x.amax(dim=(-2, -1)), torch.rand(2, 30) + 0.5)
    v = torch.randn(2, 30, HEADS, WIDTH)
    with torch.no_grad():
        state = linear_absorb(features, v)
        out = linear_read(features, state, 1e-6)
        focused = linear_read(focus(x, column, 3.0), linear_absorb(focus(x, column, 3.0), v), 1e-6)
    with use_form("plain"):
        torch.testing.assert_close(state.kv, linear_absorb(features, v).kv, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out, linear_read(features, state, 1e-6), rtol=1e-4, atol=1e-4)
        plain = linear_read(focus(x, column, 3.0), linear_absorb(focus(x, column, 3.0), v), 1e-6)
    torch.testing.assert_close(focused, plain, rtol=1e-4, atol=1e-4)
