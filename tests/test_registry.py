"""The registry: names, options, capabilities, papers, errors."""

import re
import sys

import pytest
import torch
from torch import nn

import linsight
from linsight.attention import Capabilities, Core, Layer, Paper, list_attentions, register, run_rounds
from linsight.errors import LinsightError, UnknownNameError
from linsight.ops import tiles
from matrix.subject import random_tokens


@pytest.mark.parametrize("entry", list_attentions(), ids=lambda entry: entry.name)
def test_entries_describe_themselves(entry):
    assert entry.formula and entry.complexity.startswith("O(") and entry.paper.title
    assert entry.factory.__doc__ and sys.modules[entry.factory.__module__].__doc__
    assert entry.family != "other" and entry.paper.year, "register(..., family=), of FAMILIES; a venue with its year"
    assert all(option.help for option in entry.options), "an option without a line in the docstring"
    assert entry.name == entry.factory.__module__.rpartition(".")[2], "one mechanism, one file of its name"


@pytest.mark.parametrize("entry", list_attentions(), ids=lambda entry: entry.name)
def test_formulas_are_written_for_github(entry):
    """Markdown takes a backslash away before punctuation, and a formula ends at the first dollar or empty line."""
    latex = entry.latex
    assert latex, f"register(..., latex=) of '{entry.name}' is the formula of its docstring, for docs/mechanisms.md"
    assert not re.search(r"\\[^a-zA-Z]|[$\n<*]", latex)
    for begin, end in (("{", "}"), (r"\left(", r"\right)"), (r"\begin{aligned}", r"\end{aligned}")):
        assert latex.count(begin) == latex.count(end)


def test_listing_by_capability():
    assert {entry.name for entry in list_attentions(stream=True)} >= {"linear", "efficient", "inline"}
    assert [entry.name for entry in list_attentions()] == sorted(entry.name for entry in list_attentions())
    assert "softmax" in {entry.name for entry in list_attentions(score_bias=True, stream=False)}
    with pytest.raises(UnknownNameError, match="did you mean 'stream'"):
        list_attentions(streams=True)


def test_other_names_lead_to_one_mechanism():
    entries = list_attentions()
    others = [name.casefold() for entry in entries for name in entry.also]
    assert len(others) > 20 and len(set(others)) == len(others)
    assert not {entry.name for entry in entries} & set(others)


@pytest.mark.parametrize(
    ("call", "offer"),
    [
        (lambda: linsight.create_attention("inlin", 8, 2), "did you mean 'inline'"),
        (lambda: linsight.create_attention("dinat", 8, 2), "it is 'nat' here"),
        (lambda: linsight.create_attention("inline", 8, 2, feature_maps="relu"), "did you mean 'feature_map'"),
        (lambda: linsight.create_attention("inline", 8, 2, feature_map="rely"), "did you mean 'relu'"),
        (lambda: linsight.create_attention("agent", 8, 2, agents="9"), "agents='9' of 'agent' must be a whole number"),
        (lambda: linsight.create_attention("agent", 8, 2, agent_grid=3), r"\(a whole number, a whole number\) or None"),
        (lambda: linsight.create_attention("focused", 8, 2, power=True), "power=True of 'focused' must be a number"),
        (lambda: linsight.create_attention("inline", 8, 3), "choose a divisor of 8"),
        (lambda: linsight.create_attention("inline", 8, 2, reduction=2), "does not support"),
        (lambda: linsight.create_attention("softmax", 8, 2, reduction=2, projections="qkv"), "projections='q_kv'"),
    ],
)
def test_errors_offer_a_way_out(call, offer):
    with pytest.raises(LinsightError, match=offer) as caught:
        layer = call()
        layer(torch.randn(1, 4, 8), linsight.Grid(2, 2))
    assert "\n" not in str(caught.value)


def test_names_are_taken_once():
    paper = Paper("A paper", "0000.00000", "A venue")
    assert str(paper) == "A paper, arXiv 0000.00000, A venue"
    with pytest.raises(LinsightError, match="already registered"):
        register("inline", formula="", complexity="", paper=paper)(type("Other", (Core,), {}))
    with pytest.raises(LinsightError, match="not a Core"):
        register("no_core", formula="", complexity="", paper=paper)(nn.Module)


def test_published_matrix_of_a_reduction_on_odd_grids():
    """A spatial reduction floors the grid; where it is smaller than the ratio, zeros fill it up."""
    layer = linsight.create_attention("softmax", 8, 2, reduction=2)
    for height, width in ((5, 7), (1, 1), (1, 6)):
        assert layer(torch.randn(2, height * width, 8), linsight.Grid(height, width)).isfinite().all()
    with pytest.raises(LinsightError, match="reduction=1"):
        layer(torch.randn(1, 5, 8), linsight.Grid(2, 2, 1))


def test_bias_on_scores():
    """-inf in a bias hides keys exactly as dropping them does."""
    layer, x = linsight.create_attention("softmax", 8, 2).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    keep = torch.tensor([[True, False, True, True, False, True]])
    bias = torch.zeros(1, 1, 1, 6, dtype=torch.float64).masked_fill(~keep[:, None, None], float("-inf"))
    grid = linsight.Grid(2, 3)
    torch.testing.assert_close(layer(x, grid, score_bias=bias)[keep], layer(x, grid, keep=keep)[keep])
    both = layer(x, grid, score_bias=torch.randn(1, 2, 6, 6, dtype=torch.float64), keep=keep)
    assert both.isfinite().all()
    causal = linsight.create_attention("softmax", 8, 2, causal=True).double()
    causal.load_state_dict(layer.state_dict())
    zero = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(causal(x, grid, score_bias=zero), causal(x, grid))


def test_causal_is_neither_crossed_nor_tiled():
    layer, grid, x = linsight.create_attention("linear", 8, 2, causal=True), linsight.Grid(2, 3), torch.randn(1, 6, 8)
    with pytest.raises(LinsightError, match="causal"):
        layer(x, grid, context=x, context_layout=grid)
    with pytest.raises(LinsightError, match="causal"):
        run_rounds(layer.core, random_tokens(layer.core, 1, grid, 8), tiles(grid, 1, 3))


@pytest.mark.parametrize("flag", ["cross", "score_bias"])
def test_a_layer_declares_what_mix_is_given(flag):
    with pytest.raises(LinsightError, match=f"declares {flag}, which `mix` is not given"):
        type("Lossy", (Layer,), {"capabilities": Capabilities(**{flag: True})})
    own = {"capabilities": Capabilities(**{flag: True}), "forward": lambda self, x, layout, **others: x}
    assert type("Own", (Layer,), own).capabilities.prefix is False
