"""Weights of another grid, other channels or another mechanism: the right numbers, or a line that names the way."""

import argparse
import copy
import gzip
import json
import logging
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._manipulate import adapt_input_conv
from torch import nn
from torch.nn.utils import parametrizations, prune

import linsight
from linsight import catalogue, export_published, load_published
from linsight.checkpoints import load_pretrained
from linsight.checkpoints.read import read
from linsight.errors import LinsightError
from linsight.models.timm import fetch
from linsight.recipe import averaged
from linsight.tasks import ClassifyRecipe
from linsight.train import load_trained, resolve
from linsight.train.chosen import told_channels
from linsight.train.model import load_named, save, start_from
from test_hosts import SMALL, build

OLD, SIZES = (64, 128), [(128, 64), (128, 256), (64, 64)]
# Every host with tables, and every mechanism with some.
TABLED = [
    ("vit_tiny", "inline"),
    ("vit_tiny", "focused"),
    ("vit_tiny", "agent"),
    ("pvt_tiny", "inline"),
    ("pvt_tiny", "agent"),
    ("pvt_v2_b0", "focused"),
    ("swin_tiny", "softmax"),
    ("swin_tiny", "focused,softmax,agent,softmax"),
    ("compact_pico", "focused"),
    ("mlla_pyramid_tiny", "agent"),
    ("h_vit_tiny", "focused"),
]


def mixed(model):
    """The model in evaluation, with weights that no place of a table shares."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) / max(tensor[0].numel(), 4) ** 0.5)
    return model.eval()


def moved(model, size):
    """A copy as `set_input_size` makes it; of Swin, with the windows that a model of that size is built with."""
    twin = copy.deepcopy(model)
    twin.set_input_size(size, **({"window_size": 3} if hasattr(model, "layers") else {}))
    return twin


def same(model, wanted, size, channels=3):
    x = torch.linspace(-2, 2, channels * size[0] * size[1]).sin().reshape(1, channels, *size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), wanted.eval()(x), rtol=1e-4, atol=1e-4)


def plain(state):
    """A state dict without the record of its grids, as safetensors would keep it."""
    return dict(state)


def tiny(**options):
    return linsight.create_model("inline_deit_tiny", **{"depth": 1, "img_size": 64, "num_classes": 5, **options})


def refused(call, *words):
    with pytest.raises(LinsightError) as caught:
        call()
    first = str(caught.value).splitlines()[0]
    for word in words:
        assert word in first, first
    return str(caught.value)


@pytest.mark.parametrize(("host", "attention"), TABLED)
def test_tables_of_an_oblong_model(host, attention):
    source = mixed(build(host, attention, img_size=OLD))
    for size in SIZES if attention == "inline" else SIZES[:1]:
        model, wanted = build(host, attention, img_size=size), moved(source, size)
        report = load_published(model, export_published(source))
        assert report.resized
        same(model, wanted, size)
        load_published(model, plain(export_published(source)), from_size=OLD)
        same(model, wanted, size)


def write(how, model, folder):
    if how == "export":
        return export_published(model, folder / "a.safetensors") and folder / "a.safetensors"
    if how == "run":
        recipe = ClassifyRecipe(model="inline_pvt_tiny", img_size=OLD)
        save(folder / "best.safetensors", model.state_dict(), recipe, {"classes": ("a",), "top1": 1.0})
        return folder / "best.safetensors"
    if how == "old run":  # which told the size of its images alone
        about = json.dumps({"recipe": {"model": "inline_pvt_tiny", "img_size": OLD}, "classes": ["a"]})
        save_file(model.state_dict(), folder / "a.safetensors", {"linsight": about})
        return folder / "a.safetensors"
    state, record = export_published(model) if how == "script" else model.state_dict(), {}
    if how == "script":  # Swin's and DeiT's scripts keep their arguments
        state, record = plain(state), {"args": argparse.Namespace(input_size=OLD)}
    if how == "compiled":
        about = OrderedDict((f"_orig_mod.module.{key}".rstrip("."), value) for key, value in state._metadata.items())
        state = OrderedDict((f"_orig_mod.module.{key}", value) for key, value in state.items())
        state._metadata = about
    torch.save({"model": state, **record}, folder / "a.pth")
    return folder / "a.pth"


@pytest.mark.parametrize("how", ["export", "run", "old run", "state dict", "compiled", "script"])
def test_files_tell_their_grids(tmp_path, how):
    source, size = mixed(build("pvt_tiny", "inline", img_size=OLD)), (128, 64)
    model = build("pvt_tiny", "inline", img_size=size)
    report = load_published(model, write(how, source, tmp_path))
    assert report.resized[0].endswith("from 16x32 to 32x16")
    same(model, moved(source, size), size)


def test_what_nothing_tells_is_asked_for():
    source = export_published(mixed(tiny(img_size=OLD)))
    for size in SIZES:
        refused(lambda size=size: load_published(tiny(img_size=size), plain(source)), "from_size=(height, width)")
    refused(lambda: load_published(tiny(img_size=OLD), plain(source)), "from_grid=")
    model = tiny(img_size=(128, 64))
    assert load_published(model, plain(source), from_grid=(4, 8)).resized == ("pos_embed from 4x8 to 8x4",)
    wrong = refused(lambda: load_published(model, plain(source), from_size=96), "1 of 24 tensors differ")
    assert "not those of 6x6" in wrong
    pyramid = mixed(build("pvt_v2_b0", "focused", img_size=OLD))
    model = build("pvt_v2_b0", "focused", img_size=(128, 64))
    load_published(model, plain(export_published(pyramid)), from_grid=(16, 32))  # whose patches are 7x7, 4 apart
    same(model, moved(pyramid, (128, 64)), (128, 64))


def test_what_a_paper_tells_is_known():
    """Published files are for square images of 224 pixels; 196 rows may then be 7x28 in a model of that grid only."""
    state = plain(export_published(mixed(tiny(img_size=224))))
    assert load_published(tiny(img_size=224), state).resized == ()
    assert load_published(tiny(img_size=OLD), state).resized == ("pos_embed from 14x14 to 4x8",)
    refused(lambda: load_published(tiny(img_size=(112, 448)), state), "from_size")


def test_tables_of_a_layer():
    layers = [linsight.create_attention("focused", 16, 2, grid=grid) for grid in ((4, 8), (4, 8), (8, 4))]
    with torch.no_grad():
        layers[0].core.positions.normal_()
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].set_grid((8, 4))
    state = export_published(layers[0])
    for given, options in ((state, {}), (plain(state), {"from_grid": (4, 8)})):
        load_published(layers[2], given, **options)
        torch.testing.assert_close(layers[2].core.positions, layers[1].core.positions)
    load_published(layers[0], plain(state))  # where nothing tells, a layer alone is made for its grid
    refused(lambda: load_published(layers[2], plain(state), from_size=OLD), "pass from_grid=")


@pytest.mark.parametrize("host", ["vit_tiny", "pvt_tiny", "swin_tiny"])
def test_torch_does_not_mistake_a_grid(host):
    source, model = (build(host, "focused", img_size=size) for size in (OLD, (128, 64)))
    with pytest.raises(RuntimeError, match=r"linsight\.load_published resamples it"):
        model.load_state_dict(source.state_dict())
    copy.deepcopy(source).load_state_dict(source.state_dict())


def test_models_of_timm_with_oblong_tables():
    make = {"depth": 1, "num_classes": 5}
    source = mixed(timm.create_model("deit_tiny_patch16_224", img_size=OLD, **make))
    model = timm.create_model("deit_tiny_patch16_224", img_size=(128, 64), **make)
    for name in ("softmax", None):
        if name:
            model = linsight.create_model("deit_tiny_patch16_224", attention=name, img_size=(128, 64), **make)
        refused(lambda model=model: load_published(model, source.state_dict()), "from_size")
        load_published(model, source.state_dict(), from_size=OLD)
        same(model, moved(source, (128, 64)), (128, 64))


@pytest.mark.parametrize(
    ("sides", "name"), [((0, 3), "from_size"), ("64", "from_size"), ((4, 4, 4), "from_grid"), (2.5, "from_grid")]
)
def test_sides_are_whole_numbers(sides, name):
    refused(lambda: load_published(tiny(), {}, **{name: sides}), name, "whole numbers")


def test_one_size_is_enough():
    refused(lambda: load_published(tiny(), {}, from_size=64, from_grid=4), "pass one")


def test_a_run_and_a_model_by_name_take_a_size(tmp_path):
    source = mixed(linsight.create_model("inline_deit_tiny", depth=1, num_classes=5, img_size=OLD))
    save_file(plain(export_published(source)), tmp_path / "a.safetensors")
    model = tiny(img_size=(128, 64), num_classes=3)
    assert start_from(model, str(tmp_path / "a.safetensors"), from_size=OLD).resized
    full = linsight.create_model("wfm_tiny", device="meta")  # without tables, to be quick
    save_file({key: torch.zeros(tensor.shape) for key, tensor in full.state_dict().items()}, tmp_path / "b.safetensors")
    assert load_named("wfm_tiny", str(tmp_path / "b.safetensors"), from_size=OLD).recipe.img_size == (224, 224)


def test_what_timm_saved_with_a_model_tells_its_size():
    """As `timm.models.save_for_hf` leaves it: weights that tell nothing, beside the arguments of their model."""
    source = mixed(tiny(img_size=OLD))
    for size in (OLD, (128, 64)):
        model = tiny(img_size=size)
        model.pretrained_model_args = {"img_size": list(OLD), "depth": 1}
        load_pretrained(model, plain(source.state_dict()))
        same(model, moved(source, size), size)
    model.pretrained_model_args = {}
    refused(lambda: load_pretrained(model, plain(source.state_dict())), "inline_deit_tiny", "from_size")


def test_a_run_keeps_its_oblong_grid(tmp_path):
    recipe = ClassifyRecipe(model="inline_deit_tiny", model_args={"depth": 1}, img_size=OLD)
    model = mixed(tiny(img_size=OLD))
    save(tmp_path / "best.safetensors", model.state_dict(), recipe, {"classes": tuple("abcde")})
    same(load_trained(tmp_path).model, model, OLD)
    assert read(tmp_path / "best.safetensors")._metadata[""]["grids"] == {"pos_embed": [4, 8]}


# --- channels ---


@pytest.mark.parametrize("host", [*SMALL, "dynp_resnet18_025_t32_cifar"])
def test_filters_for_other_channels(host):
    def make(channels):
        if host in SMALL:
            return build(host, "softmax" if host == "swin_tiny" else "inline", in_chans=channels)
        return linsight.create_model(host, in_chans=channels, num_classes=7)

    colour = mixed(make(3))
    stem = colour.pretrained_cfg["first_conv"] + ".weight"
    before = colour.state_dict()[stem]
    for channels in (1, 4):
        model = make(channels)
        report = load_published(model, export_published(colour))
        assert len(report.adapted) == 1 and f"from 3 to {channels} channels" in str(report)
        torch.testing.assert_close(model.state_dict()[stem], adapt_input_conv(channels, before))
        if channels > 1:
            refused(lambda model=model: load_published(make(3), export_published(model)), f"in_chans={channels}")
            continue
        back = make(3)
        load_published(back, export_published(model))
        assert "repeated, times 1/3" in load_published(back, export_published(model)).adapted[0]
        x = torch.rand(1, 1, 64, 64)
        with torch.no_grad():  # a grey image in three equal channels gives what it gave
            torch.testing.assert_close(back.eval()(x.expand(-1, 3, -1, -1)), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_wrapped_models_for_other_channels():
    features = tiny(in_chans=1, features_only=True, out_indices=[0])
    assert load_published(features, export_published(tiny())).adapted
    dense = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "img_size": 64}
    colour, grey = (linsight.create_model("agent_swin_tiny_dense", in_chans=n, **dense) for n in (3, 1))
    assert load_published(grey, export_published(colour)).adapted
    assert load_published(tiny(in_chans=4, num_classes=0), export_published(tiny()), head=False).adapted


def test_pretrained_for_grey_images(monkeypatch, tmp_path):
    source = linsight.create_model("wfm_tiny", depth=1)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda _, path: save_file(export_published(source), path))
    model = linsight.create_model("wfm_tiny", depth=1, in_chans=1, pretrained=True)
    wanted = source.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, wanted)


def test_mean_and_std_follow_the_channels():
    own = resolve("cifar10").mean
    recipe = resolve("cifar10", {"in_chans": "1"})
    assert recipe.mean == pytest.approx((sum(own) / 3,)) and len(recipe.std) == 1
    assert "the average of the 3 channels of recipe cifar10" in told_channels("cifar10", recipe)
    assert told_channels("cifar10", resolve("cifar10")) == ""
    assert averaged(recipe, 4)["mean"] == recipe.mean * 4
    assert resolve("cifar10", {"in_chans": 1, "mean": 0.25}).mean == (0.25,)
    refused(lambda: resolve("cifar10", {"in_chans": 1, "mean": "0.5,0.5"}), "mean takes 1 numbers, not 2")


# --- weights in parts ---


def linear(model):
    return model.blocks[0].mlp.fc1


PARTS = {
    "pruned": lambda model: prune.l1_unstructured(linear(model), "weight", 0.5),
    "pruned qkv": lambda model: prune.ln_structured(model.blocks[0].attn.qkv, "weight", 0.3, n=2, dim=0),
    "pruned stem": lambda model: prune.l1_unstructured(model.patch_embed.proj, "weight", 0.5),
    "weight norm": lambda model: parametrizations.weight_norm(linear(model)),
    "weight norm of all": lambda model: parametrizations.weight_norm(linear(model), dim=None),
    "spectral norm": lambda model: parametrizations.spectral_norm(linear(model)),
    "spectral norm of a stem": lambda model: parametrizations.spectral_norm(model.patch_embed.proj),
    "spectral norm, old": lambda model: nn.utils.spectral_norm(linear(model)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_made_whole(kind, tmp_path):
    source, model = mixed(tiny()), tiny()
    PARTS[kind](source)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    report = load_published(model, tmp_path / "a.pth")
    assert kind.partition(" ")[0].partition(",")[0] in str(report.adapted)
    same(model, source.eval(), (64, 64))
    own = tiny()
    PARTS[kind](own)
    assert not load_published(own, source.state_dict()).adapted  # it has such parts itself
    refused(lambda: load_published(own, tiny().state_dict()), "load weights before that")


def test_parts_that_nothing_tells_are_refused():
    source, state = tiny(), tiny().state_dict()
    parametrizations.orthogonal(linear(source))
    refused(lambda: load_published(tiny(), source.state_dict()), "remove_parametrizations")
    lora = {**state, "blocks.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)}
    refused(lambda: load_published(tiny(), lora), "LoRA", "merge_and_unload")
    packed = {**state, "blocks.0.mlp.fc1.qweight": torch.ones(2, 2).int()}
    refused(lambda: load_published(tiny(), packed), "quantised")


# --- wrappers ---


def named(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPED = {
    "lightning": lambda s: {"state_dict": {**named("model.", s), "loss.weight": torch.ones(2)}, "epoch": 1},
    "net": lambda s: {"state_dict": {**named("net.", s), "criterion.w": torch.ones(2)}},
    "averaged": lambda s: {**named("module.", s), "n_averaged": torch.tensor(3)},
    "detector": lambda s: {"state_dict": {**named("backbone.", s), "decode_head.weight": torch.ones(3)}},
    "compiled blocks": lambda s: {key.replace("blocks.0.", "blocks.0._orig_mod."): t for key, t in s.items()},
    "sharded": lambda s: {key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for key, t in s.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers(how):
    source, model = mixed(tiny()), tiny()
    report = load_published(model, WRAPPED[how](plain(export_published(source))))
    assert len(report.loaded) == len(source.state_dict()) and not report.mismatched
    same(model, source, (64, 64))


def test_several_models_in_a_file():
    state = tiny().state_dict()
    two = {**named("student.", state), **named("teacher.", state)}
    refused(lambda: load_published(tiny(), two), "student., teacher.", "removeprefix('student.')")
    refused(lambda: load_published(tiny(), {"student": state, "teacher": state}), "torch.load(path)['student']")
    refused(lambda: load_published(tiny(), torch.optim.AdamW(tiny().parameters()).state_dict()), "optimiser")
    refused(lambda: load_published(tiny(), tiny()), "VisionTransformer", "state dict")


def test_a_model_with_compiled_blocks():
    class Compiled(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

        def __getattr__(self, name):
            return self._modules["_orig_mod"] if name == "_orig_mod" else getattr(self._modules["_orig_mod"], name)

    source, model = mixed(tiny()), tiny()
    model.blocks[0] = Compiled(model.blocks[0])
    load_published(model, export_published(source))
    assert torch.equal(model.blocks[0]._orig_mod.mlp.fc1.weight, linear(source).weight)
    assert export_published(model).keys() == export_published(source).keys()
    # with a table in the block, of another grid, which is not square
    source, model, plain = (build("vit_tiny", "linformer", img_size=size) for size in ((32, 48), 32, 32))
    state = export_published(source)
    model.blocks[0] = Compiled(model.blocks[0])
    report = load_published(model, state)
    assert report.resized == load_published(plain, state).resized and "blocks.0." in str(report.resized)
    assert torch.equal(model.blocks[0]._orig_mod.attn.core.E, plain.blocks[0].attn.core.E)


# --- numbers ---


def test_precision_is_told():
    state = export_published(tiny())
    report = load_published(tiny(), {key: tensor.half() for key, tensor in state.items()})
    assert report.converted == ("24 tensors from float16 to float32",) and "converted: 24" in str(report)
    assert load_published(tiny().bfloat16(), state).converted == ("24 tensors from float32 to bfloat16",)
    assert load_published(tiny(), state).converted == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_none_are_told(value):
    state, told = export_published(tiny()), []
    state["norm.bias"][3] = value
    handler = logging.Handler()
    handler.emit = told.append
    logging.getLogger("linsight").addHandler(handler)
    try:
        report = load_published(tiny(), state)
    finally:
        logging.getLogger("linsight").removeHandler(handler)
    assert report.infinite == ("norm.bias (1 of 192)",) and "nan or infinite: norm.bias" in str(report)
    assert [record.levelname for record in told] == ["WARNING"] and "norm.bias (1 of 192)" in told[0].getMessage()


# --- files ---


def zipped(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


FILES = {
    "a.pth": (b"\n<!DOCTYPE html><html>", "a web page"),
    "b.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "c.pth": (b"", "is empty"),
    "d.pth": (b"\0" * 5000, "all zeros"),
    "e.pth.gz": (gzip.compress(b"weights"), "unpack it"),
    "f.h5": (b"\x89HDF\r\n\x1a\n" + b"0" * 100, "HDF5"),
    "g.gguf": (b"GGUF" + b"0" * 100, "quantisation"),
    "model.safetensors.index.json": (b'{"weight_map": {}}', "several files"),
    "h.json": (b'{"a": 1}', "JSON"),
    "i.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "j.npy": (b"\x93NUMPY\1\0", "NumPy"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_told_for_what_they_are(tmp_path, name):
    content, word = FILES[name]
    (tmp_path / name).write_bytes(content)
    message = refused(lambda: read(tmp_path / name), word, name)
    assert "\n" not in message


def test_archives_and_cut_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", b"")
    refused(lambda: read(tmp_path / "script.pt"), "TorchScript")
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    refused(lambda: read(tmp_path / "a.npz"), "NumPy")
    zipped(tmp_path / "b.zip", "a.pth", b"x")
    refused(lambda: read(tmp_path / "b.zip"), "unpack it")
    save_file({"a": torch.zeros(100)}, tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[:-50])
    refused(lambda: read(tmp_path / "c.safetensors"), f"{len(whole) - 50} of {len(whole)} bytes")
    refused(lambda: read(tmp_path), "is a folder", "c.safetensors")
    refused(lambda: read("hf-hub:timm/deit"), "hf_hub_download")
    refused(lambda: read("s3://bucket/a.pth"), "http(s)")


@pytest.mark.parametrize("record", ["[]", "{", '{"recipe": 3}', '{"grids": {"pos_embed": [0, "x"]}, "recipe": null}'])
def test_an_odd_record_is_passed_over(tmp_path, record):
    save_file(plain(export_published(tiny())), tmp_path / "a.safetensors", {"linsight": record})
    assert load_published(tiny(), tmp_path / "a.safetensors").loaded


# --- messages ---


def test_the_way_to_weights_of_another_mechanism():
    refused(
        lambda: linsight.create_model("deit_tiny_patch16_224", attention="t5", pretrained=True),
        "linsight.load_published(model, path, strict=False)",
        "https://",
    )
    refused(lambda: linsight.create_model("wfm_tiny", attention="inline", pretrained=True), "strict=False", "https://")
    refused(lambda: timm.create_model("inline_deit_tiny", pretrained=True), "README of LeapLabTHU/InLine", "github.com")
    refused(lambda: linsight.create_model("swin_tiny", pretrained=True), "timm, as swin_tiny_patch4_window7_224")
    soft, model = tiny(attention="softmax"), tiny(attention="t5", class_token=False, global_pool="avg")
    message = refused(lambda: load_published(model, export_published(soft)), "strict=False loads the")
    assert "core.w1" in message
    load_published(model, export_published(soft), strict=False)
    assert torch.equal(model.blocks[0].attn.qkv.weight, soft.blocks[0].attn.qkv.weight)


def test_what_could_not_be_fetched_is_named(monkeypatch):
    def create(name, *, pretrained=False, **kwargs):
        if pretrained:
            raise FileNotFoundError("no network\nand more")
        return original(name, pretrained=pretrained, **kwargs)

    original = timm.create_model
    monkeypatch.setattr(fetch.timm, "create_model", create)
    for name in ("deit_tiny_patch16_224", "pvt_v2_b0", "swin_tiny_patch4_window7_224"):
        message = refused(
            lambda name=name: linsight.create_model(name, pretrained=True), name, "no network", "https://"
        )
        assert "load_published(model, path)" in message and "\n" not in message


def test_every_published_model_says_where_it_is_from():
    for row in catalogue.list_models():
        if row["published"] and not row["name"].startswith("compact"):
            assert row["paper"]["url"].startswith("https://arxiv.org/abs/"), row["name"]
        if row["weights"]:
            assert row["code"], row["name"]
