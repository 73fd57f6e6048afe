"""HiLo against its two halves written out, windows that are cut at the rim; LITv2's merging and its bare stages."""

import pytest
import torch
from torchvision.ops import deform_conv2d

import linsight
from linsight import create_attention
from linsight.attention import Cost
from linsight.errors import CapabilityError, LinsightError
from linsight.models.hosts.litv2 import DeformableMerge, MlpBlock
from linsight.ops import Grid
from matrix.subject import close


@pytest.mark.parametrize(("window", "alpha"), [(2, 0.5), (3, 0.9), (5, 0.3)])
def test_it_is_its_formula_on_a_grid_that_windows_do_not_divide(window, alpha):
    """Token by token: high heads see the window's tokens that there are, low ones the means of these."""
    grid, heads, width = Grid(4, 7), 4, 4
    layer = create_attention("hilo", 16, heads, window_size=window, alpha=alpha).double()
    x = torch.randn(28, 16, dtype=torch.float64)
    places = [(i // 7 // window, i % 7 // window) for i in range(28)]
    cells = {cell: [i for i in range(28) if places[i] == cell] for cell in sorted(set(places))}
    low = int(heads * alpha)
    assert (layer.low_heads, layer.high_heads) == (low, heads - low)
    rows = []
    for i in range(28):
        own = x[cells[places[i]]]
        coarse = torch.stack([x[cell].mean(dim=0) for cell in cells.values()])
        q, k, v = (part.unflatten(-1, (-1, width)) for part in layer.h_qkv(torch.cat([x[i : i + 1], own])).chunk(3, -1))
        weights = torch.einsum("hd,khd->hk", q[0], k[1:] / width**0.5).softmax(dim=-1)
        high = layer.h_proj(torch.einsum("hk,khd->hd", weights, v[1:]).flatten())
        q = layer.l_q(x[i]).unflatten(-1, (-1, width))
        k, v = (part.unflatten(-1, (-1, width)) for part in layer.l_kv(coarse).chunk(2, -1))
        weights = torch.einsum("hd,khd->hk", q, k / width**0.5).softmax(dim=-1)
        rows.append(torch.cat([high, layer.l_proj(torch.einsum("hk,khd->hd", weights, v).flatten())]))
    close(layer(x[None], grid)[0], torch.stack(rows))


@pytest.mark.parametrize(
    ("heads", "alpha", "window", "low"),
    [(12, 0.9, 2, 10), (12, 0.2, 2, 2), (12, 0.7, 2, 8), (4, 0.9, 2, 3), (1, 0.9, 2, 0), (4, 0.0, 1, 4), (4, 1, 3, 4)],
)
def test_heads_and_their_weights_are_those_published(heads, alpha, window, low):
    layer = create_attention("hilo", 16 * heads, heads, alpha=alpha, window_size=window, device="meta")
    assert layer.low_heads == low
    names = {name.partition(".")[0] for name, _ in layer.named_parameters()}
    assert names == {*(("l_q", "l_kv", "l_proj") if low else ()), *(("h_qkv", "h_proj") if low < heads else ())}
    assert layer.structure.cost is (Cost.QUADRATIC if low else Cost.WINDOWED)


@pytest.mark.parametrize("options", [{"window_size": 0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_what_is_no_window_and_no_share(options):
    with pytest.raises(LinsightError, match=next(iter(options))):
        create_attention("hilo", 16, 2, **options)


def test_merging_is_torchvisions_deformable_convolution():
    """Also where places lie beyond the map, and on odd sides, whose last row or column is read by offsets alone."""
    merge = DeformableMerge(6, 12).double().eval()
    torch.nn.init.normal_(merge.read.offset.weight, std=0.5)
    torch.nn.init.normal_(merge.read.offset.bias, std=2)
    merge.norm = merge.act = torch.nn.Identity()
    for height, width in ((6, 8), (5, 7), (2, 3)):
        x = torch.randn(2, 6, height, width, dtype=torch.float64)
        tokens, grid = merge(x)
        truth = deform_conv2d(x, merge.read.offset(x), merge.proj.weight, merge.proj.bias, stride=2)
        assert (grid.height, grid.width) == truth.shape[2:] == merge.grid((height, width))
        close(tokens, truth.flatten(2).transpose(1, 2))
    tokens, grid = merge(torch.randn(1, 6, 1, 4, dtype=torch.float64))
    assert (tokens.shape, grid) == ((1, 2, 12), Grid(1, 2))


def test_places_are_not_rounded_in_half_precision():
    """At 200 tokens bfloat16 has no numbers between whole places."""
    merge = DeformableMerge(4, 8).eval()
    torch.nn.init.constant_(merge.read.offset.bias, 0.5)
    x = torch.randn(1, 4, 2, 256)
    exact, found = merge(x)[0], merge.bfloat16()(x.bfloat16())[0]
    assert (found - exact).abs().max() <= 0.03 * exact.abs().max()


def test_stages_without_heads_have_no_attention():
    small = {"stages": [(8, 1, 0), (16, 1, 0), (16, 1, 2), (16, 1, 2)], "num_classes": 3}
    model = linsight.create_model("litv2_pyramid_small", attention="hilo", **small)
    kinds = [type(stage.blocks[0]) is MlpBlock for stage in model.stages]
    assert kinds == [True, True, False, False]
    linsight.create_model("litv2_pyramid_small", attention="l2vit_block,l2vit_block,inline,l2vit_block", **small)
    with pytest.raises(LinsightError, match="'inline' stands only where there is no attention"):
        linsight.create_model("litv2_pyramid_small", attention="inline,softmax,softmax,softmax", **small)
    with pytest.raises(LinsightError, match="num_heads"):
        linsight.create_model("ravlt_t", attention="inline", **small)
    with pytest.raises(CapabilityError, match="no tiles"):
        linsight.stream(model, torch.randn(3, 64, 64))


def test_published_shares_of_heads_load():
    """Of the releases with another alpha, by the option."""
    small = {"stages": [(8, 1, 0), (16, 1, 0), (40, 1, 10), (40, 1, 10)], "num_classes": 3}
    options = {"window_size": [2, 2, 2, 1], "alpha": 0.5}
    model = linsight.create_model("litv2_small", attention_options=options, **small)
    state = linsight.export_published(model)
    assert state["layers.2.blocks.0.attn.l_q.weight"].shape == (20, 40)
    assert state["layers.3.blocks.0.attn.l_q.weight"].shape == (40, 40)
    with pytest.raises(LinsightError):
        linsight.load_published(linsight.create_model("litv2_small", **small), state)
