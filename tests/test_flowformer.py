"""Flow attention against its flows written out token by token, of what is kept; the causal form, by its past."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core, list_attentions
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

E = 1e-6


def flow(x, other, more=0.0):
    """Between one token and the sum of the other side."""
    return (x + E) @ (other + E) + more


def flows(q, k, v, more):
    """The definition, for one head of one image."""
    incoming = [flow(x, k.sum(0), more) for x in q]
    outgoing = [flow(x, q.sum(0), more) for x in k]
    sinks = [flow(x, sum(y / o for y, o in zip(k, outgoing, strict=True)), more) for x in q]
    sources = [flow(x, sum(y / i for y, i in zip(q, incoming, strict=True)), more) for x in k]
    weights = torch.stack(sources).clamp(-1, 1).softmax(0) * len(k)
    state = sum(torch.outer(y, c * w) for y, c, w in zip(k, weights, v, strict=True))
    rows = zip(q, incoming, sinks, strict=True)
    return torch.stack([torch.sigmoid(s * len(q) / len(k)) * (x / i) @ state for x, i, s in rows])


@pytest.mark.parametrize(("form", "more"), [("vision", E), ("reference", 0.0)])
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_flows(form, more, dropping):
    grid, core = Grid(2, 5, 1), create_core("flowformer", 8, 2, form=form).double()
    kept = torch.arange(grid.tokens) % 3 != 1 if dropping else torch.ones(grid.tokens, dtype=torch.bool)
    tokens = random_tokens(core, 1, grid, dim=8, keep=kept[None] if dropping else None)
    out = core(tokens, Layout(grid))
    for h in range(2):
        q, k, v = (x[0, kept, h] for x in tokens[:3])
        close(out[0, kept, h], flows(q.sigmoid(), k.sigmoid(), v, more))


def test_the_forms_differ_where_queries_and_keys_vanish():
    """By e, which is all that a flow of closed gates has."""
    grid = Grid(3, 3)
    cores = [create_core("flowformer", 8, 2, form=form).double() for form in ("vision", "reference")]
    tokens = random_tokens(cores[0], 1, grid, dim=8)
    tokens = tokens._replace(q=tokens.q - 12, k=tokens.k - 12)
    vision, reference = (core(tokens, Layout(grid)) for core in cores)
    assert (vision - reference).abs().max() > 1e-2 * reference.abs().max()


def test_keys_are_counted_apart_from_queries():
    """N / M is that of what is kept: a context twice as long, of the same keys twice, allocates as one of each once."""
    layer = create_attention("flowformer", 16, 2).double()
    x, context = torch.randn(1, 6, 16).double(), torch.randn(1, 5, 16).double()
    once = layer(x, Grid(2, 3), context=context, context_layout=Grid(1, 5))
    keep = torch.tensor([[True] * 5 + [False] * 4])
    longer = torch.cat([context, torch.full((1, 4, 16), torch.nan).double()], dim=1)
    close(layer(x, Grid(2, 3), context=longer, context_layout=Grid(1, 9), keep=keep), once)


def test_causal_is_settled_by_the_past():
    """No token depends on a later one, over more than one chunk; the last is not that of the plain form."""
    core, grid = create_core("flowformer_causal", 8, 2).double(), Grid(1, 70)
    tokens = random_tokens(core, 1, grid, dim=8)
    out = core(tokens, Layout(grid))
    for n in (1, 2, 64, 65):
        close(core(tokens.each(lambda x, n=n: x[:, :n]), Layout(Grid(1, n))), out[:, :n])
    q, k, v = (x[0, :1, 0] for x in tokens[:3])
    close(out[0, :1, 0], flows(q.sigmoid(), k.sigmoid(), v, 0.0))  # one token is all there is
    plain = create_core("flowformer", 8, 2, form="reference").double()
    assert (plain(tokens, Layout(grid))[:, -1] - out[:, -1]).abs().max() > 1e-3
    assert "flowformer_causal" not in [entry.name for entry in list_attentions(stream=True)]


def test_blocks_of_the_published_model():
    """The MLP's branch is scaled, that of attention is not; positions are told once."""
    model = linsight.create_model("flow_pyramid", stages=[(8, 1, 2, 2.0), (8, 1, 2, 2.0)], num_classes=3).double()
    assert [hasattr(stage, "pos_embed") for stage in model.stages] == [True, False]
    block, x = model.stages[0].blocks[0].eval(), torch.randn(1, 6, 8, dtype=torch.float64)
    assert torch.equal(block.gamma, torch.full((8,), 1e-5).double())
    torch.nn.init.uniform_(block.gamma, 0.5, 2)
    middle = x + block.attn(block.norm1(x), Grid(2, 3))
    close(block(x, Grid(2, 3)), middle + block.gamma * block.mlp(block.norm2(middle)))
