"""Backbones of detection and segmentation: a map from each stage, as the published ones give them."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import get_model_args, get_model_traits
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from linsight.attention import Rename


class Features(FeatureGetterNet):
    """timm's `features_only` wrapper around a model, with what training asks of one."""

    model: Any

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model wants kept from weight decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay: those of the model, by their names in here."""
        return {name: _inside(rule) for name, rule in self.model.group_matcher(coarse).items()}

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As the model's."""
        self.model.set_input_size(*args, **kwargs)
        size = get_model_traits(self.model)["img_size"]
        self._traits = {**getattr(self, "_traits", {}), "img_size": size}
        self._model_args = {**getattr(self, "_model_args", {}), **get_model_args(self.model)}


def _inside(rule: Any) -> Any:
    """A rule of `group_matcher` for names that begin with "model."."""
    if rule is None:
        return None
    if isinstance(rule, str):
        return re.sub(r"(?<!\[)\^", r"^model\.", rule)
    return [(_inside(pattern), suffix) for pattern, suffix in rule]


class DenseFeatures(Features):
    """A hierarchical model without head and final norm, which gives the maps of its stages.

    normed: a LayerNorm (eps 1e-5) on each map that is returned, not on the one that is passed on; it is not in the
        checkpoint of a classifier, so that is loaded with `head=False`.
    out_indices: the stages whose maps are given, in order; those behind the last one are dropped.

    Images of any size, `(B, C, H, W)` -> maps `(B, C_i, H_i, W_i)`; `feature_info` tells channels and strides.
    """

    published = (*(Rename(f"norm{i}.", f"norm{i}.") for i in range(4)), Rename("", "model."))
    num_classes = 0

    def __init__(self, model: nn.Module, *, normed: bool, out_indices: int | Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__(model, out_indices)
        like: Any = next(model.parameters())
        factory = {"device": like.device, "dtype": like.dtype}
        self.norms = [f"norm{i}" for i in self.out_indices] if normed else []
        for name, width in zip(self.norms, self.feature_info.channels() if normed else (), strict=True):
            self.add_module(name, nn.LayerNorm(width, **factory))
        self.pretrained_cfg = self.default_cfg = {**model.pretrained_cfg, "classifier": tuple(self.norms)}  # type: ignore[dict-item]
        self.in_chans, self._traits = model.in_chans, get_model_traits(model)
        self.num_features = self.head_hidden_size = self.feature_info.channels()[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of the stages."""
        maps = super().forward(x)
        for i, name in enumerate(self.norms):
            maps[i] = self[name](maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return maps
