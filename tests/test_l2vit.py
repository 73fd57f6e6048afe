"""L2ViT's attention against its weights written out; its clamp, its start, its keys."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens


@pytest.mark.parametrize("length", [1, 10], ids=["clamped", "not clamped"])
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_weights(length, dropping):
    core, grid = create_core("l2vit", 16, 2).double(), Grid(3, 4, 1)
    torch.nn.init.uniform_(core.temperature, 0.5, 2)
    keep = torch.arange(13)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    tokens = tokens._replace(q=tokens.q * length)
    kept, sums = slice(None) if keep is None else keep[0], []
    truth = torch.zeros_like(tokens.v)
    for h in range(2):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        for i in range(13):
            weights = torch.stack([q[i].relu() @ key.relu() for key in k[kept]])
            sums.append(weights.sum())
            truth[0, i, h] = core.temperature[h, 0, 0] * (weights @ v[kept]) / max(weights.sum(), 100)
    assert (max(sums) > 100) == (length == 10)
    close(core(tokens, Layout(grid)), truth)


def test_outputs_grow_with_the_tokens_until_the_sum_is_full():
    """The same image twice as large: twice the output, then no more."""
    core = create_core("l2vit", 16, 2)
    for length, growth in ((0.5, 2), (50, 1)):
        torch.manual_seed(0)
        tokens = random_tokens(core, 1, Grid(3, 4))
        tokens = tokens._replace(q=tokens.q.abs() * length)
        larger = tokens.each(lambda x: torch.cat([x, x], dim=1))
        close(core(larger, Layout(Grid(6, 4)))[:, :12], growth * core(tokens, Layout(Grid(3, 4))))


def test_sums_beyond_float16():
    core, grid = create_core("l2vit", 16, 2), Grid(64, 64)
    tokens = cast(random_tokens(core, 1, grid).each(lambda x: x.abs() * 30), torch.float16)
    exact = core.double()(cast(tokens, torch.float64), Layout(grid))
    ours = core.half()(tokens, Layout(grid))
    assert (ours - exact).abs().max() <= 2 * torch.finfo(torch.float16).eps * exact.abs().max()


def test_it_starts_at_the_scale_of_softmax_and_has_the_published_keys():
    layer = create_attention("l2vit", 64, 4)
    state = linsight.export_published(layer)
    assert set(state) == {"temperature", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert torch.equal(state["temperature"], torch.full((4, 1, 1), 0.25))


def window_block(window=2):
    """The block of the host around softmax, without what its position encodings add."""
    torch.manual_seed(0)
    model = linsight.create_model("l2vit_pyramid_tiny", stages=[(8, 1, 2, 2.0)], window_size=window, num_classes=3)
    block = model.stages[0].blocks[0].double().eval()
    for encoding in (block.cpe1, block.cpe2):
        torch.nn.init.zeros_(encoding.weight), torch.nn.init.zeros_(encoding.bias)
    return block


def test_windows_of_the_host():
    """They do not see each other, and as published they see what pads the grid."""
    block, x = window_block(), torch.randn(1, 16, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 0] = -x[:, 0]
    changed = (block(other, Grid(4, 4)) - block(x, Grid(4, 4))).abs().amax((0, 2)) > 1e-9
    assert changed.view(4, 4).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    one = x[:, :1]
    inner = torch.cat([block.norm1(one), torch.zeros(1, 3, 8, dtype=torch.float64)], dim=1)
    middle = one + block.attn(inner, Grid(2, 2))[:, :1]
    close(block(one, Grid(1, 1)), middle + block.mlp(block.norm2(middle)))


def test_blocks_of_the_host_take_turns():
    model = linsight.create_model("l2vit_tiny", device="meta")
    for stage in model.stages:
        kinds = [type(block).__name__ for block in stage.blocks]
        assert kinds == ["WindowBlock", "L2ViTBlock"] * (len(kinds) // 2)
        assert {block.window for block in stage.blocks[::2]} == {(7, 7)}
    with pytest.raises(LinsightError, match="window_size=0"):
        linsight.create_model("l2vit_pyramid_tiny", window_size=0)
