"""Graphs made in default calls: right at every size, also at those not seen when they were made, or one line."""

import inspect
import itertools

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import linsight
from linsight.attention import merge_heads, split_heads
from linsight.convert import Attention2d, MultiheadAttention
from linsight.errors import LinsightError
from linsight.models import HOSTS
from linsight.models.parts.positions import with_positions
from linsight.ops import Grid, Tile, at_least, at_most, divided, gather_pooled, pool_tokens, read_pooled, table_for
from matrix import graphs, subjects
from matrix.graphs import EXAMPLE, UNSEEN, OnImages, equals, in_onnxruntime, in_onnxruntime_by_tracing, traced
from test_hosts import MECHANISMS, SMALL, build, sizes
from test_matrix import named

pytestmark = [
    pytest.mark.timeout(300),  # where cores are shared
    *map(pytest.mark.filterwarnings, graphs.WARNINGS),
]


def other_sizes(host):
    """(batch, height, width), among them images that leave one token, or one window, in a stage."""
    first, *rest = sizes(host)
    least = (8, 9) if min(first) < 64 else (33, 30)
    return [(3, *rest[-1]), (1, *rest[0]), (2, *least), (2, *rest[2])]


def shallow(host, attention="inline"):
    """Two stages, or two blocks: in Swin, two of which one is shifted."""
    small = SMALL[host]
    if host != "compact_pico" and "stages" in small:
        first, *_, last = small["stages"]
        return build(host, attention, stages=[(dim, 1, *rest) for dim, _, *rest in (first, last)]).eval()
    if "depths" in small:
        dims = {key: small[key][:2] for key in ("num_heads", "embed_dims") if key in small}
        return build(host, attention, depths=(1, 2 if host.startswith("swin") else 1), **dims).eval()
    return build(host, attention, **({"depth": 2} if "depth" in small else {})).eval()


def symbolic(model, x):
    return torch.fx.symbolic_trace(model)


def by_torch_export(model, x):
    return graphs.exported(model, x, strict=True)


WAYS = (traced, in_onnxruntime, in_onnxruntime_by_tracing)
LAYERS = [pytest.param(s, marks=[] if s.name == "inline" else [pytest.mark.full]) for s in subjects()]
QUICK = [("vit_tiny", traced), ("swin_tiny", traced), ("pvt_tiny", traced), ("vit_tiny", in_onnxruntime_by_tracing)]
MODELS = [
    pytest.param(
        host,
        attention,
        way,
        marks=[]
        if (way is symbolic and attention == "inline")
        or ((host, way) in QUICK and attention == ("softmax" if host == "swin_tiny" else "agent"))
        else [pytest.mark.full],
    )
    for host, attention, way in itertools.product(SMALL, MECHANISMS, (symbolic, *WAYS, by_torch_export))
    if way in (symbolic, traced, in_onnxruntime_by_tracing) or attention in ("inline", "softmax", "agent")
]


@pytest.mark.parametrize("subject", LAYERS, ids=named)
def test_layers_by_the_exporter_that_traces(subject):
    model, (batch, *size) = OnImages(subject.layer()).eval(), EXAMPLE
    equals(in_onnxruntime_by_tracing(model, torch.randn(batch, 16, *size)), model, 16, UNSEEN)


@pytest.mark.parametrize(("host", "attention", "way"), MODELS, ids=named)
def test_models(host, attention, way):
    model = shallow(host, attention)
    x = torch.randn(2, 3, *(sizes(host)[1]))
    equals(way(model, x), model, 3, other_sizes(host))


class Pooled(torch.nn.Module):
    """Attention through two pooled tokens, whose outputs are viewed: how they lie in memory is the kernel's."""

    def __init__(self):
        super().__init__()
        self.q, self.bias = torch.nn.Linear(16, 16), torch.nn.Parameter(torch.randn(1, 2, 1, 2))

    def forward(self, x):
        height, width = x.shape[2:]
        q = split_heads(self.q(x.flatten(2).transpose(1, 2)), 2)
        pooled = pool_tokens(q, Tile.whole(Grid(height, width)), (1, 2))
        bias = self.bias.expand(-1, -1, height * width, -1)
        return merge_heads(read_pooled(q, pooled, gather_pooled(pooled, q, q, None), bias))


def test_views_of_what_a_kernel_returned():
    model = Pooled().eval()
    equals(in_onnxruntime(model, torch.randn(2, 16, 4, 5)), model, 16, UNSEEN)


@pytest.mark.full
def test_windows_of_two_kinds():
    """A mixed Swin whose mechanisms have windows of their own, too."""
    model = build("swin_tiny", "inline,softmax", depths=(2, 2), num_heads=(1, 2), attention_window=4).eval()
    for way in (traced, in_onnxruntime):
        equals(way(model, torch.randn(2, 3, 160, 96)), model, 3, [*other_sizes("swin_tiny"), (1, 64, 64)])


class Placed(torch.nn.Module):
    """A map with a position table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(1, 16, 8))

    def forward(self, x):
        whole = Tile.whole(Grid(*x.shape[2:]))
        return with_positions(x.flatten(2).transpose(1, 2), self.table, (4, 4), whole, "bicubic-antialias")


@pytest.mark.parametrize(
    ("make", "channels"),
    [(Placed, 8), *(pytest.param(lambda host=host: shallow(host), 3, marks=pytest.mark.full) for host in SMALL)],
)
def test_compiled_training_at_a_second_size(make, channels):
    """The position table is resampled by products, whose gradient a compiler knows at sizes that it does not."""
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, backend="aot_eager")
    for size in ((64, 64), (96, 128)):
        x, gradients = torch.randn(2, channels, *size), []
        for call in (model, compiled):
            model.zero_grad()
            call(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("new", [(14, 14), (7, 9), (20, 31), (1, 1)])
def test_tables_are_resampled_as_timm_does(new):
    table = torch.randn(1, 14 * 14, 8)
    right = resample_abs_pos_embed(table, list(new), [14, 14], num_prefix_tokens=0)
    found = table_for(table, (14, 14), Tile.whole(Grid(*new)), "bicubic-antialias")
    assert (found - right).abs().max() <= (0 if new == (14, 14) else 1e-6 * table.abs().max() * 4)


@pytest.mark.parametrize("host", SMALL)
def test_features_by_torchvision(host):
    """A node is named as the module that it calls; what comes out of a block is what the block gives."""
    model, x = build(host).eval(), torch.randn(2, 3, *sizes(host)[0])
    name = next(name for name, module in model.named_modules() if name.endswith((".attn", ".proj_drop", "blocks.1")))
    seen = []
    block = name.rpartition(".attn")[0] or name
    model.get_submodule(block).register_forward_hook(lambda module, given, out: seen.append(out))
    found = create_feature_extractor(model, {block: "features"})(x)["features"]
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(found, seen[-1])


def test_a_mask_in_a_graph_is_refused_when_it_runs():
    graph, x = torch.fx.symbolic_trace(build("vit_tiny").eval()), torch.randn(1, 3, 32, 32)
    with pytest.raises(LinsightError, match="attn_mask"):
        graph(x, torch.zeros(17, 17))
    with pytest.raises(LinsightError, match="sizes"):
        graph(x, sizes=[[32, 32]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: build("vit_tiny", norm="siamese"),
        lambda: linsight.create_attention("inline", 16, 2),
        lambda: linsight.attention.create_block("weightformer", 16, 2),
        lambda: Attention2d(16, 2),
        lambda: linsight.create_model("dynp_reg400m_t32", num_classes=3),
    ],
)
def test_what_fx_cannot_follow_is_one_line(make):
    model = make().eval()
    with pytest.raises(LinsightError, match="forward_intermediates") as caught:
        torch.fx.symbolic_trace(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", SMALL)
def test_script_is_one_line(host):
    with pytest.raises(LinsightError, match=r"torch\.jit\.trace") as caught:
        torch.jit.script(build(host))
    assert "\n" not in str(caught.value)


def test_no_argument_of_a_model_is_by_keyword_only():
    """An exporter that passes every argument in order could not call the model."""
    kinds = {host.model_cls for host in HOSTS.values()} | {Attention2d, MultiheadAttention}
    for kind in kinds:
        names = [p.name for p in inspect.signature(kind.forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert not names, (kind, names)


@pytest.mark.parametrize("host", SMALL)
def test_counters_of_operations(host):
    model, x = build(host).eval(), torch.randn(1, 3, *sizes(host)[0])
    shapes = []
    for module in model.modules():
        module.register_forward_hook(lambda module, given, out: shapes.append(getattr(out, "shape", None)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() > 0 and len(shapes) > 5


def test_sizes_of_every_kind():
    assert (at_least(2, 5), at_most(2, 5), at_least(7, 5), at_most(7, 5)) == (5, 2, 7, 5)
    for side in (2, 7):
        known = torch.tensor(side)  # as under torch.jit.trace
        assert at_least(known, 5) == at_least(5, known) == max(side, 5)
        assert at_most(known, 5) == at_most(5, known) == min(side, 5)
    places = torch.arange(20)
    for found, right in zip(divided(places, 6), (places // 6, places % 6), strict=True):
        assert torch.equal(found, right)
