"""Hybrids against softmax written out: windows of grids and sequences, selection by r, branches turned off."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from linsight.convert.conversion import converted_layers, linearize, new_parameters
from linsight.convert.hybrid import (
    Hybrid,
    HybridMixing,
    annealed,
    branches,
    round_selection,
    selection_loss,
    without,
)
from linsight.convert.mixing import Mixing, mixings
from linsight.convert.transfer import distil_layers, layer_errors
from linsight.errors import CapabilityError, LinsightError, UnknownNameError
from linsight.ops import Grid
from matrix.subject import close

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
HEADS, WIDTH = 2, 8


def teacher():
    model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def sample(grid, batch=2):
    q, k, v = torch.randn(3, batch, grid.tokens, HEADS, WIDTH, dtype=torch.float64)
    return q, k, v, torch.randn(batch, grid.tokens, HEADS * WIDTH, dtype=torch.float64)


def make(attention="linear", **options):
    hybrid = Hybrid(**{key: options.pop(key) for key in list(options) if key in ("window", "alpha", "selected", "r")})
    return HybridMixing(attention, HEADS * WIDTH, HEADS, hybrid=hybrid, dtype=torch.float64, **options)


def softmax(q, k, v, seen, scale=WIDTH**-0.5):
    """Softmax over the keys that each query sees, (N, N), by image and head."""
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(HEADS):
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if seen(b, i, j)]
                if keys:
                    weights = (scale * k[b, keys, h] @ q[b, i, h]).softmax(0)
                    out[b, i, h] = weights @ v[b, keys, h]
    return out.flatten(2)


def near(i, j, side, window):
    """Whether place j is in the window of place i along a side, which moves inward at the rim."""
    first = min(max(i - window // 2, 0), max(side - window, 0))
    return first <= j < first + window


@pytest.mark.parametrize(
    "grid, window", [(Grid(3, 5), 3), (Grid(4, 2, 2), 3), (Grid(1, 9), 3), (Grid(1, 7, 1), 5), (Grid(2, 6), 4)]
)
def test_the_window_is_softmax_around_each_token(grid, window):
    q, k, v, x = sample(grid)
    mixing = make(window=window, alpha=0.7)

    def seen(b, i, j):
        i, j = i - grid.prefix, j - grid.prefix
        if i < 0 or j < 0:
            return False
        sides = zip(divmod(i, grid.width), divmod(j, grid.width), grid[:2], strict=True)
        return all(near(mine, other, side, window) for mine, other, side in sides)

    close(mixing(q, k, v, x, grid), Mixing.forward(mixing, q, k, v, x, grid) + 0.7 * softmax(q, k, v, seen))


def test_a_window_of_the_whole_is_softmax():
    grid = Grid(3, 4)
    q, k, v, x = sample(grid)
    mixing = make(window=7, alpha=1.0, scale=0.5)
    with torch.no_grad():
        out = mixing(q, k, v, x, grid) - Mixing.forward(mixing, q, k, v, x, grid)
    close(out, softmax(q, k, v, lambda b, i, j: True, 0.5))


def test_the_scale_and_the_own_keys_of_the_model_are_kept():
    """Of a mechanism that takes queries for keys, the window has the keys."""
    grid = Grid(2, 4)
    q, k, v, x = sample(grid)
    mixing = make("soft", window=3, alpha=1.0)
    assert mixing.query_is_key or mixing.key_is_query
    out = mixing(q, k, v, x, grid) - Mixing.forward(mixing, q, k, v, x, grid)

    def seen(b, i, j):
        return all(near(a, c, s, 3) for a, c, s in zip(divmod(i, 4), divmod(j, 4), grid[:2], strict=True))

    close(out, softmax(q, k, v, seen), 1e-6)


def test_padding_at_the_end_has_a_rim_of_its_own():
    for grid, sizes in ((Grid(1, 8), [(1, 8), (1, 5)]), (Grid(3, 4, 1), [(2, 3), (3, 2)])):
        q, k, v, x = sample(grid)
        keep = torch.zeros(2, grid.tokens, dtype=torch.bool)
        for b, (height, width) in enumerate(sizes):
            keep[b, : grid.prefix] = True
            keep[b, grid.prefix :].view(*grid[:2])[:height, :width] = True

        def seen(b, i, j, grid=grid, sizes=sizes):
            (y, x), (v, u) = divmod(i - grid.prefix, grid.width), divmod(j - grid.prefix, grid.width)
            height, width = sizes[b]
            inside = min(i, j) >= grid.prefix and max(y, v) < height and max(x, u) < width
            return inside and near(y, v, height, 3) and near(x, u, width, 3)

        mixing = make(window=3, alpha=1.0)
        out = mixing(q, k, v, x, grid, keep=keep) - Mixing.forward(mixing, q, k, v, x, grid, keep=keep)
        close(out[keep], softmax(q, k, v, seen)[keep])
        k = k.masked_fill(~keep[..., None, None], math.nan)
        assert mixing(q, k, v, x, grid, keep=keep)[keep].isfinite().all()
    keep[0, grid.prefix] = False
    with pytest.raises(CapabilityError, match="padding at the end"):
        mixing(q, k, v, x, grid, keep=keep)


def test_a_causal_mechanism_has_a_causal_window():
    grid = Grid(1, 6)
    q, k, v, x = sample(grid)
    mixing = make("hedgehog", window=3, alpha=1.0, causal=True)
    out = mixing(q, k, v, x, grid) - Mixing.forward(mixing, q, k, v, x, grid)
    close(out, softmax(q, k, v, lambda b, i, j: i - 3 < j <= i))
    with pytest.raises(CapabilityError, match="causal window"):
        mixing(*sample(Grid(2, 3)), Grid(2, 3))


def test_what_a_window_has_no_place_for():
    mixing, grid = make("softmax", window=3), Grid(2, 3)
    q, k, v, x = sample(grid)
    with pytest.raises(CapabilityError, match="a bias on the scores"):
        mixing(q, k, v, x, grid, score_bias=torch.zeros(1, 1, 6, 6, dtype=torch.float64))
    with pytest.raises(CapabilityError, match="keys of another grid"):
        mixing(q, k[:, :2], v[:, :2], x, grid, key_grid=Grid(1, 2))


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_selected_is_a_share_of_both(r):
    grid = Grid(2, 3, 1)
    q, k, v, x = sample(grid)
    mixing = make(selected=True, r=r)
    keep = torch.arange(7)[None].expand(2, -1) < 5
    for seen, beside in ((lambda b, i, j: True, {}), (lambda b, i, j: j < 5, {"keep": keep})):
        linear = Mixing.forward(mixing, q, k, v, x, grid, **beside)
        close(mixing(q, k, v, x, grid, **beside), r * softmax(q, k, v, seen) + (1 - r) * linear)
    few = Grid(1, 4)
    linear = Mixing.forward(mixing, q, k[:, :4], v[:, :4], x, grid, key_grid=few)
    out = mixing(q, k[:, :4], v[:, :4], x, grid, key_grid=few)
    close(out, r * softmax(q, k[:, :4], v[:, :4], lambda b, i, j: True) + (1 - r) * linear)


def test_r_stays_within_0_and_1_and_comes_back():
    mixing = make(selected=True)
    for value, wanted in ((1.2, 1.0), (-0.1, 0.0), (0.4, 0.4)):
        mixing.r.data.fill_(value)
        mixing.r.grad = None
        mixing.share.backward()
        assert mixing.share.item() == wanted and mixing.r.grad == 1


def test_a_start_at_0_is_the_mechanism_and_can_leave():
    model = teacher()
    images = torch.randn(2, 3, 32, 32)
    plain, hybrid = linearize(model, "hedgehog"), linearize(model, "hedgehog", hybrid=Hybrid(window=3))
    close(hybrid(images), plain(images), 1e-6)
    hybrid(images).square().sum().backward()
    slopes = [mixing.alpha.grad for mixing in mixings(hybrid).values()]
    assert all(slopes[:-1]) and slopes[-1] == 0  # all that the head reads of the last layer is the class token
    assert {name.rpartition(".")[2] for name in new_parameters(hybrid)} >= {"alpha", "weight"}
    assert converted_layers(hybrid)["blocks.0.attn"].hybrid == Hybrid(window=3)
    assert converted_layers(plain)["blocks.0.attn"].hybrid is None


def test_all_softmax_is_the_teacher():
    model = teacher()
    images = torch.randn(2, 3, 32, 32)
    close(linearize(model, "linear", hybrid=Hybrid(selected=True, r=1.0))(images), model(images), 1e-5)


def test_layer_wise_distillation_uses_the_window():
    model = teacher()
    batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    student = linearize(model, "hedgehog", hybrid=Hybrid(window=3))
    before = layer_errors(model, student, batches)
    with without(student, "window"):  # the mechanism alone learns all
        distil_layers(model, student, batches, steps=8)
    assert all(mixing.alpha == 0 for mixing in mixings(student).values())
    middle = layer_errors(model, student, batches)
    distil_layers(model, student, batches, steps=8)
    after = layer_errors(model, student, batches)
    assert all(after[name] < middle[name] < before[name] for name in before)
    assert all(mixing.alpha != 0 for mixing in mixings(student).values())


def test_branches_are_turned_off_and_on_again():
    grid = Grid(3, 3)
    q, k, v, x = sample(grid)
    model = nn.Module()
    model.mixing = make(window=3, alpha=0.5, selected=True, r=0.25)
    mixing = model.mixing
    both = mixing(q, k, v, x, grid)
    parts = {}
    for name in ("mechanism", "window", "softmax"):
        with without(model, name):
            parts[name] = mixing(q, k, v, x, grid)
    close(mixing(q, k, v, x, grid), both)
    close(both - parts["mechanism"], 0.75 * Mixing.forward(mixing, q, k, v, x, grid))
    close(both - parts["softmax"], 0.25 * softmax(q, k, v, lambda b, i, j: True))
    close(both - parts["window"] + parts["window"], both)
    with without(model, "mechanism"), without(model, "window"):
        close(mixing(q, k, v, x, grid), both - parts["softmax"])
        with without(model, "softmax"):
            assert not mixing(q, k, v, x, grid).any()
    assert mixing.off == frozenset() and mixing.branches == ("mechanism", "window", "softmax")


def test_a_model_without_its_mechanism_is_one_without_attention():
    model = teacher()
    images = torch.randn(2, 3, 32, 32)
    student = linearize(model, "linear", layers=[0, 2])
    for name in ("blocks.0.attn", "blocks.2.attn"):
        proj = model.get_submodule(name).proj
        model.set_submodule(name, Constant(proj.bias))
    with without(student, "mechanism"):
        close(student(images), model(images), 1e-6)
    assert (student(images) - model(images)).abs().max() > 1e-3


class Constant(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, x, **beside):
        return self.bias.expand_as(x)


def test_branches_that_there_are_not():
    student = linearize(teacher(), "linear")
    for branch, kind, said in (
        ("window", LinsightError, "no layer has the branch 'window': those converted have mechanism"),
        ("windows", UnknownNameError, "branch of a hybrid 'windows'"),
    ):
        with pytest.raises(kind, match=said), without(student, branch):
            pass


def set_r(student, values):
    for mixing, value in zip(mixings(student).values(), values, strict=True):
        mixing.r.data.fill_(value)


def test_the_selection_loss_is_its_definition():
    student = linearize(teacher(), "linear", hybrid=Hybrid(selected=True))
    values = (0.9, 0.2, 0.6)
    set_r(student, values)
    loss = selection_loss(student, keep=1, power=4.0)
    assert loss.item() == pytest.approx((2 - 1) ** 2 + sum(1 - abs(2 * r - 1) ** 4 for r in values), rel=1e-5)
    loss.backward()
    for mixing, r in zip(mixings(student).values(), values, strict=True):
        slope = 2 * (2 - 1) - 4 * abs(2 * r - 1) ** 3 * 2 * math.copysign(1, 2 * r - 1)
        assert mixing.r.grad.item() == pytest.approx(slope, rel=1e-4)
    for keep, power, said in ((4, 2.0, "0 to 3 can stay"), (-1, 2.0, "0 to 3 can stay"), (1, 0.5, "must be 1 or more")):
        with pytest.raises(LinsightError, match=said):
            selection_loss(student, keep=keep, power=power)


def test_the_power_falls_by_equal_factors():
    powers = [annealed(step, 5, first=16, last=1) for step in range(5)]
    assert powers == pytest.approx([16, 8, 4, 2, 1])
    assert annealed(0, 1) == 16


def test_a_selection_that_is_learned_keeps_as_many_layers_as_asked_for():
    student = linearize(teacher(), "linear", hybrid=Hybrid(selected=True))
    set_r(student, (0.55, 0.6, 0.7))
    chosen = [mixing.r for mixing in mixings(student).values()]
    optimiser = torch.optim.SGD(chosen, 0.01)
    for step in range(200):
        optimiser.zero_grad()
        # the task would rather have softmax in the last layer
        task = (chosen[2] - 1).square() + chosen[0].square()
        (task + selection_loss(student, keep=1, power=annealed(step, 200))).backward()
        optimiser.step()
    assert list(round_selection(student).values()) == ["mechanism", "mechanism", "softmax"]


def test_rounded_layers_are_one_of_both():
    model = teacher()
    images = torch.randn(2, 3, 32, 32)
    hybrid = Hybrid(window=3, alpha=0.3, selected=True)
    student = linearize(model, "linear", hybrid=hybrid)
    set_r(student, (0.9, 0.5, 0.1))
    copied = copy.deepcopy(student)
    assert round_selection(student) == {
        "blocks.0.attn": "softmax",
        "blocks.1.attn": "mechanism",
        "blocks.2.attn": "mechanism",
    }
    set_r(copied, (1.0, 0.0, 0.0))
    close(student(images), copied(images), 1e-6)
    found = converted_layers(student)
    assert [layer.attention for layer in found.values()] == ["softmax", "linear", "linear"]
    assert [layer.hybrid for layer in found.values()] == [None, *[Hybrid(window=3, alpha=0.3)] * 2]
    assert set(new_parameters(student)) == {f"blocks.{i}.attn.mixing.alpha" for i in (1, 2)}
    assert [branches(mixing) for mixing in mixings(student).values()] == [("softmax",), *[("mechanism", "window")] * 2]
    with without(student, "softmax"):
        assert (student(images) - copied(images)).abs().max() > 1e-4
    with pytest.raises(LinsightError, match="no layer selects"):
        round_selection(student)
    with pytest.raises(LinsightError, match="no r that could be rounded"):
        mixings(student)["blocks.0.attn"].settle()


def test_a_hybrid_is_copied_and_saved():
    model = teacher()
    images = torch.randn(1, 3, 32, 32)
    hybrid = Hybrid(window=3, selected=True, r=0.4)
    one, other = (linearize(model, "hedgehog", hybrid=hybrid) for _ in range(2))
    for parameter in one.parameters():
        parameter.data += 0.1
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(images), one(images))
    assert torch.equal(copy.deepcopy(one)(images), one(images))
    half = linearize(model.bfloat16(), "hedgehog", hybrid=hybrid)
    assert half(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "alone"),
        ({"window": -1}, "whole number"),
        ({"window": 2.5}, "whole number"),
        ({"window": True}, "whole number"),
        ({"selected": True, "r": 1.5}, "r=1.5"),
    ],
)
def test_hybrids_that_are_none(options, said):
    with pytest.raises(LinsightError, match=said):
        Hybrid(**options)


def test_softmax_is_not_selected_from_softmax():
    with pytest.raises(LinsightError, match="nothing to select"):
        linearize(teacher(), "softmax", hybrid=Hybrid(selected=True))
