"""Batches of images of different sizes, packed and padded, beyond what the matrix checks of every mechanism."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F

import linsight
from linsight import Grid, Layout, create_attention
from linsight.attention import Capabilities, Layer, Paper, each_image, mechanism, register, unregister
from linsight.errors import CapabilityError, LinsightError
from linsight.models.hosts.vit.blocks import dropped
from linsight.ops import Groups, as_layout, check_tokens, each_grid, mask_tokens, pack, resize_matrix, unpack
from matrix.subject import close

GRIDS = (Grid(3, 4, 1), Grid(1, 5, 1), Grid(3, 4, 1))
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MEAN = {"class_token": False, "global_pool": "avg"}
# Neither as the table of 4x4 patches nor multiples of one; two of a size.
SIZES = ((40, 24), (7, 50), (40, 24), (32, 32))


def sequences(grids=GRIDS, dim=8):
    return [torch.randn(grid.tokens, dim) for grid in grids]


@given(st.lists(st.builds(Grid, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=4))
def test_what_is_packed_is_unpacked(grids):
    images = sequences(grids, 3)
    x, layout = pack(images, grids)
    check_tokens(x, layout)
    assert layout.prefix == max(grid.prefix for grid in grids)
    for ours, image in zip(unpack(x, layout), images, strict=True):
        assert torch.equal(ours, image)
    seen = []
    out = each_grid(lambda part, own: seen.append((len(part), own.grid)) or 2 * part, x, layout)
    assert torch.equal(out, 2 * x)
    assert sorted(seen) == sorted((list(grids).count(grid), grid) for grid in set(grids))


def test_offsets_of_a_packed_batch():
    layout = Layout.packed(GRIDS)
    assert layout.cu_seqlens.tolist() == [0, 13, 19, 32]
    assert layout.grid == Grid(3, 5, 1)
    assert layout.is_packed
    assert not Layout(Grid(3, 4)).is_packed


@pytest.mark.parametrize(
    ("message", "mistake"),
    [
        ("image 1 has shape", lambda x: pack(sequences((GRIDS[0], GRIDS[0])), GRIDS[:2])),
        ("2 images, but 3 grids", lambda x: pack(sequences(GRIDS[:2]), GRIDS)),
        ("at least one image", lambda x: pack([], [])),
        (r"must be \(1, 32, channels\)", lambda x: check_tokens(x[:, 1:], Layout.packed(GRIDS))),
        (r"must be \(1, 32, channels\)", lambda x: check_tokens(x.expand(2, -1, -1), Layout.packed(GRIDS))),
        (
            r"cu_seqlens \[0, 13, 20, 32\] are not the offsets of 3 grids with 32 tokens: .*Layout.packed",
            lambda x: check_tokens(x, Layout(GRIDS[0], None, torch.tensor([0, 13, 20, 32]), GRIDS)),
        ),
        ("cu_seqlens", lambda x: check_tokens(x, Layout(GRIDS[0], None, torch.tensor([0, 32])))),
        ("not both", lambda x: check_tokens(x, replace(Layout.packed(GRIDS), sizes=torch.ones(1, 2, dtype=torch.int)))),
        ("their images are 3 and 2", lambda x: Groups(Layout.packed(GRIDS), Layout.packed(GRIDS[:2]))),
        ("their images are 3 and none", lambda x: cross(x, x[:, :13], GRIDS[0])),
        ("score_bias", lambda x: layer()(x, Layout.packed(GRIDS), score_bias=torch.zeros(1, 1, 32, 32))),
        ("reduction=1", lambda x: layer(reduction=2)(x, Layout.packed(GRIDS))),
    ],
)
def test_mistakes_are_one_line(message, mistake):
    with pytest.raises(LinsightError, match=message) as caught:
        mistake(torch.randn(1, 32, 8))
    assert "\n" not in str(caught.value)


def layer(name="softmax", **options):
    return create_attention(name, 8, 2, **options).eval()


def cross(x, context, context_layout):
    return layer()(x, Layout.packed(GRIDS), context=context, context_layout=context_layout)


@pytest.mark.parametrize("options", [{"reduction": 2}, {"pool": 3}])
@pytest.mark.parametrize("name", ["softmax", "focused"])
def test_reduced_keys(name, options):
    grids = [grid._replace(prefix=0) for grid in GRIDS]
    images, reducing = sequences(grids), layer(name, **options)
    x, layout = pack(images, grids)
    for ours, image, grid in zip(unpack(reducing(x, layout), layout), images, grids, strict=True):
        close(ours, reducing(image[None], grid)[0], 1e-5)


def test_a_layer_of_its_own_by_one_line():
    """Context and masks are split as well; without the line it is refused, and packed is not declared."""

    def forward(self, x, layout, *, keep=None, context=None, context_layout=None, score_bias=None, residual=None):
        source = x if context is None else context
        check_tokens(source, as_layout(layout if context is None else context_layout), "context")
        total = mask_tokens(source, keep).sum(1, keepdim=True)
        return x + total * as_layout(layout).grid.height + (0 if residual is None else residual)

    kinds = {}
    try:
        for name, own in (("toy_packed", each_image(forward)), ("toy_plain", forward)):
            kind = type(name, (Layer,), {"forward": own, "capabilities": Capabilities(cross=True, prefix=True)})
            kinds[name] = register(name, kind="layer", formula="", complexity="O(N d)", paper=Paper("None"))(kind)
        assert mechanism("toy_packed").capabilities.packed
        assert not mechanism("toy_plain").capabilities.packed
    finally:
        for name in kinds:
            unregister(name)
    others = (Grid(2, 2), Grid(1, 1), Grid(5, 1))
    images, contexts = sequences(), sequences(others)
    (x, layout), (context, context_layout) = pack(images, GRIDS), pack(contexts, others)
    keep, mixer = torch.rand(1, context.shape[1]) < 0.5, kinds["toy_packed"]()
    out = mixer(x, layout, residual=x, keep=keep, context=context, context_layout=context_layout)
    kept = keep[0].split([grid.tokens for grid in others])
    for i, ours in enumerate(unpack(out, layout)):
        own = {"context": contexts[i][None], "context_layout": others[i], "keep": kept[i][None]}
        close(ours, mixer(images[i][None], GRIDS[i], residual=images[i][None], **own)[0], 1e-6)


def test_a_packed_layer_in_one_graph():
    packed, (x, layout) = layer("softmax"), pack(sequences(), GRIDS)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    close(compiled(x, layout), packed(x, layout), 1e-6)


def vit(attention="inline", **arguments):
    model = linsight.create_model("vit_tiny", attention=attention, **{**SMALL, **arguments})
    for parameter in model.parameters():  # so that nothing starts at zero
        if not parameter.any():
            nn.init.trunc_normal_(parameter, std=0.5)
    return model.double().eval()


def padded(images):
    """On one canvas, with garbage around each."""
    return torch.stack(
        [F.pad(image, (0, 53 - image.shape[2], 0, 43 - image.shape[1]), value=torch.nan) for image in images]
    )


HOSTS = {
    "inline": {},
    "agent": {"attention": "agent"},
    "softmax": {"attention": "softmax"},
    "mlla": {"attention": "mlla"},
    "weightformer": {"attention": "weightformer", "attention_options": {"every": 1}},
    "circulant": {"attention": "circulant", **MEAN},
    "registers": {"reg_tokens": 2, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True, "global_pool": "avgmax"},
    "cpe": {"cpe": True, "pos_embed": "none"},
    "steps": {"steps": [(16, 1), (32, 1)]},
    "siamese": {"norm": "siamese", "cpe": True, "steps": [(16, 1), (32, 1)], **MEAN},
}


@pytest.mark.parametrize("arguments", HOSTS.values(), ids=HOSTS)
def test_a_vit_gives_each_image_what_it_gets_alone(arguments):
    model = vit(**arguments)
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    alone = torch.cat([model(image[None]) for image in images])
    # timm resamples tables in float32
    close(model.forward_packed(images), alone, 1e-6)
    if arguments.get("attention") == "circulant":
        with pytest.raises(CapabilityError, match=r"'circulant' does not support padded batches \(sizes\); these do"):
            model(padded(images), sizes=SIZES)
    else:
        close(model(padded(images), sizes=torch.tensor(SIZES)), alone, 1e-6)


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_gradients_of_a_vit(way):
    model = vit()
    model.set_grad_checkpointing()
    images = [torch.randn(3, *size, dtype=torch.float64, requires_grad=True) for size in SIZES]
    alone = torch.cat([model(image[None]) for image in images])
    out = model.forward_packed(images) if way == "packed" else model(padded(images), sizes=SIZES)
    weights = torch.randn_like(alone)
    leaves = [*images, *model.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (out, alone)), strict=True):
        assert ours.isfinite().all()
        close(ours, theirs, 1e-6)


def test_features_of_a_vit():
    model = vit()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    tokens, layout = model.forward_features_packed(images)
    features = model.forward_features(padded(images), sizes=SIZES)
    for i, (ours, image) in enumerate(zip(unpack(tokens, layout), images, strict=True)):
        alone = model.forward_features(image[None])[0]
        close(ours, alone, 1e-6)
        close(features[i, 0], alone[0], 1e-6)
    close(model.forward_packed(images, pre_logits=True), features[:, 0], 1e-6)


def test_both_heads_of_a_distilled_vit():
    model = linsight.create_model("deit_tiny_distilled_patch16_224", attention="inline", depth=1, num_classes=5)
    model.eval()
    images = [torch.randn(3, *size) for size in ((40, 24), (20, 50))]
    alone = torch.cat([model(image[None]) for image in images])
    close(model.forward_packed(images), alone, 1e-5)
    canvas = torch.zeros(2, 3, 40, 50)
    for place, image in zip(canvas, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    close(model(canvas, sizes=((40, 24), (20, 50))), alone, 1e-5)


@pytest.mark.parametrize(
    ("message", "mistake"),
    [
        ("image 1 of 9x17 pixels does not fit in a batch of 16x16", lambda m, x: m(x, sizes=[(16, 16), (9, 17)])),
        ("image 0 of 0x3 pixels", lambda m, x: m(x, sizes=[(0, 3), (9, 9)])),
        (r"sizes of shape \(1, 2\)", lambda m, x: m(x, sizes=[(16, 16)])),
        ("as whole numbers", lambda m, x: m(x, sizes=torch.ones(2, 2))),
        ("attn_mask", lambda m, x: m(x, attn_mask=x, sizes=[(16, 16), (9, 9)])),
        ("at least one image", lambda m, x: m.forward_packed([])),
        (r"image 0 has shape \(1, 3, 8, 8\)", lambda m, x: m.forward_packed([torch.ones(1, 3, 8, 8)])),
    ],
)
def test_mistakes_with_sizes_are_one_line(message, mistake):
    model = linsight.create_model("vit_tiny", attention="inline", **SMALL)
    with pytest.raises(LinsightError, match=message) as caught:
        mistake(model, torch.randn(2, 3, 16, 16))
    assert "\n" not in str(caught.value)


def test_pooling_that_has_no_padded_form():
    model = vit(class_token=False, global_pool="map")
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    close(model.forward_packed(images), torch.cat([model(image[None]) for image in images]), 1e-6)
    with pytest.raises(LinsightError, match="global_pool='map' has no form for padded batches: call forward_packed"):
        model(padded(images), sizes=SIZES)


def test_each_packed_image_is_dropped_on_its_own():
    layout = Layout.packed([Grid(1, 2)] * 40)
    out = dropped(DropPath(0.5).train(), torch.ones(1, 80, 3), layout)[0].unflatten(0, (40, 2))
    assert {row.unique().item() for row in out} == {0.0, 2.0}


@pytest.mark.parametrize("new", [1, 3, 4, 7, 11])
def test_tables_are_resampled_as_timm_does(new):
    table = torch.randn(1, 16, 6)
    rows = resize_matrix(4, new, "bicubic-antialias")
    columns = resize_matrix(4, torch.tensor([5]), "bicubic-antialias", count=8)[0, :5]
    ours = torch.einsum("yh,xw,hwc->yxc", rows, columns, table[0].unflatten(0, (4, 4))).flatten(0, 1)
    close(ours, resample_abs_pos_embed(table, (new, 5), (4, 4), num_prefix_tokens=0)[0], 1e-5)
