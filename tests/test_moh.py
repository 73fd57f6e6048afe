"""MoH's gates by their definition, the loss that balances heads on its way to the one who trains, and mistakes."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linsight import create_attention
from linsight.attention import add_loss, collect_losses
from linsight.attention.parts.head_gates import HeadGates
from linsight.errors import LinsightError
from linsight.ops import Grid
from linsight.train.learner import Learner
from matrix.subject import close

F64 = torch.float64


def gates(x, state, shared, routed):
    """Those of one token."""
    parts = []
    if shared:
        parts.append(shared * (state["wg_1.weight"] @ x).softmax(0) if shared > 1 else torch.ones(1, dtype=F64))
    if routed:
        p = (state["wg.weight"] @ x).softmax(0)
        kept = p >= p.sort().values[-routed]
        parts.append(routed * p * kept / (p * kept).sum())
    if len(parts) == 2:
        a, b = 2 * (state["wg_0.weight"] @ x).softmax(0)
        parts = [a * parts[0], b * parts[1]]
    return torch.cat(parts)


@pytest.mark.parametrize(("shared", "routed"), [(2, 2), (1, 3), (0, 2), (6, 0)])
def test_gates_are_their_definition(shared, routed):
    made = HeadGates(8, 6, shared, routed, owner="moh", dtype=F64)
    x = torch.randn(2, 5, 8, dtype=F64)
    found = made.gates(x)
    assert found.shape == (2, 5, 6)
    close(found[1], torch.stack([gates(row, made.state_dict(), shared, routed) for row in x[1]]))


def test_gates_of_equal_heads_are_one():
    made = HeadGates(8, 6, 2, 3, owner="moh", dtype=F64)
    for parameter in made.parameters():
        torch.nn.init.zeros_(parameter)
    found = made.gates(torch.randn(1, 4, 8, dtype=F64))
    assert found.sum() == 4 * 5
    assert {*found.flatten().tolist()} == {0.0, 1.0}


def test_a_layer_is_softmax_attention_whose_heads_are_gated():
    layer, plain = create_attention("moh", 12, 3, dtype=F64), create_attention("softmax", 12, 3, dtype=F64)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "gates" not in key})
    x, grid = torch.randn(2, 6, 12, dtype=F64), Grid(2, 3)
    heads = []
    plain.core.register_forward_hook(lambda module, given, out: heads.append(out))
    plain(x, grid)
    gated = (heads[0] * layer.core.gates.gates(x)[..., None]).flatten(2)
    close(layer(x, grid), layer.proj(gated))


def test_the_balance_of_kept_tokens_reaches_who_collects():
    layer, grid = create_attention("moh", 8, 4, shared_heads=1, routed_heads=1, dtype=F64), Grid(2, 3)
    x, keep = torch.randn(2, 6, 8, dtype=F64), torch.arange(6).expand(2, -1) < 4
    layer(x, grid)  # to nobody
    with collect_losses() as own:
        layer(x, grid, keep=keep)
        layer(x[:, :4], Grid(2, 2))
        layer.eval()(x, grid)
    (_, masked, weight), (_, short, _) = own.told
    close(masked, short)
    p = layer.core.gates.wg(x[:, :4]).softmax(-1).flatten(0, 1)
    used = torch.nn.functional.one_hot(p.argmax(-1), 3).to(F64).mean(0)
    close(short, 9 * (p.mean(0) * used).mean())
    close(own.added_to(torch.ones((), dtype=F64)), 1 + weight * (masked + short) / 2)


def test_losses_are_a_mean_over_layers_and_a_sum_over_kinds():
    with collect_losses() as outer:
        add_loss("a", torch.tensor(1.0), 1.0)
        with collect_losses() as inner:
            add_loss("a", torch.tensor(2.0), 0.5)
            add_loss("a", torch.tensor(4.0), 0.5)
            add_loss("b", torch.tensor(8.0), 0.25)
    assert inner.added_to(torch.tensor(10.0)) == 10 + 1.5 + 2
    assert outer.added_to(torch.tensor(10.0)) == 11
    assert collect_losses().__enter__().added_to(torch.tensor(3.0)) == 3


def test_training_adds_them():
    class Told:
        def loss(self, student, batch, epoch):
            add_loss("a", torch.tensor(2.0), 0.5)
            return (torch.tensor(1.0), 3) if epoch else None

    learner = SimpleNamespace(task=Told())
    assert Learner.loss(learner, None, 1) == (2, 3)
    assert Learner.loss(learner, None, 0) is None


@pytest.mark.parametrize("way", ["checkpoint", "compile"])
def test_the_balance_of_recomputed_and_of_compiled_layers(way):
    layer, grid = create_attention("moh", 8, 4, shared_heads=1, routed_heads=1, dtype=F64), Grid(2, 3)
    x = torch.randn(2, 6, 8, dtype=F64)
    call = torch.compile(layer, backend="eager", fullgraph=True)
    found = []
    for run in (layer, (lambda x, g: checkpoint(layer, x, g, use_reentrant=False)) if way == "checkpoint" else call):
        layer.zero_grad()
        with collect_losses() as own:
            out = run(x, grid)
        own.added_to(out.square().sum()).backward()
        assert len(own.told) == 1
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    close(found[1], found[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared_heads": 5}, "from 0 to the 4 heads"),
        ({"shared_heads": 2, "routed_heads": 0}, "from 1 to 2"),
        ({"shared_heads": 4, "routed_heads": 1}, "other 0 heads a token keeps: 0"),
        ({"head_dim": -1}, "head_dim=-1"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(LinsightError, match=words):
        create_attention("moh", 8, 4, **options)
