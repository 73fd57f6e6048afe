"""timm's own models with a mechanism put in: what the adopters of the hosts share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn

from linsight.errors import LinsightError, UnknownNameError

from ..hosts.pvt_v2 import PyramidVisionTransformerV2
from ..hosts.swin import SwinTransformer
from ..hosts.vit import VisionTransformer
from ..hosts.vit.blocks import host_arguments
from ..parts.dense import Features
from ..parts.stepsnet import block_widths
from ..plan import plan
from ..registry import ON_HOST, TIMM_HOSTS, create_model, register, require_sane
from ..seams import refuse_idle
from ..weights import SOURCES, find_weights, load_from_cfg
from .fetch import create_fetched
from .saved import check_cfg


def add_timm_host(
    module: str,
    host: Any,
    depths: Callable[[Any], Sequence[int]],
    *,
    sized: bool = True,
    extra: Sequence[str] = (),
    output_fmt: str = "NCHW",
    **always: Any,
) -> None:
    """Let `create_model` take the models that the timm module `module` defines.

    host: the class, whose `adopt` makes such a model one of ours, of a choice for each block and the size of images.
    depths: the blocks of each stage of such a model.  sized: whether timm's class takes `img_size`.
    extra: names of arguments of the host that timm's class lacks.  always: arguments that the host needs.
    output_fmt: of the maps that timm's `features_only` gives of these models.
    """

    def create(
        name: str, attention: str, options: Mapping[str, Any] | None, *, pretrained: bool, **kwargs: Any
    ) -> nn.Module:
        features = _features(kwargs)
        size = kwargs.get("img_size") if sized else kwargs.pop("img_size", None)
        host.check(attention, kwargs)
        refuse_idle(host.idle(attention, kwargs), kwargs)
        given = {key: kwargs.pop(key) for key in extra if key in kwargs}
        model: Any = create_fetched(name, pretrained=pretrained, **{**always, **kwargs})
        blocks, size = depths(model), size or model.pretrained_cfg["input_size"][-2:]
        model = host.adopt(model, plan(attention, blocks, options), to_2tuple(size), **given)
        usual = {"out_indices": tuple(range(len(blocks))), "output_fmt": output_fmt}
        return model if features is None else Features.around(model, **{**usual, **features})

    TIMM_HOSTS[module] = create


add_timm_host(
    "timm.models.swin_transformer",
    SwinTransformer,
    depths=lambda model: [len(stage.blocks) for stage in model.layers],
    extra=("attention_window",),
    output_fmt="NHWC",
    strict_img_size=False,
)
add_timm_host(
    "timm.models.pvt_v2",
    PyramidVisionTransformerV2,
    depths=lambda model: [len(stage.blocks) for stage in model.stages],
    sized=False,
)


def _features(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Takes out of `kwargs` which maps are asked for, and how; None where none are."""
    features = kwargs.pop("features_only", False)
    if kwargs.pop("feature_cls", "getter") != "getter":
        raise LinsightError("feature_cls=: maps come by forward_intermediates here, 'getter', leave it out")
    asked: dict[str, Any] = {key: kwargs.pop(key) for key in ("out_indices", "output_fmt") if key in kwargs}
    for key, value in asked.items():
        if not features:
            raise LinsightError(f"{key}={value} has no effect: pass features_only=True, too")
    return asked if features else None


def _timm_vit(
    name: str, attention: str, options: Mapping[str, Any] | None, *, pretrained: bool, **kwargs: Any
) -> nn.Module:
    """timm's own ViT `name`, its weights too where asked, on our host."""
    extra = {key: kwargs.pop(key) for key in ("cpe", "norm", "steps") if key in kwargs}
    if pretrained and extra:
        raise LinsightError(f"the weights of '{name}' are those of timm's blocks: pass pretrained=False")
    if extra.get("steps") is not None:
        kwargs["depth"] = len(block_widths(extra["steps"]))
    shape = {key: value for key, value in kwargs.items() if key in ("img_size", "patch_size", "depth")}
    plain = timm.create_model(name, device="meta", **shape)
    (choices,) = plan(attention, [len(plain.blocks)], options)
    features = _features(kwargs)
    ours = host_arguments(choices, plain.patch_embed.grid_size, kwargs, **extra)
    extra.pop("cpe", None)
    model = VisionTransformer.adopt(create_fetched(name, pretrained=pretrained, **{**kwargs, **ours}), **extra)
    return model if features is None else Features.around(model, **{"out_indices": 3, **features})


TIMM_HOSTS["timm.models.vision_transformer"] = _timm_vit
TIMM_HOSTS["timm.models.deit"] = _timm_vit


_BASE = "vit_tiny_patch16_224"


def _on_host(
    *,
    pretrained: bool,
    base: str = _BASE,
    pretrained_cfg: Mapping[str, Any] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model of timm called `base`, on its host, with weights that were saved, else with its own."""
    given = {**(pretrained_cfg or {}), **(pretrained_cfg_overlay or {})}
    check_cfg(given)
    saved = any(map(given.get, (*SOURCES, "url")))
    if saved and given.get("num_classes") is not None:  # which some writers tell there alone
        kwargs.setdefault("num_classes", given["num_classes"])
    found = find_weights(given, cache_dir) if pretrained and saved else None
    if given.get("source"):  # of a folder or a repository, which anyone may have made
        if not isinstance(base, str) or not is_model(base):
            raise UnknownNameError("model of timm", str(base)[:80], list_models())
        require_sane(base, partial(create_model, base), kwargs, found)
    model: Any = create_model(base, pretrained=pretrained and not saved, **kwargs)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **given, "architecture": ON_HOST}
    model.pretrained_model_args = pretrained_model_args  # which tell the size of images of the weights
    if pretrained and saved:
        load_from_cfg(model, model.pretrained_cfg, found, cache_dir)
    return model


_cfg = get_pretrained_cfg(_BASE).to_dict(remove_source=True)
_cfg |= {"custom_load": False, "fixed_input_size": False}
register(ON_HOST, f"{ON_HOST}: the model of timm called base= on its host.", _on_host, _cfg)
