"""The published layouts of every host with softmax, InLine and focused attention, in all the forms they come in."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_checkpoint_files import Harmful, config_node
from test_load_published import equal, refused, snapshot
from torch import nn

import linsight
from linsight import export_published, load_published
from linsight.checkpoints.guess import size_of
from linsight.checkpoints.report import ROWS
from linsight.errors import CheckpointError
from linsight.models import HOSTS, VARIANTS
from test_hosts import SMALL, build

hosts = pytest.mark.parametrize("host", SMALL)
pyramids = pytest.mark.parametrize("host", ["pvt_tiny", "pvt_v2_b0", "swin_tiny", "cswin_tiny"])
attentions = pytest.mark.parametrize("attention", ["softmax", "inline", "focused"])
MIXED = "focused,inline,softmax,softmax"


def distinct(model):
    """The model, no two of its tensors alike: a key in the place of another cannot go unseen."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1  # or many layers would overflow
            tensor.copy_((torch.rand(tensor.shape) + 0.5) / fan_in)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))


@attentions
@hosts
def test_out_and_in(host, attention):
    source, target = distinct(build(host, attention)), build(host, attention)
    state = export_published(source)
    report = load_published(target, state)
    assert set(report.loaded) == set(source.state_dict())
    assert not (report.resized or report.dropped or report.kept or report.mismatched)
    assert equal(target.state_dict(), source.state_dict())
    assert equal(export_published(target), state)
    assert torch.equal(logits(target), logits(source))


# Every key that the published code has, as its repositories write them.
_ENDS = r"\.(weight|bias)"
_LOCAL = rf"residual\.[02]{_ENDS}|scale|positional_encoding|dwc{_ENDS}"
KEYS = {
    "vit_tiny": rf"cls_token|pos_embed|patch_embed\.proj{_ENDS}|(norm|head){_ENDS}|"
    rf"blocks\.[0-2]\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12]){_ENDS}|attn\.({_LOCAL}))",
    "pvt_tiny": rf"cls_token|pos_embed[1-4]|patch_embed[1-4]\.(proj|norm){_ENDS}|(norm|head){_ENDS}|"
    rf"block[1-4]\.[01]\.((norm[12]|attn\.(q|kv|proj|sr|norm)|mlp\.fc[12]){_ENDS}|attn\.({_LOCAL}))",
    "pvt_v2_b0": rf"patch_embed[1-4]\.(proj|norm){_ENDS}|(norm[1-4]|head){_ENDS}|"
    rf"block[1-4]\.[01]\.((norm[12]|attn\.(q|kv|proj|sr|norm)|mlp\.(fc[12]|dwconv\.dwconv)){_ENDS}|attn\.({_LOCAL}))",
    "swin_tiny": rf"patch_embed\.(proj|norm){_ENDS}|(norm|head){_ENDS}|"
    rf"layers\.[0-2]\.downsample\.(norm{_ENDS}|reduction\.weight)|layers\.[0-3]\.blocks\.[01]\."
    rf"((norm[12]|attn\.(qkv|proj)|mlp\.fc[12]){_ENDS}|attn\.(relative_position_bias_table|{_LOCAL}))",
    "cswin_tiny": rf"stage1_conv_embed\.[02]{_ENDS}|merge[1-3]\.(conv|norm){_ENDS}|(norm|head){_ENDS}|"
    rf"stage[1-4]\.[01]\.((norm[12]|qkv|proj|mlp\.fc[12]){_ENDS}|attns\.[01]\.(get_v{_ENDS}|{_LOCAL}))",
}
# Published keys, and where their tensors belong.
PLACES = {
    ("vit_tiny", "inline"): {
        "blocks.1.attn.residual.2.weight": "blocks.1.attn.core.generator.2.weight",
        "blocks.0.attn.qkv.bias": "blocks.0.attn.qkv.bias",
    },
    ("pvt_tiny", "softmax"): {
        "pos_embed4": "stages.3.pos_embed",
        "cls_token": "stages.3.cls_token",
        "patch_embed2.norm.bias": "stages.1.downsample.norm.bias",
        "block1.0.attn.sr.weight": "stages.0.blocks.0.attn.reduction.sr.weight",
        "block1.0.attn.norm.weight": "stages.0.blocks.0.attn.reduction.norm.weight",
        "block4.1.attn.kv.weight": "stages.3.blocks.1.attn.kv.weight",
        "head.weight": "head.fc.weight",
    },
    ("pvt_tiny", "focused"): {
        "block2.1.attn.positional_encoding": "stages.1.blocks.1.attn.core.positions",
        "block2.1.attn.scale": "stages.1.blocks.1.attn.core.scale",
        "block3.0.attn.dwc.weight": "stages.2.blocks.0.attn.core.dwc.weight",
    },
    ("pvt_v2_b0", "softmax"): {
        "patch_embed1.proj.weight": "patch_embed.proj.weight",
        "patch_embed3.norm.weight": "stages.2.downsample.norm.weight",
        "block1.0.attn.norm.bias": "stages.0.blocks.0.attn.reduction.norm.bias",
        "block2.1.mlp.dwconv.dwconv.weight": "stages.1.blocks.1.mlp.dwconv.weight",
        "norm1.weight": "stages.0.norm.weight",
        "norm4.bias": "stages.3.norm.bias",
        "head.bias": "head.bias",
    },
    ("pvt_v2_b0", "inline"): {"block4.0.attn.residual.0.bias": "stages.3.blocks.0.attn.core.generator.0.bias"},
    ("swin_tiny", "softmax"): {
        "layers.0.downsample.norm.weight": "layers.1.downsample.norm.weight",
        "layers.2.downsample.reduction.weight": "layers.3.downsample.reduction.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table": "layers.0.blocks.0.attn.relative_position_bias_table",
        "head.weight": "head.fc.weight",
    },
    ("swin_tiny", "focused"): {
        "layers.1.blocks.1.attn.positional_encoding": "layers.1.blocks.1.attn.core.positions",
    },
    ("cswin_tiny", "softmax"): {
        "stage1_conv_embed.0.weight": "stages.0.downsample.proj.weight",
        "stage1_conv_embed.2.weight": "stages.0.downsample.norm.weight",
        "merge1.conv.weight": "stages.1.downsample.proj.weight",
        "merge3.norm.bias": "stages.3.downsample.norm.bias",
        "stage2.1.attns.1.get_v.weight": "stages.1.blocks.1.attn.branches.1.lepe.weight",
        "stage1.0.qkv.weight": "stages.0.blocks.0.attn.qkv.weight",
        "stage4.0.proj.bias": "stages.3.blocks.0.attn.proj.bias",
        "head.bias": "head.fc.bias",
    },
    ("cswin_tiny", "inline"): {
        "stage1.0.attns.0.residual.2.bias": "stages.0.blocks.0.attn.branches.0.core.generator.2.bias",
        "stage1.0.attns.0.get_v.weight": "stages.0.blocks.0.attn.branches.0.lepe.weight",
    },
    ("cswin_tiny", "focused"): {
        "stage3.0.attns.0.positional_encoding": "stages.2.blocks.0.attn.branches.0.core.positions",
    },
}


@attentions
@pytest.mark.parametrize("host", KEYS)
def test_every_key_is_a_published_one(host, attention):
    assert [key for key in export_published(build(host, attention)) if not re.fullmatch(KEYS[host], key)] == []


@pytest.mark.parametrize(("host", "attention"), PLACES)
def test_published_keys_go_where_they_belong(host, attention):
    model = distinct(build(host, attention))
    state, own = export_published(model), model.state_dict()
    for key, ours in PLACES[host, attention].items():
        assert torch.equal(state[key], own[ours]), key


def test_a_norm_that_is_kept_but_not_applied():
    """FLatten's PVT."""
    source = distinct(build("pvt_tiny", "focused", global_pool="avg", final_norm="carried"))
    state = export_published(source)
    assert state["norm.weight"].shape == (16,) and state["pos_embed4"].shape == (1, 4, 16) and "cls_token" not in state
    target = build("pvt_tiny", "focused", global_pool="avg", final_norm="carried")
    load_published(target, state)
    assert equal(export_published(target), state)


def prefixed(state):
    return {f"module.{key}": value for key, value in state.items()}


RECORDS = {
    "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 5e-4, "params": [0]}]},
    "lr_scheduler": {"base_values": [5e-4], "t_in_epochs": False},
    "max_accuracy": 82.4,
    "scaler": {"scale": 65536.0},
    "epoch": 299,
}
# As the training scripts of InLine, FLatten, PVT, Swin, CSwin and timm write them.
WRAPPERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "training": lambda state: {"model": state, **RECORDS},
    "DDP": lambda state: {"model": prefixed(state), "epoch": 3},
    "state_dict": lambda state: {"state_dict": prefixed(state), "arch": "a", "epoch": 3, "version": 2},
    "averaged": lambda state: {"state_dict_ema": state},
    "timm": lambda state: {"state_dict": state, "arch": "a", **RECORDS},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pyramids
def test_published_files(host, wrapper, tmp_path, monkeypatch):
    source, target = distinct(build(host, "inline")), build(host, "inline")
    state = export_published(source)
    content = WRAPPERS[wrapper](state)
    with monkeypatch.context() as patch:
        if wrapper == "training":
            node = config_node("yacs.config", "CfgNode", patch)
            content["config"] = node(MODEL=node(TYPE="swin", NUM_CLASSES=7), AMP=True)
        torch.save(content, tmp_path / "a.pth")
    report = load_published(target, tmp_path / "a.pth")
    assert not (report.dropped or report.kept) and len(report.loaded) == len(source.state_dict())
    assert equal(export_published(target), state)


@pytest.mark.parametrize("layout", [dict, prefixed])
@pyramids
def test_published_safetensors(host, layout, tmp_path):
    state, target = export_published(distinct(build(host, MIXED))), build(host, MIXED)
    save_file(layout(state), tmp_path / "a.safetensors")
    load_published(target, tmp_path / "a.safetensors")
    assert equal(export_published(target), state)


@pytest.mark.parametrize(
    ("variant", "host", "wanted"),
    [
        ("inline_cswin_tiny", "cswin_tiny", "state_dict_ema"),
        ("focused_cswin_tiny", "cswin_tiny", "state_dict_ema"),
        ("cswin_tiny", "cswin_tiny", "state_dict_ema"),
        ("inline_pvt_tiny", "pvt_tiny", "model"),
        ("focused_swin_tiny", "swin_tiny", "model"),
    ],
)
def test_averaged_weights(variant, host, wanted, tmp_path):
    """Those of CSwin are the published results."""
    model = linsight.create_model(variant, **SMALL[host])
    trained, averaged = (export_published(distinct(model)) for _ in range(2))
    torch.save({"model": trained, "state_dict_ema": averaged, **RECORDS}, tmp_path / "a.pth")
    for ema, wrapper in [(None, wanted), (False, "model"), (True, "state_dict_ema")]:
        assert load_published(model, tmp_path / "a.pth", ema=ema).wrapper == wrapper
        assert equal(export_published(model), trained if wrapper == "model" else averaged)


def test_constant_buffers_are_rebuilt(tmp_path):
    source, target = distinct(build("swin_tiny", "softmax")), build("swin_tiny", "softmax")
    constants = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
        "layers.0.blocks.1.attn_mask": torch.zeros(36, 9, 9),
    }
    torch.save({"model": {**export_published(source), **constants}}, tmp_path / "a.pth")
    report = load_published(target, tmp_path / "a.pth")
    assert report.dropped == tuple(f"{key} (rebuilt)" for key in constants)
    assert torch.equal(logits(target), logits(source))


@hosts
def test_fine_tuned_heads(host):
    state, model = export_published(distinct(build(host))), build(host, num_classes=3)
    assert "; 7 classes in the checkpoint, 3 in the model: pass head=False" in refused(model, state)
    head = {key: value for key, value in snapshot(model).items() if value.shape[:1] == (3,)}
    report = load_published(model, state, head=False)
    assert set(report.kept) == set(head) and len(report.dropped) == 2
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in head.items())
    assert len(report.loaded) == len(state) - 2


@hosts
def test_headless_files(host):
    state, model = export_published(distinct(build(host))), build(host)
    body = {key: value for key, value in state.items() if value.shape[:1] != (7,)}
    assert "the checkpoint has no head: pass head=False" in refused(model, body)
    assert len(load_published(model, body, head=False).loaded) == len(body)


@hosts
def test_features_take_the_whole_file(host):
    """Also from behind a wrapper, and where a stage is missing."""
    state = export_published(distinct(build(host)))
    count = 1 if host == "compact_pico" else 2
    model = build(host, features_only=True, out_indices=range(count))
    report = load_published(nn.DataParallel(model), state)
    assert report.dropped and not report.kept
    x = torch.ones(1, 3, 64, 64)
    whole = build(host, features_only=True, out_indices=range(count + 1))
    load_published(whole, state)
    with torch.no_grad():
        for a, b in zip(model.eval()(x), whole.eval()(x), strict=False):
            assert torch.equal(a, b)


# timm's own models in the sizes of SMALL; windows that divide the grid, as timm's padding is another.
TIMM = {
    "vit_tiny": "vit_tiny_patch16_224",
    "pvt_v2_b0": "pvt_v2_b0",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
WINDOW = {"swin_tiny": {"window_size": 4, "img_size": 64}}


def of_timm(host, **arguments):
    return timm.create_model(TIMM[host], **{**SMALL[host], **WINDOW.get(host, {}), **arguments})


@pytest.mark.parametrize("host", TIMM)
def test_timms_layout(host):
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True} if host == "vit_tiny" else {}
    theirs, ours = distinct(of_timm(host, **arguments)), build(host, "softmax", **WINDOW.get(host, {}))
    load_published(ours, theirs.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs))
    back = of_timm(host, **arguments)
    load_published(back, export_published(ours))
    assert equal(back.state_dict(), theirs.state_dict())
    assert torch.equal(logits(back), logits(theirs))


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("focused_pvt_tiny", "pvt_v2_b0"),
        ("focused_pvt_v2_b0", "swin_tiny"),
        ("inline_swin_tiny", "cswin_tiny"),
        ("focused_cswin_base_384", "cswin_tiny"),
        ("pvt_tiny_meanpool", "pvt_tiny"),
        ("compact_nano", "compact_pico"),
    ],
)
def test_another_family_or_size(file, model):
    """One table, which ends with the screen; the name is that of the build whose tables fit as they are."""
    published = export_published(linsight.create_model(file, device="meta"))
    state = {key: torch.empty_like(value, device="cpu") for key, value in published.items()}
    summary, *table = refused(build(model), {"model": state}).splitlines()
    assert summary.endswith(f"it fits '{file}'")
    assert len(table) == ROWS + 2 and re.fullmatch(r"\.\.\. and \d+ more", table[-1])
    assert len({row.index(" | ") for row in table[:-1]}) == 1


def test_every_registered_model_tells_its_size():
    """Without it, all of them are built to name a checkpoint, which takes seconds."""
    arguments = [host.args for host in HOSTS.values()] + [
        {**HOSTS[variant.host].args, **variant.args} for variant in VARIANTS.values()
    ]
    assert all(None not in size_of(args) for args in arguments)
    swin, steps = HOSTS["swin_tiny"].args, VARIANTS["steps_swin_tiny"].args
    assert size_of({**swin, **steps}) == (96, 26) and size_of({**swin, "steps": [[(96, 3)], [(192, 2)]]}) == (96, 5)


def test_other_blocks_of_the_same_host():
    """A softmax stage where the model has InLine: the keys say so, no other model is named."""
    message = refused(
        build("swin_tiny", "inline"), export_published(build("swin_tiny", "inline,inline,inline,softmax"))
    )
    assert "layers.3.blocks.0.attn.relative_position_bias_table" in message and "it fits" not in message
    assert "layers.3.blocks.0.attn.core.generator.0.weight" in message


@pyramids
def test_what_is_no_checkpoint(host, tmp_path):
    model, path, made = build(host), tmp_path / "a.pth", tmp_path / "made"
    torch.save({"model": export_published(model), "hook": Harmful(made)}, path)
    assert "could run code" in refused(model, path) and not made.exists()
    torch.save({"model": export_published(model)}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut short" in refused(model, path)
    for nothing in ({}, {"model": {}}):
        assert "holds no weights" in refused(model, nothing)


def emptied(model):
    """A model of the meta device with memory, whose values are all wrong."""
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(1)
    return model


@pytest.mark.parametrize(
    ("host", "attention"), [*((host, "focused") for host in SMALL), ("swin_tiny", "softmax"), ("cswin_tiny", "softmax")]
)
def test_models_made_without_memory(host, attention):
    source = distinct(build(host, attention))
    model = build(host, attention, device="meta")
    with pytest.raises(CheckpointError, match="to_empty"):
        load_published(model, export_published(source))
    load_published(emptied(model), export_published(source))
    assert equal(dict(model.named_buffers()), dict(source.named_buffers()))
    assert torch.equal(logits(model), logits(source))


def test_a_model_of_timm_made_without_memory():
    source = distinct(of_timm("swin_tiny"))
    model = emptied(of_timm("swin_tiny", device="meta"))
    load_published(model, export_published(source))
    assert torch.equal(logits(model), logits(source))
