"""Varied-size windows: what they are without moves and growth, rims of padded batches, sides below a window."""

import torch

from linsight.attention import Tokens, create_core
from linsight.ops import Grid, Layout, Partition
from matrix.subject import close, random_tokens


def make_core(**options):
    core = create_core("vsa", 8, 2, **options).double()
    torch.nn.init.normal_(core.relative_position_bias_table)
    return core


def test_windows_that_stay_are_windows():
    core, grid = make_core(window=3), Grid(6, 9)
    for linear in (core.sampling_offsets, core.sampling_scales):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    window = create_core("window", 8, 2, window=3, shift="never").double()
    window.relative_position_bias_table = core.relative_position_bias_table
    tokens = random_tokens(core, 2, grid, dim=8)
    close(core(tokens, Layout(grid)), window(tokens, Layout(grid)))


def test_a_move_is_a_share_of_the_grid_and_a_growth_one_of_the_window():
    """Of one head, by columns: t half of what lies between the first and the last token, s three times the window."""
    core, grid = make_core(window=2), Grid(4, 6)
    for linear, bias in ((core.sampling_offsets, [0.5, 0.0, 0.0, 1.5]), (core.sampling_scales, [2.0, 0.0, 0.0, 0.0])):
        torch.nn.init.zeros_(linear.weight)
        linear.bias.data = torch.tensor(bias, dtype=torch.float64)
    places = core.places(random_tokens(core, 1, grid, dim=8), Layout(grid), Partition(grid, core.window))
    places = places.view(2, 6, 4, 2)  # heads, windows, tokens
    columns, rows = (((places[..., i] + 1) * side - 1) / 2 for i, side in enumerate((6, 4)))
    move = 0.5 * 5 / 2 / 3  # three windows a row
    close(columns[0, 0], torch.tensor([-1, 2, -1, 2], dtype=torch.float64) + move)
    close(rows[0, 0], torch.tensor([0, 0, 1, 1]).double())
    close(rows[1, 0], torch.tensor([0, 0, 1, 1], dtype=torch.float64) + 1.5 * 3 / 2 / 2)
    close(columns[1, 4], torch.tensor([2, 3, 2, 3]).double())


def test_each_image_of_a_padded_batch_has_a_rim_and_shares_of_its_own():
    """Also where a side is below a window, which the published code divides by."""
    core, sizes, canvas = make_core(window=3), [(8, 9), (6, 4), (2, 7), (1, 1)], Grid(8, 9)
    tokens = random_tokens(core, len(sizes), canvas, dim=8)
    layout = Layout(canvas, torch.tensor(sizes))
    keep = layout.keep(tokens.q.device)
    poisoned = [x.masked_fill(~keep.view(*keep.shape, *[1] * (x.ndim - 2)), float("nan")) for x in tokens[:4]]
    out = core(Tokens(*poisoned, keep=keep), layout)
    for i, size in enumerate(sizes):
        alone = Tokens(*(x[i, keep[i]][None] for x in tokens[:4]))
        close(out[i, keep[i]], core(alone, Layout(Grid(*size)))[0])
