"""MHLA against its sums token by token, with both denominators, on grids that blocks do not divide; its start."""

import pytest
import torch

from linsight import create_attention
from linsight.attention import create_core
from linsight.attention.mechanisms.mhla import mixing
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

E = 1e-6


def make_core(**options):
    core = create_core("mhla", 8, 2, blocks=4, qk_norm=False, **options).double()
    for parameter in (core.lepe.weight, core.lepe.bias):
        torch.nn.init.zeros_(parameter)
    return core


def definition(core, tokens, grid, published):
    """For one image: blocks of 2 x 2, as halves of rows and columns; the first is the smaller one of an odd side."""
    prefix, out = grid.prefix, torch.zeros_like(tokens.v)
    places = [divmod(i, grid.width) for i in range(grid.height * grid.width)]
    cut = (grid.height // 2, grid.width // 2)
    block = [2 * (y >= cut[0]) + (x >= cut[1]) for y, x in places]
    within = [(y - cut[0] * (y >= cut[0]), x - cut[1] * (x >= cut[1])) for y, x in places]
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        q, k = q.relu() + E, k.relu() + E
        sums, norms = [torch.outer(a, b) for a, b in zip(k, v, strict=True)], k
        zero = torch.zeros_like(sums[0])
        s = [sum((sums[prefix + i] for i in range(len(block)) if block[i] == b), zero) for b in range(4)]
        z = [sum((norms[prefix + i] for i in range(len(block)) if block[i] == b), zero[:, 0]) for b in range(4)]
        s0, z0 = sum(sums[:prefix], zero) / 4, sum(norms[:prefix], zero[:, 0]) / 4
        for i in range(prefix):
            out[0, i, h] = q[i] @ (sum(s) / 4 + s0) / (q[i] @ (sum(z) / 4 + z0) + E)
        for i, a in enumerate(block):
            own, weights = q[prefix + i], core.mix[a]
            if published:
                other = [
                    next(
                        (q[prefix + j] for j in range(len(block)) if block[j] == b and within[j] == within[i]), 0 * own
                    )
                    for b in range(4)
                ]
                below = sum(weights[b] * (other[b] @ z[b]) for b in range(4)) + own @ z0
            else:
                below = own @ (sum(weights[b] * z[b] for b in range(4)) + z0)
            out[0, prefix + i, h] = own @ (sum(weights[b] * s[b] for b in range(4)) + s0) / (below + E)
    return out


@pytest.mark.parametrize("denominator", ["paper", "published"])
@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(3, 4, 2), Grid(1, 5), Grid(1, 1)], ids=str)
def test_core_is_its_sums(denominator, grid):
    core = make_core(denominator=denominator)
    torch.nn.init.uniform_(core.mix)
    tokens = random_tokens(core, 1, grid, dim=8)
    close(core(tokens, Layout(grid)), definition(core, tokens, grid, denominator == "published"))


def test_the_denominators_differ_and_only_one_streams():
    grid, cores = Grid(4, 4), [make_core(denominator=name) for name in ("paper", "published")]
    tokens = random_tokens(cores[0], 1, grid, dim=8)
    paper, published = (core(tokens, Layout(grid)) for core in cores)
    assert (paper - published).abs().max() > 1e-2
    assert [core.structure.stream for core in cores] == [True, False]


def test_the_start_of_the_mix():
    """Columns sum to 1, rows do not; "gaussian" is as it is; blocks of 4 x 4 have the published sums of rows."""
    for transform in ("linear", "cos", "exp", "local"):
        close(mixing(4, transform, 1.0).sum(0), torch.ones(16), 1e-6)
    rows = mixing(4, "linear", 1.0).sum(1)
    assert (round(rows.min().item(), 3), round(rows.max().item(), 3)) == (0.828, 1.180)
    assert mixing(3, "gaussian", 1.0).diagonal().eq(1).all()
    assert mixing(3, "local", 1.0)[0, 8] == 0


def test_a_tiny_denominator_is_not_rounded_in_half():
    """With e added in float32; queries and keys that are all negative leave e alone."""
    core = make_core().half()
    tokens = random_tokens(core, 1, Grid(2, 2), dim=8)
    tokens = tokens._replace(q=-tokens.q.abs(), k=-tokens.k.abs())
    exact = make_core()(tokens, Layout(Grid(2, 2)))
    half = core(tokens.each(torch.Tensor.half), Layout(Grid(2, 2)))
    close(half.double(), exact, 2e-3)


def test_the_layer_norms_its_input_and_has_no_other_blocks():
    layer = create_attention("mhla", 16, 2).double()
    x = torch.randn(1, 12, 16).double()
    close(layer(x * 3 + 5, Grid(3, 4)), layer(x, Grid(3, 4)), 1e-4)  # a LayerNorm sees neither, but for its eps
    with pytest.raises(LinsightError, match="blocks=8"):
        create_attention("mhla", 16, 2, blocks=8)
    with pytest.raises(CapabilityError, match="dropping tokens"):
        layer(x, Grid(3, 4), keep=torch.ones(1, 12, dtype=torch.bool))
