"""Trained models of timm whose softmax attention becomes one of ours."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import linsight
from linsight import list_attentions
from linsight.attention import Additive, mechanism
from linsight.convert import Mixing, converted_layers, linearize, new_parameters
from linsight.errors import LinsightError

VITS = {
    "vit_tiny_patch16_224": {"img_size": (48, 80)},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "vit_tiny_r_s16_p8_224": None,
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_base_patch16_clip_224": {"img_size": 48},
    "vit_base_patch16_siglip_224": {"img_size": 48},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_small_patch16_rope_224": {"img_size": 48},
}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
PYRAMIDS = {
    "swin_tiny_patch4_window7_224": {
        "img_size": (56, 112),
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "num_classes": 5,
    },
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "num_classes": 5},
    "pvt_v2_b2_li": {"depths": (1, 1, 1, 1), "num_classes": 5},
}
NAMES = [name for name, options in VITS.items() if options] + list(PYRAMIDS)
CORES = [entry.name for entry in list_attentions() if entry.kind == "core" and entry.structure.bidirectional]
REFUSED = ["linfusion", "ttt", "convshare"]  # one maps tokens before they are projected, convolutions add channels


def source(name):
    """A small model with random weights whose attention is not flat, and images for it."""
    options = {**SMALL, **VITS[name]} if name in VITS else PYRAMIDS[name]
    model = timm.create_model(name, **options).eval()
    for key, parameter in model.named_parameters():
        if "gamma" in key:  # 1e-5 at the start
            nn.init.ones_(parameter)
        elif "norm" not in key:
            nn.init.normal_(parameter, std=0.3 if "attn" in key else 0.1)
    size = options.get("img_size", (64, 96))
    return model, torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))


@pytest.mark.parametrize("name", NAMES)
def test_softmax_is_the_model_itself(name):
    model, images = source(name)
    converted = linearize(model, "softmax")
    assert len(converted_layers(converted)) == len(converted_layers(linearize(model, "linear"))) >= 2
    with torch.no_grad():
        torch.testing.assert_close(converted(images), model(images), rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() <= converted.state_dict().keys()
    assert not any(isinstance(module, Mixing) for module in model.modules())  # a copy was converted


@pytest.mark.parametrize("attention", ["inline", "rala", "agent"])
@pytest.mark.parametrize("name", NAMES)
def test_models_learn_from_what_they_inherited(name, attention):
    model, images = source(name)
    converted = linearize(model, attention, layers=[0, -1])
    kept = converted.state_dict()
    dropped = {key for key in model.state_dict() if key not in kept}
    assert all("relative_position" in key for key in dropped)
    for key, tensor in model.state_dict().items():
        assert key in dropped or torch.equal(tensor, kept[key])
    out = converted(images)
    assert not torch.allclose(out, model(images), atol=1e-4)
    out.square().sum().backward()
    idle = ("sr.", "attn.norm.")  # the reduction of keys, where the mechanism sees all tokens
    for key, parameter in converted.named_parameters():
        assert parameter.grad is not None or any(word in key for word in idle), key


@pytest.mark.parametrize("attention", [name for name in CORES if name not in REFUSED])
def test_every_core_takes_over_a_vit(attention):
    model, images = source("vit_tiny_patch16_224")
    if not mechanism(attention).capabilities.prefix:
        model = timm.create_model(
            "vit_tiny_patch16_224", **SMALL, img_size=(48, 80), class_token=False, global_pool="avg"
        ).eval()
    converted = linearize(model, attention)
    out = converted(images)
    assert out.isfinite().all() and out.shape == (2, 5)
    assert set(new_parameters(converted)) == {key for key in converted.state_dict() if ".mixing." in key} - {
        name for name, _ in converted.named_buffers()
    }


def test_the_way_out_where_channels_are_added():
    model, images = source("vit_tiny_patch16_224")
    with pytest.raises(LinsightError, match=r"^blocks\.0\.attn: 'ttt' gives 48 channels .*linsight info ttt"):
        linearize(model, "ttt")
    assert linearize(model, "ttt", conv=False)(images).isfinite().all()


def test_prefix_tokens_and_sizes_are_those_of_the_images():
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **SMALL, img_size=56, dynamic_img_size=True).eval()
    converted = linearize(model, "inline")
    seen, handles = [], []
    for mixing in converted.modules():
        if isinstance(mixing, Mixing):
            handles.append(mixing.register_forward_pre_hook(lambda module, args: seen.append(args[4])))
    converted(torch.randn(1, 3, 56, 56))
    converted(torch.randn(1, 3, 28, 84))
    assert [tuple(grid) for grid in seen] == [(4, 4, 5)] * 2 + [(2, 6, 5)] * 2
    for handle in handles:
        handle.remove()
    converted(pixels := torch.randn(1, 3, 42, 70))
    twin = copy.deepcopy(converted)
    twin(torch.randn(1, 3, 28, 84))  # its place is its own
    assert converted.blocks[0].attn.place.grid == (3, 5) != twin.blocks[0].attn.place.grid
    torch.testing.assert_close(pickle.loads(pickle.dumps(twin))(pixels), converted(pixels))


def test_masked_tokens_are_not_seen():
    model, _ = source("vit_tiny_patch16_224")
    attn = linearize(model, "linear").blocks[0].attn
    attn.place.grid = (3, 5)
    x = torch.randn(2, 16, 32)
    keep = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    keep[1, ..., 9:] = False
    other = x.clone()
    other[1, 9:] = 7.0
    for mask in (keep, torch.zeros(2, 1, 1, 16).masked_fill(~keep, float("-inf")), keep.expand(2, 1, 16, 16)):
        out, changed = attn(x, attn_mask=mask), attn(other, attn_mask=mask)
        torch.testing.assert_close(out[1, :9], changed[1, :9])
        assert not torch.allclose(out[1, :9], attn(other)[1, :9], atol=1e-3)
    pairs = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    with pytest.raises(LinsightError, match=r"'linear' does not support a mask of pairs of tokens.*softmax"):
        attn(x, attn_mask=pairs)
    soft = linearize(model, "softmax").blocks[0].attn
    soft.place.grid = (3, 5)
    torch.testing.assert_close(soft(x, attn_mask=pairs), model.blocks[0].attn(x, attn_mask=pairs))
    with pytest.raises(LinsightError, match="a causal mask"):
        attn(x, is_causal=True)


def test_what_is_added_locally_starts_at_nothing():
    model, images = source("vit_tiny_patch16_224")
    for attention in ("inline", "rala", "agent", "focused", "mlla"):
        neutral, published = linearize(model, attention), linearize(model, attention, neutral=False)
        mixing = neutral.blocks[0].attn.mixing
        added = [part for part in mixing.modules() if isinstance(part, Additive)]
        assert all(not parameter.any() for part in added for parameter in part.parameters())
        assert attention == "inline" or added
        assert not torch.allclose(neutral(images), published(images), atol=1e-4), attention
    plain = linearize(model, "inline", local=False)
    torch.testing.assert_close(linearize(model, "inline")(images), plain(images))


def test_a_shift_of_all_keys_is_taken_off():
    model, images = source("vit_tiny_patch16_224")
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        for block in shifted.blocks:
            block.attn.qkv.bias[32:64] += 2.0
    torch.testing.assert_close(shifted(images), model(images), rtol=1e-3, atol=1e-4)  # softmax does not see it
    apart = {}
    for centred in (True, False):
        pair = [linearize(some, "hedgehog", centred=centred)(images) for some in (model, shifted)]
        apart[centred] = (pair[0] - pair[1]).abs().max().item()
    assert apart[True] < 1e-4 < 1e-3 < apart[False]


def test_scales_of_the_source_are_kept():
    model, images = source("vit_tiny_patch16_224")
    for block in model.blocks:
        block.attn.scale *= 3
        block.attn.fused_attn = False
    torch.testing.assert_close(linearize(model, "softmax")(images), model(images), rtol=1e-4, atol=1e-5)


def test_what_is_inherited_is_a_choice():
    model, _ = source("vit_tiny_patch16_224")
    torch.manual_seed(1)
    converted = linearize(model, "linear", inherit={"q": "skip", "out": "freeze", "v": "copy"})
    for before, after in zip(model.blocks, converted.blocks, strict=True):
        q, k, v = (after.attn.qkv.weight[i * 32 : (i + 1) * 32] for i in range(3))
        old = before.attn.qkv.weight.chunk(3)
        assert not torch.equal(q, old[0]) and torch.equal(k, old[1]) and torch.equal(v, old[2])
        assert q.std() < 0.03 < old[0].std() and not after.attn.qkv.bias[:32].any()
        assert not after.attn.proj.weight.requires_grad and torch.equal(after.attn.proj.weight, before.attn.proj.weight)
    assert {row.inherit["out"] for row in converted_layers(converted).values()} == {"freeze"}
    with pytest.raises(LinsightError, match=r"rows of one tensor, qkv\.weight"):
        linearize(model, "linear", inherit={"q": "freeze"})


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, [0, 1]),
        (0, [0]),
        ([-1], [1]),
        ("blocks.1.attn", [1]),
        (["blocks.0.*", 1], [0, 1]),
        (lambda name: name.startswith("blocks.1"), [1]),
    ],
)
def test_layers_are_chosen(layers, chosen):
    model, _ = source("vit_tiny_patch16_224")
    assert list(converted_layers(linearize(model, "linear", layers=layers))) == [f"blocks.{i}.attn" for i in chosen]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: linearize(model, layers=2), "layers has 2: there are 2 attentions, 0 to 1"),
        (lambda model: linearize(model, layers="block.1.attn"), "did you mean 'blocks.1.attn'"),
        (lambda model: linearize(model, layers=[]), "chooses none of the 2 attentions"),
        (lambda model: linearize(model, "hedgehop"), "did you mean 'hedgehog'"),
        (lambda model: linearize(model, "fnet"), r"^blocks\.0\.attn: 'fnet' is a whole layer with maps of its own"),
        (lambda model: linearize(model, inherit={"w": "copy"}), "unknown part of an attention in inherit 'w'"),
        (lambda model: linearize(model, inherit={"q": "drop"}), "way to inherit q 'drop'"),
        (lambda model: linearize(model, "linear", causal=True), r"^blocks\.0\.attn: 'linear' in its causal form"),
        (
            lambda model: linearize(nn.Sequential(nn.Linear(2, 2))),
            "Sequential has no softmax attention of linsight, timm",
        ),
        (lambda model: linearize(timm.create_model("resnet18")), "no softmax attention"),
        (lambda model: linearize(linearize(model, "t5"), "inline"), "2 attentions .* converted already, to t5"),
        (lambda model: linearize("vit_tiny_patch16_224"), r"a str, not a module: .*timm\.create_model"),
        (lambda model: linearize(model, inherit="skip"), "must be a mapping of parts to ways"),
        (
            lambda model: linearize(timm.create_model("maxvit_nano_rw_256")),
            "it has AttentionCl, .*: models of your own take a layer of linsight.create_attention",
        ),
        (
            lambda model: linearize(
                timm.create_model("vit_tiny_patch16_224", **SMALL, block_fn=timm.models.vision_transformer.Block)
            ).load_state_dict({}),
            "Missing key",
        ),
    ],
)
def test_bad_input_is_one_line(call, words):
    model, _ = source("vit_tiny_patch16_224")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((LinsightError, RuntimeError), match=words) as caught:
        call(model)
    if isinstance(caught.value, LinsightError):
        assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


OURS = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": (64, 96)},
    "compact_nano": {},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", OURS)
def test_hosts_of_linsight_stay_hosts(name):
    model = linsight.create_model(name, attention="softmax", num_classes=5, **OURS[name]).eval()
    for key, parameter in model.named_parameters():
        if "attn" in key and "norm" not in key:
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(linearize(model, "softmax")(images), model(images), rtol=1e-4, atol=1e-5)
    for attention in ("inline", "rala", "soft"):
        converted = linearize(model, attention)
        converted(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in new_parameters(converted).values()), attention
        torch.testing.assert_close(linsight.fuse(converted)(images), converted(images), rtol=1e-3, atol=1e-4)
    converted, image = linearize(model, "inline"), torch.randn(3, 160, 224)
    streamed = linsight.stream(converted, image, tile=64, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(streamed, converted(image[None]), rtol=1e-3, atol=1e-4)
    with pytest.raises(LinsightError, match="stream"):
        linsight.stream(linearize(model, "inline", centred=True), image)


def test_a_block_of_one_map_has_no_seam():
    block = timm.models.vision_transformer.ParallelScalingBlock
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, block_fn=block)
    with pytest.raises(LinsightError, match=r"^blocks\.0: one projection makes queries, keys, values and the MLP"):
        linearize(model)


def test_dropout_of_scores_is_told_of():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, attn_drop_rate=0.1)
    with pytest.warns(UserWarning, match=r"attention dropout \(0\.1\) is gone"):
        linearize(model, "linear")


def test_nothing_is_converted_twice():
    model, images = source("vit_tiny_patch16_224")
    once = linearize(model, "linear", layers=0)
    twice = linearize(once, "inline")
    rows = converted_layers(twice)
    assert [row.attention for row in rows.values()] == ["linear", "inline"]
    assert twice(images).isfinite().all()


def test_published_files_of_t5_load_into_a_converted_deit():
    sizes = {"img_size": 32, "patch_size": 8, **SMALL}
    published = linsight.create_model("t5_tiny", **sizes).eval()
    for parameter in published.parameters():
        nn.init.normal_(parameter, std=0.3)
    bare = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    converted = linearize(timm.create_model("deit_tiny_patch16_224", **sizes, **bare), "t5").eval()
    linsight.load_published(converted, linsight.export_published(published))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(converted(images), published(images))
