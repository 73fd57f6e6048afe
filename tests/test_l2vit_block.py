"""The block of L2ViT: its steps with torch's own layers, statistics without padding, prefix tokens, its keys."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight.attention import create_block
from linsight.ops import Grid, Layout
from matrix.subject import close


def make_block(**options):
    block = create_block("l2vit_block", 8, 2, **options).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.uniform_(block.local_mp.bn.running_var, 0.5, 2)
    return block


def test_block_is_the_published_steps():
    block, x = make_block().eval(), torch.randn(2, 15, 8, dtype=torch.float64)

    def on_map(x, *modules):
        x = x.transpose(1, 2).unflatten(2, (3, 5))
        for module in modules:
            x = module(x)
        return x.flatten(2).transpose(1, 2)

    def conv(own):
        return lambda x: F.conv2d(x, own.weight, own.bias, padding=own.weight.shape[2] // 2, groups=8)

    def norm(x):
        bn = block.local_mp.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    truth = x + on_map(x, conv(block.cpe))
    truth = truth + block.attn(block.norm1(truth), Grid(3, 5))
    local = block.local_mp
    truth = truth + on_map(block.norm3(truth), conv(local.conv1), F.gelu, norm, conv(local.conv2))
    truth = truth + block.mlp(block.norm2(truth))
    close(block(x, Grid(3, 5)), truth)


def test_statistics_do_not_see_padding():
    """In training: of images alone, and of the same on a larger canvas."""
    x, canvas = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 20, 8, dtype=torch.float64)
    layout = Layout(Grid(4, 5), torch.tensor([[2, 3], [2, 3]]))
    inside = layout.keep(canvas.device)
    canvas[inside] = x.flatten(0, 1)
    block = make_block().train()
    twin = make_block().train()
    twin.load_state_dict(block.state_dict())
    outs = block(x, Grid(2, 3)), twin(canvas, layout)[inside].unflatten(0, (2, 6))
    close(outs[1], outs[0])
    for name in ("running_mean", "running_var"):
        close(getattr(twin.local_mp.bn, name), getattr(block.local_mp.bn, name))


def test_prefix_tokens_pass_by_the_convolutions():
    block, x = make_block().eval(), torch.randn(1, 7, 8, dtype=torch.float64)
    for parameter in (*block.attn.parameters(), *block.mlp.parameters()):
        torch.nn.init.zeros_(parameter)
    out = block(x, Grid(2, 3, 1))
    close(out[:, :1], x[:, :1])
    close(out[:, 1:], block(x[:, 1:], Grid(2, 3)))


def test_paths_are_dropped_in_training():
    block, x = make_block(drop_path=0.99).train(), torch.randn(64, 6, 8, dtype=torch.float64)
    only_conv = x + block.cpe(x, (2, 3))
    alike = (block(x, Grid(2, 3)) - only_conv).abs().amax((1, 2)) < 1e-12
    assert alike.sum() > 48


@pytest.mark.parametrize("ratio", [4.0, 2.0])
def test_published_keys(ratio):
    state = linsight.export_published(create_block("l2vit_block", 8, 2, mlp_ratio=ratio))
    assert {"cpe.0.proj.weight", "attn.temperature", "local_mp.bn.running_var", "norm3.bias"} <= set(state)
    assert state["mlp.fc1.weight"].shape == (8 * ratio, 8)
