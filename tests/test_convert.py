"""Our mechanisms in the models of torch, torchvision and timm, and between convolutions."""

import copy
import pickle
import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from linsight import Grid, create_attention, list_attentions
from linsight.attention import PROJECTIONS, Attention, create_core, mechanism
from linsight.convert import Attention2d, MultiheadAttention, attention_class, replace_attention, surgery
from linsight.errors import CapabilityError, LinsightError, UnknownNameError

DIM, HEADS = 16, 4
CORES = [entry.name for entry in list_attentions() if entry.kind == "core"]
ORDERED = [entry.name for entry in list_attentions() if not entry.structure.bidirectional]  # of a sequence, not a grid


def does_more(name):
    """True for a mechanism whose layer projects more than q, k and v, or fewer, or does more than project."""
    core = mechanism(name).factory
    parts = {part for projection in PROJECTIONS[core.projections] for part in projection.parts}
    around = core.layer or Attention
    usual = all(getattr(around, way) is getattr(Attention, way) for way in ("given", "tokens", "conclude"))
    return parts != {"q", "k", "v"} or not usual


OWN_PROJECTIONS = [name for name in CORES if does_more(name)]


def pair(**options):
    """torch's attention and ours, with the same weights."""
    theirs = nn.MultiheadAttention(DIM, HEADS, **options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = MultiheadAttention(DIM, HEADS, attention="softmax", **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)


# ---- MultiheadAttention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["self", "value", "cross", "unbatched"])
def test_softmax_is_that_of_torch(kind, bias, batch_first):
    theirs, ours = pair(bias=bias, batch_first=batch_first)
    x, y, z = ((tokens(9) if kind == "unbatched" else tokens(9, 9)) for _ in range(3))
    query, key, value = {"self": (x, x, x), "value": (x, x, y), "cross": (x, y, z), "unbatched": (x, x, x)}[kind]
    expected, _ = theirs(query, key, value)
    out, weights = ours(query, key, value)
    assert weights is None
    torch.testing.assert_close(out, expected)
    inputs = [query, *theirs.parameters()], [query, *ours.parameters()]
    cotangent = torch.randn_like(out)
    for mine, other in zip(
        torch.autograd.grad(out, inputs[1], cotangent), torch.autograd.grad(expected, inputs[0], cotangent), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("pairs", ["none", "bool", "float", "heads", "causal"])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
def test_masks_are_those_of_torch(pairs, padding):
    theirs, ours = pair(batch_first=True)
    x = tokens(3, 6)
    y = x if pairs == "causal" else tokens(3, 7)
    n = y.shape[1]
    drop = torch.rand(6, n) > 0.6
    drop[:, 0] = False
    masks = {
        "bool": drop,
        "float": torch.randn(6, n).double(),
        "heads": torch.randn(3 * HEADS, 6, n).double(),
        "causal": torch.ones(6, n).triu(1).bool(),
    }
    ignored = torch.arange(n) >= torch.tensor([[n], [n - 2], [2]])
    added = torch.zeros(3, n).double().masked_fill(ignored, float("-inf"))
    paddings = {"bool": ignored, "float": added - 0.5 * torch.rand(3, n)}
    asked = {
        "attn_mask": masks.get(pairs),
        "key_padding_mask": paddings.get(padding),
        "is_causal": pairs == "causal",
        "need_weights": False,
    }
    out, _ = ours(x, y, y, **asked)
    for name, mask in asked.items():  # torch wants both masks in one dtype
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            asked[name] = torch.zeros(mask.shape).double().masked_fill(mask, float("-inf"))
    expected, _ = theirs(x, y, y, **asked)
    torch.testing.assert_close(out, expected)


def test_causal_mechanisms_take_the_hint_and_others_name_those_that_can():
    x, mask = torch.randn(2, 6, DIM), torch.ones(6, 6).triu(1).bool()
    causal = MultiheadAttention(DIM, HEADS, attention="linear", batch_first=True, causal=True)
    out, _ = causal(x, x, x, attn_mask=mask, is_causal=True)
    start = x[:, :4]
    torch.testing.assert_close(out[:, :4], causal(start, start, start)[0])
    with pytest.raises(CapabilityError, match="causal=False, or the query as the key"):
        causal(x, x.clone(), x)
    ours = MultiheadAttention(DIM, HEADS, attention="linear", batch_first=True)
    with pytest.raises(CapabilityError, match=r"MultiheadAttention\(causal=True\)"):
        ours(x, x, x, attn_mask=mask, is_causal=True)
    with pytest.raises(CapabilityError, match=r"attn_mask.*these do: .*softmax"):
        ours(x, x, x, attn_mask=mask)
    with pytest.raises(CapabilityError, match=r"a causal mask.*these do: .*linear"):
        MultiheadAttention(DIM, HEADS, grid="1d", batch_first=True)(x, x, x, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize("name", CORES)
def test_every_mechanism_answers_as_its_layer_does(name):
    if name in OWN_PROJECTIONS:
        with pytest.raises(CapabilityError, match=f"'{name}' has projections of its own"):
            MultiheadAttention(DIM, HEADS, attention=name)
        return
    prefix = int(create_core(name, DIM, HEADS).capabilities.prefix)
    grid = Grid(3, 5, prefix)
    layer = create_attention(name, DIM, HEADS, grid=(3, 5), projections="qkv")
    ours = MultiheadAttention(DIM, HEADS, attention=name, grid=(3, 5), prefix=prefix, batch_first=True)
    renamed = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    ours.load_state_dict(
        {renamed.get(key, re.sub(r"^proj\.", "out_proj.", key)): t for key, t in layer.state_dict().items()}
    )
    x = torch.randn(2, grid.tokens, DIM)
    torch.testing.assert_close(ours(x, x, x)[0], layer(x, grid))
    if layer.core.capabilities.keep:
        keep = torch.rand(2, grid.tokens) > 0.3
        expected = layer(x, grid, keep=keep)
        for mask in (~keep, torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))):
            torch.testing.assert_close(ours(x, x, x, key_padding_mask=mask)[0][keep], expected[keep])
        poisoned = x.masked_fill(~keep[..., None], float("nan"))
        torch.testing.assert_close(ours(poisoned, poisoned, poisoned, key_padding_mask=~keep)[0][keep], expected[keep])


@pytest.mark.parametrize("name", ["linear", "softmax", "focused"])
def test_dropped_values_leave_no_trace_in_gradients(name):
    """What is no number there would be one in the gradient of every weight that it is multiplied with."""
    ours = MultiheadAttention(DIM, HEADS, attention=name, grid="1d", batch_first=True)
    x, value = torch.randn(2, 9, DIM), torch.randn(2, 9, DIM)
    drop = torch.rand(2, 9) > 0.6
    found = []
    for filled in (value, value.masked_fill(drop[..., None], float("nan"))):
        out, _ = ours(x, x, filled, key_padding_mask=drop)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(ours.parameters()))])
    for plain, poisoned in zip(*found, strict=True):
        torch.testing.assert_close(poisoned, plain)


@pytest.mark.parametrize("name", [name for name in CORES if name not in (*OWN_PROJECTIONS, *ORDERED)])
def test_without_a_grid_only_where_places_do_not_matter(name):
    ours = MultiheadAttention(DIM, HEADS, attention=name, batch_first=True)
    x = torch.randn(2, 12, DIM)
    order = torch.randperm(12)
    try:
        out, _ = ours(x, x, x)
    except LinsightError as error:
        assert "module.grid" in str(error)
        for parameter in ours.core.parameters():  # a convolution is often zero at first
            nn.init.normal_(parameter, std=0.1)
        ours.grid = (3, 4)
        shuffled, (here, _) = x[:, order], ours(x, x, x)
        other_order = ours(shuffled, shuffled, shuffled)[0]
        assert not torch.allclose(here, ours(x, x, x, grid="1d")[0]) or not torch.allclose(here[:, order], other_order)
    else:
        shuffled = x[:, order]
        torch.testing.assert_close(ours(shuffled, shuffled, shuffled)[0], out[:, order])


def test_cross_attention_has_two_grids():
    ours = MultiheadAttention(DIM, HEADS, attention="linear", grid=(2, 3), key_grid=(4, 5), batch_first=True)
    query, key = torch.randn(2, 6, DIM), torch.randn(2, 20, DIM)
    assert ours(query, key, key)[0].shape == query.shape
    with pytest.raises(LinsightError, match="20 tokens came, but a grid of 2x3"):
        ours(query, key, key, key_grid=(2, 3))
    inline = MultiheadAttention(DIM, HEADS, grid=(2, 3), batch_first=True)
    with pytest.raises(CapabilityError, match=r"'inline' .*\(self-attention passes one tensor as both\).*these do"):
        inline(query, query.clone(), query)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dropout": 0.1}, "dropout=0.1: no mechanism here drops scores"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 8}, "kdim=8"),
        ({"vdim": 8}, "vdim=8"),
        ({"num_heads": 3}, "num_heads=3 does not divide embed_dim=16"),
        ({"attention": "circulant", "prefix": 1}, "prefix"),
        ({"power": 3}, "option of 'inline' 'power'"),
    ],
)
def test_what_cannot_be_done_is_one_line(asked, words):
    with pytest.raises(LinsightError, match=words) as raised:
        MultiheadAttention(DIM, **{"num_heads": HEADS, **asked})
    assert "\n" not in str(raised.value)


def test_arguments_that_ask_for_nothing_pass():
    options = {"add_bias_kv": False, "add_zero_attn": False, "kdim": DIM, "vdim": None}
    ours = MultiheadAttention(DIM, HEADS, 0.0, True, grid=(2, 3), **options)
    x = torch.randn(6, 4, DIM)  # tokens first
    out, _ = ours(x, x, x)
    alone = x[:, 1]
    torch.testing.assert_close(out[:, 1], ours(alone, alone, alone)[0])
    where = copy.deepcopy(ours)
    where.set_grid((3, 2))
    assert not torch.equal(where(x, x, x)[0], out)
    torch.testing.assert_close(ours(x, x, x, grid=(3, 2))[0], where(x, x, x)[0])
    assert MultiheadAttention(DIM, HEADS, device="meta").in_proj_weight.is_meta


# ---- replace_attention


def encoder(**options):
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("grad", [True, False])  # without, torch runs a kernel of its own on the weights of its own
def test_the_encoder_of_torch_calls_us(grad):
    theirs = encoder()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours, "softmax") == ["layers.0.self_attn", "layers.1.self_attn"]
    x, ignored = torch.randn(2, 6, DIM), torch.arange(6) >= torch.tensor([[6], [4]])
    expected = theirs(x, src_key_padding_mask=ignored)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x, src_key_padding_mask=ignored)[~ignored], expected[~ignored])
        replace_attention(theirs, "inline", grid=(2, 3))
        assert not torch.allclose(theirs(x, src_key_padding_mask=ignored)[~ignored], expected[~ignored], atol=0.01)


def test_a_choice_of_no_attention_is_told():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2, enable_nested_tensor=False)
    with pytest.raises(LinsightError, match=r"where= is true of none .*layers\.0\.self_attn"):
        replace_attention(model, "softmax", where=lambda name: "attention" in name)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    by_hand = encoder()
    for layer in by_hand.layers:
        layer.self_attn = MultiheadAttention(DIM, HEADS, attention="linear", batch_first=True)
    with torch.no_grad(), pytest.raises(LinsightError, match="enable_nested_tensor=False"):
        by_hand(torch.randn(2, 6, DIM), src_key_padding_mask=torch.arange(6) >= torch.tensor([[6], [4]]))


def test_torchvision_keeps_its_weights_and_its_checkpoints():
    def vit():
        return torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()

    model = vit()
    before, x = model(torch.randn(1, 3, 32, 32)), torch.randn(2, 3, 32, 32)
    model.encoder.layers[0].self_attention.in_proj_weight.requires_grad_(False)
    softmax = copy.deepcopy(model)
    replace_attention(softmax, "softmax")
    torch.testing.assert_close(softmax(x), model(x))
    other = vit()
    other.load_state_dict(softmax.state_dict())  # back into torch's own
    torch.testing.assert_close(other(x), model(x))

    kept = model.state_dict()
    names = replace_attention(model, "inline", grid=(4, 4), prefix=1)
    assert names == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    assert model(x).isfinite().all() and model(x).shape == (2, 1000)
    assert all(torch.equal(kept[key], t) for key, t in model.state_dict().items() if ".core." not in key)
    assert not model.encoder.layers[0].self_attention.in_proj_weight.requires_grad
    assert not model.encoder.layers[0].self_attention.training
    assert before.shape == (1, 1000)
    fresh = vit()
    replace_attention(fresh, "inline", grid=(4, 4), prefix=1, keep_weights=False)
    with pytest.raises(LinsightError, match="65 tokens came, but a grid of 4x4 with 1 prefix"):
        fresh.encoder.layers[0](torch.randn(1, 65, 16))


def test_surgery_is_all_or_nothing():
    model = nn.ModuleDict({"one": nn.MultiheadAttention(DIM, HEADS), "two": nn.MultiheadAttention(DIM, HEADS, kdim=8)})
    model["again"] = model["one"]
    with pytest.raises(LinsightError, match="two: kdim=8"):
        replace_attention(model, "linear")
    assert not any(isinstance(module, MultiheadAttention) for module in model.values())
    assert replace_attention(model, "linear", where=lambda name: name != "two") == ["one", "again"]
    assert model["again"] is model["one"] and isinstance(model["one"], MultiheadAttention)
    with pytest.raises(LinsightError, match=r"Linear has no torch\.nn\.MultiheadAttention"):
        replace_attention(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"dropout \(0.1\) is gone"):
        replace_attention(nn.TransformerEncoderLayer(DIM, HEADS, 32), "linear")


# ---- surgery


class Twice(nn.Module):
    """One attention under two names, with another inside; and a norm."""

    def __init__(self):
        super().__init__()
        self.one = self.again = nn.MultiheadAttention(DIM, HEADS)
        self.one.inner = nn.MultiheadAttention(DIM, HEADS)
        self.norm = nn.LayerNorm(DIM)


def test_modules_inside_a_selected_one_go_with_it():
    model = Twice()
    assert surgery.select(model, nn.MultiheadAttention) == {"one": model.one, "again": model.one}
    inner = surgery.select(model, nn.MultiheadAttention, lambda name: name.endswith("inner"))
    assert inner == {"one.inner": model.one.inner, "again.inner": model.one.inner}
    assert surgery.select(model.norm, nn.LayerNorm) == {}  # a model cannot be replaced in itself


def test_a_report_tells_what_was_replaced_inherited_and_left_new():
    model, seen = Twice().eval(), []
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    model.norm.weight.requires_grad_(False)

    def build(old, index):
        seen.append((old, index))
        new = nn.LayerNorm(DIM)
        new.bias, new.extra = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))  # a bias of another shape
        return new

    found = surgery.select(model, nn.LayerNorm)
    report = surgery.replace(model, found, build)
    assert seen == [(found["norm"], 0)]
    assert report == surgery.Report(("norm",), ("norm.weight",), ("norm.bias", "norm.extra"))
    assert str(report) == "replaced: 1 (norm)\ninherited: 1 (norm.weight)\nnew: 2 (norm.bias, norm.extra)"
    assert (model.norm.weight == 2).all() and not model.norm.weight.requires_grad and not model.norm.training
    assert model.norm.bias.requires_grad
    fresh = surgery.replace(model, surgery.select(model, nn.LayerNorm), build, keep_weights=False)
    assert fresh.inherited == () and len(fresh.new) == 3 and (model.norm.weight == 1).all()
    assert str(surgery.Report(tuple("abcdef"), (), ())) == "replaced: 6 (a, b, c, d, ...)\ninherited: 0\nnew: 0"


# ---- attention_class


def tiny(**options):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), embed_dim=DIM, depth=2, num_heads=HEADS, **options
    ).eval()


def test_timm_computes_the_same_with_softmax_and_its_own_weights():
    theirs, ours = tiny(), tiny(attn_layer=attention_class("softmax", grid="1d", prefix=1))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    mask = torch.ones(7, 7).tril().bool()
    for kind in (mask, torch.zeros(7, 7).masked_fill(~mask, float("-inf"))):
        torch.testing.assert_close(ours(x, attn_mask=kind), theirs(x, attn_mask=kind))


@pytest.mark.parametrize("name", ["inline", "mlla", "ttt"])
def test_timm_takes_mechanisms_on_its_grid(name):
    made = attention_class(name, grid=(2, 3), prefix=1)
    model, x = tiny(attn_layer=made), torch.randn(2, 3, 32, 48)
    attention = model.blocks[0].attn
    nn.init.normal_(attention.proj.weight)
    seen = torch.randn(2, 7, DIM)
    torch.testing.assert_close(attention(seen), attention(seen, Grid(2, 3, prefix=1)))
    out = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x), out)  # which holds the class, too
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train()(x), out)
    with pytest.raises(LinsightError, match="8 tokens came, but a grid of 2x3 with 1 prefix tokens has 7"):
        attention(torch.randn(2, 8, DIM))
    attention.grid = (1, 7)
    assert attention(torch.randn(2, 8, DIM)).shape == (2, 8, DIM)


def test_timm_asks_for_what_cannot_be_done():
    made = attention_class("linear", grid=(2, 3), prefix=1, causal=False)
    with pytest.raises(LinsightError, match="pass qk_norm=False"):
        tiny(attn_layer=made, qk_norm=True)
    with pytest.raises(LinsightError, match="pass scale_attn_norm=False"):
        made(DIM, HEADS, scale_norm=True)
    with pytest.raises(LinsightError, match="pass attn_drop_rate=0"):
        tiny(attn_layer=made, attn_drop_rate=0.1)
    with pytest.raises(LinsightError, match="attn_layer= is given rotary"):
        made(DIM, HEADS, rotary=True)
    with pytest.raises(UnknownNameError, match="option of 'linear' 'power'"):
        tiny(attn_layer=attention_class("linear", grid=(2, 3), power=2))
    with pytest.raises(CapabilityError, match=r"'circulant' .*prefix tokens"):
        attention_class("circulant", grid=(2, 3), prefix=1)
    with pytest.raises(LinsightError, match="whole block"):
        attention_class("weightformer", grid=(2, 3))
    model, x = tiny(attn_layer=made), torch.randn(1, 3, 32, 48)
    with pytest.raises(CapabilityError, match=r"attention_class\(causal=True\)"):
        model(x, is_causal=True)
    with pytest.raises(CapabilityError, match=r"attn_mask.*these do: .*softmax"):
        model(x, attn_mask=torch.ones(7, 7).bool())


def test_a_model_of_timm_keeps_its_weights_and_its_checkpoints():
    theirs, x = tiny(qkv_bias=False, attn_drop_rate=0.1, proj_drop_rate=0.2), torch.randn(2, 3, 32, 48)
    softmax, ours = copy.deepcopy(theirs), copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=r"dropout \(0.1\) is gone"):
        assert replace_attention(softmax, "softmax", grid=(2, 3), prefix=1) == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(softmax(x), theirs(x))
    assert softmax.blocks[0].attn.proj_drop.p == 0.2 and not softmax.blocks[0].attn.training
    theirs.load_state_dict(softmax.state_dict())
    with pytest.warns(UserWarning, match="is gone"):
        replace_attention(ours, "inline", grid=(2, 3), prefix=1, where=lambda name: name == "blocks.1.attn")
    assert type(ours.blocks[0].attn) is timm.layers.Attention
    assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    assert ours(x).isfinite().all()
    with pytest.raises(LinsightError, match=r"blocks\.0\.attn: .*pass grid="):
        replace_attention(theirs, "linear")
    with pytest.raises(LinsightError, match=r"blocks\.0\.attn: .*pass qk_norm=False"):
        replace_attention(tiny(qk_norm=True), "linear", grid="1d")


# ---- Attention2d


@pytest.mark.parametrize("height, width", [(5, 7), (1, 11)])
def test_maps_are_tokens(height, width):
    module = Attention2d(DIM, HEADS, "focused")
    x, keep = torch.randn(2, DIM, height, width), torch.rand(2, height, width) > 0.3
    expected = module.layer(x.flatten(2).mT, Grid(height, width), keep=keep.flatten(1))
    out = module(x, keep)
    torch.testing.assert_close(out, expected.mT.reshape(x.shape))
    assert out.is_contiguous()
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, keep), out)


def test_channels_last_goes_through_without_copies():
    module, seen = Attention2d(DIM, HEADS), {}
    module.layer.register_forward_hook(lambda _, given, out: seen.update(given=given[0], out=out))
    x = torch.randn(2, DIM, 5, 7).contiguous(memory_format=torch.channels_last)
    out = module(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert seen["given"].data_ptr() == x.data_ptr() and seen["given"].is_contiguous()
    assert seen["out"].data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, module(x.contiguous()))


def test_maps_export_and_compile_at_any_size():
    module, x = Attention2d(DIM, HEADS, "linear").eval(), torch.randn(2, DIM, 6, 5)
    size = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(module, (x,), dynamic_shapes=(size,), strict=False).module()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, DIM, 6, 5), (3, DIM, 4, 7)):
            y = torch.randn(shape)
            torch.testing.assert_close(program(y), module(y))
            torch.testing.assert_close(compiled(y), module(y))


def test_set_grid_reaches_the_tables():
    module = Attention2d(DIM, HEADS, "agent", grid=(4, 4))
    module.set_grid((6, 2))
    assert module.layer.core.tables.ah_bias.shape != module.layer.core.tables.aw_bias.mT.shape
