"""CLEAR against the matrix of all scores, masked: discs, prefix tokens, cells, its scale; memory; and inside FLUX."""

import math

import pytest
import torch
from torch import nn

import linsight
from golden.builders.clear import FluxAttention, rotary
from linsight import create_attention
from linsight.attention import Tokens, create_core, mechanism, run_rounds
from linsight.convert import Mixing
from linsight.convert.place import Place
from linsight.convert.seams.diffusers_processors import Flux
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, Tile, disc_attention, tiles
from matrix.costs import Elements
from matrix.subject import close, random_tokens

F64 = torch.float64


def sums_over_cells(x, height, width, weight):
    """Sums over f x f cells of `x` `(B, height * width, H, D)`, cell by cell; at the rim the last token again."""
    f, sums = weight.shape[0], []
    for top in range(0, height, f):
        for left in range(0, width, f):
            places = [min(top + a, height - 1) * width + min(left + b, width - 1) for a in range(f) for b in range(f)]
            sums.append(sum(w * x[:, place] for w, place in zip(weight.flatten(), places, strict=True)))
    return torch.stack(sums, dim=1)


def dense(core, tokens, grid, keep=None):
    """All scores, of which a query sees what the formula lets it see; 0 where that is nothing."""
    q, k, v = tokens[:3]
    prefix, radius, f = grid.prefix, core.radius, core.down_factor
    length = grid.tokens * (10 if f > 1 else 1)
    y, x = (places.flatten() for places in torch.meshgrid(*map(torch.arange, grid[:2]), indexing="ij"))
    seen = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    seen[prefix:, prefix:] = (y[:, None] - y).square() + (x[:, None] - x).square() < radius**2
    seen = seen.expand(q.shape[0], -1, -1)
    if f > 1:
        weight = core.spatial_weight.reshape(f, f)
        k, v = (torch.cat([t, sums_over_cells(t[:, prefix:], *grid[:2], weight)], dim=1) for t in (k, v))
        cells = seen.new_ones(k.shape[1] - grid.tokens).expand(q.shape[0], grid.tokens, -1).clone()
        cells[:, :prefix] = False
        seen = torch.cat([seen, cells], dim=-1)
    if keep is not None:
        seen, length = seen & keep[:, None], keep.sum(dim=1)[:, None, None, None]
    scale = q.shape[-1] ** -0.5
    if core.proportional:
        scale = scale * (torch.as_tensor(length, dtype=q.dtype).log() / math.log(core.proportional)).sqrt()
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhmn,bnhd->bmhd", weights, v)


def make_core(**options):
    core = create_core("clear", 8, 2, **options).double()
    if core.spatial_weight is not None:
        nn.init.normal_(core.spatial_weight)
    return core


OPTIONS = [
    {"radius": 1},
    {"radius": 3},
    {"radius": 8},
    {"radius": 5, "proportional": 16},
    {"radius": 2, "down_factor": 2},
    {"radius": 3, "down_factor": 4, "proportional": 16},
]
GRIDS = [Grid(8, 12, 3), Grid(13, 7), Grid(1, 9, 2), Grid(1, 1), Grid(17, 18, 1)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_core_is_masked_softmax(options, grid):
    """With gradients recorded and without, and with the rows of a padded batch that are an image."""
    core = make_core(**options)
    tokens = random_tokens(core, 2, grid, dim=8)
    truth = dense(core, tokens, grid)
    close(core(tokens, Layout(grid)), truth)
    with torch.no_grad():
        close(core(tokens, Layout(grid)), truth)
    canvas = Layout(Grid(grid.height + 2, grid.width + 3, grid.prefix), torch.tensor([grid[:2]] * 2))
    inside = canvas.keep(tokens.q.device)
    padded = [x.new_full((2, canvas.grid.tokens, *x.shape[2:]), torch.nan) for x in tokens[:3]]
    for wide, x in zip(padded, tokens[:3], strict=True):
        wide[inside] = x.flatten(0, 1)
    close(core(Tokens(*padded, keep=inside), canvas)[inside], truth.flatten(0, 1))


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_dropped_tokens_are_not_seen(options):
    """Neither those of the grid nor those in front; a query that sees nothing has an output of 0."""
    core, grid = make_core(**options), Grid(9, 6, 2)
    tokens = random_tokens(core, 3, grid, dim=8, keep=torch.rand(3, grid.tokens) < 0.4)
    tokens.keep[1:, :2] = torch.tensor([[False, True], [False, False]])
    out = core(tokens, Layout(grid))
    close(out, dense(core, tokens, grid, tokens.keep))
    close(run_rounds(core, tokens, tiles(grid, 4, 5)), out)


@pytest.mark.parametrize(("radius", "count"), [(1, 1), (2, 9), (3, 25), (5, 69), (8, 193), (16, 793), (32, 3205)])
def test_a_disc_has_the_published_number_of_keys(radius, count):
    """The distance is strictly below r: of r = 5 neither (5, 0) nor (3, 4) is seen. By equal weights of one value."""
    side = 2 * radius + 1
    grid = Grid(side, side)
    v = torch.zeros(1, grid.tokens, 1, 1)
    v[:, grid.tokens // 2] = 1
    out = create_core("clear", 1, 1, radius=radius)(Tokens(torch.zeros_like(v), torch.zeros_like(v), v), Layout(grid))
    assert round(1 / out[0, grid.tokens // 2].item()) == count


def test_cells_start_as_averages_and_prefix_tokens_do_not_see_them():
    core, grid = create_core("clear", 8, 2, down_factor=4).double(), Grid(8, 8, 5)
    assert core.spatial_weight.shape == (1, 1, 1, 4, 1, 4, 1) and torch.all(core.spatial_weight == 1 / 16)
    tokens = random_tokens(core, 1, grid, dim=8)
    out, plain = (c(tokens, Layout(grid)) for c in (core, create_core("clear", 8, 2).double()))
    close(out[:, :5], plain[:, :5])
    assert (out - plain)[:, 5:].abs().min() > 0


def test_cells_are_sums_of_turned_keys():
    """The rotary embedding comes first: of turned tokens, a core without it is the same."""
    core, bare = create_core("clear", 8, 2, down_factor=2, rotary=True), create_core("clear", 8, 2, down_factor=2)
    grid = Grid(6, 4, 2)
    tokens = random_tokens(core, 1, grid, dim=8)
    turned = core.placed_tokens(tokens, Tile.whole(grid))
    assert not torch.allclose(turned.k, tokens.k)
    close(core.double()(tokens, Layout(grid)), bare.double()(turned, Layout(grid)))


def test_with_as_many_keys_as_it_was_trained_with_the_scale_is_the_usual_one():
    grid = Grid(5, 6, 2)
    core, plain = make_core(radius=3, proportional=32), make_core(radius=3)
    tokens = random_tokens(core, 2, grid, dim=8)
    close(core(tokens, Layout(grid)), plain(tokens, Layout(grid)))
    cells = make_core(radius=3, proportional=32, down_factor=2)  # counts ten times as many
    plain = make_core(radius=3, down_factor=2)
    plain.load_state_dict(cells.state_dict())
    assert not torch.allclose(cells(tokens, Layout(grid)), plain(tokens, Layout(grid)))


@pytest.mark.parametrize("radius", [2, 3, 7])
def test_a_tile_with_its_halo_equals_the_whole(radius):
    grid = Grid(11, 12)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 4, dtype=F64)
    whole = disc_attention(q, k, v, Tile.whole(grid), radius)
    for tile in tiles(grid, 4, 5, halo=radius - 1):
        part = disc_attention(tile.inner(tile.take(q)), tile.take(k), tile.take(v), tile, radius)
        close(part, Tile(grid, tile.top, tile.left, tile.height, tile.width).take(whole))


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_gradients(options):
    """Those of tokens and weights, against finite differences, at the rim of blocks and cells."""
    core, grid = make_core(**options), Grid(3, 5, 1)
    leaves = [x.requires_grad_() for x in random_tokens(core, 1, grid, dim=8)[:3]]

    def run(q, k, v, *weights):
        state = dict(zip(dict(core.named_parameters()), weights, strict=True))
        return torch.func.functional_call(core, state, (Tokens(q, k, v), Layout(grid)))

    assert torch.autograd.gradcheck(run, (*leaves, *core.parameters()), fast_mode=True)


def test_blocks_are_answered_in_parts_where_nothing_is_recorded():
    """One part after the other gives the numbers of all at once; no tensor is as large as all blocks', or N x N."""
    core, grid = create_core("clear", 256, 2), Grid(136, 134, 4)
    tokens = Tokens(*torch.randn(3, 1, grid.tokens, 2, 128))
    with Elements() as at_once:
        recorded = core(tokens, Layout(grid))
    with torch.no_grad(), Elements() as in_parts:
        torch.testing.assert_close(core(tokens, Layout(grid)), recorded)
    assert in_parts.largest <= 2**25 < at_once.largest < grid.tokens**2 / 4


def test_it_is_windowed_and_cells_do_not_stream():
    assert not mechanism("clear").quadratic
    core, grid = create_core("clear", 8, 2, down_factor=2), Grid(4, 4)
    tokens = random_tokens(core, 1, grid, dim=8)
    with pytest.raises(CapabilityError, match="'clear' does not support tiles"):
        run_rounds(core, tokens, tiles(grid, 2, 4))
    layer = create_attention("clear", 8, 2, down_factor=2)
    with pytest.raises(CapabilityError, match="'clear' does not support dropping tokens"):
        layer(torch.randn(1, 16, 8), grid, keep=torch.ones(1, 16, dtype=torch.bool))


def test_published_keys():
    layer = create_attention("clear", 8, 2, down_factor=4)
    state = linsight.export_published(layer)
    assert set(state) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "spatial_weight"}
    linsight.load_published(layer, {**state, "spatial_weight": state["spatial_weight"] + 1})
    assert torch.all(layer.core.spatial_weight == 17 / 16)


@pytest.mark.parametrize("options", [{"radius": 0}, {"down_factor": 0}, {"proportional": 1}, {"proportional": -2}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(LinsightError, match=f"{next(iter(options))}=.* of 'clear'") as caught:
        create_attention("clear", 8, 2, **options)
    assert "\n" not in str(caught.value)


def flux(attn, image, text=None, places=None):
    """The attention of FLUX by softmax over all tokens."""
    parts = [(image, ("to_q", "to_k", "to_v"), attn.norm_q, attn.norm_k)]
    if text is not None:
        added = ("add_q_proj", "add_k_proj", "add_v_proj")
        parts.insert(0, (text, added, attn.norm_added_q, attn.norm_added_k))
    found = []
    for x, names, *norms in parts:
        q, k, v = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)) for name in names)
        found.append((norms[0](q), norms[1](k), v))
    q, k, v = (torch.cat(both, dim=1).transpose(1, 2) for both in zip(*found, strict=True))
    if places is not None:
        pairs = torch.view_as_complex(torch.stack([places[0][:, ::2], places[1][:, ::2]], dim=-1))
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * pairs).flatten(-2)
            for x in (q, k)
        )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if text is None:
        return out
    return attn.to_out(out[:, text.shape[1] :]), attn.to_add_out(out[:, : text.shape[1]])


@pytest.mark.parametrize("radius", [0, 12])
@pytest.mark.parametrize("double", [False, True])
def test_in_flux_a_disc_of_all_tokens_is_what_flux_computes(double, radius):
    """As is our softmax, at any length of text; text and image apart in a double block, together in a single one."""
    attn = FluxAttention(32, 2, double=double)
    options = {"radius": radius} if radius else {}
    processor = Flux(Mixing("clear" if radius else "softmax", 32, 2, **options), Place((5, 6)))
    text, image, places = torch.randn(2, 7, 32), torch.randn(2, 30, 32), rotary(5, 6, 7, 10000, [4, 6, 6])
    if not double:
        given = torch.cat([text, image], dim=1)
        close(processor(attn, given, None, None, places), flux(attn, given, None, places), 1e-5)
        return
    for ours, theirs in zip(processor(attn, image, text, None, places), flux(attn, image, text, places), strict=True):
        close(ours, theirs, 1e-5)
