"""Induced set attention against its two blocks, pooling against its one, the scale of both, keys, mistakes."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention.mechanisms.set_transformer import PMA, SAB
from linsight.errors import LinsightError
from linsight.ops import Grid
from matrix.subject import close

F64 = torch.float64


def mab(x, y, state, name, heads):
    """A block of the published keys under `name`, for one image."""

    def linear(kind, x):
        return x @ state[f"{name}.{kind}.weight"].T + state[f"{name}.{kind}.bias"]

    def norm(kind, x):
        if f"{name}.{kind}.weight" not in state:
            return x
        centred = x - x.mean(-1, keepdim=True)
        spread = centred.square().mean(-1, keepdim=True) + 1e-5
        return centred / spread.sqrt() * state[f"{name}.{kind}.weight"] + state[f"{name}.{kind}.bias"]

    q, k, v = linear("fc_q", x), linear("fc_k", y), linear("fc_v", y)
    seen = [
        (a @ b.T / q.shape[-1] ** 0.5).softmax(-1) @ c
        for a, b, c in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    ]
    u = norm("ln0", q + torch.cat(seen, dim=-1))
    return norm("ln1", u + linear("fc_o", u).relu())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_layer_is_two_blocks(norm, dropping):
    layer, grid = create_attention("set_transformer", 8, 4, points=3, norm=norm).double(), Grid(2, 4, 1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    kept = torch.arange(grid.tokens) % 3 != 1 if dropping else torch.ones(grid.tokens, dtype=torch.bool)
    x = torch.randn(2, grid.tokens, 8, dtype=F64)
    out = layer(x, grid, keep=kept.expand(2, -1) if dropping else None)
    state = linsight.export_published(layer)
    for image in range(2):
        tokens = x[image, kept]
        found = mab(state["I"][0], tokens, state, "mab0", 4)
        close(out[image, kept], mab(tokens, found, state, "mab1", 4))


@pytest.mark.parametrize("norm", [False, True])
def test_pooling_is_a_block(norm):
    pool, x = PMA(8, 4, 3, norm=norm).double(), torch.randn(2, 7, 8, dtype=F64)
    state = pool.state_dict()
    out, kept = pool(x), torch.arange(7) < 5
    assert out.shape == (2, 3, 8)
    close(out[1], mab(state["S"][0], x[1], state, "mab", 4))
    poisoned = x.masked_fill(~kept[:, None], float("nan"))
    close(pool(poisoned, kept.expand(2, -1)), pool(x[:, :5]))


@pytest.mark.parametrize("norm", [False, True])
def test_self_attention_is_a_block(norm):
    block, x = SAB(8, 4, norm=norm).double(), torch.randn(2, 7, 8, dtype=F64)
    state, kept = block.state_dict(), torch.arange(7) < 5
    close(block(x)[1], mab(x[1], x[1], state, "mab", 4))
    out = block(x.masked_fill(~kept[:, None], float("nan")), kept.expand(2, -1))
    close(out[:, :5], block(x[:, :5]))
    assert not out[:, 5:].any()


def test_pooling_in_half_precision():
    pool, x = PMA(8, 4).bfloat16(), torch.randn(2, 7, 8).bfloat16()
    exact = PMA(8, 4)
    exact.load_state_dict(pool.state_dict())
    assert pool(x).dtype == torch.bfloat16
    close(pool(x).float(), exact(x.float()), 0.02)


def test_published_keys():
    state = linsight.export_published(create_attention("set_transformer", 16, 2, points=5, norm=True))
    linears = {f"mab{i}.fc_{name}.{part}" for i in (0, 1) for name in "qkvo" for part in ("weight", "bias")}
    norms = {f"mab{i}.ln{j}.{part}" for i in (0, 1) for j in (0, 1) for part in ("weight", "bias")}
    assert state.keys() == {"I", *linears, *norms}
    assert state["I"].shape == (1, 5, 16)
    plain = linsight.export_published(create_attention("set_transformer", 16, 2, points=5))
    assert plain.keys() == {"I", *linears}


def test_dropout_is_on_the_projection():
    layer, x = create_attention("set_transformer", 16, 2, proj_drop=0.5).train(), torch.randn(1, 6, 16)
    assert not torch.equal(layer(x, Grid(2, 3)), layer(x, Grid(2, 3)))
    layer.eval()
    assert torch.equal(layer(x, Grid(2, 3)), layer(x, Grid(2, 3)))


def test_mistakes_are_told():
    with pytest.raises(LinsightError, match="points=0 of 'set_transformer'"):
        create_attention("set_transformer", 16, 2, points=0)
