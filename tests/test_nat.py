"""Neighbourhood attention: the windows of its papers read token by token, grids that they refuse, its table, memory."""

import contextlib
import itertools

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core, mechanism
from linsight.errors import LinsightError
from linsight.ops import (
    AxisWindow,
    Grid,
    Layout,
    Tile,
    axis_window,
    flex,
    forms,
    neighbourhood_attention,
    neighbourhood_attention_nd,
    tiles,
    use_form,
)
from matrix.costs import Elements
from matrix.graphs import OnImages
from matrix.subject import close, random_tokens

F64 = torch.float64


def window_of(x, length, kernel, dilation, stride, causal):
    """The keys of token `x` of a side, as published where the side is long enough, else with the dilation that fits."""
    dilation = min(dilation, max(1, length // kernel))
    group, place = x % dilation, x // dilation
    members = [y for y in range(length) if y % dilation == group]
    last = len(members) - 1
    if causal:
        leader = min(place // stride * stride + stride - 1, last)
        return [y for c, y in enumerate(members) if c <= place and leader - c < kernel]
    if len(members) < kernel:
        return members
    leader = min(place // stride * stride + stride // 2, last)
    left, right = kernel // 2, kernel // 2 + (kernel % 2 - 1)
    centre = max(left, min(leader, last - right))
    return members[centre - left : centre + right + 1]


WINDOWS = [
    (kernel, dilation, stride, causal)
    for kernel, dilation, causal in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 3, 5), (False, True))
    for stride in range(1, kernel + 1)
]


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 8, 11, 13, 14, 20, 37])
def test_windows_along_an_axis(length):
    for window in WINDOWS:
        kernel, dilation, _, causal = window
        keys, distance, seen = axis_window(torch.arange(length), torch.tensor([[length]]), AxisWindow(*window))
        assert keys.shape == distance.shape == seen.shape == (1, length, kernel)
        for x in range(length):
            found = keys[0, x][seen[0, x]]
            assert found.tolist() == window_of(x, length, *window), (x, window)
            assert x in found
            assert causal or kernel * dilation > length or len(found) == kernel
            step = min(dilation, max(1, length // kernel))
            assert torch.equal(distance[0, x][seen[0, x]] * step, found - x)
            assert distance[0, x][seen[0, x]].abs().max() < kernel


def naive(tokens, grid, down, across, table=None):
    """The matrix of all scores, of which each query sees those of its window."""
    q, k, v = tokens[:3]
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    mask = torch.ones_like(scores, dtype=torch.bool)
    bias = torch.zeros_like(scores)
    steps = [min(w.dilation, max(1, n // w.kernel)) for w, n in ((down, grid.height), (across, grid.width))]
    for y, x in itertools.product(range(grid.height), range(grid.width)):
        for i, j in itertools.product(window_of(y, grid.height, *down), window_of(x, grid.width, *across)):
            pair = (..., y * grid.width + x, i * grid.width + j)
            mask[pair] = False
            if table is not None:
                dy, dx = (i - y) // steps[0] + down.kernel - 1, (j - x) // steps[1] + across.kernel - 1
                bias[pair] = table[:, dy, dx]
    weights = (scores + bias).masked_fill(mask, float("-inf")).softmax(-1)
    return torch.einsum("bhmn,bnhd->bmhd", weights, v)


OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (5, 2), "dilation": (1, 3)},
    {"kernel_size": 4, "stride": (4, 2), "dilation": 2},
    {"kernel_size": 3, "dilation": 2, "is_causal": True},
    {"kernel_size": (2, 5), "stride": (1, 3), "is_causal": (False, True)},
]


def make_core(dim=8, num_heads=2, **options):
    core = create_core("nat", dim, num_heads, **options).double()
    if core.rpb is not None:
        torch.nn.init.normal_(core.rpb)
    return core


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", [Grid(8, 9), Grid(13, 7), Grid(1, 16), Grid(5, 3), Grid(2, 1)], ids=str)
def test_equals_masked_softmax(grid, options):
    """Also where the papers refuse the grid: a side below kernel times dilation, or below the kernel."""
    core = make_core(**options)
    tokens = random_tokens(core, 2, grid, dim=8)
    close(core(tokens, Layout(grid)), naive(tokens, grid, *core.window, core.rpb))


def test_any_number_of_axes():
    """Of three, each query sees the product of its windows, with the bias of each distance; of two, as `NAT` does."""
    sides, windows = (3, 5, 4), (AxisWindow(2, causal=True), AxisWindow(3, stride=2), AxisWindow(2, dilation=2))
    q, k, v = torch.randn(3, 2, *sides, 2, 4, dtype=F64)
    table = torch.randn(2, 3, 5, 3, dtype=F64)
    out = neighbourhood_attention_nd(q, k, v, windows, table)
    for place in itertools.product(*map(range, sides)):
        keys = list(itertools.product(*(window_of(x, n, *w) for x, n, w in zip(place, sides, windows, strict=True))))
        at = (slice(None), *map(list, zip(*keys, strict=True)))
        far = zip(zip(*keys, strict=True), place, windows, strict=True)
        steps = [[(y - x) // w.dilation + w.kernel - 1 for y in axis] for axis, x, w in far]
        scores = torch.einsum("bhd,bnhd->bhn", q[(slice(None), *place)], k[at]) / 2 + table[(slice(None), *steps)]
        close(out[(slice(None), *place)], torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), v[at]))
    core = make_core(kernel_size=(3, 2), rpb=False)
    flat = core(Tokens(*(x[:, 0].flatten(1, 2) for x in (q, k, v))), Layout(Grid(5, 4)))
    close(neighbourhood_attention_nd(*(x[:, 0] for x in (q, k, v)), core.window).flatten(1, 2), flat)
    with pytest.raises(LinsightError, match="3 axes, but there are 2 windows"):
        neighbourhood_attention_nd(q, k, v, windows[:2])


def test_a_window_of_the_whole_grid_is_softmax():
    grid = Grid(5, 8)
    core, softmax = make_core(kernel_size=(5, 8), rpb=False), create_core("softmax", 8, 2)
    tokens = random_tokens(core, 2, grid, dim=8)
    close(core(tokens, Layout(grid)), softmax(tokens, Layout(grid)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_image_of_a_padded_batch_has_its_own_rim_and_dilation(options):
    core, sizes, canvas = make_core(**options), [(8, 9), (6, 4), (3, 7), (1, 1)], Grid(8, 9)
    tokens = random_tokens(core, len(sizes), canvas, dim=8)
    layout = Layout(canvas, torch.tensor(sizes))
    keep = layout.keep(tokens.q.device)
    poisoned = [x.masked_fill(~keep[..., None, None], float("nan")) for x in tokens[:3]]
    out = core(Tokens(*poisoned, keep=keep), layout)
    for i, size in enumerate(sizes):
        alone = Tokens(*(x[i, keep[i]][None] for x in tokens[:3]))
        close(out[i, keep[i]], core(alone, Layout(Grid(*size)))[0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flex_attention_is_told_the_same_windows(options):
    """Run eagerly, as it is defined: its kernel is for CUDA, where alone it is chosen."""
    core, sides = make_core(**options).float(), (9, 20)
    q, k, v = torch.randn(3, 2, 180, 2, 4)
    tile = Tile.whole(Grid(*sides))
    with use_form("flex"), torch.no_grad():
        plain = neighbourhood_attention(q, k, v, tile, core.window, core.rpb)
        out = flex.neighbourhood_attention(q, k, v, sides, core.window, core.rpb)
    torch.testing.assert_close(out, plain)


def test_flex_attention_skips_the_blocks_of_other_dilation_groups():
    """On 32 x 32 tokens, groups of 8 x 8: each block of 128 sees itself alone, of eight."""
    window = AxisWindow(3, dilation=4)
    assert flex.plan((32, 32), (window, window), torch.device("cpu")).blocks.sparsity() == 87.5


def test_flex_attention_is_not_for_a_cpu():
    """It would warn of the matrix that it makes there."""
    with use_form("flex"):
        neighbourhood_attention(*torch.randn(3, 1, 64, 1, 16), Tile.whole(Grid(8, 8)), 3)
    (row,) = (row for row in forms("cpu") if row.operator == "neighbourhood_attention")
    assert row.form == "blocks of queries"
    (row,) = (row for row in forms("xpu") if row.operator == "neighbourhood_attention")
    assert row.form == "plain PyTorch" and "use_form('flex')" in row.reason


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_tile_with_its_halo_equals_the_whole(options):
    core, grid = make_core(**options), Grid(11, 12)
    q, k, v = random_tokens(core, 1, grid, dim=8)[:3]
    whole = core(Tokens(q, k, v), Layout(grid))
    for tile in tiles(grid, 4, 5, halo=9):
        part = neighbourhood_attention(*(tile.take(x) for x in (q, k, v)), tile, core.window, core.rpb)
        close(part, Tile(grid, tile.top, tile.left, tile.height, tile.width).take(whole))


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_gradients(options):
    """Those of tokens and table, against finite differences."""
    core, grid = make_core(4, 2, **options), Grid(3, 6)
    leaves = [x.requires_grad_() for x in random_tokens(core, 1, grid, dim=4)[:3]]

    def run(q, k, v, table):
        return neighbourhood_attention(q, k, v, Tile.whole(grid), core.window, table)

    assert torch.autograd.gradcheck(run, (*leaves, core.rpb), fast_mode=True)


def test_queries_are_answered_in_parts_where_nothing_is_recorded():
    """One part after the other gives the numbers of all at once, and no tensor is as large as what all gather."""
    core, grid = create_core("nat", 64, 2), Grid(72, 70)
    tokens = Tokens(*torch.randn(3, 1, grid.tokens, 2, 32))
    with use_form("plain"):
        with Elements() as at_once:
            recorded = core(tokens, Layout(grid))
        with torch.no_grad(), Elements() as in_parts:
            torch.testing.assert_close(core(tokens, Layout(grid)), recorded)
    assert in_parts.largest <= 2**22 < at_once.largest < grid.tokens**2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", [Grid(8, 9), Grid(37, 7), Grid(1, 16), Grid(2, 1), Grid(26, 25)], ids=str)
def test_blocks_of_queries_are_the_same(grid, options):
    """The form of a CPU, and its gradients, beside the plain form; rims, dilation groups and rests of blocks."""
    core = make_core(**options).float()
    leaves = [x.float().requires_grad_() for x in random_tokens(core, 2, grid, dim=8)[:3]]
    ways = []
    for name in ("plain", ""):
        with use_form(name) if name else contextlib.nullcontext():
            out = core(Tokens(*leaves), Layout(grid))
            ways.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, *core.parameters()])))
    torch.testing.assert_close(ways[1], ways[0], rtol=1e-4, atol=1e-5)
    assert operations(ways[0][0].grad_fn) != operations(ways[1][0].grad_fn), "both ran the same form"


def operations(node):
    """The names of all operations that a gradient goes through."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return {type(node).__name__ for node in found}


def test_memory_of_blocks_grows_with_the_tokens():
    """Without gradients, no more than so many scores at once, or what goes in and comes out."""
    core = create_core("nat", 64, 2, dilation=2)
    for batch, grid in ((1, Grid(40, 40)), (1, Grid(160, 160)), (1, Grid(1, 3000)), (180, Grid(16, 16))):
        tokens = Tokens(*torch.randn(3, batch, grid.tokens, 2, 32))
        with Elements() as recorded:
            whole = core(tokens, Layout(grid))
        with torch.no_grad(), Elements() as once:
            torch.testing.assert_close(core(tokens, Layout(grid)), whole)
        assert recorded.largest <= batch * grid.tokens * 2 * (8 + 6) ** 2  # of each head, blocks of 8 and windows of 7
        assert once.largest <= max(2**22, batch * grid.tokens * 64)


def test_blocks_do_not_depend_on_where_they_are_first_laid_out():
    core, grid = create_core("nat", 8, 2), Grid(19, 23)
    tokens = Tokens(*torch.randn(3, 1, grid.tokens, 2, 4).requires_grad_())
    with torch.inference_mode(), torch.device("meta"):
        first = core(tokens, Layout(grid))
    again = core(tokens, Layout(grid))
    again.sum().backward()
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
def test_one_graph_for_grids_above_and_below_the_window(options):
    torch._dynamo.reset()
    model, counter = OnImages(create_attention("nat", 8, 2, **options)), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((12, 10), (7, 19), (3, 5), (2, 30)):
        x = torch.randn(2, 8, height, width)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_hosts_leave_its_windows_to_itself():
    assert not mechanism("nat").quadratic


def test_a_table_of_another_kernel_is_resized_when_loaded():
    """Bicubic, as that of the published model with 11x11 windows was."""
    source, target = (create_attention("nat", 8, 2, kernel_size=kernel) for kernel in (7, (11, 5)))
    published = linsight.export_published(source)
    assert set(published) == {"rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    report = linsight.load_published(target, published)
    assert report.resized == ("rpb from 7x7 to 11x5",)
    truth = F.interpolate(source.core.rpb[None], (21, 9), mode="bicubic")[0]
    torch.testing.assert_close(target.core.rpb, truth)
    assert target.core.no_weight_decay() == {"rpb"}


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 0}, {"dilation": 0}, {"stride": 8}, {"kernel_size": (7, 3), "stride": 5}, {"is_causal": "w"}],
    ids=str,
)
def test_windows_that_are_none_are_refused(options):
    with pytest.raises(LinsightError, match=f"{next(iter(options))}=.* of 'nat'") as caught:
        create_attention("nat", 8, 2, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dilations"),
    [
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
    ],
)
def test_dilations_take_turns_in_published_models(name, dilations):
    model = linsight.create_model(name, device="meta")
    stages = getattr(model, "stages", None) or model.layers
    found = [[block.attn.core.window for block in stage.blocks] for stage in stages]
    assert found == [[(AxisWindow(7, dilation),) * 2 for dilation in row] for row in dilations]


@pytest.mark.parametrize("size", [(40, 24), (5, 130)], ids=str)
def test_images_smaller_than_the_windows(size):
    stages = [(8, 2, 2, 2.0), (8, 2, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0)]
    model = linsight.create_model("dinat_mini", stages=stages, num_classes=3)
    out = model(torch.randn(2, 3, *size))
    out.square().sum().backward()
    assert out.shape == (2, 3) and all(p.grad.isfinite().all() for p in model.parameters())
