"""Backbones of dense tasks: the maps of a model at strides 4, 8, 16 and 32, of images of any height and width.

A map has `ceil(H / stride)` rows, so every pixel is in it: what floors is given whole strides, zeros at the right and
bottom. Hosts of stages give their own maps, a plain ViT those of a simple feature pyramid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Rename
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import is_proxy, to_multiple

from ..doors import building, checked
from ..parts.convs import ConvEmbed
from ..parts.dense import DenseFeatures, Features, inside
from ..parts.images import check_images, refuse_fx
from ..registry import ARCHITECTURES, HOSTS, TIMM_HOSTS, VARIANTS, create_model
from ..steps import StreamPlan
from ..timm.fetch import create_fetched
from .decoders.base import cut

STRIDES = (4, 8, 16, 32)
_TIMM = "timm/"
# Of `features_only`, and of a classifier: nothing that a pyramid has.
_ASKED_IN_VAIN = ("features_only", "out_indices", "output_fmt", "feature_cls", "num_classes")


class Backbone(nn.Module):
    """The maps of the stages of a model: images `(B, in_chans, H, W)` -> maps `(B, C_i, H_i, W_i)`, the finest first.

    H_i = ceil(H / strides[i]), W_i alike.

    model: what gives them, unpadded.
    multiple: images are padded to it, at the right and bottom, by zeros.
    channels, strides: of each map.
    """

    num_classes = 0

    def __init__(self, model: Features, *, multiple: int = 1) -> None:
        super().__init__()
        self.model, self.multiple = model, multiple
        self.channels: tuple[int, ...] = tuple(model.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(model.feature_info.reduction())
        self.in_chans: int = model.in_chans
        self.pretrained_cfg = self.default_cfg = dict(model.pretrained_cfg)

    @property
    def published(self) -> tuple[Rename, ...]:
        """Published names: those of the model, or of the backbone for dense tasks that it is."""
        return (Rename("", "model." if isinstance(self.model, DenseFeatures) else "model.model."),)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps, the finest first."""
        if is_proxy(x):
            refuse_fx("the padding of a dense model")
        check_images(self, x)
        height, width = x.shape[2:]
        if self.multiple > 1:
            high, wide = to_multiple(height, self.multiple), to_multiple(width, self.multiple)
            x = F.pad(x, (0, wide - width, 0, high - height))
        maps = self.maps(x)
        if self.multiple > 1:
            maps = [cropped(m, height, width, stride) for m, stride in zip(maps, self.strides, strict=True)]
        return tuple(maps)

    def maps(self, x: Tensor) -> Sequence[Tensor]:
        """The maps of images of whole multiples."""
        return self.model(x)

    def stream_plan(self) -> StreamPlan:
        """The steps of an image in tiles, and the maps that `spread` takes.

        Raises:
            CapabilityError: the model tells no steps.
        """
        if getattr(self, "border", 0):
            raise CapabilityError("patches beyond the image do not stream in dense tasks: take a host without a border")
        return self.model.stream_plan()

    def spread(self, maps: Sequence[Tensor], height: Any, width: Any) -> tuple[Tensor, ...]:
        """The maps of an image, or of a part of it that begins at whole strides, of those that the model gives."""
        return tuple(maps)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model wants kept from weight decay."""
        kept = self.model.no_weight_decay() if hasattr(self.model.model, "no_weight_decay") else set()
        return {f"model.{name}" for name in kept}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay; what is not the model's own is in the last one."""
        return {name: inside("model.", rule) for name, rule in self.model.group_matcher(coarse).items()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As the model's: resample position tables, for good. Images of any size work without it, too."""
        self.model.set_input_size(*args, **kwargs)


class SimplePyramid(Backbone):
    """Maps at strides 4, 8, 16 and 32 of the last one of a plain ViT, which has a single stride.

    Finer ones by transposed convolutions of stride 2, which halve the channels, with LayerNorm and GELU between them;
    coarser ones by the maximum. Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV
    2022 (arXiv 2203.16527), section 3; the convolutions behind its scales are those of decoders.
    """

    def __init__(self, model: Features, patch: int, *, border: int = 0) -> None:
        super().__init__(model)
        like: Any = next(model.parameters())
        factory = {"device": like.device, "dtype": like.dtype}
        (width,) = self.channels
        self.patch, self.border, self.strides = patch, border, STRIDES
        steps = [max(0, (patch // stride).bit_length() - 1) for stride in STRIDES]
        self.channels = tuple(width >> step for step in steps)
        self.up = nn.ModuleList(_upsampling(width, step, **factory) for step in steps)
        self.pretrained_cfg = self.default_cfg = {**self.pretrained_cfg, "classifier": ("up",)}

    @property
    def published(self) -> tuple[Rename, ...]:
        """Published names; what makes maps of other strides is ours."""
        return (Rename("up.", "up."), *super().published)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps, the finest first."""
        return self.spread(self.model(x), *x.shape[2:])

    def spread(self, maps: Sequence[Tensor], height: Any, width: Any) -> tuple[Tensor, ...]:
        """See `Backbone`."""
        (last,) = maps
        if self.border:
            last = last[:, :, self.border : -self.border, self.border : -self.border]
        found = []
        for up, stride in zip(self.up, self.strides, strict=True):
            if stride > self.patch:
                found.append(_pooled(last, stride // self.patch))
            else:
                found.append(up(last) if stride == self.patch else cropped(up(last), height, width, stride))
        return tuple(found)


def pyramid(
    name: str,
    *,
    attention: str | None = None,
    attention_options: Mapping[str, Any] | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    pretrained: bool = False,
    **model_args: Any,
) -> Backbone:
    """The backbone of a dense task, by the name of its model: a tuple of maps, with their `channels` and `strides`.

    Args:
        name: as of `create_model`, a variant for dense tasks too, or any model of timm that gives maps, "timm/NAME" or
            "NAME". What linsight has a host for is on that host.
        attention: a mechanism, one a stage, or the first k blocks of a stage; by default the model's own.
        attention_options: keyword arguments of the mechanism.
        in_chans: channels of images.
        img_size: height and width that position tables are made for; images of any size go through.
        drop_path_rate: of the blocks.
        pretrained: with the published weights.
        model_args: of the model.

    Raises:
        LinsightError: there is no such model, or it gives no maps of images of any size.
    """
    for key in _ASKED_IN_VAIN:
        if key in model_args:
            raise LinsightError(f"{key}={model_args[key]} has no effect: a backbone gives all its maps, leave it out")
    rates = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    given = checked(name, attention, attention_options, {"in_chans": in_chans, **rates, **model_args})
    if is_model(_base(name.removeprefix(_TIMM))):
        name = name.removeprefix(_TIMM)
    if _is_timms(name):
        return _of_timm(name, attention or "", pretrained, given)
    if not (name in VARIANTS and VARIANTS[name].dense):
        given["num_classes"] = 0
    chosen: dict[str, Any] = {"attention": attention, "attention_options": attention_options, "img_size": img_size}
    model: Any = create_model(name, pretrained=pretrained, **chosen, **given)
    for part in model.modules():
        if isinstance(part, ConvEmbed):
            part.whole = True
    if isinstance(model, DenseFeatures):
        return Backbone(model)
    return _around(model, name)


def _around(model: Any, name: str, multiple: int = 1) -> Backbone:
    """The backbone of a model that was built, with its maps at the strides that are asked for."""
    if not hasattr(model, "forward_intermediates"):
        raise LinsightError(f"'{name}' gives no maps: take a host, as swin_tiny ('linsight list --models' shows them)")
    strides = [row["reduction"] for row in model.feature_info]
    if len(strides) > 1 and len(set(strides)) == 1:
        patch = strides[0]
        if not _is_power_of_two(patch):
            raise LinsightError(
                f"'{name}' has patches of {patch} pixels: a pyramid of strides 4 to 32 needs a power of two, pass "
                f"patch_size=16"
            )
        border = getattr(model.patch_embed, "border", 0)
        return SimplePyramid(Features.around(model, out_indices=1), patch, border=border)
    last = {stride: place for place, stride in enumerate(strides)}  # of maps at one stride the last
    coarse = [place for stride, place in last.items() if stride >= STRIDES[0]]
    places = coarse if len(coarse) >= len(STRIDES) else list(last.values())
    features = Features.around(model, out_indices=tuple(places))
    return Backbone(features, multiple=strides[places[-1]] if multiple > 1 else 1)


def _of_timm(name: str, attention: str, pretrained: bool, given: Mapping[str, Any]) -> Backbone:
    """The backbone of a model of timm that linsight has no host for. It may floor, so it is given whole strides."""
    if attention not in ("", "softmax"):
        raise LinsightError(f"attention={attention}: '{name}' is a model of timm without a linsight host, leave it out")
    with building(name, given):
        model: Any = create_fetched(name, pretrained=pretrained, num_classes=0, **given)
    model.in_chans = getattr(model, "in_chans", given["in_chans"])  # which not all classes of timm tell
    if model.pretrained_cfg.get("fixed_input_size"):
        raise LinsightError(f"'{name}' of timm takes images of one size alone: take a convnet of timm, or a host")
    return _around(model, name, STRIDES[-1])


def _is_timms(name: str) -> bool:
    """True for a model of timm that linsight has no host for."""
    base = _base(name)
    if {base, name} & {*VARIANTS, *ARCHITECTURES, *HOSTS} or not is_model(base):
        return False
    return model_entrypoint(base).__module__ not in TIMM_HOSTS


def _base(name: str) -> str:
    return name.partition(".")[0]


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _upsampling(width: int, steps: int, **factory: Any) -> nn.Sequential:
    """A map of twice the sides and half the channels, `steps` times."""
    parts: list[nn.Module] = []
    for step in range(steps):
        if step:
            parts += [LayerNorm2d(width, **factory), nn.GELU()]
        parts.append(nn.ConvTranspose2d(width, width // 2, 2, 2, **factory))
        width //= 2
    return nn.Sequential(*parts)


def _pooled(x: Tensor, size: int) -> Tensor:
    """The maximum of squares of `size`, those at the right and bottom of what there is."""
    high, wide = to_multiple(x.shape[2], size), to_multiple(x.shape[3], size)
    x = F.pad(x, (0, wide - x.shape[3], 0, high - x.shape[2]), value=torch.finfo(x.dtype).min)
    return F.max_pool2d(x, size)


def cropped(x: Tensor, height: Any, width: Any, stride: int) -> Tensor:
    """The part of a map that an image of this height and width has at a stride."""
    return cut(x, (height + stride - 1) // stride, (width + stride - 1) // stride)
