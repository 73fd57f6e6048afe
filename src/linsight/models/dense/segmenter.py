"""Segmenters: a backbone, a decoder, and perhaps an auxiliary head, which give the classes of every pixel."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import CapabilityError, LinsightError

from ..parts.dense import inside
from ..steps import Decode, StreamPlan
from .backbone import Backbone, pyramid
from .decoders import Auxiliary, Decoder, create_decoder
from .decoders.base import enlarged
from .decoders.table import DECODERS, decoder_row


class Segmented(NamedTuple):
    """The logits of a segmenter in training, both `(B, classes, H, W)`.

    auxiliary: of the auxiliary head, whose loss counts `auxiliary_weight` of the segmenter; None where there is none.
    """

    main: Tensor
    auxiliary: Tensor | None = None


class Segmenter(nn.Module):
    """Images `(B, in_chans, H, W)` of any size -> logits `(B, num_classes, H, W)`, of each pixel.

    Logits of the decoder are brought to the size of the images bilinearly, corners not aligned. In training mode there
    are those of the auxiliary head beside them, as `Segmented`.
    """

    published_part = "backbone"  # published checkpoints fill it alone: their heads are of other libraries

    def __init__(self, backbone: Backbone, decoder: Decoder, auxiliary: Auxiliary | None = None) -> None:
        super().__init__()
        self.backbone, self.decoder, self.auxiliary = backbone, decoder, auxiliary
        for head in filter(None, (decoder, auxiliary)):
            if head.channels != backbone.channels or head.num_classes != decoder.num_classes:
                raise LinsightError(
                    f"a head for maps of {_listed(head.channels)} channels and {head.num_classes} classes does not go "
                    f"with maps of {_listed(backbone.channels)} and {decoder.num_classes} classes: make it for those"
                )
            if head.strides != backbone.strides:
                raise LinsightError(
                    f"a head for maps at strides {_listed(head.strides)} does not go with maps at "
                    f"{_listed(backbone.strides)}: make it with strides=backbone.strides"
                )
        self.num_classes, self.in_chans = decoder.num_classes, backbone.in_chans
        self.num_features = self.head_hidden_size = decoder.width
        heads = ("decoder.classifier", *(["auxiliary.classifier"] if auxiliary else []))
        cfg = {**backbone.pretrained_cfg, "num_classes": self.num_classes, "classifier": heads}
        self.pretrained_cfg = self.default_cfg = cfg

    def stream_plan(self) -> StreamPlan:
        """The steps of an image in tiles, and how its maps are decoded.

        Raises:
            CapabilityError: the backbone or the decoder sees all of an image at once.
        """
        plan, decoder = self.backbone.stream_plan(), self.decoder
        strides = tuple(self.backbone.model.feature_info.reduction())
        if decoder.margin is None or (strides != self.backbone.strides and decoder.sees_all):
            able = ", ".join(name for name, row in DECODERS.items() if row.make.margin is not None)
            raise CapabilityError(
                f"a {type(decoder).__name__} on this backbone sees an image at once; these decoders do not: {able}"
            )
        step = max(*strides, *self.backbone.strides)
        begin = decoder.coarsest if decoder.sees_all else None
        return plan._replace(decode=Decode(self.decoded, strides, step, decoder.margin, self.num_classes, begin))

    def decoded(self, maps: Sequence[Tensor], size: Sequence[Any]) -> Tensor:
        """Logits `(B, classes, *size)`, of the maps that the model of the backbone gives of images of that size.

        The last is as the decoder's `coarsest` makes it.
        """
        decoder = self.decoder
        return enlarged(decoder.classified(decoder.joined(self.backbone.spread(maps, *size))), decoder.strides[0], size)

    @property
    def auxiliary_weight(self) -> float:
        """The weight of the auxiliary head's loss beside that of the decoder; 0 where there is none."""
        return 0.0 if self.auxiliary is None else self.auxiliary.weight

    def forward(self, x: Tensor) -> Tensor | Segmented:
        """Logits at the size of the images; `Segmented` in training mode."""
        maps = self.backbone(x)  # which looks at what came
        size = x.shape[2:]
        main = enlarged(self.decoder(maps), self.decoder.strides[0], size)
        if not self.training:
            return main
        head = self.auxiliary
        return Segmented(main, None if head is None else enlarged(head(maps), head.strides[head.place], size))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants kept from weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay: the backbone's; heads are in the last one."""
        return {name: inside("backbone.", rule) for name, rule in self.backbone.group_matcher(coarse).items()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of the backbone in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Resample position tables of the backbone, for good. Images of any size work without it, too."""
        self.backbone.set_input_size(*args, **kwargs)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last convolution of the decoder."""
        return self.decoder.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """New last convolutions, of the auxiliary head, too, for `num_classes` classes."""
        checked_classes(num_classes)
        for head in filter(None, (self.decoder, self.auxiliary)):
            head.reset_classifier(num_classes)
        self.num_classes = self.pretrained_cfg["num_classes"] = num_classes


def create_segmenter(
    backbone: str,
    decoder: str = "mlp",
    num_classes: int = 150,
    *,
    width: int | None = None,
    auxiliary: bool | None = None,
    dropout: float = 0.1,
    decoder_options: Mapping[str, Any] | None = None,
    attention: str | None = None,
    attention_options: Mapping[str, Any] | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    pretrained: bool = False,
    **model_args: Any,
) -> Segmenter:
    """A model of semantic segmentation, by the names of a backbone and a decoder, for images of any size.

    Args:
        backbone: as of `create_model`, with any mechanism, or a model of timm, "timm/NAME".
        decoder: a name in `linsight.models.dense.DECODERS`.
        num_classes: of each pixel; by default those of ADE20K.
        width: channels of the decoder, by default those it was published with.
        auxiliary: an auxiliary head, whose logits are there in training; None for a decoder that was published so.
        dropout: of the channels in front of the classes.
        decoder_options: keyword arguments of the decoder.
        attention, attention_options, in_chans, img_size, drop_path_rate, pretrained: of the backbone, as of
            `linsight.models.dense.pyramid`.
        model_args: of the backbone, and `device` and `dtype` of all.

    Raises:
        UnknownNameError: no such backbone, decoder or mechanism; the nearest is offered.
        LinsightError: they cannot be had with these arguments.
    """
    row = decoder_row(decoder)
    checked_classes(num_classes)
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise LinsightError(f"dropout={dropout} must be a rate from 0 to below 1")
    maps = pyramid(
        backbone,
        attention=attention,
        attention_options=attention_options,
        in_chans=in_chans,
        img_size=img_size,
        drop_path_rate=drop_path_rate,
        pretrained=pretrained,
        **model_args,
    )
    like = next(maps.parameters())
    shared: dict[str, Any] = {"strides": maps.strides, "dropout": dropout, "device": like.device, "dtype": like.dtype}
    main = create_decoder(decoder, maps.channels, num_classes, width=width, **shared, **(decoder_options or {}))
    beside = row.auxiliary if auxiliary is None else auxiliary
    return Segmenter(maps, main, Auxiliary(maps.channels, num_classes, **shared) if beside else None)


def checked_classes(num_classes: Any) -> None:
    """Raise unless pixels can have so many classes."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise LinsightError(f"num_classes={num_classes} must be a whole number, 1 or more: each pixel has a class")


def _listed(channels: tuple[int, ...]) -> str:
    return ", ".join(map(str, channels))
