"""MLLA by its formula, with complex numbers as published, and the two hosts that share its convolutions."""

import pytest
import timm
import torch
from torch.nn import functional as F

import linsight
from linsight import Grid, create_attention
from linsight.errors import LinsightError

SMALL = {
    "stages": [(16, 1, 2, 2.0), (32, 1, 2, 2.0), (32, 2, 2, 2.0), (64, 1, 4, 2.0)],
    "img_size": 64,
    "num_classes": 7,
}
HOST = {"mlla": "mlla_pyramid_tiny", "h_vittt": "h_vit_tiny"}
ATTENTION = {"mlla": "mlla", "h_vittt": "ttt"}
families = pytest.mark.parametrize("family", HOST)


def build(family, **arguments):
    return linsight.create_model(HOST[family], attention=ATTENTION[family], **{**SMALL, **arguments})


def spun(x, grid):
    """Channels (2i, 2i + 1) as one complex number, turned by the place of the token on the grid."""
    quarter = x.shape[-1] // 4
    speeds = 10000.0 ** (-torch.arange(quarter, dtype=x.dtype) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in grid[:2]), indexing="ij")
    angles = torch.cat([rows.flatten()[:, None] * speeds, columns.flatten()[:, None] * speeds], dim=-1)
    turned = torch.view_as_complex(x[:, grid.prefix :].unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
    return torch.cat([x[:, : grid.prefix], torch.view_as_real(turned).flatten(-2)], dim=1)


def on_grid(conv, x, grid):
    """A convolution of the tokens that have a place; zeros for the others."""
    local = conv(x[:, grid.prefix :].transpose(1, 2).unflatten(2, grid[:2])).flatten(2).transpose(1, 2)
    return F.pad(local, (0, 0, grid.prefix, 0))


@pytest.mark.parametrize("grid", [Grid(5, 3), Grid(2, 7, 2)])
def test_the_published_formula(grid):
    """With its score matrix; three heads, so that the one in the middle turns by rows and by columns."""
    layer, heads = create_attention("mlla", 12, 3).double().eval(), 3
    x = torch.randn(2, grid.tokens, 12, dtype=torch.float64)
    u = layer.in_proj(x)
    u = F.silu(torch.cat([u[:, : grid.prefix], on_grid(layer.dwc, u, grid)[:, grid.prefix :]], dim=1))
    q, k = (F.elu(part) + 1 for part in layer.qk(u).chunk(2, dim=-1))

    def scores(q, k):
        return torch.einsum("bmhd,bnhd->bhmn", q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1)))

    weights = scores(spun(q, grid), spun(k, grid)) / (scores(q, k).sum(-1, keepdim=True) + grid.tokens * 1e-6)
    out = torch.einsum("bhmn,bnhd->bmhd", weights, u.unflatten(-1, (heads, -1))).flatten(2)
    out = (out + on_grid(layer.core.lepe, u, grid)) * F.silu(layer.act_proj(x))
    torch.testing.assert_close(layer(x, grid), layer.proj(out))


def test_widths_that_cannot_be_rotated():
    with pytest.raises(LinsightError, match="divisible by 4, not 6"):
        create_attention("mlla", 6, 2)


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype):
    """Where the published code fails: a half model, and autocast, give what float32 gives."""
    torch.manual_seed(0)
    model, x = build(family).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    for found in (mixed, half):
        assert (found.float() - exact).abs().max() <= 20 * torch.finfo(dtype).eps * exact.abs().max()


@families
def test_odd_sides_are_those_of_a_padded_image(family):
    """As in the published dense backbones: zeros at the right and bottom, and positions of the whole grid."""
    model = build(family).eval()
    with torch.no_grad():
        for size in ((37, 50), (1, 3), (64, 33)):
            x = torch.randn(1, 3, *size)
            padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
            maps, whole = (model.forward_intermediates(y, intermediates_only=True) for y in (x, padded))
            for ours, theirs in zip(maps, whole, strict=True):
                assert torch.equal(ours, theirs)
            for map_, (_, grid) in zip(maps, model.grids(size), strict=True):
                assert map_.shape[2:] == grid


def test_odd_maps_are_padded_before_the_convolutions_between_stages():
    merge = build("mlla").stages[1].downsample.eval()
    x = torch.randn(1, 16, 5, 8)
    tokens, grid = merge(x)
    assert grid == (3, 4, 0) == (*merge.grid((5, 8)), 0)
    assert torch.equal(tokens, merge(F.pad(x, (0, 0, 0, 1)))[0])


@families
def test_timms_arguments(family):
    model = build(family, num_classes=3, in_chans=1, drop_path_rate=0.1)
    assert model(torch.randn(2, 1, 40, 72)).shape == (2, 3)
    assert any(getattr(module, "drop_prob", 0) for module in model.modules())
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, model.num_features)


@families
def test_dense_backbones_take_the_weights_of_a_classifier(family):
    """All but the norms of the maps, which are new, from a checkpoint with a table for each block's rotation."""
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
    classifier = timm.create_model(f"{family}_tiny", **SMALL).eval()
    dense = timm.create_model(f"{family}_tiny_dense", **arguments).eval()
    state = linsight.export_published(classifier)
    own = next(key for key in state if key.startswith("layers.0.blocks.0."))
    state[own.rpartition("blocks.0.")[0] + "blocks.0.rope.rotations"] = torch.zeros(16, 16, 8, 2)
    linsight.load_published(dense, {"model": state}, head=False)
    x = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        maps, plain = dense(x), classifier.forward_intermediates(x, intermediates_only=True)
    assert [map_.shape[1] for map_ in maps] == dense.feature_info.channels()
    for map_, before in zip(maps, plain, strict=True):
        normed = F.layer_norm(before.permute(0, 2, 3, 1), before.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(map_, normed)
