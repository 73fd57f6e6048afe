"""The Swin host: windows of any grid, shifts, padding that nobody sees, and timm's numbers where timm is exact."""

import pytest
import timm
import torch

import linsight
from linsight.attention import list_attentions
from linsight.models.hosts.swin import SwinTransformer
from linsight.ops import Grid, Partition

SMALL = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 5, "img_size": 64}


def small(attention="softmax", **arguments):
    model = SwinTransformer(attention=attention, **{**SMALL, **arguments}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("grid", [Grid(8, 12), Grid(6, 7), Grid(3, 5), Grid(4, 9), Grid(1, 13)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 2)])
def test_windows_come_back(grid, shift):
    windows, x = Partition(grid, (4, 4), shift), torch.randn(2, grid.tokens, 3)
    cut = windows.cut(x)
    assert cut.shape[1:] == (16, 3)
    assert torch.equal(windows.join(cut), x)
    keep = windows.keep(x)
    assert keep is None if not (grid.height % 4 or grid.width % 4) else keep.sum() == 2 * grid.tokens


def places(side, window, shift):
    """Of each place on a side: its window after the shift, and whether it was rolled to the other rim."""
    padded = -(-side // window) * window
    shift = shift if padded > window else 0
    return [((place - shift) % padded // window, place < shift) for place in range(side)]


@pytest.mark.parametrize("grid", [Grid(8, 12), Grid(6, 7), Grid(3, 5), Grid(9, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_softmax_in_windows_is_each_token_alone(grid, shifted):
    """Softmax over the tokens of the same window and region, with the bias of their distance; no padding in it."""
    block = small().layers[0].blocks[int(shifted)].double()
    attn, heads = block.attn, 2
    x = torch.randn(1, grid.tokens, 8, dtype=torch.float64)
    q, k, v = attn.qkv(x)[0].unflatten(-1, (3, heads, -1)).unbind(1)
    rows, columns = places(grid.height, 4, 2 * shifted), places(grid.width, 4, 2 * shifted)
    where = [(row, column) for row in rows for column in columns]
    out = torch.zeros(grid.tokens, 8, dtype=torch.float64)
    for i in range(grid.tokens):
        seen = [j for j in range(grid.tokens) if where[j] == where[i]]
        dy = torch.tensor([i // grid.width - j // grid.width for j in seen])
        dx = torch.tensor([i % grid.width - j % grid.width for j in seen])
        bias = attn.relative_position_bias_table[(dy + 3) * 7 + dx + 3]  # (n, heads)
        scores = torch.einsum("hd,nhd->nh", q[i], k[seen]) * 4**-0.5 + bias
        out[i] = torch.einsum("nh,nhd->hd", scores.softmax(0), v[seen]).flatten()
    torch.testing.assert_close(block._mix(x, grid)[0], attn.proj(out), rtol=1e-9, atol=1e-9)


LAYERS = [m.name for m in list_attentions(keep=True) if not m.quadratic and m.kind != "block"]


@pytest.mark.parametrize("attention", LAYERS)
def test_linear_attention_in_windows_is_each_window_alone(attention):
    """A window that the rim cuts is that smaller rectangle: its padding is not absorbed."""
    block = small(attention, attention_window=4).layers[0].blocks[0].double()
    grid = Grid(6, 7)
    x = torch.randn(2, grid.tokens, 8, dtype=torch.float64)
    out = block._mix(x, grid).unflatten(1, (6, 7))
    for top, left in ((0, 0), (0, 4), (4, 0), (4, 4)):
        part = x.unflatten(1, (6, 7))[:, top : top + 4, left : left + 4]
        alone = block.attn(part.flatten(1, 2), Grid(part.shape[1], part.shape[2]))
        torch.testing.assert_close(out[:, top : top + 4, left : left + 4].flatten(1, 2), alone)


def test_a_window_of_a_name_of_timm():
    model = linsight.create_model("swin_tiny_patch4_window7_224", attention="inline", attention_window=(4, 2), **SMALL)
    assert model.layers[0].blocks[1].window == (4, 2)
    assert model.layers[0].blocks[1].shift == (2, 1)
    assert model(torch.randn(1, 3, 50, 70)).shape == (1, 5)


def test_softmax_is_timms_where_windows_divide():
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **SMALL).eval()
    ours = linsight.create_model("swin_tiny_patch4_window7_224", **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.set_input_size((96, 64), window_size=4)
    ours.set_input_size((96, 64), window_size=4)
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_weights_of_timm_go_on(monkeypatch):
    """What timm built, its weights included, is what the host computes with; here without a download."""
    made = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: made.append(create(*a, **k)) or made[-1])
    for name, arguments in (
        ("swin_tiny_patch4_window7_224", SMALL),
        ("pvt_v2_b0", {}),
        ("pvt_v2_b2_li", {"depths": (1, 1, 1, 1)}),
    ):
        torch.manual_seed(3)
        theirs = create(name, **arguments).eval()
        x = torch.randn(1, 3, 64, 64)
        wanted = theirs(x)
        torch.manual_seed(3)
        ours = linsight.create_model(name, **arguments).eval()
        assert ours.head is made[-1].head and type(ours).__module__.startswith("linsight")
        torch.testing.assert_close(ours(x), wanted)


def test_the_size_of_a_window_follows_the_image():
    """As timm's: the share of the grid is kept, tables are resampled, at a rectangle too."""
    model = small("linear,softmax")
    model.set_input_size((128, 96))
    assert [block.window for block in model.layers[1].blocks] == [(8, 6), (8, 6)]
    assert model.layers[1].blocks[1].shift == (4, 3)
    assert model(torch.randn(1, 3, 128, 96)).isfinite().all()
    assert model.layers[0].blocks[0].window is None


def test_position_tables_follow_the_image():
    model = small("focused")
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 96, 40)
    before = model(x)
    model.set_input_size((96, 40))
    assert model.layers[0].blocks[0].attn.core.positions.shape == (1, 24 * 10, 8)
    torch.testing.assert_close(model(x), before)


def test_tables_follow_to_odd_grids_which_are_merged_upwards():
    model = small("focused,softmax", depths=(1, 2))
    model.set_input_size((44, 60), window_size=(4, 3))  # 11 x 15 tokens
    assert model.layers[0].blocks[0].attn.core.positions.shape == (1, 11 * 15, 8)
    first, last = model.layers
    assert (first.output_resolution, last.input_resolution, last.output_resolution) == ((11, 15), (11, 15), (6, 8))
    assert [block.window for block in last.blocks] == [(4, 3)] * 2
    assert [block.shift for block in last.blocks] == [(0, 0), (2, 1)]
    focused = small("focused", depths=(1, 1))
    focused.set_input_size((44, 60))
    assert focused.layers[1].blocks[0].attn.core.positions.shape == (1, 6 * 8, 16)
    model = small(depths=(1, 2))
    model.set_input_size((20, 60), window_size=6)  # the second stage is 3 x 8: one window of its whole height
    assert [(block.window, block.shift) for block in model.layers[1].blocks] == [((3, 6), (0, 0)), ((3, 6), (0, 3))]


def test_a_grid_of_one_window_is_not_shifted():
    block = small().layers[0].blocks[1]
    plain = small().layers[0].blocks[0]
    plain.load_state_dict(block.state_dict())
    x = torch.randn(1, 12, 8)
    torch.testing.assert_close(block._mix(x, Grid(3, 4)), plain._mix(x, Grid(3, 4)))
    assert not torch.allclose(block._mix(x, Grid(1, 12)), plain._mix(x, Grid(1, 12)))


@pytest.mark.parametrize("shifted", [False, True])
def test_dense_windows_see_their_padding(shifted):
    """As the published dense backbones: what pads a window is as a token of zeros, and one window is shifted, too."""
    block = small(dense_windows=True).layers[0].blocks[int(shifted)]
    hidden = small().layers[0].blocks[int(shifted)]
    hidden.load_state_dict(block.state_dict())
    x = torch.randn(2, 6 * 7, 8)
    padded = torch.nn.functional.pad(x.unflatten(1, (6, 7)), (0, 0, 0, 1, 0, 2)).flatten(1, 2)  # to 8x8
    whole = hidden._mix(padded, Grid(8, 8)).unflatten(1, (8, 8))
    torch.testing.assert_close(block._mix(x, Grid(6, 7)), whole[:, :6, :7].flatten(1, 2))
    assert not torch.allclose(hidden._mix(x, Grid(6, 7)), block._mix(x, Grid(6, 7)))
    # One window: a token sees those of its region alone, rows 0 to 1 and 2 to 3 after a shift by 2.
    x = torch.randn(1, 4 * 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(block._mix(x, Grid(4, 4))[0, 0].sum(), x)
    seen = (gradient[0].abs().sum(-1) > 0).unflatten(0, (4, 4))
    assert seen.sum() == (4 if shifted else 16) and seen[:2, :2].all()


def test_dense_windows_keep_their_size():
    """Whatever the image that the model is built for or moved to."""
    model = small(dense_windows=True, img_size=8)
    assert [block.window for stage in model.layers for block in stage.blocks] == [(4, 4)] * 4
    model.set_input_size((16, 16), window_size=3)
    assert [(block.window, block.shift) for block in model.layers[1].blocks] == [((3, 3), (0, 0)), ((3, 3), (1, 1))]
    assert model(torch.randn(1, 3, 16, 16)).isfinite().all()
