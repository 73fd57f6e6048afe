"""From sources to batches: decoding, augmentation, what happens to a bad image, and normalising on the device."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.signals import outlive

from ._sources import Arrays, Source
from .random import Batches, seed_sample

_MODES = {1: "L", 3: "RGB"}
# Errors of Pillow for files that are damaged, no images, or bombs.
_BAD = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Batch(NamedTuple):
    """`images` `(B, C, H, W)` of uint8, `targets` `(B,)`; `bad` names what could not be read and why."""

    images: Tensor
    targets: Tensor
    bad: list[str]


class Samples(Dataset[Any]):
    """Transformed images of a source. The randomness of one depends on the seed and its item only: `(epoch, index)`,
    and the number of the copy where an epoch has several.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], in_chans: int, seed: int) -> None:
        self.source, self.transform, self.mode, self.seed = source, transform, _MODES[in_chans], seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, int] | str:
        index = item[1]
        image = decode(self.source, index, self.mode)
        if isinstance(image, str):
            return image
        seed_sample(self.seed, *item)
        return self.transform(image), self.source.targets[index]


def decode(source: Source, index: int, mode: str) -> Image.Image | str:
    """The image in `mode`, or one line about why there is none."""
    try:
        return source.image(index, mode)
    except _BAD as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        return f"{source.name(index)}: {reason}"


def cached(source: Source, in_chans: int) -> tuple[Source, list[str]]:
    """A source decoded into memory, without its bad images, and what was wrong with those."""
    if isinstance(source, Arrays):
        return source, []
    images, targets, bad = [], [], []
    for index, target in enumerate(source.targets):
        image = decode(source, index, _MODES[in_chans])
        if isinstance(image, str):
            bad.append(image)
        else:
            images.append(np.asarray(image))
            targets.append(target)
    # one block of memory is shared by forked workers, thousands of small objects are not
    same = len({image.shape for image in images}) == 1
    block: Sequence[Any] = list(np.stack(images)) if same else images
    return Arrays(block, targets, source.classes, "cached image "), bad


def collate(samples: list[tuple[Tensor, int] | str]) -> Batch:
    """A batch of the good samples."""
    bad = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    return Batch(images, torch.tensor([target for _, target in good], dtype=torch.long), bad)


def statistics(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel, in 0..1."""
    grey = recipe.in_chans == 1
    mean = recipe.mean or ((0.5,) if grey else IMAGENET_DEFAULT_MEAN)
    return mean, recipe.std or ((0.5,) if grey else IMAGENET_DEFAULT_STD)


def eval_transform(recipe: Recipe, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """timm's transform for evaluation, to uint8 `(C, H, W)`."""
    return create_transform(
        (recipe.in_chans, *size),
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.eval_crop,
        use_prefetcher=True,
    )


def train_transform(recipe: Recipe, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """timm's augmentations, to uint8 `(C, H, W)`; erasing and mixing follow on the batch."""
    own_crop = recipe.crop_mode in ("pad", "none")
    try:
        crop, colour, final = create_transform(
            (recipe.in_chans, *size),
            is_training=True,
            separate=True,
            use_prefetcher=True,
            train_crop_mode=None if own_crop else recipe.crop_mode,
            scale=recipe.scale,
            ratio=recipe.ratio,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter or None,
            auto_augment=recipe.auto_augment,
            interpolation=recipe.interpolation,
            mean=statistics(recipe)[0],
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise LinsightError(f"auto_augment='{recipe.auto_augment}' is no policy of timm: {error}") from error
    if own_crop:
        head = eval_transform(recipe, size).transforms[:-1]  # type: ignore[attr-defined]
        if recipe.crop_mode == "pad":
            head.append(transforms.RandomCrop(size, padding=recipe.crop_padding))
        crop.transforms[:1] = head
    for augment in colour.transforms:
        for op in getattr(augment, "ops", ()):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    return transforms.Compose([*crop.transforms, *colour.transforms, *final.transforms])


def _posterize(image: Image.Image, bits_to_keep: int, **timm_args: Any) -> Image.Image:
    """Posterize, to one bit at least: timm's policies may ask for 0, which newer versions of Pillow refuse."""
    return posterize(image, max(bits_to_keep, 1), **timm_args)


def _start_worker(_: int) -> None:
    outlive()  # Ctrl-C and `timeout` reach the whole group


def loader(samples: Samples, batches: Batches, *, workers: int, pin: bool) -> Iterable[Batch]:
    """A loader to iterate once an epoch."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # its own, so that it draws nothing from ours
    )


class Normalise:
    """uint8 images to normalised floats on the device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        mean, std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in statistics(recipe))
        self.device, self.mean, self.scale = device, mean * 255, 1 / (std * 255)
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `(B, C, H, W)` -> float32, normalised, on the device."""
        images = images.to(self.device, non_blocking=True).float().sub_(self.mean).mul_(self.scale)
        return images.contiguous(memory_format=self.format)
