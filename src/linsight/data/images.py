"""From sources to batches: decoding, augmentation, what happens to a bad image, and normalising on the device."""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.signals import outlive

from .pictures import MODES, Decoded, first_line
from .random import seed_sample, share
from .sources import Arrays, Source

MODE_OF = {channels: mode for mode, channels in MODES.items()}


class Batch(NamedTuple):
    """`images` `(B, C, H, W)` of uint8, `targets` `(B,)`; `bad` names what could not be read and why.

    notes: what is to be told of images that were not read as they are, once for each.
    """

    images: Tensor
    targets: Tensor
    bad: list[str]
    notes: tuple[str, ...] = ()

    def part(self, number: int, of: int) -> "Batch":
        """One of `of` parts of its images, as `share` cuts them."""
        places = share(len(self.images), number, of)
        return Batch(self.images[places], self.targets[places], [])


class Samples(Dataset[Any]):
    """Transformed images of a source, with their classes and with what is to be told of them, or a line about why not.

    The randomness of one depends on the seed and its item only: `(epoch, index)`, and the number of the copy where an
    epoch has several. fill: the value of pixels that are no number.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        in_chans: int,
        seed: int,
        fill: float | None = None,
    ) -> None:
        if in_chans not in MODE_OF:
            raise LinsightError(f"in_chans={in_chans}: pictures are decoded whole in 1, 3 or 4 channels; use --stream")
        self.source, self.transform, self.mode, self.seed = source, transform, MODE_OF[in_chans], seed
        self.fill = fill

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, int, tuple[str, ...]] | str:
        index = item[1]
        found = _decoded(self.source, index, self.mode, self.fill)
        if isinstance(found, str):
            return found
        seed_sample(self.seed, *item)
        return self.transform(found.image), self.source.targets[index], found.notes


def decode(source: Source, index: int, mode: str, fill: float | None = None) -> Image.Image | str:
    """The image in `mode`, or one line about why there is none. fill: the value of pixels that are no number."""
    found = _decoded(source, index, mode, fill)
    return found if isinstance(found, str) else found.image


def _decoded(source: Source, index: int, mode: str, fill: float | None) -> Decoded | str:
    try:
        return source.decoded(index, mode, fill)
    except LinsightError as error:
        return str(error)
    except Exception as error:  # of whatever holds the images, as a disk that is gone
        return f"{source.name(index)}: cannot be read: {first_line(error)}"


def cached(source: Source, in_chans: int, fill: float | None = None) -> tuple[Source, list[str], list[str]]:
    """A source decoded into memory, without its bad images; what was wrong with those, and notes about the others."""
    if isinstance(source, Arrays):
        return source, [], []
    images, targets, bad, notes = [], [], [], list[str]()
    for index, target in enumerate(source.targets):
        found = _decoded(source, index, MODE_OF[in_chans], fill)
        if isinstance(found, str):
            bad.append(found)
        else:
            images.append(np.asarray(found.image))
            targets.append(target)
            notes += found.notes
    # one block of memory is shared by forked workers, thousands of small objects are not
    same = len({image.shape for image in images}) == 1
    block: Sequence[Any] = list(np.stack(images)) if same else images
    return Arrays(block, targets, source.classes, "cached image "), bad, notes


def collate(samples: list[tuple[Tensor, int, tuple[str, ...]] | str]) -> Batch:
    """A batch of the good samples."""
    bad = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([image for image, *_ in good]) if good else torch.empty(0, dtype=torch.uint8)
    targets = torch.tensor([target for _, target, _ in good], dtype=torch.long)
    return Batch(images, targets, bad, tuple(note for *_, notes in good for note in notes))


def told(notes: Iterable[str]) -> list[str]:
    """A line for each kind of note, with its count."""
    counts = collections.Counter(notes)
    return [f"{count} image{'s have' if count > 1 else ' has'} {note}" for note, count in counts.items()]


def statistics(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel, in 0..1."""
    colour, same = recipe.in_chans == 3, (0.5,) * recipe.in_chans
    mean = recipe.mean or (IMAGENET_DEFAULT_MEAN if colour else same)
    return mean, recipe.std or (IMAGENET_DEFAULT_STD if colour else same)


def eval_transform(recipe: Recipe, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """timm's transform for evaluation, to uint8 `(C, H, W)`."""
    return create_transform(
        (recipe.in_chans, *size),
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.eval_crop,
        use_prefetcher=True,
        mean=statistics(recipe)[0],
    )


def whole_image(image: Image.Image) -> Tensor:
    """An image as it is, uint8 `(C, H, W)`."""
    return pil_to_tensor(image)


def train_transform(recipe: Recipe, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """timm's augmentations, to uint8 `(C, H, W)`; erasing and mixing follow on the batch."""
    if recipe.in_chans == 4 and (recipe.auto_augment or recipe.color_jitter):
        raise LinsightError("augmentation of colours knows no four channels: pass auto_augment=none and color_jitter=0")
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


def loader(
    samples: Samples,
    batches: Iterable[list[tuple[int, ...]]],
    *,
    workers: int,
    pin: bool,
    collate: Callable[[list[Any]], Batch] = collate,
) -> Iterable[Batch]:
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


class Unprepared(Normalise):
    """uint8 images as they are, on the device, for a model that prepares them itself."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `(B, C, H, W)` -> the same, on the device."""
        return images.to(self.device, non_blocking=True)
