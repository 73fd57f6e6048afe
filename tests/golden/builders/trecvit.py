"""TRecViT: its temporal block, its encoder, and whole models."""

from typing import Any

from golden.spec import Run, tensor
from linsight import Grid
from linsight.models.video import TemporalBlock, TRecViT
from linsight.models.video.trecvit import Encoder


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments that the configuration of a case tells."""
    return {"depth": config["depth"], "num_heads": config["num_heads"], "mlp_dim": config["mlp_dim"]}


def lru(spec: dict[str, Any]) -> Run:
    """The temporal block on sequences of frames."""
    x, config = tensor(spec["input_shape"]), spec["config"]
    block = TemporalBlock(config["width"], config["num_heads"], config["conv1d_temporal_width"])
    return Run(block, lambda: block(x))


def encoder(spec: dict[str, Any]) -> Run:
    """The layers, on tokens (B, T, N, C) of which the first is the class token."""
    x, config = tensor(spec["input_shape"]), spec["config"]
    grid = Grid(1, x.shape[2] - 1, 1)
    conv = config["conv1d_temporal_width"]
    made = Encoder(config["width"], **sizes(config), grid=grid[:2], conv_width=conv)
    return Run(made, lambda: made(x, grid))


def trecvit(spec: dict[str, Any]) -> Run:
    """The model, made for frames of the size that it is given."""
    clips, config = tensor(spec["input_shape"]), spec["config"]
    size = {"img_size": tuple(clips.shape[-2:]), "num_classes": config["num_classes"]}
    model = TRecViT(embed_dim=config["width"], **sizes(config), **size)
    return Run(model, lambda: model(clips))


BUILDERS = {"trecvit_": trecvit, "trecvit_lru_": lru, "trecvit_encoder_": encoder}
