"""Which form of each operator runs where, and why: the table behind `linsight doctor`.

The plain PyTorch form is the definition of an operator, and runs wherever no other form can.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Form(NamedTuple):
    """Another way to compute an operator.

    name: what it is, in words.  why: when it is chosen.
    lacks: what a device lacks to run it, in words; "" when it can.
    """

    name: str
    why: str
    lacks: Callable[[torch.device], str]


class ChosenForm(NamedTuple):
    """The form of `operator` that runs on a device."""

    operator: str
    form: str
    reason: str


PLAIN = "plain PyTorch"

# Best first, by the operator's name in this package; an empty row is an operator with the plain form alone.
FORMS: dict[str, tuple[Form, ...]] = {
    "outer_sum": (),
    "apply_state": (),
    "linear_attention": (),
    "causal_linear_attention": (),
    "circular_correlation": (
        Form("real FFT", "run eagerly or compiled; matrices of cosines and sines when exported", lambda device: ""),
    ),
    "depthwise_conv": (),
    "dynamic_depthwise_conv": (
        Form("one grouped convolution", "run eagerly; shifted products when compiled or exported", lambda device: ""),
    ),
    "pool_tokens": (
        Form("one adaptive pooling", "run eagerly, whole, without gradients; else small matrices", lambda device: ""),
    ),
    "gather_pooled": (Form("scaled dot-product attention", "one call over all keys", lambda device: ""),),
    "read_pooled": (Form("scaled dot-product attention", "one call over all pooled tokens", lambda device: ""),),
    "inner_gradient": (),
    "inner_forward": (),
    "neighbourhood_attention": (),
}


def forms(device: torch.device | str = "cpu") -> list[ChosenForm]:
    """The form of every operator that runs on `device`."""
    return [_choose(operator, candidates, torch.device(device)) for operator, candidates in FORMS.items()]


def _choose(operator: str, candidates: tuple[Form, ...], device: torch.device) -> ChosenForm:
    lacking = [(form, form.lacks(device)) for form in candidates]
    for form, lack in lacking:
        if not lack:
            return ChosenForm(operator, form.name, form.why)
    reasons = [f"{form.name}: {lack}" for form, lack in lacking]
    return ChosenForm(operator, PLAIN, "; ".join(reasons) or f"no fused form exists for {device.type}")
