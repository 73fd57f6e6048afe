"""The shipped recipes, as data. `about` says what to expect, on what, and the command."""

import dataclasses

from ._recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A recipe and what is known of its result."""

    about: str
    recipe: Recipe


_DIGITS = Recipe(
    model="inline_compact_pico",
    img_size=(8,),
    in_chans=1,
    val_fraction=0.2,
    crop_mode="pad",
    crop_padding=1,
    hflip=0.0,
    interpolation="bilinear",
    mean=(0.3053,),
    std=(0.3763,),
    crop_pct=1.0,
    lr=3e-3,
    epochs=15,
    warmup_epochs=2,
    batch_size=64,
    clip_grad=1.0,
    smoothing=0.1,
    workers=0,
    cache=True,
)

_CIFAR10 = Recipe(
    model="inline_compact_nano",
    img_size=(32,),
    data="torch/cifar10",
    crop_mode="pad",
    crop_padding=4,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
    crop_pct=1.0,
    eval_crop="center",
    opt="nmuon",
    lr=4e-3,
    weight_decay=0.1,
    epochs=16,
    warmup_epochs=2,
    batch_size=256,
    smoothing=0.1,
    channels_last=True,
    cache=True,
)

# InLine-DeiT, arXiv 2412.06590: 300 epochs from scratch on 8 GPUs; the rates are for a batch of 512.
_INLINE_DEIT = Recipe(
    model="inline_deit_tiny",
    drop_path=0.1,
    data="imagenet",
    color_jitter=0.4,
    auto_augment="rand-m9-mstd0.5-inc1",
    re_prob=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    lr=5e-4,
    lr_base_batch=512,
    clip_grad=5.0,
    epochs=300,
    warmup_epochs=20,
    warmup_lr=5e-7,
    min_lr=5e-6,
    batch_size=4096,
)


def _inline_deit(size: str, batch_size: int, top1: float) -> Shipped:
    about = (
        f"InLine-DeiT on ImageNet-1K as published: {top1} % top-1 after 300 epochs, at a batch of {batch_size} "
        f"(8 GPUs of {batch_size // 8}). linsight train --recipe inline_deit_{size} --data IMAGENET"
    )
    return Shipped(about, dataclasses.replace(_INLINE_DEIT, model=f"inline_deit_{size}", batch_size=batch_size))


RECIPES: dict[str, Shipped] = {
    "digits": Shipped(
        "InLine on scikit-learn's 8x8 handwritten digits: 99 % top-1, 40 seconds on 2 CPU cores. linsight train",
        _DIGITS,
    ),
    "cifar10": Shipped(
        "InLine on CIFAR-10: 84 % top-1, an hour on 2 CPU cores; a start for other small images. "
        "linsight train --recipe cifar10 --data FOLDER",
        _CIFAR10,
    ),
    "photos": Shipped(
        "InLine-DeiT-T from scratch on photographs of one's own, on one device. "
        "linsight train --recipe photos --data FOLDER",
        dataclasses.replace(_INLINE_DEIT, data="photos", epochs=100, warmup_epochs=5, batch_size=128),
    ),
    "inline_deit_tiny": _inline_deit("tiny", 4096, 74.5),
    "inline_deit_small": _inline_deit("small", 1024, 80.2),
    "inline_deit_base": _inline_deit("base", 512, 82.3),
}
