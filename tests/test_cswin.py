"""The stripes of the CSwin host: who has them, and that padding them changes nothing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import linsight
from linsight.attention import Capabilities, Tokens, mechanism, split_heads
from linsight.errors import CapabilityError, LinsightError
from linsight.models import Choice
from linsight.models.hosts.cswin import CrossShapedAttention
from linsight.ops import Grid, Layout, Partition, depthwise_conv

STAGES = [(8, 1, 2, 2.0, 1), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 7), (16, 1, 2, 2.0, 7)]
GRIDS = ((8, 8), (10, 6), (7, 9), (20, 5), (3, 12), (11, 13))


def attention(name="softmax", split=2, grid=(8, 8)):
    torch.manual_seed(0)
    return CrossShapedAttention(Choice(name, {}), 16, 4, grid=grid, split=split).eval()


def stripe_by_stripe(layer, x, grid, cond):
    """The same by the definition: each stripe of its true width alone."""
    halves = []
    qkv, conds = layer.qkv(x).unflatten(-1, (3, 2, -1)), cond.unflatten(-1, (2, -1))
    for i, branch in enumerate(layer.branches):
        source = torch.cat([qkv[..., i, :], conds[:, :, i : i + 1]], dim=2).unflatten(1, grid)  # (B, H, W, 4, C)
        along, outs = 2 - i, []
        for stripe in source.split(branch.sizes[1 - i], dim=along):
            size = stripe.shape[1:3]
            q, k, v, c = stripe.flatten(1, 2).unbind(2)
            tokens = Tokens(*(split_heads(t, branch.core.num_heads) for t in (q, k, v)), c)
            out = branch.core(tokens, Layout(Grid(*size))).flatten(2)
            out = out + depthwise_conv(v, size, branch.lepe.weight, branch.lepe.bias)
            outs.append(out.unflatten(1, size))
        halves.append(torch.cat(outs, dim=along).flatten(1, 2))
    return layer.proj(torch.cat(halves, dim=-1))


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (1, 3), (3, 1), (1, 1), (6, 4), (11, 13)])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("name", ["softmax", "inline"])
def test_padded_stripes_are_exact(name, split, grid):
    layer = attention(name, split).double()
    x, cond = torch.randn(2, 2, grid[0] * grid[1], 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, Grid(*grid), cond), stripe_by_stripe(layer, x, grid, cond))


@pytest.mark.parametrize(("sizes", "kept"), [((None, 3), [15, 10]), ((2, None), [10, 10, 5])])
def test_stripes_come_back(sizes, kept):
    """Of 5 rows and 5 columns; the last stripe is padded, and says so."""
    stripes, x = Partition(Grid(5, 5), sizes), torch.randn(2, 25, 3)
    cut = stripes.cut(x)
    assert cut.shape[:2] == (2 * len(kept), stripes.inner.tokens)
    assert torch.equal(stripes.join(cut), x)
    assert stripes.keep(x).sum(1).tolist() == 2 * kept
    assert Partition(Grid(6, 6), sizes).keep(x) is None


def test_only_who_asks_for_it_sees_the_stream_before_the_norm():
    x, stream = torch.randn(2, 1, 64, 16)
    for name, asks in (("inline", True), ("circulant", False)):
        layer = attention(name, split=None)
        assert torch.equal(layer(x, Grid(8, 8), stream), layer(x, Grid(8, 8))) != asks


def test_the_first_half_of_the_heads_sees_columns_the_second_rows():
    layer, grid = attention(split=1), Grid(4, 5)
    x = torch.randn(1, 20, 16, requires_grad=True)
    for branch, seen in zip(layer.branches, ("column", "row"), strict=True):
        shares = layer.qkv(x).unflatten(-1, (3, 2, -1))[..., 0, :]
        out = branch(shares, grid, x[..., :8]).unflatten(1, (4, 5))
        (gradient,) = torch.autograd.grad(out[0, 1, 2].sum(), x)
        touched = gradient.abs().sum(-1).unflatten(1, (4, 5))[0] > 0
        expected = torch.zeros(4, 5, dtype=torch.bool)
        expected[:, 2] = seen == "column"
        expected[1] |= seen == "row"
        assert torch.equal(touched, expected)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("softmax", 224, [2, 2, 2, 1]), ("softmax", 112, [2, 2, 1, 1]), ("inline", 224, [1, 1, 1, 1])],
)
def test_which_mechanisms_have_stripes(name, size, expected):
    model = linsight.create_model("cswin_tiny", attention=name, stages=STAGES, img_size=size)
    assert [len(stage.blocks[0].attn.branches) for stage in model.stages] == expected


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_heads_that_stripes_cannot_share(heads):
    with pytest.raises(LinsightError, match=f"num_heads={heads} must divide dim=24, and be even"):
        linsight.create_model("cswin_tiny", stages=[(24, 1, heads, 2.0, 1)] * 4)


def test_one_head_is_enough_without_stripes():
    model = linsight.create_model("cswin_tiny", stages=[(8, 1, 1, 2.0, 1)] * 4, attention="inline")
    assert model(torch.randn(1, 3, 40, 56)).shape == (1, 1000)


def test_a_mechanism_that_cannot_drop_tokens_has_no_padding(monkeypatch):
    layer = attention()
    monkeypatch.setattr(type(layer.branches[0].core), "capabilities", Capabilities())
    assert layer(torch.randn(1, 24, 16), Grid(6, 4)).isfinite().all()
    with pytest.raises(CapabilityError, match="'softmax' does not support a grid that stripes of 2 do not divide"):
        layer(torch.randn(1, 20, 16), Grid(4, 5))


def test_tables_move_to_the_grid_of_a_stage_or_of_a_stripe(monkeypatch):
    told = []
    for name in ("softmax", "inline"):
        monkeypatch.setattr(mechanism(name).factory, "set_grid", lambda self, grid: told.append(grid))
    model = linsight.create_model("cswin_tiny", attention="inline,softmax,softmax,softmax", stages=STAGES)
    model.set_input_size((448, 224))
    assert told == [(112, 56), (56, 2), (2, 28), (28, 7), (7, 14), (14, 7)]


@pytest.mark.full
@pytest.mark.timeout(300)
def test_stripes_in_graphs():
    """Two graphs for six grids, divisible or not, with few stripes or many; one exported program for all."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attention()

        def forward(self, x):  # (B, C, H, W)
            return self.attn(x.flatten(2).transpose(1, 2), Grid(x.shape[2], x.shape[3]))

    torch._dynamo.reset()
    layer, counter = Layer().eval(), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 16, *GRIDS[1]),), dynamic_shapes=(dims,)).module()
        for grid in GRIDS:
            x = torch.randn(2, 16, *grid)
            for form in (compiled, program):
                torch.testing.assert_close(form(x), layer(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
