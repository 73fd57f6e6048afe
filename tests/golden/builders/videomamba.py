"""VideoMamba's mixer on tokens, and whole models, of images and of videos."""

import re
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.models.video import VideoMamba


def bimamba(spec: dict[str, Any]) -> Run:
    """The mixer."""
    x, config = tensor(spec["input_shape"]), spec["config"]
    layer = linsight.create_attention("bimamba", config["d_model"], 1, states=config["d_state"])
    inputs = {"input": x.requires_grad_()} if "gradients" in spec else {}
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])), inputs=inputs)


def videomamba(spec: dict[str, Any]) -> Run:
    """The model of clips (B, 3, T, H, W), made for their size, or that of images, by its name."""
    clips, config = tensor(spec["input_shape"]), spec.get("config", {})
    shapes = dict(spec["state_dict"])
    if clips.ndim == 4:
        images = linsight.create_model(re.split(r"_img\d", spec["name"])[0], img_size=clips.shape[-1])
        return Run(images, lambda: images(clips))
    depth = sum(key.endswith("mixer.A_log") for key in shapes)
    made = {"frames": config["num_frames"], "tubelet": config["kernel_size"], "img_size": config["img_size"]}
    width = {"embed_dim": shapes["cls_token"][2], "depth": depth, "num_classes": config["num_classes"]}
    model = VideoMamba(**width, **made)
    return Run(model, lambda: model(clips))


BUILDERS = {"bimamba_": bimamba, "videomamba_": videomamba}
