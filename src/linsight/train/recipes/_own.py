"""Our own recipes: two that train in minutes on a CPU, one for photographs, and one that starts from weights."""

from linsight.tasks import ClassifyRecipe

from ._base import IMAGENET, Shipped

FINETUNE = "finetune"  # the recipe of a run that starts from weights and names none

_DIGITS = ClassifyRecipe(
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
    cache="memory",
)

_CIFAR10 = ClassifyRecipe(
    model="inline_compact_tiny",
    img_size=(32,),
    data="torch/cifar10",
    crop_mode="pad",
    crop_padding=4,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
    crop_pct=1.0,
    eval_crop="center",
    cutmix=1.0,
    mixup_prob=0.5,
    re_prob=0.1,
    re_mode="const",
    opt="nmuon",
    lr=4e-3,
    weight_decay=0.1,
    epochs=26,
    warmup_epochs=2,
    batch_size=256,
    smoothing=0.1,
    channels_last=True,
    cache="memory",
)

_PHOTOS = IMAGENET.changed(data="photos", epochs=100, warmup_epochs=5, batch_size=128)

# Milder images than from scratch, and small rates: 1e-4 at the head, 3 % of that at the first of 12 blocks.
_FINETUNE = _PHOTOS.changed(
    scale=(0.25, 1.0),
    auto_augment="rand-m7-mstd0.5-inc1",
    re_prob=0.1,
    mixup=0.0,
    cutmix=0.0,
    layer_decay=0.75,
    lr=1e-4,
    lr_base_batch=0,
    new_lr_scale=10.0,
    epochs=20,
    warmup_epochs=1,
    warmup_lr=1e-6,
    min_lr=1e-6,
    batch_size=64,
)

OWN = {
    "digits": Shipped(
        "InLine on scikit-learn's 8x8 handwritten digits: 99 % top-1, 40 seconds on 2 CPU cores. linsight train",
        _DIGITS,
    ),
    "cifar10": Shipped(
        "InLine on CIFAR-10: 88 % top-1, an hour on 2 CPU cores with bfloat16; a start for other small images. "
        "linsight train --recipe cifar10 --data FOLDER",
        _CIFAR10,
    ),
    "photos": Shipped(
        "InLine-DeiT-T from scratch on photographs of one's own, on one device. "
        "linsight train --recipe photos --data FOLDER",
        _PHOTOS,
    ),
    FINETUNE: Shipped(
        "fine-tuning of what --init names, at small rates that decay with depth; of a run, its model and images are "
        "kept. linsight train --recipe finetune --init WEIGHTS --data FOLDER",
        _FINETUNE,
    ),
}
