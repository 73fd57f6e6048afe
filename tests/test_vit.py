"""The ViT host: timm's numbers where timm has them, and any image size."""

import itertools

import pytest
import timm
import torch
from torch.nn import functional as F

import linsight
from linsight import Grid
from linsight.errors import CapabilityError, LinsightError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
# How tokens other than patches, and pooling, may be set; the first is DeiT.
TOKENS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "mean": {"class_token": False, "global_pool": "avg"},
    "registers without class token": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "table without prefix": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-3},
}
tokens = pytest.mark.parametrize("arguments", TOKENS.values(), ids=TOKENS)


def vit(attention="inline", **arguments):
    return linsight.create_model("vit_tiny", attention=attention, **{**SMALL, **arguments}).eval()


def pair(**arguments):
    """Our host with softmax and timm's model, with the same weights."""
    ours = vit("softmax", **arguments)
    sizes = {"dynamic_img_size": True, "dynamic_img_pad": True}
    theirs = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **sizes, **arguments}).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@tokens
def test_softmax_is_timm(arguments):
    ours, theirs = pair(**arguments)
    with torch.no_grad():
        for size in ((32, 32), (33, 20), (16, 56)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0 if size == (32, 32) else 1e-6)


INTERMEDIATES = [
    dict(zip(("norm", "return_prefix_tokens", "intermediates_only", "output_dict", "stop_early"), flags, strict=True))
    for flags in itertools.product([False, True], repeat=5)
]


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("arguments", [TOKENS["mean"], TOKENS["registers"]], ids=["mean", "registers"])
def test_forward_intermediates_is_timm(arguments, output_fmt):
    ours, theirs = pair(**arguments)
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        for indices in (2, [0, 1]):
            for flags in INTERMEDIATES:
                results = [
                    m.forward_intermediates(x, indices=indices, output_fmt=output_fmt, **flags) for m in (ours, theirs)
                ]
                torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@tokens
def test_any_size(arguments):
    """Rectangles, sizes that patches do not divide, and images smaller than one patch."""
    model = vit(**arguments)
    for height, width in ((33, 27), (16, 72), (8, 64), (5, 3), (1, 1)):
        x = torch.randn(2, 3, height, width, requires_grad=True)
        out = model(x)
        out.sum().backward()
        assert out.shape == (2, 7)
        assert out.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [(231, 197), (160, 352)])
def test_built_for_224(size):
    model = linsight.create_model("inline_deit_tiny", num_classes=5, depth=2).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    assert maps[-1].shape == (1, 192, -(-size[0] // 16), -(-size[1] // 16))


def test_features_only():
    model = vit(features_only=True, out_indices=[0, 2])
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [8, 8]
    assert [tuple(map_.shape) for map_ in model(torch.randn(2, 3, 33, 24))] == [(2, 32, 5, 3)] * 2


def test_set_input_size():
    model = vit()
    model.set_input_size((48, 64))
    assert model.pos_embed.shape == (1, 1 + 6 * 8, 32)
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 7)


def test_a_border_is_patches_of_zeros():
    """Of an image alone, packed and padded."""
    model, wide = vit(border=1, **TOKENS["mean"]), vit(img_size=48, **TOKENS["mean"])
    wide.load_state_dict(model.state_dict())
    images = [torch.randn(3, *size) for size in ((32, 32), (17, 38))]
    canvas = torch.randn(2, 3, 32, 40)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        expected = [wide(F.pad(x, (8, 8 + -x.shape[2] % 8, 8, 8 + -x.shape[1] % 8))[None]) for x in images]
        for found in (
            torch.cat([model(image[None]) for image in images]),
            model.forward_packed(images),
            model(canvas, sizes=[image.shape[1:] for image in images]),
        ):
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    model.set_input_size((16, 24))
    assert model.pos_embed.shape == (1, 4 * 5, 32)
    assert model(torch.randn(1, 3, 16, 24)).shape == (1, 7)


@tokens
def test_heads(arguments):
    model, x = vit(**arguments), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model.get_classifier().out_features == 4
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)


def test_class_token_starts_as_published():
    token = torch.cat([vit(embed_dim=64).cls_token.detach().flatten() for _ in range(8)])
    assert 0.01 < token.std() < 0.03


def test_a_position_encoding_in_front_of_each_block():
    """x + conv(x) on the grid, the class token left alone, then the block as without it."""
    model = vit(cpe=True)
    block, x, grid = model.blocks[1], torch.randn(2, 1 + 4 * 3, 32), Grid(4, 3, 1)
    encoded = x.clone()
    canvas = x[:, 1:].transpose(1, 2).unflatten(2, (4, 3))
    encoded[:, 1:] += block.cpe._conv_forward(canvas, block.cpe.weight, block.cpe.bias).flatten(2).transpose(1, 2)
    encoding, block.cpe = block.cpe, None
    plain = block(encoded, grid)
    block.cpe = encoding
    torch.testing.assert_close(block(x, grid), plain)


def test_blocks_follow_the_plan():
    model = vit("inline:1/softmax", depth=3)
    assert [type(block.attn.core).__name__ for block in model.blocks] == ["InLine", "Softmax", "Softmax"]
    options = vit(attention_options={"local": False})
    assert options.blocks[0].attn.core.generator is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qk_norm": True}, "qk_norm=False"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate=0"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate=0"),
        ({"num_heads": 3}, "choose a divisor of 32"),
        ({"border": -1}, "give 0 or more"),
        ({"attention": "inline,softmax"}, "this host has 1"),
    ],
)
def test_what_the_host_refuses(arguments, message):
    with pytest.raises(LinsightError, match=message):
        vit(**arguments)


def test_masks_of_timm_are_refused():
    model = vit()
    with pytest.raises(CapabilityError, match="keep="):
        model(torch.randn(1, 3, 32, 32), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(LinsightError, match="NCHW, NHWC, NLC"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="CHW")


def test_a_table_with_a_border_moves_to_another_size():
    arguments = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "border": 1}
    small = linsight.create_model("vit_tiny", img_size=32, class_token=False, global_pool="avg", **arguments)
    large = linsight.create_model("vit_tiny", img_size=48, class_token=False, global_pool="avg", **arguments)
    linsight.load_published(large, linsight.export_published(small))
    small.set_input_size((48, 48))
    assert large.pos_embed.shape == (1, 64, 16)
    torch.testing.assert_close(large.pos_embed, small.pos_embed)
