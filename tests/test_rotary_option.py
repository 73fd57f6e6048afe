"""The rotary option: its definition in complex numbers, relative places, and that tokens are turned once, anywhere."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import create_core, list_attentions, mechanism, scan
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, Tile, pack, unpack
from matrix import graphs
from matrix.subject import Subject, close, random_tokens
from streaming.hosts import small
from streaming.test_stream import image, same_as_dense

pytestmark = [
    pytest.mark.timeout(300),  # tracing is slow where cores are shared
    *map(pytest.mark.filterwarnings, graphs.WARNINGS),
]
TURNING = [entry for entry in list_attentions(rotary=True) if getattr(entry.factory, "turns", "")]
TOKENS = [entry.name for entry in TURNING if entry.factory.turns == "tokens"]
# Windows lie where the grid begins, whatever tokens are.
SHIFTED = [entry.name for entry in TURNING if entry.capabilities.keep and entry.name != "window"]
DIM, HEADS, WIDTH = 16, 2, 8


def turned(x, grid, top=0, left=0):
    """Heads `(B, N, H, D)` times exp(i angle), pair by pair; 100^(-j/m) rows, then columns, a token further."""
    m = x.shape[-1] // 4
    speed = 100.0 ** (-torch.arange(m, dtype=torch.float64) / m)
    y, x_ = torch.meshgrid(torch.arange(grid.height) + top, torch.arange(grid.width) + left, indexing="ij")
    angle = torch.cat([y.reshape(-1, 1) * speed, x_.reshape(-1, 1) * speed], dim=1)
    angle = torch.cat([torch.zeros(grid.prefix, 2 * m, dtype=torch.float64), angle])[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def weights_of(name, q, k, grid, keys):
    """The weights `(B, H, M, N)` as the formula defines them, of all pairs, and how far each looks back or not."""

    def products(a, b):
        return torch.einsum("bmhd,bnhd->bhmn", a, b)

    if name == "softmax":
        return (products(turned(q, grid), turned(k, keys)) * WIDTH**-0.5).exp(), None
    q, k = (F.elu(q) + 1, F.elu(k) + 1) if name == "linear" else (q.relu(), k.relu())
    return products(turned(q, grid), turned(k, keys)), products(q, k)


def core_of(name, **options):
    """A core in float64, without a local term that would hide what it mixes."""
    own = {"inline": {"feature_map": "relu", "local": False}}.get(name, {})
    return create_core(name, DIM, HEADS, rotary=True, **own, **options).double()


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_is_its_definition(name, causal):
    """Below the line kernel attention sees features as they are; prefix tokens are turned nowhere."""
    grid = Grid(3, 5, 2)
    core = core_of(name, causal=causal)
    tokens = random_tokens(core, 2, grid)
    above, below = weights_of(name, tokens.q, tokens.k, grid, grid)
    seen = torch.ones(17, 17, dtype=torch.float64)
    above = above * (seen.tril() if causal else seen)
    below = above if below is None else below * (seen.tril() if causal else seen)
    wanted = above @ tokens.v.transpose(1, 2) / (below.sum(dim=-1, keepdim=True) + getattr(core, "eps", 0))
    close(core(tokens, Layout(grid)), wanted.transpose(1, 2))


def test_inline_turns_all_products_and_rows_still_sum_to_1():
    core, grid = core_of("inline"), Grid(4, 3, 1)
    tokens = random_tokens(core, 2, grid)
    similarity, _ = weights_of("inline", tokens.q, tokens.k, grid, grid)
    similarity = similarity * WIDTH**-0.5
    weights = (similarity - similarity.mean(dim=-1, keepdim=True) + 1) / grid.tokens
    close(core(tokens, Layout(grid)), (weights @ tokens.v.transpose(1, 2)).transpose(1, 2))
    close(core(tokens._replace(v=torch.ones_like(tokens.v)), Layout(grid)), torch.ones_like(tokens.v))


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_context_is_turned_by_its_own_grid(name):
    grid, keys = Grid(3, 4, 1), Grid(2, 5)
    core = core_of(name)
    q, (k, v) = random_tokens(core, 2, grid).q, random_tokens(core, 2, keys)[1:3]
    above, below = weights_of(name, q, k, grid, keys)
    total = (above if below is None else below).sum(dim=-1, keepdim=True) + getattr(core, "eps", 0)
    tokens = random_tokens(core, 2, grid)._replace(q=q, k=k, v=v)
    close(core(tokens, Layout(grid), context_layout=Layout(keys)), (above @ v.transpose(1, 2) / total).transpose(1, 2))


@pytest.mark.parametrize("name", TOKENS)
def test_turned_tokens_anywhere(name):
    """The option is the mechanism on tokens that are turned once; where the first of them lies has no effect."""
    grid = Grid(5, 6, 1 if mechanism(name).capabilities.prefix else 0)
    subject = Subject(name, (("rotary", True),))
    core, plain = (made.core().double() for made in (subject, Subject(name)))
    plain.load_state_dict(core.state_dict())
    tokens = random_tokens(core, 2, grid)
    out = core(tokens, Layout(grid))
    spatial = slice(grid.prefix, None)  # a shift would be between them and prefix tokens, too
    alone, lies = tokens.each(lambda x: x[:, spatial]), Grid(5, 6)
    for own, at, ours, (top, left) in (
        (tokens, grid, out, (0, 0)),
        (alone, lies, core(alone, Layout(lies)), (3, 11)),
    ):
        q, k = (turned(x, at, top, left) for x in own[:2])
        close(plain(own._replace(q=q, k=k), Layout(at)), ours)
    assert not torch.allclose(out, plain(tokens, Layout(grid)), atol=1e-3)


@pytest.mark.parametrize("name", SHIFTED)
def test_places_count_by_their_differences(name):
    """A patch of tokens anywhere on a larger grid, the rest of which is dropped, gives the same."""
    layer = Subject(name, (("rotary", True),)).layer(grid=None).double()  # a table of places is another matter
    grid, patch, outs = Grid(9, 11), torch.randn(1, 3, 4, DIM, dtype=torch.float64), []
    for top, left in ((2, 2), (4, 5)):
        canvas, keep = torch.zeros(1, 9, 11, DIM, dtype=torch.float64), torch.zeros(1, 9, 11, dtype=torch.bool)
        canvas[:, top : top + 3, left : left + 4], keep[:, top : top + 3, left : left + 4] = patch, True
        outs.append(layer(canvas.flatten(1, 2), grid, keep=keep.flatten(1))[keep.flatten(1)])
    close(outs[1], outs[0])


@pytest.mark.parametrize("entry", TURNING, ids=lambda entry: entry.name)
def test_packed_and_prefix(entry):
    """Packed images are turned each by its own places. A grid of one place turns nothing, prefix tokens neither."""
    prefix = 2 if entry.capabilities.prefix else 0
    layer, plain = (Subject(entry.name, options).layer().double() for options in ((("rotary", True),), ()))
    plain.load_state_dict(layer.state_dict())
    grids = [Grid(3, 5, prefix), Grid(1, 7, prefix)]
    images = [torch.randn(grid.tokens, DIM, dtype=torch.float64) for grid in grids]
    x, layout = pack(images, grids)
    for ours, own, grid in zip(unpack(layer(x, layout), layout), images, grids, strict=True):
        close(ours, layer(own[None], grid)[0])
    assert not torch.allclose(layer(images[0][None], grids[0]), plain(images[0][None], grids[0]), atol=1e-3)
    one = Grid(1, 1, prefix)
    x = torch.randn(1, one.tokens, DIM, dtype=torch.float64)
    close(layer(x, one), plain(x, one))


@pytest.mark.parametrize("attention", ["inline", "nystrom"])
def test_streamed_is_dense(attention):
    model = small("vit_tiny", attention, cpe=True, attention_options={"rotary": True})
    assert all(block.attn.core.rotary for block in model.blocks)
    same_as_dense(model, image(29, 38), 15)


def test_causal_tiles_are_a_scan():
    grid, core = Grid(6, 5, 1), core_of("linear", causal=True)
    tokens = random_tokens(core, 2, grid)
    cut = [Tile(grid, top, 0, 2, 5) for top in (0, 2, 4)]
    close(scan(core, tokens, cut), core(tokens, Layout(grid)))


def test_it_adds_no_parameters_and_is_kept():
    grid, x = Grid(4, 6), torch.randn(2, 24, DIM)
    for name in ("inline", "softmax"):
        plain, layer = (create_attention(name, DIM, HEADS, rotary=rotary).eval() for rotary in (False, True))
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            out = layer(x, grid)
            assert not torch.allclose(out, plain(x, grid), atol=1e-4)
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), linsight.fuse(layer)):
                close(twin(x, grid), out, 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("efficient", {}, "'efficient' does not support rotary=True (rotary); these do: agent, "),
        ("l2vit_block", {}, "'l2vit_block' does not support rotary=True (rotary)"),
        ("softmax", {"dim": 12}, "divisible by 4, not 6"),
        ("softmax", {"reduction": 2}, "keys of a reduced grid"),
        ("linear", {"pool": 7}, "pass reduction=1"),
        ("sigmoid", {"qk_norm": True}, "pass qk_norm=False"),
        ("fast", {"norm": "layer"}, "pass norm='l2'"),
        ("hedgehog", {"feature_map": "exp"}, "take another map"),
        ("softmax", {"rotary": 1}, "must be True or False"),
    ],
)
def test_refusals_are_one_line(name, options, words):
    create = linsight.attention.create_block if mechanism(name).kind == "block" else create_attention
    with pytest.raises(LinsightError) as caught:
        create(name, **{"dim": DIM, "num_heads": HEADS, "rotary": True, **options})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, CapabilityError) == ("rotary" not in options and "dim" not in options)


def test_it_is_listed():
    (option,) = (option for option in mechanism("linear").options if option.name == "rotary")
    assert option.default is False and "features" in option.help
    assert {"softmax", "inline", "ttt"} <= {entry.name for entry in list_attentions(rotary=True)}
    assert {"mlla", "yoso", "vca"}.isdisjoint(entry.name for entry in list_attentions(rotary=True))


@pytest.mark.full
@pytest.mark.parametrize("way", graphs.CHECKS)
@pytest.mark.parametrize("name", ["softmax", "agent", "linear", "inline"])
def test_graphs(name, way):
    graphs.CHECKS[way](Subject(name, (("rotary", True),)))
