"""The classes that a trained model sees in image files."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from linsight.errors import LinsightError
from linsight.fuse import fused
from linsight.recipe import change
from linsight.runtime.device import pick_device, pick_dtype

from ._feeds import refuse
from ._sources import images_under
from .evaluation import probabilities
from .images import Normalise, Samples, eval_transform, loader
from .model import Trained, image_size
from .random import Batches


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image file, best first, with their probabilities."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    trained: Trained,
    paths: Sequence[str | pathlib.Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    amp: str = "auto",
    on_bad_image: str = "skip",
    img_size: Any = None,
) -> tuple[list[Prediction], list[str]]:
    """Predictions for image files and for all images in folders; and a line for each that could not be read.

    img_size: of the images, a side or height and width; by default, that of the run.

    Raises:
        LinsightError: a path that does not exist, a folder without images, no readable image at all, or a
            bad image where those are refused.
    """
    settings = {"batch_size": batch_size, "device": device, "amp": amp, "on_bad_image": on_bad_image}
    settings["img_size"] = trained.recipe.img_size if img_size is None else img_size
    recipe = change(trained.recipe, settings)
    require_top(top)
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise LinsightError(f"no such image or folder: '{path}'")
        found = images_under(path) if path.is_dir() else [path]
        if not found:
            raise LinsightError(f"no image in the folder '{path}'")
        files += found
    if not files:
        raise LinsightError("no image is given: name image files, or folders of them")
    where = pick_device(recipe.device)
    dtype, _ = pick_dtype(recipe.amp, where)
    model = fused(trained.model.to(where).eval())
    source = _Files(files, trained.classes)
    samples = Samples(source, eval_transform(recipe, image_size(recipe, model)), recipe.in_chans, 0)
    normalise = Normalise(recipe, where)
    done: list[Prediction] = []
    bad: list[str] = []
    for batch in loader(samples, Batches(len(files), recipe.batch_size, shuffle=False), workers=0, pin=False):
        bad += batch.bad
        refuse(recipe, batch.bad)
        if not len(batch.images):
            continue
        best = probabilities(model, batch.images, normalise, dtype).sort(descending=True)
        for target, values, indices in zip(batch.targets.tolist(), *best, strict=True):
            done.append(likeliest(trained, files[target], values, indices, top))
    if not done:
        raise LinsightError(f"no image could be read: {bad[0]}")
    return done, bad


def require_top(top: int) -> None:
    """Raise a LinsightError unless `top` classes can be told."""
    if not isinstance(top, int) or top < 1:
        raise LinsightError(f"top={top!r} must be a whole number, 1 or more")


def likeliest(trained: Trained, file: pathlib.Path, values: Tensor, indices: Tensor, top: int) -> Prediction:
    """The first `top` of the probabilities `values`, best first, of the classes `indices`."""
    names = dict(enumerate(trained.titles or trained.classes))
    top = min(top, len(names))
    classes = tuple(names.get(index, str(index)) for index in indices[:top].tolist())
    return Prediction(str(file), classes, tuple(values[:top].tolist()))


class _Files:
    """Image files as a source, whose targets are their own indices."""

    def __init__(self, files: Sequence[pathlib.Path], classes: tuple[str, ...]) -> None:
        self.files, self.classes, self.targets = files, classes, list(range(len(files)))

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, mode: str) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return image.convert(mode)

    def name(self, index: int) -> str:
        return str(self.files[index])
