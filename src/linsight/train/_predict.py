"""The classes that a trained model sees in image files."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from linsight.errors import LinsightError
from linsight.fuse import fused
from linsight.runtime.device import pick_device, pick_dtype

from ._feeds import refuse
from ._sources import images_under
from ._trees import shown
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
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[Prediction], list[str]]:
    """Predictions for image files and for all images in folders; and a line for each that could not be read.

    Args:
        note: called with a line about what was left out, or not read as it is.

    Raises:
        LinsightError: a path that does not exist, a folder without images, no readable image at all, or a
            bad image where those are refused.
    """
    files: list[pathlib.Path] = []
    aside: list[str] = []
    for path in map(pathlib.Path, paths):
        if not os.path.exists(path):
            raise LinsightError(f"no such image or folder: {shown(path)}")
        found = images_under(path, aside) if path.is_dir() else [path]
        if not found:
            raise LinsightError(f"no image in the folder {shown(path)}{''.join(f' ({line})' for line in aside[-1:])}")
        files += found
    for line in aside:
        note(line)
    recipe = dataclasses.replace(trained.recipe, on_bad_image=on_bad_image)
    where = pick_device(device)
    dtype, _ = pick_dtype(amp, where)
    model = fused(trained.model.to(where).eval())
    source = _Files(files, trained.classes)
    samples = Samples(source, eval_transform(recipe, image_size(recipe, model)), recipe.in_chans, 0)
    normalise = Normalise(recipe, where)
    done: list[Prediction] = []
    bad: list[str] = []
    for batch in loader(samples, Batches(len(files), batch_size, shuffle=False), workers=0, pin=False):
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


def likeliest(trained: Trained, file: pathlib.Path, values: Tensor, indices: Tensor, top: int) -> Prediction:
    """The first `top` of the probabilities `values`, best first, of the classes `indices`."""
    names = dict(enumerate(trained.titles or trained.classes))
    top = min(top, len(names))
    classes = tuple(names.get(index, str(index)) for index in indices[:top].tolist())
    return Prediction(str(file), classes, tuple(values[:top].tolist()))


class _Files:
    """Image files as a source, whose targets are their own indices."""

    notes: tuple[str, ...] = ()

    def __init__(self, files: Sequence[pathlib.Path], classes: tuple[str, ...]) -> None:
        self.files, self.classes, self.targets = files, classes, list(range(len(files)))

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, mode: str) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return image.convert(mode)

    def name(self, index: int) -> str:
        return shown(self.files[index])[1:-1]
