"""Models by name: ours, a host with any mechanism, timm's own."""

import copy
import urllib.error

import pytest
import timm
import torch
from safetensors.torch import save_file

import linsight
from linsight.bench.counting import count_macs, count_parameters
from linsight.errors import LinsightError, UnknownNameError
from linsight.models import HOSTS, VARIANTS, Variant, add_variants, default_attention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


def kind(variant):
    """The class of the model, the mechanism in it, and whether it is a dense backbone."""
    host = HOSTS.get(getattr(variant, "host", ""), variant)
    return host.model_cls, getattr(variant, "attention", ""), getattr(variant, "dense", "")


PUBLISHED = sorted((v for v in VARIANTS.values() if v.published), key=lambda v: v.published["params"], reverse=True)
SMALLEST = {variant.name for variant in {kind(variant): variant for variant in PUBLISHED}.values()}


def by_turns():
    """Variants, of which a sixth of those that are larger than one of their kind; `pytest -m full` takes all."""
    for place, name in enumerate(sorted(VARIANTS)):
        yield pytest.param(name, marks=[] if name in SMALLEST or place % 6 == 0 else pytest.mark.full)


@pytest.mark.parametrize("name", [*by_turns()])
def test_variants_are_the_published_models(name):
    """Built by timm, with the published parameters."""
    assert timm.is_model(name)
    model = timm.create_model(name, device="meta")
    published = VARIANTS[name].published
    if published:
        assert abs(count_parameters(model) - published["params"]) <= 5.1e3  # cards give two decimals of a million
    assert model.pretrained_cfg["architecture"] == name
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == model.pretrained_cfg["input_size"]


# Larger ones differ from the smallest in widths and depths, which parameters tell.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (i % 4 > 0)) for i, n in enumerate(sorted(SMALLEST))]
)
def test_multiply_adds_are_the_published(name):
    """At the published size."""
    model = timm.create_model(name, device="meta").eval()
    macs = count_macs(model, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    assert abs(macs / 1e9 - VARIANTS[name].published["gmacs"]) <= 0.0101  # two decimals of a billion


@pytest.mark.parametrize("name", ["inline_deit_tiny", "inline_swin_tiny", "focused_pvt_tiny", "inline_cswin_tiny"])
def test_variants_take_timms_arguments(name):
    model = timm.create_model(name, num_classes=3, in_chans=1, drop_path_rate=0.1, img_size=96)
    assert model.num_classes == 3
    assert model(torch.randn(2, 1, 96, 96)).shape == (2, 3)
    assert any(getattr(module, "drop_prob", 0) for module in model.modules())
    model.reset_classifier(5)
    assert model.forward_head(model.forward_features(torch.randn(1, 1, 70, 90))).shape == (1, 5)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 96, 64)).shape == (1, model.num_features)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("inline_swin_tiny", (231, 197)),
        ("inline_swin_tiny", (160, 352)),
        ("focused_pvt_tiny", (149, 211)),
        ("focused_pvt_v2_b0", (231, 197)),
        ("inline_cswin_tiny", (149, 211)),
    ],
)
def test_any_size_on_a_build_for_224(name, size):
    model = timm.create_model(name, features_only=True, out_indices=(0, 3)).eval()
    with torch.no_grad():
        first, last = model(torch.randn(1, 3, *size))
    for map_, reduction in ((first, 4), (last, 32)):
        # The host floors or ceils at each stage.
        for side, pixels in zip(map_.shape[2:], size, strict=True):
            assert pixels // reduction <= side <= -(-pixels // reduction)
        assert map_.isfinite().all()


@pytest.mark.parametrize("name", ["inline_compact_pico", "vit_tiny", "pvt_tiny"])
@pytest.mark.parametrize("argument", ["checkpoint_path", "exportable", "scriptable", "no_jit"])
def test_what_timm_keeps_for_itself_is_told(name, argument):
    with pytest.raises(
        LinsightError, match=rf"{argument}= is an argument of timm.create_model.*load_published"
    ) as caught:
        linsight.create_model(name, **{argument: "a.pth"})
    assert "\n" not in str(caught.value)


def test_a_variant_takes_arguments_and_another_mechanism():
    model = timm.create_model(
        "inline_deit_tiny", **SMALL, attention="linear", attention_options={"feature_map": "relu"}
    )
    assert {type(block.attn.core).__name__ for block in model.blocks} == {"Linear"}
    assert linsight.create_model("inline_deit_tiny", **SMALL)(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_hosts_default_to_softmax():
    assert type(linsight.create_model("vit_tiny", **SMALL).blocks[0].attn.core).__name__ == "Softmax"


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_224.augreg_in21k"]
)
def test_names_of_timm(name):
    """A model of timm on our host: its numbers with softmax, and any mechanism in its place."""
    theirs = timm.create_model(name, **SMALL).eval()
    ours = linsight.create_model(name, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    inline = linsight.create_model(name, attention="inline:1/softmax", **SMALL)
    assert [type(block.attn.core).__name__ for block in inline.blocks] == ["InLine", "Softmax"]
    assert inline(torch.randn(1, 3, 40, 24)).shape == (1, 7)


def test_names_of_timm_with_features_only():
    model = linsight.create_model(
        "vit_tiny_patch16_224", attention="inline", features_only=True, out_indices=[1], **SMALL
    )
    assert [tuple(map_.shape) for map_ in copy.deepcopy(model)(torch.randn(1, 3, 40, 24))][-1] == (1, 32, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linsight.create_model("inline_deit_tinny"), "did you mean 'inline_deit_tiny'"),
        (lambda: linsight.create_model("vit_tiny", attention="inlin"), "did you mean 'inline'"),
        (lambda: linsight.create_model("vit_tiny", attention_options={"local": True}), "option of 'softmax' 'local'"),
        (lambda: linsight.create_model("resnet18", attention="inline"), "without a linsight host"),
        (lambda: linsight.create_model("vit_tiny", attention=""), "attention ''"),
        (
            lambda: linsight.create_model("pvt_tiny", global_pool="map"),
            "global_pool='map' is not one of 'token', 'avg'",
        ),
        (lambda: linsight.create_model("pvt_tiny_meanpool", global_pool="token", final_norm="on"), "final_norm 'on'"),
        (lambda: linsight.create_model("swin_tiny", attn_drop_rate=0.1), "attn_drop_rate=0"),
        (lambda: linsight.create_model("pvt_v2_b0", attn_drop_rate=0.1), "attn_drop_rate=0"),
        (lambda: linsight.create_model("swin_tiny", always_partition=True), "always_partition=False"),
        (lambda: linsight.create_model("swin_tiny", attention="inline", attention_window=0), "attention_window=0"),
        (
            lambda: timm.create_model("inline_deit_tiny", pretrained=True),
            r"LeapLabTHU/InLine\): load .*load_published",
        ),
        (lambda: linsight.create_model("vit_tiny", pretrained=True), "known for 'vit_tiny': load .*load_published"),
        (
            lambda: timm.create_model("focused_swin_tiny", pretrained=True),
            "are in the repository LeapLabTHU/FLatten-Transformer, .*load_published",
        ),
        (
            lambda: linsight.create_model("wfm_tiny", attention="inline", pretrained=True),
            "those of another mechanism: pass pretrained=False",
        ),
        (
            lambda: linsight.create_model("vit_tiny_patch16_224", attention="inline", pretrained=True),
            "pretrained=False",
        ),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(LinsightError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_published_weights_are_fetched_from_their_address(monkeypatch, tmp_path):
    """The authors' file, kept in PyTorch's hub folder; another classifier stays as it is."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = timm.create_model("wfm_tiny", depth=1)
    asked = []

    def download(address, path):
        asked.append(address)
        save_file(linsight.export_published(source), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = timm.create_model("wfm_tiny", depth=1, pretrained=True)
    assert asked == ["https://huggingface.co/RuizeHe/weightformer-t/resolve/main/model.safetensors"]
    state = source.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    other = linsight.create_model("wfm_tiny", depth=1, num_classes=3, pretrained=True)
    assert torch.equal(other.blocks[0].linear1.bias, source.blocks[0].linear1.bias) and other.head.out_features == 3


def test_without_a_network_the_address_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(address, path):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    address = "https://huggingface.co/RuizeHe/weightformer-b/resolve/main/model.safetensors"
    with pytest.raises(LinsightError, match=f"{address} could not be downloaded: .*no network") as caught:
        timm.create_model("wfm_base", depth=1, pretrained=True)
    assert "\n" not in str(caught.value)


def test_no_name_of_timm_is_taken():
    with pytest.raises(LinsightError, match="timm has a model"):
        add_variants(Variant("resnet18", "vit_tiny", "inline"))
    assert "resnet18" not in VARIANTS


def test_hosts_are_timm_models():
    """With softmax; ours, but for PVTv2's names, which were timm's already."""
    for name in HOSTS:
        ours = timm.model_entrypoint(name).__module__.startswith("linsight")
        assert ours != name.startswith("pvt_v2")
    for name in ("swin_tiny", "pvt_v2_b0", "cswin_tiny"):
        assert isinstance(linsight.create_model(name, device="meta"), HOSTS[name].model_cls)
    assert isinstance(timm.create_model("swin_tiny", device="meta"), HOSTS["swin_tiny"].model_cls)


def test_unknown_names_are_lookups_too():
    with pytest.raises(UnknownNameError):
        linsight.create_model("no_such_model_anywhere")


def test_the_mechanism_that_a_model_has_unasked():
    for name in ("inline_deit_tiny", "vit_tiny", "deit_tiny_patch16_224"):
        model = linsight.create_model(name, device="meta")
        core = type(model.blocks[0].attn.core)
        assert core is linsight.attention.mechanism(default_attention(name)).factory
