"""cosFormer against its weights written out; its clamp, its length, what it refuses."""

import math

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


def published(core, tokens, length, causal=False):
    """Every weight of every pair."""
    out = torch.zeros_like(tokens.v)
    count = out.shape[1]
    for b in range(out.shape[0]):
        for h in range(core.num_heads):
            q, k, v = (x[b, :, h] for x in tokens[:3])
            for i in range(count):
                seen = range(i + 1) if causal else range(count)
                weights = torch.stack(
                    [q[i].relu() @ k[j].relu() * math.cos(math.pi / 2 * (i - j) / length) for j in seen]
                )
                out[b, i, h] = weights @ v[: len(weights)] / weights.sum().clamp(min=1e-6)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [0, 20])
def test_core_is_its_weights(causal, length):
    """In the causal form the first tokens have few keys: their sums are small, or 0."""
    core, grid = create_core("cosformer", 8, 4, causal=causal, length=length), Grid(3, 4, 1)
    tokens = random_tokens(core, 2, grid, dim=8)
    tokens.k[:, :3] *= 1e-4  # below the line: under 1e-6 here and there
    close(core(tokens, Layout(grid)), published(core, tokens, length or 13, causal))


def test_a_query_without_a_positive_channel_reads_nothing():
    core, grid = create_core("cosformer", 16, 2), Grid(2, 3)
    tokens = random_tokens(core, 1, grid)
    tokens.q[:, 1] = -tokens.q[:, 1].abs()
    out = core(tokens, Layout(grid))
    assert not out[:, 1].any() and out[:, 2].any()


def test_a_length_is_at_least_the_number_of_tokens():
    with pytest.raises(LinsightError, match="12 tokens are more than length=11"):
        create_attention("cosformer", 16, 2, length=11)(torch.randn(1, 12, 16), Grid(3, 4))
    with pytest.raises(LinsightError, match="length=-1 of 'cosformer'"):
        create_attention("cosformer", 16, 2, length=-1)


def test_dropped_tokens_and_a_context_are_refused():
    layer, x, grid = create_attention("cosformer", 16, 2), torch.randn(1, 12, 16), Grid(3, 4)
    with pytest.raises(CapabilityError, match="dropping tokens"):
        layer(x, grid, keep=torch.ones(1, 12, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="keys of another sequence"):
        layer(x, grid, context=x, context_layout=grid)


def test_published_keys():
    names = {f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")}
    assert set(linsight.export_published(create_attention("cosformer", 16, 2))) == names
