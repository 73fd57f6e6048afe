"""Subjects: what can be measured, what it is put beside, and how it is built."""

import fnmatch
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import nn

from linsight.attention import list_attentions
from linsight.errors import LinsightError, UnknownNameError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, create_model

from .operators import SOFTMAX

# Our hosts that timm has, by its names. The others stand for themselves, with softmax in them.
TIMM = {
    **{f"vit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")},
    "swin_base_384": "swin_base_patch4_window12_384",
    **{f"pvt_v2_b{size}": f"pvt_v2_b{size}" for size in range(6)},
}
NONE = "none"


class Subject(NamedTuple):
    """A thing to measure: the operator of the mechanism `name`, or the model `name`, with `attention` if given."""

    kind: Literal["operator", "model"]
    name: str
    attention: str = ""

    @property
    def label(self) -> str:
        """Its name in tables and files."""
        return f"{self.name}[{self.attention}]" if self.attention else self.name


class Group(NamedTuple):
    """Subjects that are measured in the same rounds, and what their times are divided by, if anything."""

    subjects: tuple[Subject, ...]
    beside: Subject | None = None

    @property
    def sides(self) -> list[Subject]:
        """All of them, the one beside last."""
        return list(dict.fromkeys([*self.subjects, *filter(None, [self.beside])]))


def operators() -> list[str]:
    """The mechanisms that can be measured without a model: those with a core."""
    return [entry.name for entry in list_attentions() if entry.kind == "core"]


def plan_groups(names: Sequence[str], attention: Sequence[str] = (), beside: str = "") -> tuple[Group, ...]:
    """Who is measured with whom: one group of operators, or one of models for each softmax model beside them.

    Args:
        names: mechanisms, or models of ours or timm's; of ours also patterns, as `inline_*`.
        attention: mechanisms, each to be put into each model; a plan of stages has `+` between them.
        beside: what to compare with; "" is softmax, on the same host; "none" is nothing.

    Raises:
        UnknownNameError: a name is neither a mechanism nor a model.
        LinsightError: mechanisms and models together, a mechanism that is a whole block, or a model that takes none.
    """
    found = list(dict.fromkeys(subject for name in names for subject in _matching(name)))
    if not found:
        raise LinsightError("nothing to measure: name mechanisms or models ('linsight list' shows them)")
    if len({subject.kind for subject in found}) > 1:
        raise LinsightError("mechanisms and models cannot be measured together: name either, or HOST --attention A,B")
    if attention:
        if found[0].kind == "operator":
            raise LinsightError("--attention is for models; mechanisms are named by themselves: linsight bench A,B")
        plans = [plan.replace("+", ",") for plan in attention]
        found = [Subject("model", subject.name, plan) for subject in found for plan in plans]
        with torch.device("meta"):  # refuses what cannot be made, before anything is measured
            for subject in found:
                create_model(subject.name, attention=subject.attention)
    if beside and beside != NONE:
        other = _exactly(beside, found[0].kind)
        return (Group(tuple(found), other),)
    if beside == NONE:
        return (Group(tuple(found)),)
    groups: dict[Subject | None, list[Subject]] = {}
    for subject in found:
        groups.setdefault(softmax_beside(subject), []).append(subject)
    return tuple(Group(tuple(subjects), other) for other, subjects in groups.items())


def softmax_beside(subject: Subject) -> Subject | None:
    """The subject with softmax in it: timm's model where timm has the host. None where there is no such thing."""
    if subject.kind == "operator":
        return Subject("operator", SOFTMAX)
    name = subject.name
    if name in VARIANTS:
        if VARIANTS[name].dense:
            return None
        name = VARIANTS[name].host.removesuffix("_meanpool")  # the head of one family's PVT, without a name of its own
    elif name not in HOSTS:  # timm's, or one that takes no mechanism
        return Subject("model", name) if name not in ARCHITECTURES else None
    return Subject("model", TIMM.get(name, name))


def _matching(name: str) -> list[Subject]:
    if not set("*?[") & set(name):
        return [_exactly(name)]
    models = [model for table in (VARIANTS, HOSTS, ARCHITECTURES) for model in fnmatch.filter(sorted(table), name)]
    found = [Subject("operator", each) for each in fnmatch.filter(operators(), name)]
    if not models and not found:
        raise UnknownNameError("mechanism or model", name, {*operators(), *VARIANTS, *HOSTS, *ARCHITECTURES})
    return found or [Subject("model", model) for model in models]


def _exactly(name: str, kind: str = "") -> Subject:
    kinds = {entry.name: entry.kind for entry in list_attentions()}
    if name in kinds and kind != "model":
        if kinds[name] != "core":
            raise LinsightError(f"'{name}' is a whole {kinds[name]}, no operator: measure HOST --attention {name}")
        return Subject("operator", name)
    if kind != "operator" and (_ours(name) or name in HOSTS or timm.is_model(name.partition(".")[0])):
        return Subject("model", name)
    known: Iterable[str] = {*VARIANTS, *HOSTS, *ARCHITECTURES, *timm.list_models()} if kind != "operator" else ()
    raise UnknownNameError(
        kind or "mechanism or model", name, {*known, *(() if kind == "model" else operators())}, "see 'linsight list'"
    )


def _ours(name: str) -> bool:
    if name in HOSTS:  # PVTv2's names are timm's
        return timm.model_entrypoint(name).__module__.partition(".")[0] == "linsight"
    return name in VARIANTS or name in ARCHITECTURES


def build(subject: Subject, size: tuple[int, int], device: str | torch.device) -> nn.Module:
    """A model of ours or timm's with fresh weights, for images of `size`, height and width."""
    name = subject.name
    image: dict[str, Any] = {"img_size": size}
    with torch.device(device):
        if subject.attention:
            return create_model(name, attention=subject.attention, **image)
        if _ours(name):
            return create_model(name, **image)
        # a model that takes any size takes no such argument; Swin's windows stay as they are
        return timm.create_model(name, **(image if _fixed(name) else {}))


@functools.cache
def _fixed(name: str) -> bool:
    cfg: Any = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)
