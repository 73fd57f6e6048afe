"""The rows of the tables of hosts and papers: models, what is published of them, how they are trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from linsight.attention import Paper

from .parts.dense import Features

# How `features_only` wraps a host of four stages.
FOUR_MAPS: Mapping[str, Any] = {"out_indices": (0, 1, 2, 3), "feature_cls": Features}
# The published rule for the decay of averages: 0.9996 ** (batch of all GPUs / 4096).
AVERAGED: Mapping[str, Any] = {"ema": 0.9996, "ema_base_batch": 4096}


class Training(NamedTuple):
    """A published recipe: one that several papers share, and what this one changes of it.

    base: a name in `linsight.train.recipes.BASES`.  batch: images of one GPU.
    changes: fields of a `linsight.recipe.Recipe`, beside those that the model's `cfg` tells.
    note: what there is to say instead of an accuracy, or beside it.
    start: the weights that it starts from, if any.
    name: of the recipe, where it is not that of the model.
    best: whether the published accuracy of the model is that of this recipe; else it is `top1`, or not published.
    """

    base: str
    batch: int
    drop_path: float
    changes: Mapping[str, Any]
    note: str = ""
    start: str = ""
    name: str = ""
    best: bool = True
    top1: float | None = None


def trained(
    base: str,
    batch: int,
    drop_path: float,
    *,
    note: str = "",
    start: str = "",
    name: str = "",
    best: bool = True,
    top1: float | None = None,
    **changes: Any,
) -> Training:
    """A `Training`, its changes as keyword arguments."""
    return Training(base, batch, drop_path, changes, note, start, name, best, top1)


@dataclasses.dataclass(frozen=True)
class Host:
    """A backbone that takes any mechanism.

    name: as in `create_model("vit_tiny", attention=...)`.
    model_cls: the class, which takes `attention=` and `attention_options=`.
    args: its arguments for this size.
    cfg: timm's pretrained_cfg entries beyond the defaults below.
    feature_cfg: how timm's `features_only` wraps it.
    published: figures of the host with softmax, as of a variant.
    paper, code, weights: as of a variant; `credit_hosts` tells them.
    stride: by what the last map is smaller than an image; 0 where there is a sequence.
    """

    name: str
    model_cls: type[nn.Module]
    args: Mapping[str, Any]
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    feature_cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Paper | None = None
    weights: str = ""
    code: str = ""
    stride: int = 32


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model: a host, the mechanism in it and what it changes of the host's arguments.

    published: its figures (`top1`, `params`, `gmacs`); `plotted` where its top-1 is read off a plot, so is not exact;
        `ema` where the averaged weights are the published ones.
    dense: a backbone for dense tasks, whose forward gives the map of each stage: "plain", or "normed" by a LayerNorm
        of its own.
    training: how its authors trained it.
    weights: where they put its weights: the address of the file, or else the place; empty where none is known.
    code: their repository, as OWNER/NAME of GitHub.
    paper: where it was published, if not with its mechanism.
    """

    name: str
    host: str
    attention: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense: Literal["", "plain", "normed"] = ""
    training: tuple[Training, ...] = ()
    weights: str = ""
    code: str = ""
    paper: Paper | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A named model whose layers are its own: it takes no mechanism.

    model_cls: the class.  args: its arguments.  cfg, published, training, weights, code, paper: as of a variant.
    feature_cfg: how timm's `features_only` wraps it; None: it gives no maps.
    """

    name: str
    model_cls: type[nn.Module]
    args: Mapping[str, Any]
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    feature_cfg: Mapping[str, Any] | None = None
    training: tuple[Training, ...] = ()
    weights: str = ""
    code: str = ""
    paper: Paper | None = None


def figures(top1: float | None, params: float, gmacs: float, **more: Any) -> dict[str, Any]:
    """Published top-1 in percent (None: not published); of the published code, millions of parameters and GMACs."""
    known = {"params": round(params * 1e6), "gmacs": gmacs, **more}
    return known if top1 is None else {"top1": top1, **known}
