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
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    list_models,
    model_entrypoint,
    parse_model_name,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models import create_model as create_by_timm
from torch import nn

from linsight.attention import Paper
from linsight.errors import LinsightError, UnknownNameError

from .arguments import carry_out, take
from .bounds import require_bounded
from .doors import building, checked
from .parts.dense import DenseFeatures, Features
from .parts.images import FORMATS, check_format
from .parts.indices import in_order
from .rows import Architecture, Host, Variant
from .seams import refuse_idle
from .timm.fetch import place_of
from .timm.saved import check_cfg, check_saved_args, fetch_config, made_of, read_config, repository, weights_in
from .weights import SOURCES, find_weights, load_from_cfg, load_weights

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
default_cfgs: dict[str, DefaultCfg] = {}  # by this name, timm takes them from the module of what it registers
ON_HOST = "linsight_host"  # in timm: a model of timm's on its host here, so that it can be saved and made again
_NONE: Mapping[str, str] = MappingProxyType({})
_Row = TypeVar("_Row", Variant, Architecture)


def add_hosts(*hosts: Host) -> None:
    """Make hosts known to `create_model`, and to timm, with softmax attention, where it has no such name."""
    for host in hosts:
        HOSTS[host.name] = host
        if not is_model(host.name):
            _register_variant(Variant(host.name, host.name, "softmax"))


def credit_hosts(model_cls: type[nn.Module], paper: Paper, code: str, timm: Mapping[str, str] = _NONE) -> None:
    """Say where the hosts of a class are from.

    code: the repository of their authors.  timm: by our names, those of the models that timm has with their weights.
    """
    for name, host in HOSTS.items():
        if host.model_cls is model_cls:
            weights = f"timm, as {timm[name]}" if name in timm else ""
            HOSTS[name] = dataclasses.replace(host, paper=paper, code=code, weights=weights)


def add_variants(*variants: Variant, code: str = "", paper: Paper | None = None) -> None:
    """Make variants known to `create_model` and register them in timm, under names that timm lacks.

    code: the repository of their authors.  paper: theirs, where it is not that of their mechanism.
    """
    for variant in (_credited(variant, code, paper) for variant in variants):
        _refuse_taken(variant.name, VARIANTS)
        VARIANTS[variant.name] = variant
        if not is_model(variant.name):
            _register_variant(variant)


def _credited(entry: _Row, code: str, paper: Paper | None) -> _Row:
    return dataclasses.replace(entry, code=code or entry.code, paper=paper or entry.paper)


def add_architectures(*architectures: Architecture, code: str = "", paper: Paper | None = None) -> None:
    """Make models that take no mechanism known to `create_model` and register them in timm; the rest as above."""
    for entry in (_credited(entry, code, paper) for entry in architectures):
        _refuse_taken(entry.name, ARCHITECTURES)
        ARCHITECTURES[entry.name] = entry
        if not is_model(entry.name):
            about = f"{entry.name}: {entry.model_cls.__name__}."
            register(entry.name, about, partial(build, entry), default_config(entry.name))


def _refuse_taken(name: str, own: Mapping[str, Any]) -> None:
    if is_model(name) and name not in own:
        raise LinsightError(f"timm has a model called '{name}' already")


def _register_variant(variant: Variant) -> None:
    about = f"{variant.name}: {variant.attention} in the host {variant.host}."
    register(variant.name, about, partial(build, variant), _config(variant))


def register(name: str, about: str, make: Callable[..., nn.Module], cfg: Mapping[str, Any]) -> None:
    """Make a model known to timm: what makes it, and its default_cfg."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return make(pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = about
    entrypoint.__module__ = __name__
    setattr(sys.modules[__name__], name, entrypoint)
    default_cfgs.update(generate_default_cfgs({name: dict(cfg)}))
    register_model(entrypoint)


def default_config(name: str) -> dict[str, Any]:
    """The `pretrained_cfg` of one of our models, by its name: how images are made for it."""
    return _config(VARIANTS.get(name) or ARCHITECTURES.get(name) or HOSTS[name])


def _config(entry: Variant | Architecture | Host) -> dict[str, Any]:
    host = HOSTS.get(getattr(entry, "host", entry.name))
    cfg = {**DEFAULT_CFG, **(host.cfg if host else {}), **entry.cfg, "architecture": entry.name}
    if host and host.stride and cfg["pool_size"] is None:
        cfg["pool_size"] = tuple(-(-side // host.stride) for side in cfg["input_size"][-2:])
    weights = getattr(entry, "weights", "")
    if weights.startswith("https://"):
        cfg["url"] = weights
    return {**cfg, "num_classes": 0} if getattr(entry, "dense", "") else cfg


def _take_cfg(entry: Variant | Architecture, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The pretrained_cfg of a model, with what timm's factory put into `kwargs`."""
    given, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    if isinstance(given, str):  # a tag, which timm knows whether it has
        return resolve_pretrained_cfg(entry.name, given, overlay).to_dict()
    given = given if isinstance(given, Mapping) else given.to_dict() if given else {}
    check_cfg({**given, **(overlay or {})})
    return resolve_pretrained_cfg(entry.name, {**_config(entry), **given}, overlay).to_dict()


def build(
    entry: Variant | Architecture, *, pretrained: bool = False, cache_dir: str | None = None, **kwargs: Any
) -> nn.Module:
    """The model of a row of a table, with weights where they are asked for: published ones, or those of its cfg."""
    kwargs = checked(entry.name, kwargs.get("attention"), kwargs.get("attention_options"), kwargs)
    asked, cfg = record(kwargs), _take_cfg(entry, kwargs)
    later = take(kwargs)
    published = cfg.get("url") == _config(entry).get("url") and not any(map(cfg.get, SOURCES))
    if pretrained and published:
        _check_fetched(entry, kwargs.get("attention"))
    found = find_weights(cfg, cache_dir) if pretrained and not published else None
    build_entry: Callable[..., nn.Module] = _build_variant if isinstance(entry, Variant) else _build_architecture
    make = partial(_carried_out, partial(build_entry, entry, cfg), later)
    if cfg.get("source"):  # of a folder or a repository, which anyone may have made
        require_sane(entry.name, make, kwargs, found)
    with building(entry.name, asked):
        model = make(**kwargs)
    if pretrained and published:
        classes = DEFAULT_CFG["num_classes"]
        load_weights(model, entry.weights, head=kwargs.get("num_classes", classes) == classes)
    elif pretrained:
        load_from_cfg(model, cfg, found, cache_dir)
    model._model_args = asked  # type: ignore[assignment]
    return model


def _carried_out(make: Callable[..., nn.Module], later: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    model = make(**kwargs)
    carry_out(model, later)
    return model


def require_sane(name: str, make: Callable[..., nn.Module], given: Mapping[str, Any], weights: Any) -> None:
    """Raise unless a model can have the arguments `given`, as of a file, and is of a size that can be meant."""
    check_saved_args({key: value for key, value in given.items() if key not in _TIMMS and key not in _PLACED})
    placed = {key: "meta" for key in given if key == "device"}
    require_bounded(name, partial(make, **{**given, **placed}), weights if isinstance(weights, Path) else None)


def record(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by which a model is made again, as timm keeps them for `save_for_hf`."""
    passing = {"device", "dtype", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"}
    return {key: value for key, value in kwargs.items() if value is not None and key not in passing}


def _check_fetched(entry: Variant | Architecture, attention: str | None = None) -> None:
    """Raise, naming the way out, unless the published weights of a model can be fetched."""
    source: Any = HOSTS.get(entry.name, entry)  # a host, with softmax
    code = f" (code of its authors: https://github.com/{source.code})" if source.code else ""
    own = getattr(entry, "attention", None)
    if attention not in (None, own):
        place = f" ({source.weights})" if source.weights else ""
        raise LinsightError(
            f"the weights of '{entry.name}' are those of another mechanism: pass pretrained=False; of a file of theirs"
            f"{place}, linsight.load_published(model, path, strict=False) keeps what both have{code}"
        )
    if source.weights.startswith("https://"):
        return
    if source.weights.startswith("timm, as "):
        raise LinsightError(
            f"no file of weights is known for '{entry.name}': load one with linsight.load_published(model, path), or "
            f"create the model that has them in {source.weights}{code}"
        )
    known = f"the weights of '{entry.name}' are in {source.weights}, which linsight cannot fetch from{code}"
    if not source.weights:
        known = f"no address of weights is known for '{entry.name}'{code}"
    raise LinsightError(f"{known}: load a published file with linsight.load_published(model, path)")


def _build_variant(variant: Variant, cfg: dict[str, Any], **kwargs: Any) -> nn.Module:
    host = HOSTS[variant.host]
    attention = kwargs.pop("attention", None)
    attention = variant.attention if attention is None else attention
    options = kwargs.pop("attention_options", None)
    if options is None:
        options = variant.options if attention == variant.attention else {}
    if variant.dense:  # which gives features whether asked to or not
        kwargs.pop("features_only", None)
    maps = {key: kwargs.pop(key) for key in ("out_indices", "output_fmt") if variant.dense and key in kwargs}
    check_known(variant.name, host.model_cls, kwargs)
    args = {"img_size": cfg["input_size"][-2:], **host.args, **variant.args, **kwargs}
    if hasattr(host.model_cls, "idle"):
        refuse_idle(host.model_cls.idle(attention, args), kwargs)
    model = build_model_with_cfg(
        host.model_cls,
        variant.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg=_feature_cfg(host.feature_cfg, args),
        attention=attention,
        attention_options=options,
        **args,
    )
    return DenseFeatures(model, normed=variant.dense == "normed", **maps) if variant.dense else model


def _build_architecture(entry: Architecture, cfg: dict[str, Any], **kwargs: Any) -> nn.Module:
    if kwargs.pop("attention", None) is not None or kwargs.pop("attention_options", None):
        raise LinsightError(
            f"'{entry.name}' takes no attention mechanism, its layers are its own: take a host, as vit_tiny "
            f"('linsight list --models' shows them)"
        )
    if entry.feature_cfg is None and kwargs.pop("features_only", False):
        raise LinsightError(f"'{entry.name}' has no features_only: it classifies, and gives no maps")
    check_known(entry.name, entry.model_cls, kwargs)
    if kwargs.get("features_only") and "out_indices" in kwargs:
        kwargs["out_indices"] = in_order(kwargs["out_indices"], len(entry.feature_cfg["out_indices"]))  # type: ignore[index]
    feature_cfg = _feature_cfg(entry.feature_cfg or {}, kwargs)
    return build_model_with_cfg(
        entry.model_cls,
        entry.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg=feature_cfg,
        **{"img_size": cfg["input_size"][-2:], **entry.args, **kwargs},
    )


def _feature_cfg(known: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """How timm's `features_only` wraps a model, with the format of maps, which is taken out of what is `given`."""
    cfg = dict(known)
    if "output_fmt" in given:
        cfg["output_fmt"] = given.pop("output_fmt")
        if not issubclass(cfg.get("feature_cls", nn.Module), Features):  # timm's others only note it
            check_format(cfg["output_fmt"], FORMATS[:1])
    return cfg


_FEATURES = ("features_only", "out_indices", "feature_cls", "output_fmt")  # the last one is ours, the others timm's
_TIMMS = (*_FEATURES, "pretrained_model_args")
_PLACED = ("device", "dtype")
_OF_ITS_DOOR = ("checkpoint_path", "scriptable", "exportable", "no_jit")  # what timm.create_model keeps for itself


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
        if key in _OF_ITS_DOOR and key not in known:
            raise LinsightError(
                f"{key}= is an argument of timm.create_model, which makes '{name}', too; weights of a file are read by "
                f"linsight.load_published(model, path)"
            )
        if key not in known and key not in _TIMMS:
            raise UnknownNameError(f"argument of '{name}'", key, known - {"self"})
    if not given.get("features_only"):
        for key in _FEATURES[1:]:
            if key in given:
                raise LinsightError(f"{key}={given[key]} has no effect: pass features_only=True, too")


def default_attention(name: str) -> str:
    """The mechanism of the model `name` where none is asked for: a variant's own, else softmax."""
    return VARIANTS[name].attention if name in VARIANTS else "softmax"


def _create_from_source(name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A model in timm's layout, by timm's own door."""
    with made_of(name):
        source, inner = parse_model_name(name)
        folder = Path(inner) if source == "local-dir" else fetch_config(*repository(inner), kwargs.get("cache_dir"))
        read_config(folder)
        weights = weights_in(folder) if pretrained and source == "local-dir" else None
        make = partial(create_by_timm, name, **{**kwargs, **{key: "meta" for key in kwargs if key == "device"}})
        require_bounded(name, make, weights)
        return create_by_timm(name, pretrained=pretrained, **kwargs)


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
        linsight has (`"deit_tiny_patch16_224"`), an architecture, which takes no mechanism, or
        what timm saved (`"local-dir:FOLDER"`, `"hf-hub:NAME"`).
    attention: a mechanism, one a stage (`"inline,inline,softmax,softmax"`), or the first k blocks
        of a stage (`"inline:4/softmax"`), or several in turn (`"softmax~inline"`). A variant has its
        own; otherwise softmax.
    attention_options: keyword arguments of the mechanism; a list gives a value to each stage, `"1~8"` values to blocks
        in turn.
    kwargs: timm's: num_classes, in_chans, img_size, drop_path_rate, features_only ...

    Raises:
        UnknownNameError: no such model, mechanism or option; the nearest is offered.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    kwargs = checked(name, attention, attention_options, kwargs)
    if ":" in name:
        kwargs |= {"attention": attention, "attention_options": attention_options}
        return _create_from_source(name, pretrained=pretrained, **kwargs)
    ours = VARIANTS.get(name) or ARCHITECTURES.get(name)
    if name in HOSTS and name in default_cfgs:  # not PVTv2's, whose names and weights are timm's
        ours = ours or Variant(name, host=name, attention="softmax")
    if ours is not None:
        return build(ours, pretrained=pretrained, attention=attention, attention_options=attention_options, **kwargs)
    base = name.partition(".")[0]
    if is_model(base):
        adopt = TIMM_HOSTS.get(model_entrypoint(base).__module__)
        if adopt is None:
            raise LinsightError(
                f"'{name}' is a model of timm without a linsight host; models of these modules have one: "
                f"{', '.join(sorted(module.rpartition('.')[2] for module in TIMM_HOSTS))}; 'linsight list' shows ours"
            )
        if pretrained and attention not in (None, "softmax"):
            raise LinsightError(
                f"the weights of '{name}' are those of softmax attention: pass pretrained=False; of a file of theirs "
                f"({place_of(name)}), linsight.load_published(model, path, strict=False) keeps what both have, as qkv"
            )
        attention, later = attention or default_attention(name), take(kwargs)
        with building(name, kwargs):
            model = adopt(name, attention, attention_options, pretrained=pretrained, **kwargs)
            carry_out(model, later)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": ON_HOST}  # type: ignore[dict-item,assignment]
        made = {"base": name, "attention": attention, "attention_options": attention_options, **kwargs, **later}
        model._model_args = record(made)  # type: ignore[assignment]
        return model
    raise UnknownNameError(
        "model", name, {*VARIANTS, *ARCHITECTURES, *HOSTS, *list_models()}, "'linsight list' shows ours"
    )
