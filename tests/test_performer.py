"""Performer against its kernel written out; its maximum over all keys, its features and their drawing."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core, run_rounds
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, tiles
from matrix.subject import cast, close, random_tokens

F64 = torch.float64


def published(core, tokens):
    """Every feature of every token, one by one, with the published factor m^(-1/2)."""
    omega, keep = core.projection_matrix, tokens.keep
    count, width = omega.shape
    out = torch.zeros_like(tokens.v)
    for b in range(out.shape[0]):
        kept = [j for j in range(tokens.k.shape[1]) if keep is None or keep[b, j]]
        for h in range(core.num_heads):
            q, k, v = (x[b, :, h] for x in tokens[:3])
            top = max(float(row @ k[j]) * width**-0.25 for row in omega for j in kept)

            def phi(x, top, width=width, count=count):
                x = x * width**-0.25
                if core.kernel == "relu":
                    return torch.stack([max(row @ x, torch.zeros((), dtype=F64)) + 1e-3 for row in omega])
                u = torch.stack([row @ x for row in omega])
                top = u.max() if top is None else top
                return count**-0.5 * ((u - x @ x / 2 - top).exp() + 1e-4)

            for i in range(q.shape[0]):
                weights = torch.stack([phi(q[i], None) @ phi(k[j], top) for j in kept])
                out[b, i, h] = weights @ v[kept] / weights.sum()
    return out


@pytest.mark.parametrize("options", [{}, {"kernel": "relu"}, {"features": 3, "scaling": 1}], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_kernel(options, dropping):
    """A dropped key has the largest scores of all: the maximum does not see it."""
    core, grid = create_core("performer", 16, 2, **options).double(), Grid(3, 4, 1)
    keep = torch.arange(13).expand(2, -1) % 4 != 2 if dropping else None
    tokens = random_tokens(core, 2, grid, keep=keep)
    if dropping:
        tokens.k[:, 2] = 30 * core.projection_matrix[0]
    close(core(tokens, Layout(grid)), published(core, tokens))


def test_the_maximum_is_of_all_tiles():
    """Each tile's own would weight its keys anew: they differ by more than the features' floor can hide."""
    core, grid = create_core("performer", 16, 2).double(), Grid(6, 8)
    tokens = random_tokens(core, 1, grid)
    tokens.k[:, :16] *= 4
    cut = tiles(grid, 2, 3)
    close(run_rounds(core, tokens, cut), core(tokens, Layout(grid)))
    alone = core(tokens.each(cut[-1].take), Layout(Grid(2, 2)))
    assert (alone - cut[-1].take(core(tokens, Layout(grid)))).abs().max() > 1e-2


def test_features_estimate_softmax():
    """With short tokens, where the constant under the features counts for little."""
    grid = Grid(5, 6)
    core, softmax = create_core("performer", 8, 1, features=4096).double(), create_core("softmax", 8, 1)
    tokens = random_tokens(core, 1, grid, dim=8)
    tokens = tokens._replace(q=tokens.q / 2, k=tokens.k / 2)
    truth = softmax(tokens, Layout(grid))
    apart = (truth - tokens.v.mean(dim=1, keepdim=True)).square().mean()
    assert (core(tokens, Layout(grid)) - truth).square().mean() < 0.15 * apart


@pytest.mark.parametrize(("dim", "count"), [(16, 44), (64, 266), (1, 1), (2, 1)])
def test_features_by_default(dim, count):
    assert create_core("performer", dim, 1).projection_matrix.shape == (count, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64])
def test_rows_are_orthogonal_in_blocks(dtype):
    core = create_core("performer", 32, 2, features=40, scaling=1, dtype=dtype)
    omega = core.projection_matrix.double()
    for block in omega.split(16):
        torch.testing.assert_close(block @ block.T, 16 * torch.eye(len(block), dtype=F64), rtol=0, atol=0.05)
    gaussian = create_core("performer", 64, 2, features=512).projection_matrix
    lengths = gaussian.norm(dim=1)
    assert lengths.std() > 0.5 and abs(lengths.square().mean() - 32) < 2
    angles = gaussian[:32] @ gaussian[:32].T / (lengths[:32, None] * lengths[:32])
    torch.testing.assert_close(angles, torch.eye(32), rtol=0, atol=1e-4)


def test_redraw_is_asked_for():
    """In training, too, the features stay those that were drawn; drawn anew, they are others."""
    layer, x = create_attention("performer", 16, 2).train(), torch.randn(1, 12, 16)
    before = layer.core.projection_matrix.clone()
    layer(x, Grid(3, 4)).sum().backward()
    assert torch.equal(layer.core.projection_matrix, before)
    layer.core.redraw()
    assert not torch.allclose(layer.core.projection_matrix, before)
    meta = create_attention("performer", 16, 2, device="meta")
    meta.core.redraw()
    assert meta.core.projection_matrix.is_meta


def test_keys_far_from_zero_are_exact_in_half_precision():
    """|x'|^2 / 2 is 5000 here, where float16 counts in fours: all of phi is made in float32."""
    core, grid = create_core("performer", 16, 2), Grid(4, 4)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(q=tokens.q * 3, k=tokens.k * 3), torch.float16)
    exact = core.double()(cast(tokens, F64), Layout(grid))
    ours = core.half()(tokens, Layout(grid)).double()  # Omega, too, is rounded
    assert (ours - exact).abs().max() <= 0.02 * exact.abs().max()


def test_published_keys():
    layer = create_attention("performer", 16, 2, qkv_bias=False)
    names = {f"to_{name}.weight" for name in "qkv"} | {"to_out.weight", "to_out.bias"}
    assert set(linsight.export_published(layer)) == names | {"fast_attention.projection_matrix"}


def test_features_are_not_negative():
    with pytest.raises(LinsightError, match="features=-1 of 'performer'"):
        create_attention("performer", 16, 2, features=-1)
