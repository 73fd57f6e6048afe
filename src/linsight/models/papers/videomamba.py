"""VideoMamba (arXiv 2403.06977): its models of images, in the ViT host, and of videos.

GMACs are counted here, the paper says 1.1, 4.3, 12.7 and 16.9. Top-1 of videos are of 3 crops and 4 clips
(Kinetics-400) at 224 pixels, by frames, and not of masked pre-training. The published start divides the last map of
each mixer by the root of the depth, which is not done here. The middle and the base model were distilled from the
small one. Of the training on videos, that of the tiny and the middle model is known: 70 and 50 epochs of AdamW at
2e-4, weight decay 0.1 and 0.05, stochastic depth 0.1 and 0.8.
"""

from functools import partial
from typing import Any

from linsight.attention import mechanism
from linsight.attention.parts.wide import WideRMSNorm

from ..registry import add_variants
from ..rows import Training, Variant, figures, trained
from ..video.create import VideoModel, add_video_models
from ..video.videomamba import VideoMamba

_CODE = "OpenGVLab/VideoMamba"
_HUB = f"https://huggingface.co/{_CODE}/resolve/main/videomamba_"
_PAPER = mechanism("bimamba").paper
# Width, depth, parameters in millions, GMACs and top-1 of images at 224 pixels; top-1 of Kinetics-400 by frames.
_SIZES: dict[str, tuple[int, int, float, float, float, dict[int, float]]] = {
    "tiny": (192, 24, 7.148, 1.293, 76.9, {8: 76.9, 16: 78.1, 32: 78.8, 64: 79.6}),
    "small": (384, 24, 25.797, 4.851, 81.2, {8: 79.3, 16: 80.8, 32: 81.5, 64: 81.8}),
    "middle": (576, 32, 74.217, 14.205, 82.8, {8: 80.6, 16: 81.9, 32: 82.4, 64: 82.8}),
    "base": (768, 24, 97.598, 18.766, 82.7, {}),
}


_NORM = partial(WideRMSNorm, eps=1e-5)


def _trained(batch: int, drop_path: float, last: float = 1e-5, **changes: Any) -> Training:
    """By DeiT's script, in which the peak scales with the batch, and the rates of warm-up and of the end do not."""
    rates: dict[str, Any] = {"warmup_lr": 1e-6 * 512 / (8 * batch), "min_lr": last * 512 / (8 * batch)}
    return trained("deit", batch, drop_path, clip_grad=5.0, **rates, **changes)


def _training(size: str) -> tuple[Training, ...]:
    if size == "tiny":
        return (_trained(512, 0.0, weight_decay=0.1, aug_repeats=1, auto_augment="v0"),)
    if size == "small":
        return (_trained(128, 0.15, note="batch not known, so that of the middle model"),)
    if size == "middle":
        return (_trained(128, 0.5, 5e-6, warmup_epochs=20, note="published distilled from the small model"),)
    return ()


add_variants(
    *(
        Variant(
            f"videomamba_{size}",
            "vit_tiny",
            "videomamba",
            args={"embed_dim": dim, "depth": depth, "num_heads": dim // 64, "norm_layer": _NORM},
            published=figures(top1, params, gmacs),
            training=_training(size),
            weights=f"{_HUB}{size[0]}16_in1k_res224.pth",
        )
        for size, (dim, depth, params, gmacs, top1, _) in _SIZES.items()
    ),
    code=_CODE,
)
add_video_models(
    *(
        VideoModel(
            f"videomamba_video_{size}",
            VideoMamba,
            {"embed_dim": dim, "depth": depth},
            published={"kinetics400": found} if found else {},
            paper=_PAPER,
            code=_CODE,
            weights=f"{_HUB}{size[0]}16_k400_f8_res224.pth" if found else "",
        )
        for size, (dim, depth, *_, found) in _SIZES.items()
    )
)
