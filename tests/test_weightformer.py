"""WeightFormer: its layers against their definition, which blocks are dynamic, what the norm does to the stream."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import Grid
from linsight.attention import Tokens, create_block, drive, run_rounds
from linsight.attention.mechanisms.weightformer import DynCnn, DynLinear, is_dynamic
from linsight.errors import LinsightError
from linsight.ops import Layout, Tile, tiles

GRIDS = [Grid(4, 6), Grid(7, 5), Grid(5, 8, 2), Grid(1, 7), Grid(6, 1, 1), Grid(1, 1), Grid(2, 3)]


def of(layer, x, grid):
    return layer(Tokens(x, x, x), Layout(grid))


def dyn_linear(layer, x, grid):
    """One image after another, with torch's pooling."""
    out = []
    for tokens in x:
        image = tokens[grid.prefix :].T.unflatten(1, grid[:2])
        cells = F.avg_pool2d(image, (min(2, grid.height), min(2, grid.width))).flatten(1).T
        inner = layer.wfm(cells)
        width = x.shape[-1] // 4
        a, b = F.silu(inner[:, :width]) @ layer.w1, F.silu(inner[:, width:]) @ layer.w2
        delta = a.T @ b * x.shape[-1] ** -0.5 / (grid.height * grid.width)
        out.append(tokens @ (delta / (delta.norm(dim=0) + 1) + layer.w) + layer.b)
    return torch.stack(out)


def dyn_cnn(layer, x, grid):
    """The same of the convolution; 0 at prefix tokens."""
    out = torch.zeros_like(x)
    for i, tokens in enumerate(x):
        image = tokens[grid.prefix :].T.unflatten(1, grid[:2])
        cells = F.adaptive_avg_pool2d(image, 3)
        first, last = (layer.wfm[j].weight[:, :, 0, 0] for j in (0, 2))
        hidden = F.gelu(torch.einsum("oc,cij->oij", first, cells) + layer.wfm[0].bias[:, None, None])
        kernels = torch.einsum("oc,cij->oij", last, hidden)
        kernels = kernels / (kernels.flatten(1).norm(dim=1)[:, None, None] + 1) + layer.w[:, 0]
        local = F.conv2d(image, kernels[:, None], layer.b, padding=1, groups=len(kernels))
        out[i, grid.prefix :] = local.flatten(1).T
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("layer", "definition"),
    [(DynLinear(8, 16, dtype=torch.float64), dyn_linear), (DynCnn(8, dtype=torch.float64), dyn_cnn)],
    ids=["linear", "cnn"],
)
def test_dynamic_layers_are_their_definition(layer, definition, grid):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = 5 * torch.randn(3, grid.tokens, 8, dtype=torch.float64)
    out, truth = of(layer, x, grid), definition(layer, x, grid)
    torch.testing.assert_close(out, truth)
    mixed = of(layer, torch.cat([x[:1], x[:1], x[2:]]), grid)  # weights of an image are not those of its neighbour
    torch.testing.assert_close(mixed[1], truth[0])


@pytest.mark.parametrize("grid", [Grid(1, 8), Grid(8, 1), Grid(3, 4)], ids=str)
def test_the_linear_layer_sees_all_whole_cells(grid):
    """Those of a single row or column too, where the published pooling has none."""
    layer = DynLinear(8, 16).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, grid.tokens, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(of(layer, x, grid)[:, -1].sum(), x)
    seen = gradient.abs().sum(-1).unflatten(1, grid[:2]) > 0
    assert (seen[:, :2] if grid.height == 3 else seen).all()
    assert grid.height != 3 or not seen[:, 2, :-1].any()  # an odd last row


def test_which_blocks_are_dynamic():
    model = linsight.create_model("wfm_tiny", device="meta")
    assert [i for i, block in enumerate(model.blocks) if block.dynamic] == [1, 4, 7, 10, 13, 16]
    assert [i for i in range(6) if is_dynamic(i, 2)] == [1, 3, 5]
    assert all(is_dynamic(i, 1) for i in (None, 0, 1, 2))
    assert create_block("weightformer", 8, 1).dynamic and not create_block("weightformer", 8, 1, index=0).dynamic
    options = {"attention_options": {"every": 1}, "depth": 3, "device": "meta"}
    assert all(block.dynamic for block in linsight.create_model("wfm_tiny", **options).blocks)
    with pytest.raises(LinsightError, match="every=0"):
        create_block("weightformer", 8, 1, every=0)


def test_a_dynamic_block_replaces_the_stream_by_its_norm():
    x, grid = torch.randn(2, 12, 16), Grid(3, 4)
    for index, replaced in ((0, False), (1, True)):
        block = create_block("weightformer", 16, 2, index=index)
        difference = (block(7 * x + 3, grid) - block(x, grid)).abs().max()
        assert (difference < 1e-4) == replaced


def test_prefix_tokens_are_read_by_none():
    """They go through the image's linear layer, and through nothing that the grid sees."""
    block = create_block("weightformer", 8, 1).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    grid, x = Grid(3, 4, 2), torch.randn(1, 14, 8, dtype=torch.float64)
    other = torch.cat([torch.randn_like(x[:, :2]), x[:, 2:]], dim=1)
    out = block(x, grid)
    torch.testing.assert_close(block(other, grid)[:, 2:], out[:, 2:])
    torch.testing.assert_close(out[:, 2:], block(x[:, 2:], Grid(3, 4)))
    other = torch.cat([x[:, :2], torch.randn_like(x[:, 2:])], dim=1)
    assert (block(other, grid)[:, :2] - out[:, :2]).abs().max() > 1e-3


@pytest.mark.parametrize("index", [0, 1])
def test_padding_is_never_read(index):
    """Not even NaN, in no output and no gradient."""
    block = create_block("weightformer", 8, 1, index=index).double()
    layout = Layout(Grid(5, 6, 1), torch.tensor([(3, 6), (1, 4), (5, 1)]))
    inside = layout.keep(torch.device("cpu"))
    values = torch.randn(3, 31, 8, dtype=torch.float64)
    results = []
    for poison in (0.0, torch.nan):
        x = values.masked_fill(~inside[..., None], poison).requires_grad_()
        out = block(x, layout)[inside]
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Finite at activations up to 1e3, gradients too, and near float64 at activations of 1."""
    grid = Grid(9, 7)
    for index in (0, 1):
        block = create_block("weightformer", 16, 1, index=index).to(dtype)
        for scale in (1.0, 1e3):
            x = (scale * torch.randn(2, 63, 16)).to(dtype).requires_grad_()
            out = block(x, grid)
            out.float().mean().backward()
            assert out.dtype == dtype and out.isfinite().all()
            assert all(t.grad.isfinite().all() for t in (x, *block.parameters()))
        x = torch.randn(2, 63, 16).to(dtype)
        with torch.no_grad():
            error = (block(x, grid).double() - block.double()(x.double(), grid)).abs().max()
        assert error < 16 * torch.finfo(dtype).eps


def test_states_are_full_precision():
    """Sums over cells and their norm, in half models and under autocast."""
    x, whole = 100 * torch.randn(1, 64 * 64, 8), Tile.whole(Grid(64, 64))

    def state(layer, x):
        return drive(layer, lambda now: [(Tokens(x, x, x), whole)])[0]

    for layer in (DynLinear(8, 16), DynCnn(8)):
        with torch.no_grad():
            exact = state(layer.double(), x.double())
            torch.testing.assert_close(state(layer.float(), x).double(), exact, rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                assert state(layer, x).dtype == torch.float32
            assert state(layer.half(), x.half()).dtype == torch.float32


@pytest.mark.parametrize("layer", [DynLinear(8, 16), DynCnn(8)], ids=["linear", "cnn"])
def test_rounds_over_tiles_are_dense(layer):
    """Cells belong to the tile that they begin in, of odd places and sizes too."""
    layer = layer.double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    for grid in GRIDS:
        x = torch.randn(2, grid.tokens, 8, dtype=torch.float64)
        for height, width in ((1, 1), (2, 3), (3, 2), (1, 5), (5, 1)):
            found = run_rounds(layer, Tokens(x, x, x), tiles(grid, height, width))
            torch.testing.assert_close(found, of(layer, x, grid))


def test_initial_values_of_the_published_host():
    """Truncated normal of 0.02 for what the layers multiply with, biases of dynamic layers among them."""
    block = linsight.create_model("wfm_tiny", depth=2).blocks[1]
    drawn = [block.dwc.w, block.dwc.b, block.linear1.w, block.linear1.b, block.linear1.w1, block.linear1.w2]
    for parameter in (*drawn, block.linear1.wfm.weight, block.linear2.weight):
        assert 0.015 < parameter.std() < 0.025
    assert not block.linear1.wfm.bias.any() and not block.linear2.bias.any()
