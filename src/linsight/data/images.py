"""From sources to batches: decoding, augmentation, what happens to a bad image, and normalising on the device."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.queues import Queue
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from linsight.errors import ImageError, LinsightError
from linsight.recipe import Recipe
from linsight.records import shown
from linsight.runtime.launch import ALONE, Copy
from linsight.runtime.signals import outlive

from .pictures import MODES, Decoded, first_line
from .random import Shares, seed_sample, share
from .sources import Arrays, Source
from .watched import watched

MODE_OF = {channels: mode for mode, channels in MODES.items()}
_LARGEST = 16384  # side of an image before the crop of evaluation
_MANY = 1000  # images from which on it pays to start processes


class Batch(NamedTuple):
    """`images` `(B, C, H, W)` of uint8, `targets` `(B,)`; `bad` names what could not be read and why.

    targets: of a task that learns more than classes, a list with what it learns of each image.
    notes: what is to be told of images that were not read as they are, once for each.
    """

    images: Tensor
    targets: Any
    bad: list[str]
    notes: tuple[str, ...] = ()

    def part(self, number: int, of: int) -> "Batch":
        """A part of its images, number `number` of `of`, as `share` cuts them."""
        places = share(len(self.images), number, of)
        several = isinstance(self.targets, list)
        targets = [self.targets[place] for place in places] if several else self.targets[places]
        return Batch(self.images[places], targets, [])


@runtime_checkable
class Streaming(Protocol):
    """A source without random access, which makes batches itself."""

    def feed(self, samples: "Samples", batches: Any, **more: Any) -> Iterable[Batch]:
        """A loader to iterate once an epoch, by the epoch, start and size of `batches`."""
        ...


class Samples(Dataset[Any]):
    """Transformed images of a source, with their classes and with what is to be told of them, or a line about why not.

    The randomness of one depends on the seed and its item only: `(epoch, index)`, and the number of the copy where an
    epoch has several. fill, draft: as of `linsight.data.decode`.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        in_chans: int,
        seed: int,
        fill: float | None = None,
        draft: int = 0,
    ) -> None:
        if in_chans not in MODE_OF:
            raise LinsightError(f"in_chans={in_chans}: pictures are decoded whole in 1, 3 or 4 channels; use --stream")
        self.source, self.transform, self.mode, self.seed = source, transform, MODE_OF[in_chans], seed
        self.fill, self.draft = fill, draft

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, ...]) -> tuple[Tensor, Any, tuple[str, ...]] | str:
        return self.take(self.source, item[1], item)

    def take(self, source: Source, index: int, item: tuple[int, ...]) -> tuple[Tensor, Any, tuple[str, ...]] | str:
        """The image `index` of a source, transformed as `item`."""
        found = _decoded(source, index, self.mode, self.fill, self.draft)
        if isinstance(found, str):
            return found
        seed_sample(self.seed, *item)
        try:
            return *self.prepared(source, index, found.image), found.notes
        except ImageError as error:
            return str(error)

    def prepared(self, source: Source, index: int, image: Image.Image) -> tuple[Tensor, Any]:
        """The image as the model is given it, and what is learned of it; an ImageError where that is damaged."""
        return self.transform(image), source.targets[index]


def decode(source: Source, index: int, mode: str, fill: float | None = None) -> Image.Image | str:
    """The image in `mode`, or one line about why there is none. fill: the value of pixels that are no number."""
    found = _decoded(source, index, mode, fill)
    return found if isinstance(found, str) else found.image


def _decoded(source: Source, index: int, mode: str, fill: float | None, draft: int = 0) -> Decoded | str:
    try:
        return source.decoded(index, mode, fill, draft)
    except LinsightError as error:
        return str(error)
    except Exception as error:  # of whatever holds the images, as a disk that is gone
        return f"{source.name(index)}: cannot be read: {first_line(error)}"


def cached(
    source: Source, in_chans: int, fill: float | None = None, workers: int = 0
) -> tuple[Source, list[str], list[str]]:
    """A source decoded into memory; what was wrong with its bad images, and notes about the others.

    Bad images keep their places, so that the order of an epoch is the one of the source itself.
    """
    if isinstance(source, Arrays):
        return source, [], []
    images, bad, notes = list[Any](), list[str](), list[str]()
    for pixels, told_of in all_decoded(source, in_chans, fill, workers):
        images.append(pixels)
        if isinstance(pixels, str):
            bad.append(pixels)
        notes += told_of
    # one block of memory is shared by forked workers, thousands of small objects are not
    good = [pixels for pixels in images if not isinstance(pixels, str)]
    if len({pixels.shape for pixels in good}) == 1:
        block = iter(np.stack(good))
        images = [pixels if isinstance(pixels, str) else next(block) for pixels in images]
    names = [source.name(index) for index in range(len(source))]
    found = Arrays(images, source.targets, source.classes, names=names)
    found.shards = source.shards
    return found, bad, notes


class _Decoding(Dataset[Any]):
    """The decoded pixels of a source, or a line about why there are none, with notes."""

    def __init__(self, source: Source, mode: str, fill: float | None) -> None:
        self.source, self.mode, self.fill = source, mode, fill

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, tuple[str, ...]]:
        found = _decoded(self.source, index, self.mode, self.fill)
        return (found, ()) if isinstance(found, str) else (np.asarray(found.image), found.notes)


def all_decoded(
    source: Source, in_chans: int, fill: float | None, workers: int
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The pixels of each image of a source, uint8 `(H, W)` or `(H, W, C)`, or a line about why there are none; notes.

    workers: processes that decode, where there are many images.
    """
    decoding = _Decoding(source, MODE_OF[in_chans], fill)
    many = workers if len(source) >= _MANY else 0
    feed = DataLoader(
        decoding,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=many,
        worker_init_fn=start_worker,
        prefetch_factor=16 if many else None,
        generator=torch.Generator(),
    )
    yield from watched(
        feed,
        "a process that decodes images was killed, most likely for want of memory: set workers lower, or cache=off",
    )


def _as_it_is(item: Any) -> Any:
    return item


def collate(samples: list[tuple[Tensor, Any, tuple[str, ...]] | str]) -> Batch:
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
    """timm's transform for evaluation, to uint8 `(C, H, W)`.

    Raises:
        LinsightError: images would be made so large, for a small crop of them, that it cannot be meant.
    """
    side = round(max(size) / recipe.crop_pct)
    if side > max(_LARGEST, 2 * max(size)):
        raise LinsightError(
            f"crop_pct={recipe.crop_pct:g} at img_size={max(size)} makes images of {side} pixels before they are "
            f"cropped, and {_LARGEST} are the limit: set crop_pct higher, 0.875 is usual"
        )
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
        raise LinsightError(
            f"auto_augment={shown(recipe.auto_augment)} is no policy of timm: {shown(str(error), str)}"
        ) from error
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


def start_worker(_: int) -> None:
    """Make a worker process outlive the signals that stop the run, which ends it, and end where it cannot answer."""
    outlive()  # Ctrl-C and `timeout` reach the whole group
    # for want of shared memory or of open files a batch is not sent, and the main process would wait for it for ever
    Queue._on_queue_feeder_error = staticmethod(_end_unheard)  # type: ignore[attr-defined]


def _end_unheard(error: Exception, item: Any) -> None:
    os._exit(1)


def loader(
    samples: Samples,
    batches: Iterable[list[tuple[int, ...]]],
    *,
    workers: int,
    pin: bool,
    collate: Callable[[list[Any]], Batch] = collate,
    copy: Copy = ALONE,
) -> Iterable[Batch]:
    """A loader to iterate once an epoch. A source that is a stream has its own, which goes by `batches`, too.

    copy: the process, of those that share each batch.
    """
    if isinstance(samples.source, Streaming):
        ranks = {"rank": copy.rank, "world": copy.world}
        return samples.source.feed(samples, batches, workers=workers, pin=pin, collate=collate, **ranks)
    return DataLoader(
        samples,
        batch_sampler=batches if copy.world == 1 else Shares(batches, copy.rank, copy.world),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=start_worker,
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
