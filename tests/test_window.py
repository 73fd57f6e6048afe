"""Window attention: Swin's own numbers, sides and images within one window, its table."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, Partition
from matrix.subject import close, random_tokens

SMALL = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 5, "img_size": 64}


def make_core(**options):
    core = create_core("window", 8, 2, **options).double()
    if core.rpb:
        torch.nn.init.normal_(core.relative_position_bias_table)
    return core


@pytest.mark.parametrize("size", [(64, 64), (56, 100), (20, 44)], ids=str)
def test_in_the_host_of_swin_it_is_swin(size):
    """By the weights of softmax in the host's windows; also of padded grids, and where a side is one window."""
    theirs = linsight.create_model("swin_tiny", **SMALL).eval()
    ours = linsight.create_model("swin_tiny", attention="window", attention_options={"window": 4}, **SMALL).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("table"):
            torch.nn.init.normal_(parameter)
    state = {key.replace("attn.relative", "attn.core.relative"): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    assert [block.attn.core.shift for stage in ours.layers for block in stage.blocks] == 2 * [(0, 0), (2, 2)]
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize("window", [4, (2, 3)], ids=str)
@pytest.mark.parametrize("rpb", [True, False])
def test_each_image_of_a_padded_batch_has_windows_of_its_own(window, rpb):
    """A side within one window is not shifted, whatever the canvas is."""
    core = make_core(window=window, shift="always", rpb=rpb)
    sizes, canvas = [(8, 9), (6, 4), (3, 7), (1, 1)], Grid(8, 9)
    tokens = random_tokens(core, len(sizes), canvas, dim=8)
    layout = Layout(canvas, torch.tensor(sizes))
    keep = layout.keep(tokens.q.device)
    poisoned = [x.masked_fill(~keep[..., None, None], float("nan")) for x in tokens[:3]]
    out = core(Tokens(*poisoned, keep=keep), layout)
    for i, size in enumerate(sizes):
        alone = Tokens(*(x[i, keep[i]][None] for x in tokens[:3]))
        close(out[i, keep[i]], core(alone, Layout(Grid(*size)))[0])


def test_regions_do_not_see_each_other_however_large_scores_are():
    """A mask of -100, as published, would be outweighed."""
    core, grid = make_core(window=4, shift="always", rpb=False), Grid(1, 8)
    q, k, v = random_tokens(core, 1, grid, dim=8)[:3]
    out = core(Tokens(q, k, v), Layout(grid))[:, :2]
    k = torch.cat([k[:, :6], 1e4 * q[:, :2]], dim=1)  # the two that are cut into one window with the first two
    close(core(Tokens(q, k, v), Layout(grid))[:, :2], out)


def test_padding_and_shifts_of_each_image_come_back():
    grid, images = Grid(5, 7), torch.tensor([[5, 7], [2, 7], [3, 3]])
    windows, x = Partition(grid, (3, 3), (1, 1), images=images), torch.randn(3, 35, 2)
    assert torch.equal(windows.join(windows.cut(x)), x)
    assert windows.keep(x).view(3, -1).sum(1).tolist() == [35, 35, 35]
    assert (windows.apart(x) != 0).flatten(1).any(1).view(3, -1).any(1).tolist() == [True, True, False]


def test_a_table_of_another_window_is_resized_when_loaded():
    source, target = (create_attention("window", 8, 2, window=window) for window in (3, (5, 2)))
    report = linsight.load_published(target, linsight.export_published(source))
    assert report.resized == ("relative_position_bias_table from 3x3 to 5x2",)
    table = source.core.relative_position_bias_table.T.view(1, 2, 5, 5)
    truth = F.interpolate(table, (9, 3), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(target.core.relative_position_bias_table, truth)
    assert target.core.no_weight_decay() == {"relative_position_bias_table"}


@pytest.mark.parametrize("options", [{"window": 0}, {"window": (3, 0)}, {"window": 2.5}, {"shift": "half"}], ids=str)
def test_windows_that_are_none_are_refused(options):
    with pytest.raises(LinsightError, match="of 'window'") as caught:
        create_attention("window", 8, 2, **options)
    assert "\n" not in str(caught.value)
