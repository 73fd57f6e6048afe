"""SOFT against its kernels and exact inverses, on sides that the ratio does not divide; its starts."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


def make_core(**options):
    core = create_core("soft", 8, 2, **options).double()
    torch.nn.init.normal_(core.landmarks)  # landmarks far from each other, so that steps converge
    torch.nn.init.normal_(core.norm.weight, mean=3.0)
    return core


def definition(core, tokens, grid, normalised):
    """By torch's convolution, cdist and exact inverses, for one image with the queries as keys."""
    out, r, prefix = torch.zeros_like(tokens.v), core.ratio, grid.prefix
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        q, k = q * q.shape[1] ** -0.25, k * q.shape[1] ** -0.25
        canvas = q[prefix:].T.unflatten(-1, (grid.height, grid.width))
        canvas = F.pad(canvas, (0, -grid.width % r, 0, -grid.height % r))
        marks = F.conv2d(canvas, core.landmarks, stride=r).flatten(1).T
        marks = F.gelu(F.layer_norm(marks, marks.shape[1:], core.norm.weight, core.norm.bias))
        ahead, behind, among = (torch.exp(-torch.cdist(x, marks).square() / 2) for x in (q, k, marks))
        if normalised:
            root = among.sum(1).rsqrt()
            inverse = root[:, None] * among.inverse() * root
        else:
            inverse = (among + 0.01 * torch.eye(len(among))).inverse()
        out[0, :, h] = ahead @ inverse @ behind.T @ v
        if core.kernel is not None:
            local = v[prefix:].T.unflatten(-1, (grid.height, grid.width))[:, None]
            out[0, prefix:, h] += F.conv2d(local, core.kernel[h : h + 1], padding=core.halo)[:, 0].flatten(1).T
    return out


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("grid", "ratio", "kernel"), [(Grid(4, 6), 2, 3), (Grid(5, 4, 2), 2, 0), (Grid(1, 4), 3, 5)])
def test_core_is_its_kernels(grid, ratio, kernel, normalised):
    core = make_core(ratio=ratio, kernel_size=kernel, normalised=normalised)
    tokens = random_tokens(core, 1, grid, dim=8)
    close(core(tokens, Layout(grid)), definition(core, tokens, grid, normalised), 1e-6)


def test_the_layer_has_one_projection_of_queries_and_keys():
    layer = create_attention("soft", 16, 2)
    assert {"q.weight", "v.weight"} < layer.state_dict().keys()
    assert layer.q.out_features == 16
    tokens = layer.tokens(x := torch.randn(1, 6, 16), x, Layout(Grid(2, 3)), None)
    assert torch.equal(tokens.q, tokens.k)


def test_starts_agree_where_both_converge():
    """The published one is of the batch: alone an image has another, and one landmark has none at all."""
    grid, exact, original = Grid(4, 6), make_core(normalised=True), make_core(normalised=True, start="original")
    original.load_state_dict(exact.state_dict())
    tokens = random_tokens(exact, 2, grid, dim=8)
    close(original(tokens, Layout(grid)), exact(tokens, Layout(grid)), 1e-6)
    with pytest.raises(CapabilityError, match="padded batches"):
        layer = create_attention("soft", 8, 2, normalised=True, start="original")
        layer(torch.randn(1, 6, 8), Layout(Grid(2, 3), torch.tensor([[2, 2]])))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    close(exact.inverse(one), one)
    close(original.inverse(one), torch.zeros_like(one))


def test_mistakes_are_told():
    for mistake in ({"ratio": 0}, {"kernel_size": 4}):
        with pytest.raises(LinsightError, match=next(iter(mistake))):
            create_attention("soft", 16, 2, **mistake)


def test_blocks_of_the_published_model():
    """Norms stand behind each half, and training drops single numbers of a branch; the last stage is PVT's."""
    sizes = [(8, 1, 2, 2.0), (8, 1, 2, 2.0)]
    model = linsight.create_model("soft_pyramid_tiny", stages=sizes, drop_path_rate=0.5, num_classes=3).double()
    assert type(model.stages[1].blocks[0]).__name__ == "PreNorm" and model.stages[1].cls_token is not None
    first, x, grid = model.stages[0].blocks[0], torch.randn(1, 12, 8, dtype=torch.float64), Grid(3, 4)
    middle = F.layer_norm(x + first.attn(x, grid), (8,))
    mlp = first.mlp
    branch = mlp.fc2(F.gelu(mlp.fc1(middle), approximate="tanh"))
    close(first.eval()(x, grid), F.layer_norm(middle + branch, (8,)))
    first.drop.p = 0.5
    first.train(), torch.nn.init.zeros_(first.attn.proj.weight), torch.nn.init.ones_(first.attn.proj.bias)
    torch.nn.init.zeros_(mlp.fc2.weight), torch.nn.init.zeros_(mlp.fc2.bias)
    first.norm1, first.norm2 = torch.nn.Identity(), torch.nn.Identity()
    added = (first(x.expand(64, -1, -1), grid) - x).flatten(1)
    assert set(added.round(decimals=6).unique().tolist()) == {0, 2}
    assert all(0 < (row == 0).double().mean() < 1 for row in added.round())


def test_published_models_have_the_published_parts():
    model = linsight.create_model("soft_norm_tiny", device="meta")
    cores = [stage.blocks[0].attn.core for stage in model.stages[:3]]
    assert [(core.ratio, core.halo, core.normalised, core.original) for core in cores] == [
        (8, 4, True, True),
        (4, 2, True, True),
        (2, 1, True, True),
    ]
    assert [len(stage.blocks) for stage in linsight.create_model("soft_small_shallow", device="meta").stages] == [
        *(1, 3, 7, 4)
    ]


def test_the_plain_inverse_has_the_published_gradient():
    """Also where twenty steps are not enough: dA = -S^T dS S^T of the S that they reach."""
    core = create_core("soft", 8, 2).double()
    points = torch.randn(1, 2, 40, 4, dtype=torch.float64) * 0.05
    among = torch.exp(-torch.cdist(points, points).square() / 2).requires_grad_()
    inverse, upstream = core.inverse(among), torch.randn(1, 2, 40, 40, dtype=torch.float64)
    one = torch.eye(40, dtype=torch.float64)
    assert (inverse @ (among + 0.01 * one) - one).abs().max() > 1e-3  # not there yet
    inverse.backward(upstream)
    turned = inverse.detach().transpose(-1, -2)
    close(among.grad, -turned @ upstream @ turned)
    with torch.no_grad():
        assert torch.equal(core.inverse(among), inverse)
