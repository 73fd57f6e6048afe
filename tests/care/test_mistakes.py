"""Each mistake of a caller is one line, at each door: layers, adapters, models."""

import pickle

import pytest
import torch

import linsight
from linsight import Grid, Layout, create_attention
from linsight.attention import create_block, create_core
from linsight.convert import Attention2d, MultiheadAttention
from linsight.errors import LinsightError
from linsight.models import create_video_model
from linsight.ops import as_layout
from test_hosts import SMALL, build


def refused(call, *words):
    with pytest.raises(LinsightError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("sides", [(-1, 4), (2.5, 4), (4, -1), (4, 4, -1), (4, 4, 0.5), (4, True - 2)])
def test_grids_are_whole_numbers(sides):
    refused(lambda: Grid(*sides), "whole numbers")
    refused(lambda: as_layout(sides), "whole numbers")


def test_a_grid_is_still_a_named_tuple():
    grid = Grid(2, width=3)
    assert grid == (2, 3, 0) == Grid(height=2, width=3, prefix=0) and type(grid) is Grid
    assert pickle.loads(pickle.dumps(grid)) == grid._replace(prefix=0) and Grid(0, 3).tokens == 0


@pytest.mark.parametrize(
    ("dim", "heads"),
    [(0, 1), (16, 0), (-16, 2), (16, -2), (16.0, 2), (16, 2.0), ("16", 2), (16, 3), (None, 2), (True, 1)],
)
def test_sizes_of_layers(dim, heads):
    refused(lambda: create_attention("inline", dim, heads))
    refused(lambda: create_core("inline", dim, heads))
    refused(lambda: create_block("weightformer", dim, heads))
    refused(lambda: MultiheadAttention(dim, heads, grid=(2, 2)))
    refused(lambda: Attention2d(dim, heads))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"grid": (0, 4)}, "grid"),
        ({"grid": (2.5, 4)}, "grid"),
        ({"grid": 4}, "grid"),
        ({"qkv_bias": "no"}, "qkv_bias"),
        ({"proj_drop": 2}, "proj_drop"),
        ({"proj_drop": "much"}, "proj_drop"),
        ({"reduction": 0}, "reduction"),
        ({"reduction": 1.5}, "reduction"),
        ({"pool": -1}, "pool"),
    ],
)
def test_options_of_layers(options, word):
    refused(lambda: create_attention("softmax", 16, 2, **options), word)


LAYOUTS = {
    "no layout": None,
    "a number": 5,
    "a word": "24",
    "one side": (24,),
    "four sides": (4, 6, 0, 0),
    "no tokens": Grid(0, 6),
    "words in a grid": Grid("4", 6),
    "nothing in a grid": Grid(4, None),
    "a bare pair inside": Layout((4, 6)),
    "floats": Layout(Grid(4, 6), torch.tensor([[4.0, 6.0], [4.0, 6.0]])),
    "one size": Layout(Grid(4, 6), torch.tensor([[4, 6]])),
    "a list": Layout(Grid(4, 6), [[4, 6], [4, 6]]),
    "larger": Layout(Grid(4, 6), torch.tensor([[4, 6], [4, 7]])),
    "empty images": Layout(Grid(4, 6), torch.tensor([[4, 6], [0, 6]])),
    "negative": Layout(Grid(4, 6), torch.tensor([[4, 6], [-1, 6]])),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["softmax", "linear", "agent"])
def test_layouts(name, layout):
    refused(lambda: create_attention(name, 16, 2)(torch.randn(2, 24, 16), layout))


def beside():
    x, grid = torch.randn(2, 24, 16), Grid(4, 6)
    return {
        "integer bias": {"score_bias": torch.zeros(2, 2, 24, 24, dtype=torch.long)},
        "half bias": {"score_bias": torch.zeros(2, 2, 24, 24).half()},
        "heads of the bias": {"score_bias": torch.zeros(2, 3, 24, 24)},
        "keys of the bias": {"score_bias": torch.zeros(2, 2, 24, 23)},
        "five axes": {"score_bias": torch.zeros(1, 1, 1, 24, 24)},
        "keep of another batch": {"keep": torch.ones(3, 24, dtype=torch.bool)},
        "keep of another length": {"keep": torch.ones(2, 23, dtype=torch.bool)},
        "keep in floats": {"keep": torch.ones(2, 24)},
        "keep in integers": {"keep": torch.ones(2, 24, dtype=torch.long)},
        "a list to keep": {"keep": [[True] * 24] * 2},
        "keep elsewhere": {"keep": torch.ones(2, 24, dtype=torch.bool, device="meta")},
        "no layout of the context": {"context": x},
        "no context": {"context_layout": grid},
        "context of other channels": {"context": x[..., :8], "context_layout": grid},
        "context of another batch": {"context": x[:1], "context_layout": grid},
        "context of another length": {"context": x[:, :23], "context_layout": grid},
        "context of another rank": {"context": x[0], "context_layout": grid},
        "context in halves": {"context": x.half(), "context_layout": grid},
        "context in integers": {"context": x.long(), "context_layout": grid},
        "residual of another shape": {"residual": x[:, :23]},
        "residual elsewhere": {"residual": x.to("meta")},
    }


@pytest.mark.parametrize("name", beside())
def test_what_comes_beside_the_tokens(name):
    refused(lambda: create_attention("softmax", 16, 2)(torch.randn(2, 24, 16), Grid(4, 6), **beside()[name]))


def test_biases_of_fewer_axes_are_broadcast():
    layer, x = create_attention("softmax", 16, 2), torch.randn(2, 24, 16)
    bias = torch.randn(24, 24)
    assert torch.equal(layer(x, Grid(4, 6), score_bias=bias), layer(x, Grid(4, 6), score_bias=bias[None, None]))


def test_packed_tokens():
    layer, x = create_attention("softmax", 16, 2), torch.randn(1, 10, 16)
    layout = Layout.packed([(2, 2), (2, 3)])
    block = create_block("weightformer", 16, 2)
    for wrong in (x[:, :9], x[0], torch.cat([x, x]), x[..., :8], x.half()):
        refused(lambda wrong=wrong: layer(wrong, layout))
        refused(lambda wrong=wrong: block(wrong, layout))
    refused(lambda: layer(x, layout, keep=torch.ones(1, 9, dtype=torch.bool)))
    refused(lambda: layer(x, layout, context=x, context_layout=Layout.packed([(2, 5)])))
    refused(lambda: layer(x, layout, context=x, context_layout=Grid(2, 5)))
    refused(lambda: linsight.ops.pack([x[0, :4]], [(2, 2), (2, 3)]))


def test_the_module_of_torch():
    module = MultiheadAttention(16, 2, attention="softmax", batch_first=True, grid=(2, 3))
    q = torch.randn(2, 6, 16)
    for wrong in (q[:, :5], q[..., :8], q[None], q.half(), q.long(), q.to("meta"), q[0, 0]):
        refused(lambda wrong=wrong: module(wrong, wrong, wrong))
    refused(lambda: module(q, q[:1], q[:1], key_grid=(2, 3)))
    refused(lambda: module(q, q, q[:, :5]))
    refused(lambda: module(q, q, q[:1]))
    refused(lambda: module(q, q, q[0]))
    for mask in (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool), torch.zeros(2, 6).long()):
        refused(lambda mask=mask: module(q, q, q, key_padding_mask=mask))
    for mask in (torch.zeros(5, 6), torch.zeros(3, 6, 6), torch.zeros(6), torch.zeros(2, 2, 6, 6)):
        refused(lambda mask=mask: module(q, q, q, attn_mask=mask))
    refused(lambda: module(q, q, q, grid=(2.5, 3)))
    refused(lambda: module(q, q, q, grid="2d"))


def test_maps():
    layer, x = Attention2d(16, 2, "softmax"), torch.randn(2, 16, 4, 6)
    for wrong in (x[0], x[:, :8], x.half(), x.long(), x[None], x[:, :, :0], x.to("meta")):
        refused(lambda wrong=wrong: layer(wrong))
    for keep in (torch.ones(2, 24, dtype=torch.bool), torch.ones(2, 4, 6), torch.ones(2, 4, 5, dtype=torch.bool)):
        refused(lambda keep=keep: layer(x, keep=keep))


def images():
    x = torch.randn(2, 3, 64, 64)
    return {
        "rank": x[0],
        "five axes": x[None],
        "channels": x[:, :1],
        "channels last": x.permute(0, 2, 3, 1),
        "bytes": x.to(torch.uint8),
        "doubles": x.double(),
        "halves": x.half(),
        "no rows": x[:, :, :0],
        "no columns": x[..., :0],
        "elsewhere": x.to("meta"),
        "a list": [[1.0]],
    }


@pytest.mark.parametrize("host", SMALL)
def test_images(host):
    model, maps = build(host).eval(), build(host, features_only=True).eval()
    for name, x in images().items():
        for call in (model, model.forward_features, model.forward_intermediates, maps):
            refused(lambda call=call, x=x: call(x), "images" if name != "a list" else "list")


OTHERS = {
    name: lambda name=name: linsight.create_model(name, num_classes=3)
    for name in ("dynp_reg400m_t32", "steps_resnet18", "overlock_xt")
}
OTHERS |= {
    "trecvit": lambda: create_video_model("trecvit_mu", depth=1),
    "videomamba": lambda: create_video_model("videomamba_video_tiny", embed_dim=16, depth=1),
}
MADE = {**{host: lambda host=host: build(host) for host in SMALL}, **OTHERS}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_changes_of_a_model(make):
    """Of its classes, and of the size that it is for; it is as before when it refuses."""
    model = make()
    classes, state = model.num_classes, [*model.state_dict()]
    for wrong in (-1, 3.5, "10", True):
        refused(lambda wrong=wrong: model.reset_classifier(wrong), "num_classes")
    for wrong in (0, -32, 32.5, "big", (32, 0), (32,), (32, 32, 3)):
        refused(lambda wrong=wrong: model.set_input_size(wrong), "img_size")
    assert model.num_classes == classes and [*model.state_dict()] == state


def test_a_pooling_is_as_before_when_the_classes_are_refused():
    model = build("pvt_tiny", global_pool="token")
    model.reset_classifier(3, "avg")
    refused(lambda: model.reset_classifier("10", "token"), "num_classes")
    assert model.global_pool == "avg"


@pytest.mark.parametrize("name", ["dynp_reg400m_t32", "steps_resnet18"])
def test_images_of_architectures(name):
    model = linsight.create_model(name, num_classes=3).eval()
    for x in images().values():
        refused(lambda x=x: model(x))


def test_padded_and_packed_images():
    model, x = build("vit_tiny").eval(), torch.randn(2, 3, 32, 32)
    for wrong in ([[32, 32]], [[32, 33], [32, 32]], [[0, 1], [2, 2]], [[1.5, 2], [3, 3]], torch.ones(2, 2)):
        refused(lambda wrong=wrong: model(x, sizes=wrong))
    refused(lambda: model(x.to(torch.uint8), sizes=[[32, 32], [32, 32]]))
    for wrong in ([], [x], [x[0].to(torch.uint8)], [x[0, :1]], [x[0, :, :0]]):
        refused(lambda wrong=wrong: model.forward_packed(wrong))
