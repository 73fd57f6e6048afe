"""Checks of the interface: gradients, errors, and what any torch module can do."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from linsight import create_attention, fuse
from linsight.attention import FLAGS, create_block, list_attentions, run_rounds
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, tiles

from .subject import Subject, close, random_tokens


def gradients_are_right(subject: Subject) -> None:
    """gradcheck in float64, of the input and of every parameter."""
    if held := getattr(subject.entry.factory, "held", ""):
        pytest.skip(f"{subject} holds constant {held}")
    grid = Grid(2, 3, 1 if subject.can.prefix else 0)
    layer = subject.layer(8, 2).double()  # a rotation on the grid needs four channels a head
    names, values = [], []  # a mechanism may have no parameters at all
    for name, value in layer.named_parameters():
        names.append(name)
        values.append(value)
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
        elif capability in ("causal", "rotary"):
            subject.layer(8, **{capability: True})(x, grid)
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
    """Wrong tokens, layouts, what comes beside them, sizes, options and values."""
    layer, grid, x = subject.layer(8), Grid(2, 3), torch.randn(2, 6, 8)
    owns = next(layer.parameters(), None) is not None  # one without parameters is of every dtype and device
    create = create_block if subject.entry.kind == "block" else create_attention
    sizes = torch.tensor([[2, 3], [2, 2]])
    mistakes: list[Callable[[], Any]] = [
        *(lambda x=x: layer(x, grid) for x in (x[:, :5], x[0], x[None], x[..., :4], x.long())),
        *(
            lambda lies=lies: layer(x, lies)
            for lies in (None, 6, (6,), (-2, -3), (2.0, 3), Grid(2, 3, 1), Layout((2, 3)))
        ),
        *(lambda n=n: create(subject.name, *n) for n in ((8, 3), (8, 0), (0, 1), (-8, 2), (8, -2), (8.0, 2), (8, 2.0))),
        lambda: create(subject.name, 8, 2, grid=(0, 3)),
        lambda: create(subject.name, 8, 2, no_such_option=1),
    ]
    if owns:
        mistakes += [lambda x=x: layer(x, grid) for x in (x.half(), x.to("meta"))]
        mistakes += [lambda: layer.double()(x, grid)]
    if subject.entry.kind != "block":
        mistakes += [lambda: create(subject.name, 8, 2, projections="kqv")]
    if subject.entry.kind == "core":
        mistakes += [
            lambda: layer(x),
            lambda: layer(x, grid, context_layout=grid),
            lambda: layer(x, grid, context=x),
            lambda: layer(x, grid, residual=x[:, :5]),
        ]
    if subject.can.keep:
        kept = (torch.ones(2, 6), torch.ones(2, 6).long(), torch.ones(2, 5).bool(), torch.ones(6).bool())
        mistakes += [lambda keep=keep: layer(x, grid, keep=keep) for keep in kept]
    if subject.can.sizes:
        wrong = (sizes.float(), sizes[:1], sizes + 1, sizes - 2, sizes.tolist())
        mistakes += [lambda given=given: layer(x, Layout(grid, given)) for given in wrong]
    if subject.can.cross:
        contexts = (x[:1], x[..., :4], x.half(), x[:, :5])
        mistakes += [lambda given=given: layer(x, grid, context=given, context_layout=grid) for given in contexts]
    if subject.can.score_bias:
        biases = (torch.zeros(2, 2, 6, 5), torch.zeros(2, 3, 6, 6), torch.zeros(3, 1, 6, 6), torch.zeros(6, 6).long())
        mistakes += [lambda given=given: layer(x, grid, score_bias=given) for given in biases]
    mistakes += [
        lambda option=option: create(subject.name, 8, 2, **{option.name: "no such value"})
        for option in subject.entry.options
        if option.choices
    ]
    for i, mistake in enumerate(mistakes):
        layer.float()
        with pytest.raises(LinsightError) as caught:
            pytest.fail(f"mistake {i} is accepted: {mistake()}")
        assert "\n" not in str(caught.value)


def fused_is_plain(subject: Subject) -> None:
    """The form for inference has the same numbers, and refuses to train."""
    layer, prefix = subject.layer(), 1 if subject.can.prefix else 0
    for grid in (Grid(3, 4, prefix), Grid(6, 5, prefix)):
        x = torch.randn(2, grid.tokens, 16)
        with torch.no_grad():
            close(fuse(layer)(x, grid), layer(x, grid), 1e-5)
    with pytest.raises(LinsightError, match="train the one that it was made of"):
        fuse(layer).train()


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
    # A counter stays one.
    assert {t.dtype for t in typed.state_dict().values() if t.is_floating_point()} <= {torch.float64}
    assert typed(x.double(), grid).dtype == torch.float64
