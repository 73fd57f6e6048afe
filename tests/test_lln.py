"""LLN against its formula written out, gradients too; its statistics, its blocks, its limits."""

import pytest
import torch

from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

A, B = 0.14855178144710912, -0.35487039130661086


def published(core, tokens, of_all):
    """The formula on whole tensors, without dropped tokens; `of_all`: the statistics of the batch."""
    outs = []
    for b in range(len(tokens.q)):
        kept = slice(None) if tokens.keep is None else tokens.keep[b]
        own = slice(None) if of_all else b
        s_q, s_k = (x[own].detach() if of_all else x[b, kept].detach() for x in tokens[:2])
        s_q, s_k = s_q.std(), s_k.std()
        t = ((s_q**2 * s_k**2 - B) / (2 * A)) ** 0.5
        q, k, v = (x[b].transpose(0, 1) for x in tokens[:3])
        k, v = k[:, kept], v[:, kept]
        q, k = t / s_q * q, t / s_k * k
        q = (q - q.detach().amax(-1, keepdim=True)).exp()
        k = (k - k.detach().amax((1, 2), keepdim=True)).exp()
        out = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2) + core.eps)
        outs.append(out.transpose(0, 1))
    return torch.stack(outs)


@pytest.mark.parametrize("statistics", ["image", "batch"])
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_formula(statistics, dropping):
    core, grid = create_core("lln", 16, 2, statistics=statistics), Grid(3, 4, 1)
    keep = torch.arange(13).expand(2, -1) % 4 != 2 if dropping and statistics == "image" else None
    tokens = random_tokens(core, 2, grid, keep=keep)
    tokens.q[1] *= 3
    tokens = tokens._replace(**{name: getattr(tokens, name).requires_grad_() for name in "qkv"})
    results = []
    for out in (core(tokens, Layout(grid)), published(core, tokens, statistics == "batch")):
        results.append([out, *torch.autograd.grad(out.square().sum(), tokens[:3])])
    for ours, truth in zip(*results, strict=True):
        close(ours, truth)


def test_an_image_does_not_depend_on_its_batch():
    """By default; with the published statistics it does."""
    grid = Grid(3, 4)
    for statistics, alike in (("image", True), ("batch", False)):
        core = create_core("lln", 16, 2, statistics=statistics)
        tokens = random_tokens(core, 2, grid)
        tokens.k[1] *= 2
        alone = core(tokens.each(lambda x: x[:1]), Layout(grid))
        assert torch.allclose(core(tokens, Layout(grid))[:1], alone) == alike


@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(4, 4), Grid(1, 3, 2)], ids=str)
def test_blocks_are_softmax_attention(grid):
    core, plain, softmax = (
        create_core("lln", 16, 2, diag=True),
        create_core("lln", 16, 2),
        create_core("softmax", 16, 2),
    )
    tokens = random_tokens(core, 2, grid)
    parts = [tokens.each(lambda x, i=i: x[:, i : i + 8]) for i in range(0, grid.tokens, 8)]
    blocks = torch.cat([softmax(part, Layout(Grid(1, part.q.shape[1]))) for part in parts], dim=1)
    close(core(tokens, Layout(grid)), (plain(tokens, Layout(grid)) + blocks) / 2)


def test_equal_tokens_are_read_as_their_value():
    """Their deviation is 0, and nothing is divided by it."""
    core, grid = create_core("lln", 16, 2), Grid(2, 3)
    tokens = random_tokens(core, 1, grid).each(torch.ones_like)
    out = core(tokens._replace(v=tokens.v * 5), Layout(grid))
    close(out, torch.full_like(out, 5), 1e-7)


def test_what_there_is_not():
    x, grid = torch.randn(2, 6, 16), Grid(2, 3)
    padded = Layout(grid, torch.tensor([[2, 3], [2, 2]]))
    for options in ({"statistics": "batch"}, {"diag": True}):
        with pytest.raises(CapabilityError, match="padded batches"):
            create_attention("lln", 16, 2, **options)(x, padded)
    with pytest.raises(CapabilityError, match="dropping tokens"):
        create_attention("lln", 16, 2, diag=True)(x, grid, keep=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(LinsightError, match="eps=0 of 'lln'"):
        create_attention("lln", 16, 2, eps=0)
