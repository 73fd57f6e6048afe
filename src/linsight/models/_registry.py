"""Hosts and variants as tables of data; the variants are registered in timm when linsight is imported.

A host is a builder that takes any mechanism; a variant is a host with a published (or our own)
configuration. `create_model` understands both, and timm's own names where a host exists for them.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, is_model, list_models, model_entrypoint, register_model
from torch import nn

from linsight.errors import LinsightError, UnknownNameError

from ._dense import DenseFeatures


@dataclasses.dataclass(frozen=True)
class Host:
    """A backbone that takes any mechanism.

    name: as in `create_model("vit_tiny", attention=...)`.
    model_cls: the class, which takes `attention=` and `attention_options=`.
    args: its arguments for this size.
    cfg: timm's pretrained_cfg entries beyond the defaults below.
    feature_cfg: how timm's `features_only` wraps it.
    published: figures of the host with softmax, as of a variant.
    """

    name: str
    model_cls: type[nn.Module]
    args: Mapping[str, Any]
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    feature_cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model: a host, the mechanism in it and what it changes of the host's arguments.

    published: its figures (`top1`, `params`, `gmacs`); `plotted` where its top-1 is read off a plot, so is not exact;
        `ema` where the averaged weights are the published ones.
    dense: a backbone for dense tasks, whose forward gives the map of each stage: "plain", or "normed" by a LayerNorm
        of its own.
    """

    name: str
    host: str
    attention: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense: Literal["", "plain", "normed"] = ""


def figures(top1: float | None, params: float, gmacs: float, **more: Any) -> dict[str, Any]:
    """Published top-1 in percent (None: not published); of the published code, millions of parameters and GMACs."""
    known = {"params": round(params * 1e6), "gmacs": gmacs, **more}
    return known if top1 is None else {"top1": top1, **known}


# The evaluation of the published repositories: a square resize, then the centre crop.
DEFAULT_CFG: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "crop_mode": "squash",
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "fixed_input_size": False,
}

HOSTS: dict[str, Host] = {}
VARIANTS: dict[str, Variant] = {}
# Adopters of timm's own models: the timm module that defines them -> how to make one with a mechanism.
TIMM_HOSTS: dict[str, Callable[..., nn.Module]] = {}
_REGISTERED: set[str] = set()  # in timm, by us


def add_hosts(*hosts: Host) -> None:
    """Make hosts known to `create_model`, and to timm, with softmax attention, where it has no such name."""
    for host in hosts:
        HOSTS[host.name] = host
        if not is_model(host.name):
            _register(Variant(host.name, host.name, "softmax"))


def add_variants(*variants: Variant) -> None:
    """Make variants known to `create_model` and register them in timm, under names that timm lacks."""
    for variant in variants:
        if is_model(variant.name) and variant.name not in VARIANTS:
            raise LinsightError(f"timm has a model called '{variant.name}' already")
        VARIANTS[variant.name] = variant
        if not is_model(variant.name):
            _register(variant)


def _register(variant: Variant) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(variant, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__doc__ = f"{variant.name}: {variant.attention} in the host {variant.host}."
    entrypoint.__module__ = __name__
    setattr(sys.modules[__name__], variant.name, entrypoint)
    register_model(entrypoint)
    _REGISTERED.add(variant.name)


def _build(variant: Variant, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    host = HOSTS[variant.host]
    if pretrained:
        raise LinsightError(
            f"no weights are distributed for '{variant.name}': load a published file with "
            f"linsight.load_published(model, path)"
        )
    cfg = {**DEFAULT_CFG, **host.cfg, **variant.cfg, "architecture": variant.name}
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's factory always passes these
        given = kwargs.pop(key, None)
        if key != "cache_dir" and isinstance(given, Mapping):
            cfg.update(given)
    attention = kwargs.pop("attention", None)
    attention = variant.attention if attention is None else attention
    options = kwargs.pop("attention_options", None)
    if options is None:
        options = variant.options if attention == variant.attention else {}
    model = build_model_with_cfg(
        host.model_cls,
        variant.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg=dict(host.feature_cfg),
        attention=attention,
        attention_options=options,
        **{"img_size": cfg["input_size"][-2:], **host.args, **variant.args, **kwargs},
    )
    return DenseFeatures(model, normed=variant.dense == "normed") if variant.dense else model


def default_attention(name: str) -> str:
    """The mechanism of the model `name` where none is asked for: a variant's own, else softmax."""
    return VARIANTS[name].attention if name in VARIANTS else "softmax"


def create_model(
    name: str,
    *,
    attention: str | None = None,
    attention_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A model by name, with any mechanism.

    name: a variant (`"inline_deit_tiny"`), a host (`"vit_tiny"`), or a model of timm whose host
        linsight has (`"deit_tiny_patch16_224"`).
    attention: a mechanism, one a stage (`"inline,inline,softmax,softmax"`), or the first k blocks
        of a stage (`"inline:4/softmax"`). A variant has its own; otherwise softmax.
    attention_options: keyword arguments of the mechanism.
    kwargs: timm's: num_classes, in_chans, img_size, drop_path_rate, features_only ...

    Raises:
        UnknownNameError: no such model, mechanism or option; the nearest is offered.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if name in VARIANTS:
        return _build(
            VARIANTS[name], pretrained=pretrained, attention=attention, attention_options=attention_options, **kwargs
        )
    if name in HOSTS and name in _REGISTERED:  # not PVTv2's, whose names and weights are timm's
        plain = Variant(name, host=name, attention="softmax")
        return _build(plain, pretrained=pretrained, attention=attention, attention_options=attention_options, **kwargs)
    base = name.partition(".")[0]
    if is_model(base):
        adopt = TIMM_HOSTS.get(model_entrypoint(base).__module__)
        if adopt is None:
            raise LinsightError(
                f"'{name}' is a model of timm without a linsight host; hosts: {', '.join(sorted(HOSTS))}"
            )
        if pretrained and attention not in (None, "softmax"):
            raise LinsightError(f"the weights of '{name}' are those of softmax attention: pass pretrained=False")
        return adopt(name, attention or default_attention(name), attention_options, pretrained=pretrained, **kwargs)
    raise UnknownNameError("model", name, {*VARIANTS, *HOSTS, *list_models()}, "'linsight list' shows ours")
