"""Hosts and variants as tables of data; the variants are registered in timm when linsight is imported.

A host is a builder that takes any mechanism; a variant is a host with a published (or our own)
configuration; an architecture takes no mechanism. `create_model` understands them all, and timm's own
names where a host exists for them.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, is_model, list_models, model_entrypoint, register_model
from torch import nn

from linsight.errors import LinsightError, UnknownNameError

from .doors import building, checked
from .parts.dense import DenseFeatures
from .rows import Architecture, Host, Variant
from .seams import refuse_idle

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
ARCHITECTURES: dict[str, Architecture] = {}
# Adopters of timm's own models: the timm module that defines them -> how to make one with a mechanism.
TIMM_HOSTS: dict[str, Callable[..., nn.Module]] = {}
_REGISTERED: set[str] = set()  # in timm, by us
_LOADERS: list[Callable[..., Any]] = []  # what reads weights is of a room above


def load_pretrained_with(load: Callable[..., Any]) -> None:
    """For `pretrained=True`: `load(model, address, head=)` fills a model; `head=False` spares its classifier."""
    _LOADERS[:] = [load]


def add_hosts(*hosts: Host) -> None:
    """Make hosts known to `create_model`, and to timm, with softmax attention, where it has no such name."""
    for host in hosts:
        HOSTS[host.name] = host
        if not is_model(host.name):
            _register_variant(Variant(host.name, host.name, "softmax"))


def add_variants(*variants: Variant, code: str = "") -> None:
    """Make variants known to `create_model` and register them in timm, under names that timm lacks.

    code: the repository of their authors.
    """
    for variant in (dataclasses.replace(variant, code=code or variant.code) for variant in variants):
        _refuse_taken(variant.name, VARIANTS)
        VARIANTS[variant.name] = variant
        if not is_model(variant.name):
            _register_variant(variant)


def add_architectures(*architectures: Architecture, code: str = "") -> None:
    """Make models that take no mechanism known to `create_model` and register them in timm; `code` as above."""
    for entry in (dataclasses.replace(entry, code=code or entry.code) for entry in architectures):
        _refuse_taken(entry.name, ARCHITECTURES)
        ARCHITECTURES[entry.name] = entry
        if not is_model(entry.name):
            _register(entry.name, f"{entry.name}: {entry.model_cls.__name__}.", partial(build, entry))


def _refuse_taken(name: str, own: Mapping[str, Any]) -> None:
    if is_model(name) and name not in own:
        raise LinsightError(f"timm has a model called '{name}' already")


def _register_variant(variant: Variant) -> None:
    about = f"{variant.name}: {variant.attention} in the host {variant.host}."
    _register(variant.name, about, partial(build, variant))


def _register(name: str, about: str, make: Callable[..., nn.Module]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return make(pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = about
    entrypoint.__module__ = __name__
    setattr(sys.modules[__name__], name, entrypoint)
    register_model(entrypoint)
    _REGISTERED.add(name)


def default_config(name: str) -> dict[str, Any]:
    """The `pretrained_cfg` of one of our models, by its name: how images are made for it."""
    return _config(VARIANTS.get(name) or ARCHITECTURES.get(name) or HOSTS[name])


def _config(entry: Variant | Architecture | Host) -> dict[str, Any]:
    host = HOSTS[entry.host].cfg if isinstance(entry, Variant) else {}
    return {**DEFAULT_CFG, **host, **entry.cfg, "architecture": entry.name}


def _take_cfg(entry: Variant | Architecture, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The pretrained_cfg of a model, with what timm's factory put into `kwargs`."""
    cfg = _config(entry)
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's factory always passes these
        given = kwargs.pop(key, None)
        if key != "cache_dir" and isinstance(given, Mapping):
            cfg.update(given)
    return cfg


def build(entry: Variant | Architecture, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The model of a row of a table, with its published weights where they are asked for and can be fetched."""
    kwargs = checked(entry.name, kwargs.get("attention"), kwargs.get("attention_options"), kwargs)
    if pretrained:
        _check_fetched(entry, kwargs.get("attention"))
    given = {key: value for key, value in kwargs.items() if not key.startswith(("pretrained_cfg", "cache_dir"))}
    with building(entry.name, given):
        model = _build_variant(entry, **kwargs) if isinstance(entry, Variant) else _build_architecture(entry, **kwargs)
    if pretrained:
        classes = DEFAULT_CFG["num_classes"]
        _LOADERS[0](model, entry.weights, head=kwargs.get("num_classes", classes) == classes)
    return model


def _check_fetched(entry: Variant | Architecture, attention: str | None = None) -> None:
    """Raise, naming the way out, unless the published weights of a model can be fetched."""
    if attention not in (None, getattr(entry, "attention", None)):
        raise LinsightError(f"the weights of '{entry.name}' are those of another mechanism: pass pretrained=False")
    if entry.weights.startswith("https://"):
        return
    known = f"the weights of '{entry.name}' are in {entry.weights}, which linsight cannot fetch from"
    if not entry.weights:
        code = f" (code of its authors: {entry.code})" if entry.code else ""
        known = f"no address of weights is known for '{entry.name}'{code}"
    raise LinsightError(f"{known}: load a published file with linsight.load_published(model, path)")


def _build_variant(variant: Variant, **kwargs: Any) -> nn.Module:
    host = HOSTS[variant.host]
    cfg = _take_cfg(variant, kwargs)
    attention = kwargs.pop("attention", None)
    attention = variant.attention if attention is None else attention
    options = kwargs.pop("attention_options", None)
    if options is None:
        options = variant.options if attention == variant.attention else {}
    if variant.dense:  # which gives features whether asked to or not
        kwargs.pop("features_only", None)
    maps = {"out_indices": kwargs.pop("out_indices")} if variant.dense and "out_indices" in kwargs else {}
    check_known(variant.name, host.model_cls, kwargs)
    args = {"img_size": cfg["input_size"][-2:], **host.args, **variant.args, **kwargs}
    if hasattr(host.model_cls, "idle"):
        refuse_idle(host.model_cls.idle(attention, args), kwargs)
    model = build_model_with_cfg(
        host.model_cls,
        variant.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg=dict(host.feature_cfg),
        attention=attention,
        attention_options=options,
        **args,
    )
    return DenseFeatures(model, normed=variant.dense == "normed", **maps) if variant.dense else model


def _build_architecture(entry: Architecture, **kwargs: Any) -> nn.Module:
    cfg = _take_cfg(entry, kwargs)
    if kwargs.pop("attention", None) is not None or kwargs.pop("attention_options", None):
        raise LinsightError(
            f"'{entry.name}' takes no attention mechanism, its layers are its own: take a host, as vit_tiny "
            f"('linsight list --models' shows them)"
        )
    if entry.feature_cfg is None and kwargs.pop("features_only", False):
        raise LinsightError(f"'{entry.name}' has no features_only: it classifies, and gives no maps")
    check_known(entry.name, entry.model_cls, kwargs)
    return build_model_with_cfg(
        entry.model_cls,
        entry.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg=dict(entry.feature_cfg or {}),
        **{"img_size": cfg["input_size"][-2:], **entry.args, **kwargs},
    )


_FEATURES = ("features_only", "out_indices", "feature_cls")  # which timm takes


def check_known(name: str, cls: type[nn.Module], given: Mapping[str, Any]) -> None:
    """Raise unless the class of the model `name`, with those it derives from, takes all arguments `given`."""
    known: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            known |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    for key in given:
        if key not in known and key not in _FEATURES:
            raise UnknownNameError(f"argument of '{name}'", key, known - {"self"})
    if not given.get("features_only"):
        for key in _FEATURES[1:]:
            if key in given:
                raise LinsightError(f"{key}={given[key]} has no effect: pass features_only=True, too")


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
    kwargs = checked(name, attention, attention_options, kwargs)
    ours = VARIANTS.get(name) or ARCHITECTURES.get(name)
    if name in HOSTS and name in _REGISTERED:  # not PVTv2's, whose names and weights are timm's
        ours = ours or Variant(name, host=name, attention="softmax")
    if ours is not None:
        return build(ours, pretrained=pretrained, attention=attention, attention_options=attention_options, **kwargs)
    base = name.partition(".")[0]
    if is_model(base):
        adopt = TIMM_HOSTS.get(model_entrypoint(base).__module__)
        if adopt is None:
            raise LinsightError(
                f"'{name}' is a model of timm without a linsight host; hosts: {', '.join(sorted(HOSTS))}"
            )
        if pretrained and attention not in (None, "softmax"):
            raise LinsightError(f"the weights of '{name}' are those of softmax attention: pass pretrained=False")
        with building(name, kwargs):
            return adopt(name, attention or default_attention(name), attention_options, pretrained=pretrained, **kwargs)
    raise UnknownNameError(
        "model", name, {*VARIANTS, *ARCHITECTURES, *HOSTS, *list_models()}, "'linsight list' shows ours"
    )
