"""Which form of each operator runs where, and why: the table behind `linsight doctor`, and how to choose another.

The plain PyTorch form is the definition of an operator, and runs wherever no other form can. A fused form is a
function in `ops/triton` or `ops/cpu`, imported when it is first chosen.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linsight.errors import LinsightError, UnknownNameError

from .sizes import leaves, traced, transformed


class Form(NamedTuple):
    """Another way to compute an operator.

    name: what it is, in words.  why: when it is chosen.
    lacks: what a device lacks to run it, in words; "" when it can.
    entry: where its function is, "module:name" in `ops`; "" where the operator itself chooses.
    widest: the largest head width it takes; 0 for any.  eager: whether it runs only uncompiled and without gradients.
    asked: the name in `use_form` by which alone it is chosen; "" where it is chosen by itself.
    """

    name: str
    why: str
    lacks: Callable[[torch.device], str]
    entry: str = ""
    widest: int = 0
    eager: bool = False
    asked: str = ""


class ChosenForm(NamedTuple):
    """The form of `operator` that runs on a device."""

    operator: str
    form: str
    reason: str


PLAIN = "plain PyTorch"
TRITON = "Triton"
FUSABLE = ("cuda", "xpu")  # devices that Triton compiles for


def _everywhere(device: torch.device) -> str:
    return ""


@torch.compiler.assume_constant_result
def _for_triton(device: torch.device) -> str:
    if device.type not in FUSABLE:
        return f"not made for {device.type}"
    return "" if _triton_is_installed() else "triton is not installed"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton(entry: str, widest: int = 128) -> tuple[Form, ...]:
    return (Form(TRITON, "one pass over tokens in their own layout", _for_triton, f"triton.{entry}", widest),)


def _for_cpu(device: torch.device) -> str:
    return "" if device.type == "cpu" else "made for a CPU"


def _for_flex(device: torch.device) -> str:
    return "" if device.type == "cuda" else "compiled for CUDA only: elsewhere it makes the matrix of all scores"


def _linear(name: str) -> tuple[Form, ...]:
    why = "run eagerly without gradients; else plain"
    tiled = Form("tiles that stay in the cache", why, _for_cpu, f"cpu.tiled:{name}", eager=True)
    return (*_triton(f"linear:{name}"), tiled)


# Best first, by the operator's name in this package; an empty row is an operator with the plain form alone.
FORMS: dict[str, tuple[Form, ...]] = {
    "outer_sum": (),
    "apply_state": (),
    "linear_absorb": _linear("absorb"),
    "linear_read": _linear("read"),
    "affine_read": _linear("affine"),
    "central_absorb": _linear("central"),
    "causal_linear_attention": (),
    "circular_correlation": (
        Form("real FFT", "run eagerly or compiled; matrices of cosines and sines when exported", _everywhere),
    ),
    "focus": _triton("focus:focus", widest=0),
    "depthwise_conv": _triton("conv:depthwise_conv", widest=0),
    "dynamic_depthwise_conv": (
        *_triton("conv:dynamic_depthwise_conv", widest=0),
        Form(
            "one grouped convolution",
            "run eagerly; shifted products when compiled for batches or small images",
            _everywhere,
        ),
    ),
    "pool_tokens": (
        Form("one adaptive pooling", "run eagerly, whole, without gradients; else small matrices", _everywhere),
    ),
    "gather_pooled": (Form("scaled dot-product attention", "one call over all keys", _everywhere),),
    "read_pooled": (Form("scaled dot-product attention", "one call over all pooled tokens", _everywhere),),
    "rotate": (),
    "inner_gradient": (),
    "inner_forward": (),
    "neighbourhood_attention": (
        Form(
            "FlexAttention",
            "asked for; whole grids, one for the batch, uncompiled, below float64",
            _for_flex,
            "flex:neighbourhood_attention",
            asked="flex",
        ),
        Form(
            "blocks of queries",
            "run uncompiled on one whole grid for all images, below float64; else each query's keys are gathered",
            _for_cpu,
            "cpu.neighbourhood:neighbourhood_attention",
        ),
    ),
    "neighbourhood_mean": (),
}

_NAMES = ("plain", "triton", "flex")
_forced = ""
_chosen: dict[tuple[Any, ...], Callable[..., Any] | None] = {}  # earlier choices, by all that decides them
_leaving: dict[str, Callable[..., Any]] = {}  # of graphs that leave, see `exported_forms`
_entries: dict[str, Callable[..., Any]] = {}  # functions of other forms imported so far


@contextmanager
def use_form(name: str) -> Iterator[None]:
    """Inside, operators take the form "plain", "triton" or "flex" wherever they have it, on any device that can run it.

    "flex", of neighbourhood attention on CUDA, is chosen by nothing else; other operators run as without it. Triton
    runs on a CPU under TRITON_INTERPRET=1, set before Triton is imported: slowly, to check it.

    Raises:
        UnknownNameError: no such form.
        LinsightError: Triton is not installed.
    """
    global _forced
    if name not in _NAMES:
        raise UnknownNameError("form", name, _NAMES)
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise LinsightError("the form 'triton' needs Triton: pip install triton")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def exported_forms(forms: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, graphs that leave have these functions in the place of the plain forms, by operator."""
    before = dict(_leaving)
    _leaving.update(forms)
    try:
        yield
    finally:
        _leaving.clear()
        _leaving.update(before)


def plain_is_asked() -> bool:
    """True inside `use_form("plain")`: no other form runs, not one of a library either."""
    return _forced == "plain"


def fused_form(operator: str, x: Tensor) -> Callable[..., Any] | None:
    """The function to compute `operator` with, on tensors like `x` `(..., D)`; None for the plain form.

    Exported graphs have the plain form, which is made of torch's own operators, unless `exported_forms` has another; so
    do compiled ones on a CPU, where the compiler keeps tiles in the cache by itself.

    Raises:
        LinsightError: a form that was asked for by `use_form` cannot run on this device.
    """
    if leaves() and not _forced and operator in _leaving:
        return _leaving[operator]
    if _forced or traced() or leaves() or transformed():
        return _choose_fused(operator, x)
    like = (operator, x.device.type, x.shape[-1], torch.is_grad_enabled())
    if like not in _chosen:
        _chosen[like] = _choose_fused(operator, x)
    return _chosen[like]


def _choose_fused(operator: str, x: Tensor) -> Callable[..., Any] | None:
    if _forced == "plain" or x.is_meta or leaves() or transformed():
        return None
    for form in FORMS[operator]:
        if not form.entry or (form.widest and x.shape[-1] > form.widest) or (form.asked and form.asked != _forced):
            continue
        if _forced == "triton" and form.name == TRITON:
            _check_interpreter(x.device)
        elif form.lacks(x.device) or (form.eager and (torch.compiler.is_compiling() or torch.is_grad_enabled())):
            continue
        return _entries[_imported(form.entry, form.name)]
    return None


@torch.compiler.assume_constant_result  # a compiler cannot trace an import
def _imported(entry: str, kind: str) -> str:
    """`entry`, now in `_entries` with all others of its kind: a compiler looks into a table once."""
    if entry not in _entries:
        for other in (form.entry for row in FORMS.values() for form in row if form.name == kind):
            module, _, name = other.partition(":")
            _entries[other] = getattr(importlib.import_module(f".{module}", __package__), name)
    return entry


def _check_interpreter(device: torch.device) -> None:
    if device.type not in FUSABLE and os.environ.get("TRITON_INTERPRET") != "1":
        raise LinsightError(f"Triton runs on {device.type} only under TRITON_INTERPRET=1, set before the start")


def forms(device: torch.device | str = "cpu") -> list[ChosenForm]:
    """The form of every operator that runs on `device`."""
    return [_choose(operator, candidates, torch.device(device)) for operator, candidates in FORMS.items()]


def _choose(operator: str, candidates: tuple[Form, ...], device: torch.device) -> ChosenForm:
    asked = [f"{form.name}: by use_form('{form.asked}') alone" for form in candidates if form.asked]
    lacking = [(form, form.lacks(device)) for form in candidates if not form.asked]
    for form, lack in lacking:
        if not lack:
            return ChosenForm(operator, form.name, form.why)
    reasons = [f"{form.name}: {lack}" for form, lack in lacking] + asked
    return ChosenForm(operator, PLAIN, "; ".join(reasons) or f"no fused form exists for {device.type}")
