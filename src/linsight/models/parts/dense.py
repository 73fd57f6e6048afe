"""Backbones of detection and segmentation: a map from each stage, as the published ones give them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import get_model_args, get_model_traits
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.errors import CapabilityError

from ..steps import MapEnd, StreamPlan, Streams
from .images import FORMATS, check_format
from .keys import AnyKeys

_START = re.compile(r"(?<![\[\\])\^")  # of a pattern, not of a set or a character


class Features(AnyKeys, FeatureGetterNet):
    """timm's `features_only` wrapper around a model, with what training asks of one.

    `return_layers`, by which transformers asks for all maps up to the last one, is as in timm's other wrappers: names
    of modules of `feature_info`, with the places of their maps as text; None for those of `out_indices`.
    """

    model: Any
    return_layers: Mapping[str, str] | None = None

    def __init__(self, model: nn.Module, *timm_args: Any, output_fmt: str = "NCHW", **timm_kwargs: Any) -> None:
        check_format(output_fmt, getattr(model, "map_formats", FORMATS))
        super().__init__(model, *timm_args, output_fmt=output_fmt, **timm_kwargs)

    @classmethod
    def around(cls, model: nn.Module, **asked: Any) -> "Features":
        """The wrapper around a model that was built, with its configuration, as timm's factory puts it on."""
        like: Any = model
        wrapped: Any = cls(model, **asked)
        wrapped.in_chans, wrapped._traits = like.in_chans, dict(like._traits)
        wrapped.pretrained_cfg = wrapped.default_cfg = pretrained_cfg_for_features(like.pretrained_cfg)
        return wrapped

    @property
    def places(self) -> list[int]:
        """The places of the maps that a call gives."""
        last = self.out_indices[-1]
        asked = None if self.return_layers is None else sorted(map(int, self.return_layers.values()))
        return list(self.out_indices) if asked is None else [place for place in asked if place <= last]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, in order."""
        named = {"norm": self.norm, "output_fmt": self.output_fmt}
        maps: list[Tensor] = self.model.forward_intermediates(x, indices=self.places, intermediates_only=True, **named)
        return maps

    def stream_plan(self) -> StreamPlan:
        """The steps up to the last map, and its maps.

        Raises:
            CapabilityError: the model tells no steps, or none of its maps.
        """
        if not isinstance(self.model, Streams) or self.norm or len(self.model.stream_plan().maps) < self.places[-1] + 1:
            raise CapabilityError(f"a {type(self.model).__name__} does not give the maps of an image in parts")
        plan = self.model.stream_plan()
        maps = tuple(self.normed_end(place, plan.maps[place]) for place in self.places)
        return StreamPlan(plan.steps[: maps[-1].steps], _as_it_is, None, maps=maps)

    def normed_end(self, place: int, end: MapEnd) -> MapEnd:
        """The end of a map as it is given."""
        return end

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
        return {name: inside("model.", rule) for name, rule in self.model.group_matcher(coarse).items()}

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As the model's."""
        self.model.set_input_size(*args, **kwargs)
        size = get_model_traits(self.model)["img_size"]
        self._traits = {**getattr(self, "_traits", {}), "img_size": size}
        self._model_args = {**getattr(self, "_model_args", {}), **get_model_args(self.model)}


def _as_it_is(x: Tensor) -> Tensor:
    return x


def inside(prefix: str, rule: Any) -> Any:
    """A rule of `group_matcher` for names behind a prefix, as "model.".

    timm matches names from their beginning, so every alternative of a rule begins there, with "^" or without.
    """
    if rule is None:
        return None
    if isinstance(rule, str):
        return f"^{re.escape(prefix)}(?:{_START.sub('', rule)})"
    return [(inside(prefix, pattern), suffix) for pattern, suffix in rule]


class DenseFeatures(Features):
    """A hierarchical model without head and final norm, which gives the maps of its stages.

    normed: a LayerNorm (eps 1e-5) on each map that is returned, not on the one that is passed on; it is not in the
        checkpoint of a classifier, so that is loaded with `head=False`.
    out_indices: the stages whose maps are given, in order; those behind the last one are dropped.

    Images of any size, `(B, C, H, W)` -> maps `(B, C_i, H_i, W_i)`, or `(B, H_i, W_i, C_i)` with `output_fmt="NHWC"`;
    `feature_info` tells channels and strides.
    """

    published = (*(Rename(f"norm{i}.", f"norm{i}.") for i in range(4)), Rename("", "model."))
    num_classes = 0

    def __init__(
        self,
        model: nn.Module,
        *,
        normed: bool,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        output_fmt: str = "NCHW",
    ) -> None:
        super().__init__(model, out_indices, output_fmt=output_fmt)
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
        for i, place in enumerate(self.places):
            if f"norm{place}" in self.norms:
                maps[i] = self._normed(self[f"norm{place}"], maps[i])
        return maps

    def normed_end(self, place: int, end: MapEnd) -> MapEnd:
        """The end of a map as it is given."""
        return end._replace(norm=self[f"norm{place}"]) if f"norm{place}" in self.norms else end

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.output_fmt == "NHWC" else norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
