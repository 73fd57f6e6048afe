"""Checks of the interface: gradients, errors, and what any torch module can do."""

import copy
import pickle
from typing import Any

import pytest
import torch

from linsight import create_attention
from linsight.attention import FLAGS, list_attentions, run_rounds
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, tiles

from .subject import Subject, close, random_tokens


def gradients_are_right(subject: Subject) -> None:
    """gradcheck in float64, of the input and of every parameter."""
    grid = Grid(2, 3, 1 if subject.can.prefix else 0)
    layer = subject.layer(8, 2).double()  # a rotation on the grid needs four channels a head
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, grid.tokens, 8, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, grid))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def incapable_says_who_can(subject: Subject) -> None:
    """What is not declared raises, in one line that names the mechanisms that can."""
    grid, x = Grid(2, 3), torch.randn(1, 6, 8)
    keep = torch.ones(1, 6, dtype=torch.bool)
    asked: dict[str, tuple[Any, dict[str, Any]]] = {
        "keep": (grid, {"keep": keep}),
        "sizes": (Layout(grid, torch.tensor([[2, 2]])), {}),
        "packed": (Layout(grid, None, torch.tensor([0, 6]), (grid,)), {}),
        "cross": (grid, {"context": x, "context_layout": grid}),
        "score_bias": (grid, {"score_bias": torch.zeros(1, 1, 6, 6)}),
        "prefix": (Grid(1, 5, 1), {}),
    }

    def call(capability: str) -> None:
        if capability == "stream":
            core = subject.core(8)
            run_rounds(core, random_tokens(core, 1, grid, 8), tiles(grid, 1, 3))
        elif capability == "reduced":
            subject.layer(8, reduction=2)(x, grid)
        elif capability == "causal":
            subject.layer(8, causal=True)(x, grid)
        else:
            layout, arguments = asked[capability]
            subject.layer(8)(x, layout, **arguments)

    # What the other kinds have no argument for, nobody can ask.
    unasked = {
        "core": set(),
        "layer": {"stream", "reduced"},
        "block": {"stream", "reduced", "cross", "score_bias"},
    }[subject.entry.kind]
    for capability in sorted({*FLAGS} - unasked):
        if subject.entry.can(capability):
            call(capability)
            continue
        with pytest.raises(CapabilityError) as caught:
            call(capability)
        able = [entry.name for entry in list_attentions(**{capability: True})]
        for name in (subject.name, *able):
            assert name in str(caught.value), f"{capability}: {caught.value}"
        assert "\n" not in str(caught.value)


def bad_arguments_are_one_line(subject: Subject) -> None:
    """Wrong token counts, heads, options and values."""
    layer = subject.layer(8)
    mistakes = [
        lambda: layer(torch.randn(1, 7, 8), Grid(2, 3)),
        lambda: layer(torch.randn(6, 8), Grid(2, 3)),
        lambda: layer(torch.randn(1, 6, 8), Grid(2, 3, 1)),
        lambda: create_attention(subject.name, 8, 3),
        lambda: create_attention(subject.name, 8, 0),
        lambda: create_attention(subject.name, 8, 2, no_such_option=1),
        lambda: create_attention(subject.name, 8, 2, projections="kqv"),
    ]
    mistakes += [
        lambda option=option: create_attention(subject.name, 8, 2, **{option.name: "no such value"})
        for option in subject.entry.options
        if option.choices
    ]
    for mistake in mistakes:
        with pytest.raises(LinsightError) as caught:
            mistake()
        assert "\n" not in str(caught.value)


def module_protocol(subject: Subject) -> None:
    """Meta device, deepcopy, pickle, state dicts, device= and dtype=, printing."""
    grid, layer = Grid(3, 4), subject.layer()
    x = torch.randn(2, 12, 16)
    out = layer(x, grid)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(twin(x, grid), out, 0.0)
        assert all(a is not b for a, b in zip(layer.parameters(), twin.parameters(), strict=True))
    other = subject.layer()
    other.load_state_dict(layer.state_dict())
    close(other(x, grid), out, 0.0)
    assert repr(layer)

    meta = subject.layer(device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert meta(torch.empty(2, 12, 16, device="meta"), grid).shape == out.shape
    meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    close(meta(x, grid), out, 0.0)

    typed = subject.layer(device=torch.device("cpu"), dtype=torch.float64)
    assert {t.dtype for t in typed.state_dict().values()} == {torch.float64}
    assert typed(x.double(), grid).dtype == torch.float64
