"""From published keys to ours and back: models, layers, and what does not fit."""

import io

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import linsight
from golden import cases
from golden.spec import tensor
from linsight import export_published, load_published
from linsight.attention import Rename, mechanism
from linsight.checkpoints.keys import CONSTANTS, Rules, to_ours, to_published
from linsight.errors import CheckpointError, LinsightError
from linsight.models.hosts.cswin import CSwinTransformer


def published(name):
    """The filled state dict of a golden case, under its published keys."""
    spec, recorded = cases.load(name)
    return cases.published_state(spec), spec, recorded["output"]


def tiny(**options):
    """InLine-DeiT, small enough for a test."""
    return linsight.create_model("inline_deit_tiny", **{"depth": 2, "img_size": 64, "num_classes": 5, **options})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].shape == b[key].shape for key in a)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def refused(model, source, **options):
    """The message of a load that fails, after which the model is as it was."""
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        load_published(model, source, **options)
    assert equal(before, snapshot(model))
    return str(error.value)


def test_published_model_reproduces_its_numbers(tmp_path):
    state, spec, out = published("inline/inline_deit_tiny")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 299}, tmp_path / "a.pth")
    model = linsight.create_model("inline_deit_tiny").eval()
    report = load_published(model, tmp_path / "a.pth")
    assert len(report.loaded) == len(state) and report.wrapper == "model"
    assert not (report.resized or report.dropped or report.kept or report.mismatched)
    with torch.no_grad():
        error = (model(tensor(spec["input_shape"])) - out).abs().max() / out.abs().max()
    assert error <= cases.TOLERANCE
    assert equal(export_published(model), state)


SINGLE = [
    "inline/inline_op_deit_d64_h4_8x8",
    "inline/inline_op_pvt_d64_h4_6x10",
    "inline/inline_op_cswin_full_d64_h4_8x8",
    "inline/softmax_op_pvt_sr2_d64_h4_8x8",
    "efficient/efficient_op_d64h4_8x8",
]


@pytest.mark.parametrize("name", SINGLE)
def test_published_layers_both_ways(name):
    state, spec, out = published(name)
    run = cases.build(spec)
    load_published(run.module, state)
    with torch.no_grad():
        assert (run.call() - out).abs().max() <= cases.TOLERANCE * out.abs().max()
    assert equal(export_published(run.module), state)


@pytest.mark.parametrize("layout", ["qkv", "q_kv", "q_k_v"])
def test_a_layer_takes_any_layout_and_gives_back_the_published_one(layout):
    state, _, _ = published("efficient/efficient_op_d64h4_8x8")
    layer = linsight.create_attention("efficient", 64, 4, projections=layout)
    load_published(layer, state)
    assert equal(export_published(layer), state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ours", ["qkv", "q_kv", "q_k_v"])
@pytest.mark.parametrize("theirs", ["qkv", "q_kv", "q_k_v"])
def test_projections_are_joined_and_split(ours, theirs, bias):
    layers = [
        linsight.create_attention("linear", 8, 2, projections=layout, qkv_bias=bias) for layout in (ours, theirs, ours)
    ]
    target, source, back = layers
    load_published(target, source.state_dict())
    x, grid = torch.randn(1, 6, 8), linsight.Grid(2, 3)
    torch.testing.assert_close(target(x, grid), source(x, grid))
    load_published(back, export_published(target))
    assert equal(back.state_dict(), target.state_dict())


def test_rows_of_a_joined_projection():
    layer = linsight.create_attention("linear", 4, 1)
    parts = {name: torch.full((4, 4), float(i)) for i, name in enumerate("qkv")}
    state = {f"{name}.weight": value for name, value in parts.items()}
    state |= {f"{name}.bias": value[0] for name, value in parts.items()}
    load_published(layer, {**state, "proj.weight": torch.eye(4), "proj.bias": torch.zeros(4)})
    assert layer.qkv.weight[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_our_own_layout_is_welcome():
    source, target = tiny(), tiny()
    with torch.no_grad():
        source.blocks[0].attn.core.generator[0].bias.fill_(7)
    load_published(target, source.state_dict())
    assert equal(target.state_dict(), source.state_dict())


class Moved(nn.Module):
    """Its rules lead away from one of its own names."""

    published = (Rename("inner.", "outer."), Rename("centre.", "inner."))

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 2)


def test_our_own_layout_is_told_from_the_published_one():
    source = Moved()
    for state in (source.state_dict(), export_published(source)):
        target = Moved()
        load_published(target, state)
        assert equal(target.state_dict(), source.state_dict())


def cswin_block():
    """A block that owns what its layer would: its rules lead to the layer's published names."""
    model = CSwinTransformer(stages=[(64, 1, 4, 4.0, 8)], attention="inline", img_size=32)
    return model.stages[0].blocks[0]


class Stages(nn.Module):
    """A host with a name of its own for a stage."""

    published = (Rename("stage1.", "stages.0.blocks."),)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Module()])
        self.stages[0].blocks = nn.ModuleList([cswin_block(), cswin_block()])


def test_rules_of_host_block_and_layer_compose():
    state, _, _ = published("inline/inline_block_cswin_d64_h4_8x8")
    block = cswin_block()
    load_published(block, state)
    assert equal(export_published(block), state)
    nested = {f"stage1.{i}.{key}": value + i for i in range(2) for key, value in state.items()}
    host = Stages()
    load_published(host, nested)
    assert equal(export_published(host), nested)
    assert torch.equal(host.stages[0].blocks[1].attn.branches[0].lepe.bias, state["attns.0.get_v.bias"] + 1)


def test_the_longest_rule_wins_both_ways():
    rules = [Rules("a.", (Rename("x", "y"), Rename("x.w", "z"), Rename("old", "y")))]
    assert [to_ours(key, rules) for key in ("a.x.w", "a.x.b", "a.old.b", "x.w")] == ["a.z", "a.y.b", "a.y.b", "x.w"]
    assert [to_published(key, torch.ones(1), rules)[0] for key in ("a.z", "a.y.b", "y.b")] == ["a.x.w", "a.x.b", "y.b"]


class Compiled(nn.Module):
    """Names its module as torch.compile does, in a thousandth of the time."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [Compiled, nn.DataParallel])
def test_wrapped_models(wrap):
    source = tiny()
    model = wrap(tiny())
    load_published(model, export_published(source))
    assert equal(export_published(model), export_published(source))


def test_a_list_of_models_is_not_taken_for_a_wrapper():
    layer = linsight.create_attention("linear", 8, 2)
    pair = nn.ModuleDict({"model": layer, "head": nn.Linear(8, 2)})
    load_published(pair, {key: value + 1 for key, value in pair.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_keeps_its_dtype(dtype):
    source = tiny()
    for model, state in [
        (tiny().to(dtype), export_published(source)),
        (tiny(), {key: value.to(dtype) for key, value in export_published(source).items()}),
    ]:
        before = model.norm.weight.dtype
        load_published(model, state)
        assert {p.dtype for p in model.parameters()} == {before}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_counters_of_a_halved_checkpoint_are_read(dtype):
    source, model = (linsight.create_model("inline_compact_pico", num_classes=2, img_size=32) for _ in range(2))
    state = {key: value.to(dtype) for key, value in source.state_dict().items()}
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    load_published(model, {**state, **{key: torch.tensor(7, dtype=dtype) for key in counters}})
    found = model.state_dict()
    assert counters and {(found[key].dtype, int(found[key])) for key in counters} == {(torch.int64, 7)}
    assert "for int64" in refused(model, {**state, counters[0]: torch.tensor(0.5)})


def test_another_kind_of_numbers():
    state = export_published(tiny())
    assert "int32 for float32" in refused(tiny(), {**state, "norm.bias": state["norm.bias"].int()})


@pytest.mark.parametrize("size", [96, 32, (48, 80)])
def test_position_tables_are_resized(size):
    source, model = tiny(), tiny(img_size=size)
    with torch.no_grad():  # resampling keeps a constant table, and leaves the class token alone
        source.pos_embed.fill_(2.0)[:, 0] = 5.0
    state = export_published(source)
    message = refused(model, state, resize=False)
    assert "resize=True" in message and "4x4" in message
    report = load_published(model, state)
    assert report.resized == (f"pos_embed from 4x4 to {'x'.join(str(n) for n in model.patch_embed.grid_size)}",)
    assert model.pos_embed[:, 0].unique().tolist() == [5.0]
    torch.testing.assert_close(model.pos_embed[:, 1:], torch.full_like(model.pos_embed[:, 1:], 2.0))


@pytest.mark.parametrize("size", [64, 96])
def test_the_row_of_a_class_token_goes_where_the_model_has_none(size):
    source, model = tiny(), tiny(class_token=False, global_pool="avg", img_size=size)
    with torch.no_grad():
        nn.init.normal_(source.pos_embed)[:, 0] = 50.0
    state = export_published(source)
    load_published(model, state, strict=False)
    rows = state["pos_embed"][:, 1:]
    grid = model.patch_embed.grid_size
    wanted = rows if size == 64 else resample_abs_pos_embed(rows, list(grid), [4, 4], 0)
    assert model.pos_embed.shape == (1, grid[0] * grid[1], 192) and model.pos_embed.max() < 50
    torch.testing.assert_close(model.pos_embed.detach(), wanted)


def test_a_position_table_that_is_not_square():
    state = export_published(tiny())
    message = refused(tiny(), {**state, "pos_embed": state["pos_embed"][:, :12]})
    assert "1x12x192" in message and "1x17x192" in message


def test_another_number_of_classes():
    state, model = export_published(tiny()), tiny(num_classes=3)
    message = refused(model, state)
    assert "5 classes in the checkpoint, 3 in the model: pass head=False" in message
    head = model.head.weight.clone()
    report = load_published(model, state, head=False)
    assert torch.equal(model.head.weight, head) and torch.equal(model.norm.bias, state["norm.bias"])
    assert report.kept == ("head.weight", "head.bias") and len(report.dropped) == 2


def test_no_head_on_one_side():
    with_head, without = tiny(), tiny(num_classes=0)
    assert "the model has no head: pass head=False" in refused(without, export_published(with_head))
    load_published(without, export_published(with_head), head=False)
    assert "the checkpoint has no head: pass head=False" in refused(with_head, export_published(without))
    load_published(with_head, export_published(without), head=False)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_buffers_are_rebuilt(name):
    state = {**export_published(tiny()), f"blocks.0.attn.{name}": torch.zeros(3, 3, dtype=torch.int64)}
    assert load_published(tiny(), state).dropped == (f"blocks.0.attn.{name} (rebuilt)",)


def test_features_only_takes_the_whole_file():
    state = export_published(tiny(depth=3))
    model = tiny(depth=3, features_only=True, out_indices=(0, 1))
    report = load_published(model, state)
    assert {name.split(".")[0] for name in report.dropped} == {"blocks", "norm", "head"}
    assert all(name.startswith(("blocks.2.", "norm.", "head.")) for name in report.dropped)
    assert torch.equal(model.model.blocks[1].attn.proj.bias, state["blocks.1.attn.proj.bias"])
    assert "blocks.0.attn.odd" in refused(model, {**state, "blocks.0.attn.odd": torch.ones(1)})


def test_the_table_of_what_does_not_fit():
    state = export_published(tiny())
    del state["norm.bias"]
    state |= {"extra": torch.ones(2, 3), "norm.weight": torch.ones(7)}
    summary, *table = refused(tiny(), state).splitlines()
    assert "3 of 41 tensors differ" in summary
    assert [line.replace(" ", "") for line in table] == [
        "key|checkpoint|model|whatiswrong",
        "norm.weight|7|192|anothershape",
        "norm.bias|-|192|notinthecheckpoint",
        "extra|2x3|-|notinthemodel",
    ]
    assert len({line.index("|") for line in table}) == 1


def test_a_joined_projection_of_another_size_names_the_published_keys():
    state, _, _ = published("efficient/efficient_op_d64h4_8x8")
    layer = linsight.create_attention("efficient", 32, 4)
    assert "queries.weight + keys.weight + values.weight | 192x64x1x1" in refused(layer, state)


def test_the_table_is_cut():
    message = refused(tiny(), export_published(tiny(embed_dim=96)))
    assert len(message.splitlines()) == 15 and message.endswith("... and 27 more")
    assert "width 96 in the checkpoint, 192 in the model" in message and "classes" not in message


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("inline_deit_small", "inline_deit_tiny"),
        ("inline_deit_tiny", "vit_tiny"),
        ("wfm_tiny", "vit_tiny"),
        ("steps_deit_tiny", "vit_tiny"),
        ("siamese_deit_tiny", "vit_tiny"),
        ("steps_resnet18", "vit_tiny"),
        ("dynp_reg400m_t128", "vit_tiny"),
    ],
)
def test_the_right_model_is_named(file, model):
    state = export_published(linsight.create_model(file, num_classes=2))
    assert f"it fits '{file}'" in refused(linsight.create_model(model, num_classes=2), state)


def test_one_key_twice():
    state = export_published(tiny())
    twice = {**state, "blocks.0.attn.core.generator.0.bias": state["blocks.0.attn.residual.0.bias"]}
    assert "1 of 41 tensors differ" in refused(tiny(), twice)


def test_not_strict_loads_what_fits_and_says_so():
    state, model = export_published(tiny()), tiny()
    rest = {key: value for key, value in state.items() if not key.startswith("head")}
    report = load_published(model, {**rest, "odd": torch.ones(1)}, strict=False)
    assert {row.key for row in report.mismatched} == {"head.weight", "head.bias", "odd"}
    assert torch.equal(model.norm.bias, state["norm.bias"]) and "odd" in str(report)
    assert "does not fit" in refused(model, {"odd": torch.ones(1)}, strict=False)


def test_report_is_readable():
    state = {"state_dict": export_published(tiny()), "epoch": 4}
    assert str(load_published(tiny(), state)) == "loaded 40 tensors from the state dict, entry 'state_dict'"
    report = str(load_published(tiny(img_size=96, num_classes=3), state, head=False))
    assert "resized: pos_embed from 4x4 to 6x6" in report
    assert "dropped: head.weight (head=False)" in report and "kept: head.weight, head.bias" in report


def test_a_model_without_memory():
    model = linsight.create_model("inline_deit_tiny", device="meta", depth=1)
    with pytest.raises(LinsightError, match=r"to_empty"):
        load_published(model, export_published(tiny()))


def test_export_is_a_copy_that_can_be_saved():
    from safetensors.torch import save

    layer = linsight.create_attention("efficient", 8, 2)
    state = export_published(layer)
    save(state)  # refuses tensors that share memory
    torch.save(state, io.BytesIO())
    state["keys.weight"].fill_(9.0)
    state["reprojection.bias"].fill_(9.0)
    assert not any((value == 9.0).any() for value in layer.state_dict().values())


def test_every_mechanism_goes_out_and_in():
    for entry in linsight.list_attentions():
        if entry.kind == "block":
            continue
        source, target = (linsight.create_attention(entry.name, 8, 2) for _ in range(2))
        if source.state_dict():
            load_published(target, export_published(source))
        assert equal(target.state_dict(), source.state_dict()), entry.name
        core = mechanism(entry.name).factory(8, 2)
        load_published(core, export_published(core)) if core.state_dict() else None


def test_weights_of_timm_itself_are_not_renamed():
    model, new = (timm.create_model("swiftformer_xs", num_classes=10) for _ in range(2))
    assert load_published(new, model.state_dict()).adapted == ()
    assert equal(new.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_published(new, {f"{key}.else": value for key, value in model.state_dict().items()})
