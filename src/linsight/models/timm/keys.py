"""The published keys of timm's classes, as `published` tells them of our own."""

import re
from collections.abc import Callable
from typing import Any

from timm.models._features import FeatureDictNet
from timm.models.pvt_v2 import Attention as PVTv2Attention
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from linsight.attention import Rename


def published_keys(module: nn.Module) -> tuple[Rename, ...]:
    """The key map of one module, relative to it: what it declares, or what is known of its class."""
    declared: tuple[Rename, ...] = getattr(module, "published", ())
    known = next((rules for cls, rules in _OF_TIMM.items() if isinstance(module, cls)), None)
    return declared + (known(module) if known else ())


def _pvt_v2(model: Any) -> tuple[Rename, ...]:
    rules = [Rename("patch_embed1.", "patch_embed.")]
    for i, stage in enumerate(model.stages):
        rules += [
            *([Rename(f"patch_embed{i + 1}.", f"stages.{i}.downsample.")] if i else []),
            Rename(f"block{i + 1}.", f"stages.{i}.blocks."),
            Rename(f"norm{i + 1}.", f"stages.{i}.norm."),
        ]
        for j in range(len(stage.blocks)):
            mlp = f"{j}.mlp.dwconv."
            rules.append(Rename(f"block{i + 1}.{mlp}dwconv.", f"stages.{i}.blocks.{mlp}"))
    return tuple(rules)


def _swin(model: Any) -> tuple[Rename, ...]:
    # Published patches are merged at the end of a stage, timm's at the start of the next one.
    # All of them, even where `features_only` has cut some.
    stages = range(model.num_layers - 1)
    merges = (Rename(f"layers.{i}.downsample.", f"layers.{i + 1}.downsample.") for i in stages)
    return (*merges, Rename("head.", "head.fc."))


def _flattened(model: Any) -> tuple[Rename, ...]:
    """Rules for timm's `features_only` wrapper, whose lists of stages are flattened: `layers_0` for our `layers.0`."""
    rules = []
    for name, stage in model.items():
        flat = re.fullmatch(r"(layers|stages|blocks)_(\d+)", name)
        if flat is None:
            continue
        ours = f"{flat[1]}.{flat[2]}."
        rules.append(Rename(ours, f"{name}."))
        for path, part in stage.named_modules():
            if isinstance(part, PVTv2Attention):
                parts = ("sr.", "norm.")
                rules += [Rename(f"{ours}{path}.reduction.{one}", f"{name}.{path}.{one}") for one in parts]
    return tuple(rules)


_OF_TIMM: dict[type[nn.Module], Callable[[Any], tuple[Rename, ...]]] = {
    PyramidVisionTransformerV2: _pvt_v2,
    SwinTransformer: _swin,
    FeatureDictNet: _flattened,
}
