"""Hosts and variants as tables of data; the variants are registered in timm when linsight is imported.

A host is a builder that takes any mechanism; a variant is a host with a published (or our own)
configuration; an architecture takes no mechanism. `create_model` understands them all, and timm's own
names where a host exists for them.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, is_model, list_models, model_entrypoint, register_model
from torch import nn

from linsight.errors import LinsightError, UnknownNameError

from .parts.dense import DenseFeatures


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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A named model whose layers are its own: it takes no mechanism.

    model_cls: the class.  args: its arguments.  cfg, published: as of a variant.
    feature_cfg: how timm's `features_only` wraps it; None: it gives no maps.
    """

    name: str
    model_cls: type[nn.Module]
    args: Mapping[str, Any]
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    feature_cfg: Mapping[str, Any] | None = None


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

# How timm's `features_only` wraps a host of four stages.
FOUR_MAPS: Mapping[str, Any] = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}

HOSTS: dict[str, Host] = {}
VARIANTS: dict[str, Variant] = {}
ARCHITECTURES: dict[str, Architecture] = {}
# Adopters of timm's own models: the timm module that defines them -> how to make one with a mechanism.
TIMM_HOSTS: dict[str, Callable[..., nn.Module]] = {}
_REGISTERED: set[str] = set()  # in timm, by us


def add_hosts(*hosts: Host) -> None:
    """Make hosts known to `create_model`, and to timm, with softmax attention, where it has no such name."""
    for host in hosts:
        HOSTS[host.name] = host
        if not is_model(host.name):
            _register_variant(Variant(host.name, host.name, "softmax"))


def add_variants(*variants: Variant) -> None:
    """Make variants known to `create_model` and register them in timm, under names that timm lacks."""
    for variant in variants:
        _refuse_taken(variant.name, VARIANTS)
        VARIANTS[variant.name] = variant
        if not is_model(variant.name):
            _register_variant(variant)


def add_architectures(*architectures: Architecture) -> None:
    """Make models that take no mechanism known to `create_model` and register them in timm."""
    for entry in architectures:
        _refuse_taken(entry.name, ARCHITECTURES)
        ARCHITECTURES[entry.name] = entry
        if not is_model(entry.name):
            _register(entry.name, f"{entry.name}: {entry.model_cls.__name__}.", partial(_build_architecture, entry))


def _refuse_taken(name: str, own: Mapping[str, Any]) -> None:
    if is_model(name) and name not in own:
        raise LinsightError(f"timm has a model called '{name}' already")


def _register_variant(variant: Variant) -> None:
    about = f"{variant.name}: {variant.attention} in the host {variant.host}."
    _register(variant.name, about, partial(_build, variant))


def _register(name: str, about: str, build: Callable[..., nn.Module]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = about
    entrypoint.__module__ = __name__
    setattr(sys.modules[__name__], name, entrypoint)
    register_model(entrypoint)
    _REGISTERED.add(name)


def _take_cfg(name: str, pretrained: bool, kwargs: dict[str, Any], *cfgs: Mapping[str, Any]) -> dict[str, Any]:
    """The pretrained_cfg of a model, out of `cfgs` and what timm's factory put into `kwargs`."""
    if pretrained:
        raise LinsightError(
            f"no weights are distributed for '{name}': load a published file with linsight.load_published(model, path)"
        )
    cfg = dict(DEFAULT_CFG)
    for entries in cfgs:
        cfg.update(entries)
    cfg["architecture"] = name
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's factory always passes these
        given = kwargs.pop(key, None)
        if key != "cache_dir" and isinstance(given, Mapping):
            cfg.update(given)
    return cfg


def _build(variant: Variant, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    host = HOSTS[variant.host]
    cfg = _take_cfg(variant.name, pretrained, kwargs, host.cfg, variant.cfg)
    attention = kwargs.pop("attention", None)
    attention = variant.attention if attention is None else attention
    options = kwargs.pop("attention_options", None)
    if options is None:
        options = variant.options if attention == variant.attention else {}
    if variant.dense:  # which gives features whether asked to or not
        kwargs.pop("features_only", None)
    maps = {"out_indices": kwargs.pop("out_indices")} if variant.dense and "out_indices" in kwargs else {}
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
    return DenseFeatures(model, normed=variant.dense == "normed", **maps) if variant.dense else model


def _build_architecture(entry: Architecture, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    cfg = _take_cfg(entry.name, pretrained, kwargs, entry.cfg)
    if kwargs.pop("attention", None) is not None or kwargs.pop("attention_options", None):
        raise LinsightError(
            f"'{entry.name}' takes no attention mechanism, its layers are its own: take a host, as vit_tiny "
            f"('linsight list --models' shows them)"
        )
    if entry.feature_cfg is None and kwargs.pop("features_only", False):
        raise LinsightError(f"'{entry.name}' has no features_only: it classifies, and gives no maps")
    return build_model_with_cfg(
        entry.model_cls,
        entry.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg=dict(entry.feature_cfg or {}),
        **{"img_size": cfg["input_size"][-2:], **entry.args, **kwargs},
    )


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

    name: a variant (`"inline_deit_tiny"`), a host (`"vit_tiny"`), a model of timm whose host
        linsight has (`"deit_tiny_patch16_224"`), or an architecture, which takes no mechanism.
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
    if name in ARCHITECTURES:
        mechanism = {"attention": attention, "attention_options": attention_options}
        return _build_architecture(ARCHITECTURES[name], pretrained=pretrained, **mechanism, **kwargs)
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
    raise UnknownNameError(
        "model", name, {*VARIANTS, *ARCHITECTURES, *HOSTS, *list_models()}, "'linsight list' shows ours"
    )
