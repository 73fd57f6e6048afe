"""OverLoCK: its windows, its two heads, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import linsight
from linsight import Grid
from linsight.attention import create_block
from linsight.attention.parts.context import RepConv, enlarged
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import AxisWindow, Tile, neighbourhood_attention, neighbourhood_mean

SMALL = {"overview": [(8, 1, 7), (8, 1, 7), (16, 1, 7), (16, 1, 5)], "focus": [(2, 1), (1, 1)], "num_classes": 3}


def test_means_by_given_scores_are_neighbourhood_attention():
    """With the products of queries and keys of each window as scores; in parts, and at once with gradients."""
    q, k, v = torch.randn(3, 1, 42, 2, 4, dtype=torch.float64)
    tile, window = Tile.whole(Grid(6, 7)), (AxisWindow(3), AxisWindow(5))
    table = torch.randn(2, 5, 9, dtype=torch.float64)
    everywhere = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * 0.5  # (B, H, N, N)
    rows, columns = (torch.arange(side).sub(reach).clamp(0, side - 2 * reach - 1) for side, reach in ((6, 1), (7, 2)))
    rows, columns = (start[:, None] + torch.arange(n) for start, n in ((rows, 3), (columns, 5)))
    keys = (rows[:, None, :, None] * 7 + columns[None, :, None, :]).view(42, 15)
    scores = everywhere.gather(3, keys.expand(1, 2, 42, 15)).transpose(1, 2)
    truth = neighbourhood_attention(q, k, v, tile, window, table)
    torch.testing.assert_close(neighbourhood_mean(scores, v, tile, window, table), truth)
    with torch.no_grad():
        torch.testing.assert_close(neighbourhood_mean(scores, v, tile, window, table), truth)


def test_small_maps_are_enlarged_in_proportion():
    assert enlarged((9, 12), 7) is None
    assert enlarged((6, 8), 7) == (7, 9) and enlarged((8, 6), 7) == (9, 7)
    assert enlarged((5, 5), 7) == (7, 7) and enlarged((1, 3), 7) == (7, 21)


def test_sizes_that_do_not_do():
    for options, words in (({"kernel_size": 6}, "kernel_size=6"), ({"smk_size": 4}, "side 4"), ({}, "num_heads=4")):
        with pytest.raises(LinsightError, match=words):
            create_block("contmix", 24, 4 if not options else 2, **options)


def test_two_heads():
    """In training the loss of the overview's is added with a weight of 0.4; in evaluation there is one."""
    model = linsight.create_model("overlock_xt", **SMALL).train()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    found = model(x)
    wanted = F.cross_entropy(found.main, y) + 0.4 * F.cross_entropy(found.overview, y)
    torch.testing.assert_close(model.training_loss(found, y, F.cross_entropy), wanted)
    model.set_grad_checkpointing()
    wanted.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x).shape == (2, 3)
    model.reset_classifier(5)
    assert model.train()(x).overview.shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, 1024) and model.aux_head is None


def test_fused_it_has_one_convolution_for_all_branches():
    model, x = linsight.create_model("overlock_xt", **SMALL).eval(), torch.randn(1, 3, 96, 64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fused = linsight.fuse(model)
    assert any(isinstance(m, RepConv) for m in model.modules())
    assert not any(isinstance(m, RepConv) for m in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_it_does_not_stream():
    with pytest.raises(CapabilityError, match="does not stream"):
        linsight.create_model("overlock_xt", **SMALL).stream_plan()


def test_weights_that_were_merged_for_inference_load():
    torch.manual_seed(0)
    model, new = (linsight.create_model("overlock_xt", **SMALL).double().eval() for _ in range(2))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    state = linsight.export_published(model)
    found = [path for path, module in model.named_modules() if isinstance(module, RepConv)]
    merged = dict(state)
    for path in found:
        kernel, bias = model.get_submodule(path).merged()
        ours = next(key for key in state if torch.equal(state[key], model.get_submodule(path).lk_origin.weight))
        prefix = ours.removesuffix("lk_origin.weight")
        merged = {key: value for key, value in merged.items() if not key.startswith(prefix)}
        merged |= {f"{prefix}lk_origin.weight": kernel.detach(), f"{prefix}lk_origin.bias": bias.detach()}
    assert len(merged) < len(state)
    report = linsight.load_published(new, merged)
    assert report.adapted == (f"merged convolutions (branches made of them: {len(found)})",)
    for path in found:  # layer scale hides them in what the model says
        for ours, theirs in zip(new.get_submodule(path).merged(), model.get_submodule(path).merged(), strict=True):
            torch.testing.assert_close(ours, theirs)
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(new(x), model(x))
    assert not torch.allclose(new(x), linsight.create_model("overlock_xt", **SMALL).double().eval()(x), atol=1e-3)
