"""Agent attention: the published formula, tables on other grids, what is kept between calls, its variants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core, merge_heads, split_heads
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout

F64 = torch.float64


def make_core(dim=16, heads=2, *, seed=0, **options):
    """A core in float64 whose tables matter."""
    core = create_core("agent", dim, heads, **options).double()
    torch.manual_seed(seed)
    for parameter in core.parameters():
        nn.init.normal_(parameter, std=0.5)
    return core


def random_tokens(grid, dim=16, heads=2, batch=2):
    return Tokens(*torch.randn(3, batch, grid.tokens, heads, dim // heads, dtype=F64))


def published_bias(tables, name, grid, agent_grid):
    """B1 (`a`) or the transpose of B2 (`n`) of the grid's tokens `(H, n, h*w)`, in the order of the published code:
    block and summed sides each to the grid, then all over the agents."""
    block = tables.an_bias if name == "a" else tables.na_bias
    bias = F.interpolate(block, grid, mode="bilinear")
    if tables.ah_bias is not None:
        sides = tables.ah_bias + tables.aw_bias  # (1, H, n, h, w)
        if name == "n":
            sides = (tables.ha_bias + tables.wa_bias).movedim(-1, 2)
        bias = bias + F.interpolate(sides[0], grid, mode="bilinear")
    return over_agents(bias.flatten(2), tables.side, agent_grid)


def over_agents(table, side, agent_grid):
    """`(H, agents, places)`, the agents seen as a square map."""
    canvas = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(canvas, agent_grid, mode="bilinear").flatten(2).transpose(1, 2)


def published(core, tokens, grid, keys=None):
    """All of it as published: pooling, two softmaxes, the convolution."""
    keys, heads, prefix = keys or grid, core.num_heads, grid.prefix
    q, k, v = (t.transpose(1, 2) for t in tokens[:3])  # (B, H, N, d)
    canvas = merge_heads(tokens.q)[:, prefix:].transpose(1, 2).unflatten(2, grid[:2])
    pooled = F.adaptive_avg_pool2d(canvas, core.agent_grid).flatten(2).transpose(1, 2)
    agents, scale = split_heads(pooled, heads).transpose(1, 2), k.shape[-1] ** -0.5
    of_keys = published_bias(core.tables, "a", keys[:2], core.agent_grid)
    of_queries = published_bias(core.tables, "n", grid[:2], core.agent_grid).mT
    if prefix:
        front = of_keys.new_zeros(heads, of_keys.shape[1], prefix)
        above = front.mT
        if core.tables.ac_bias is not None:
            ac, ca = core.tables.ac_bias[0], core.tables.ca_bias[0].mT
            ac, ca = (over_agents(table, core.tables.side, core.agent_grid) for table in (ac, ca))
            front, above = front + ac, above + ca.mT
        of_keys, of_queries = torch.cat([front, of_keys], -1), torch.cat([above, of_queries], -2)
    values = (scale * agents @ k.mT + of_keys).softmax(-1) @ v
    out = ((scale * q @ agents.mT + of_queries).softmax(-1) @ values).transpose(1, 2)
    if core.dwc is not None:
        canvas = merge_heads(tokens.v)[:, prefix:].transpose(1, 2).unflatten(2, keys[:2])
        canvas = F.interpolate(canvas, grid[:2], mode="bilinear")
        local = split_heads(core.dwc(canvas).flatten(2).transpose(1, 2), heads)
        out = torch.cat([out[:, :prefix], out[:, prefix:] + local], 1)
    return out


OPTIONS = [
    {"grid": (5, 7), "agents": 9},
    {"grid": (5, 7), "agents": 9, "prefix_bias": True},
    {"grid": (5, 7), "agents": 4, "agent_grid": (3, 2), "prefix_bias": True, "local": False},
    {"agents": 9, "agent_grid": (6, 6)},
]


@pytest.mark.parametrize("grid", [Grid(5, 7), Grid(5, 7, 1), Grid(11, 3, 2), Grid(7, 7), Grid(1, 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_core_is_the_published_formula(options, grid):
    """On the grid of the tables and on others, with one prefix token, several and none, more agents than places."""
    core, tokens = make_core(**options), random_tokens(grid)
    torch.testing.assert_close(core(tokens, Layout(grid)), published(core, tokens, grid), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "coarse"), [(Grid(6, 8), Grid(3, 4)), (Grid(7, 5), Grid(3, 2)), (Grid(2, 3), Grid(4, 4))]
)
def test_keys_of_another_grid(grid, coarse):
    """Tables of two sizes; v is brought to the queries bilinearly, for the convolution."""
    core = make_core(agents=9, grid=(3, 4), query_grid=(6, 8))
    assert (core.tables.ah_bias.shape[3], core.tables.ha_bias.shape[2]) == (3, 6)
    tokens = random_tokens(coarse)._replace(q=random_tokens(grid).q)
    out = core(tokens, Layout(grid), context_layout=Layout(coarse))
    torch.testing.assert_close(out, published(core, tokens, grid, coarse), rtol=1e-9, atol=1e-10)


def test_set_grid_is_what_the_forward_does():
    grid, core = Grid(6, 3), make_core(agents=9, grid=(5, 7))
    tokens = random_tokens(grid)
    before = core(tokens, Layout(grid))
    core.tables.aw_bias.requires_grad_(False)
    core.set_grid((6, 3))
    assert core.tables.ah_bias.shape == (1, 2, 9, 6, 1) and core.tables.wa_bias.shape == (1, 2, 1, 3, 9)
    assert core.tables.ah_bias.requires_grad and not core.tables.aw_bias.requires_grad
    torch.testing.assert_close(core(tokens, Layout(grid)), before)
    bare = make_core(agents=9)
    bare.set_grid((6, 3))
    assert set(bare.tables.state_dict()) == {"an_bias", "na_bias"}


def test_a_layer_with_a_reduction_moves_both_grids():
    layer = create_attention("agent", 16, 2, agents=4, grid=(8, 12), reduction=2)
    lengths = [("ah_bias", 3, 4), ("aw_bias", 4, 6), ("ha_bias", 2, 8), ("wa_bias", 3, 12)]
    assert all(getattr(layer.core.tables, name).shape[axis] == length for name, axis, length in lengths)
    layer.set_grid((10, 7))
    lengths = [("ah_bias", 3, 5), ("aw_bias", 4, 3), ("ha_bias", 2, 10), ("wa_bias", 3, 7)]
    assert all(getattr(layer.core.tables, name).shape[axis] == length for name, axis, length in lengths)


def test_a_checkpoint_of_another_grid_is_stretched():
    """As published for fine-tuning: each side linearly along itself, blocks and the rest as they are."""
    small, large = (
        create_attention("agent", 16, 2, agents=9, grid=grid, prefix_bias=True) for grid in ((4, 6), (9, 5))
    )
    state = linsight.export_published(small)
    assert {"an_bias", "ah_bias", "ca_bias", "dwc.weight", "qkv.weight"} <= state.keys()
    report = linsight.load_published(large, state)
    assert [line.split(" ")[0] for line in report.resized] == ["ah_bias", "aw_bias", "ha_bias", "wa_bias"]
    tables = large.core.tables
    assert torch.equal(tables.an_bias, state["an_bias"])
    ah = F.interpolate(state["ah_bias"][0, ..., 0], 9, mode="linear")
    torch.testing.assert_close(tables.ah_bias[0, ..., 0], ah)
    wa = F.interpolate(state["wa_bias"][0, :, 0].mT, 5, mode="linear")
    torch.testing.assert_close(tables.wa_bias[0, :, 0].mT, wa)
    with pytest.raises(LinsightError, match="pass resize=True"):
        linsight.load_published(large, state, resize=False)
    with pytest.raises(LinsightError, match="an_bias"):  # another number of agents
        linsight.load_published(create_attention("agent", 16, 2, agents=4, grid=(4, 6), prefix_bias=True), state)


GRID = Grid(5, 6, 1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # in torch, of mapped attention
def test_parameters_given_with_the_call_are_used():
    """An ensemble of two, mapped over."""
    core = make_core(agents=4, grid=(4, 4), prefix_bias=True)
    tokens = random_tokens(GRID)
    states = {name: torch.randn(2, *p.shape, dtype=F64) for name, p in core.named_parameters()}
    with torch.no_grad():
        both = torch.func.vmap(lambda state: torch.func.functional_call(core, state, (tokens, Layout(GRID))))(states)
    for i, out in enumerate(both):
        core.load_state_dict({name: state[i] for name, state in states.items()})
        torch.testing.assert_close(out, core(tokens, Layout(GRID)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": 10}, "agents=10 of 'agent' must be a square number"),
        ({"agents": 0}, "agents=0"),
        ({"agent_grid": (0, 3)}, "agent_grid"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(LinsightError, match=message) as caught:
        create_core("agent", 16, 2, **options)
    assert "\n" not in str(caught.value)


def test_a_dense_backbone_has_more_agents_than_tables():
    """Each stage its own: tables of the classifier's agents, queries pooled to a larger grid."""
    small = {"embed_dim": 8, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 2, 2), "img_size": 64}
    for name in ("agent_swin_base_dense", "agent_swin_base"):
        model = linsight.create_model(name, **small).eval()
        agents = [module for module in model.modules() if type(module).__name__ == "Agent"]
        assert [core.tables.side for core in agents] == [3, 4, 7, 7]  # of the third stage, the first two blocks
        sides = [9, 12, 14, 14] if name.endswith("dense") else [3, 4, 7, 7]
        assert [core.agent_grid for core in agents] == [(side, side) for side in sides]
    with torch.no_grad():
        maps = linsight.create_model("agent_swin_base_dense", **small).eval()(torch.randn(1, 3, 70, 90))
    assert [tuple(map_.shape[1:]) for map_ in maps] == [(8, 18, 23), (16, 9, 12), (32, 5, 6), (64, 3, 3)]
