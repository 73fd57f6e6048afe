"""Models by name: ours, a host with any mechanism, timm's own."""

import copy

import pytest
import timm
import torch

import linsight
from linsight.errors import LinsightError, UnknownNameError
from linsight.models import HOSTS, VARIANTS, Variant, add_variants, default_attention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


@pytest.mark.parametrize(
    ("name", "params", "size"),
    [("inline_deit_tiny", 6_477_736, 224), ("inline_deit_small", 16.73e6, 288), ("inline_deit_base", 23.80e6, 448)],
)
def test_published_sizes(name, params, size):
    """The published model's parameters: to the last one, or to the two decimals that are known."""
    model = timm.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == params if isinstance(params, int) else round(count / 1e6, 2) == params / 1e6
    assert model.pretrained_cfg["input_size"] == (3, size, size)
    assert model.patch_embed.img_size == (size, size)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_are_timm_models(name):
    assert timm.is_model(name)
    model = timm.create_model(name, num_classes=3, in_chans=1, drop_path_rate=0.1, device="meta")
    assert model.num_classes == 3
    size = model.pretrained_cfg["input_size"][1:]
    assert model(torch.empty(2, 1, *size, device="meta")).shape == (2, 3)
    assert model.pretrained_cfg["architecture"] == name
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"][1:] == size


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
        (lambda: timm.create_model("inline_deit_tiny", pretrained=True), "load_published"),
        (lambda: linsight.create_model("inline_deit_tiny", pretrained=True), "load_published"),
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


def test_no_name_of_timm_is_taken():
    with pytest.raises(LinsightError, match="timm has a model"):
        add_variants(Variant("resnet18", "vit_tiny", "inline"))
    assert "resnet18" not in VARIANTS


def test_hosts_are_timm_models():
    """With softmax; ours, but for PVTv2's names, which were timm's already."""
    for name, host in HOSTS.items():
        ours = isinstance(timm.create_model(name, device="meta"), host.model_cls)
        assert ours != name.startswith("pvt_v2")
        assert isinstance(linsight.create_model(name, device="meta"), host.model_cls)


def test_unknown_names_are_lookups_too():
    with pytest.raises(UnknownNameError):
        linsight.create_model("no_such_model_anywhere")


def test_the_mechanism_that_a_model_has_unasked():
    for name in ("inline_deit_tiny", "vit_tiny", "deit_tiny_patch16_224"):
        model = linsight.create_model(name, device="meta")
        core = type(model.blocks[0].attn.core)
        assert core is linsight.attention.mechanism(default_attention(name)).factory
