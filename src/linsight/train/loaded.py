"""A trained run in Python: its model, with all that it takes to use it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from linsight.data import decode
from linsight.fuse import fused
from linsight.recipe import Recipe
from linsight.runtime.device import pick_device

from ._predict import Prediction, likeliest
from .evaluation import probabilities
from .images import MODE_OF, Normalise, eval_transform, statistics
from .model import WEIGHTS, Trained, image_size, load_trained
from .run import SUMMARY, kept_recipe

_CPU = torch.device("cpu")


class Transform:
    """Makes of an image what a trained model takes: it is resized, cropped and normalised as in the run's evaluation.

    It takes an image of Pillow's, an array `(H, W)` or `(H, W, 3)`, or the path of a file, and gives float32
    `(C, H, W)` on the CPU. An ImageError says what cannot be read.
    """

    def __init__(self, recipe: Recipe, img_size: tuple[int, int]) -> None:
        self.mode = MODE_OF[recipe.in_chans]
        self._fill = recipe.fill
        self._resize: Callable[[Image.Image], Tensor] = eval_transform(recipe, img_size)
        self._normalise = Normalise(recipe, _CPU)

    def __call__(self, image: Any) -> Tensor:
        """See the class."""
        return self._normalise(self.pixels(image)[None])[0]

    def pixels(self, image: Any) -> Tensor:
        """The image before it is normalised, uint8 `(C, H, W)`."""
        return self._resize(decode(image, self.mode, _name(image), self._fill).image)


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model and what it takes to use it.

    model: in evaluation mode, with the weights as they were trained.
    classes: their names, in the order of the logits.
    transform: makes of an image what the model takes.
    img_size: height and width of the images that it makes.
    mean, std: of each channel, in 0..1.
    recipe: how the run was made.
    summary: what it wrote at its end; empty where it did not come there, or where only its weights are left.
    path: the file of the weights.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: Transform
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: Recipe
    summary: dict[str, Any]
    path: pathlib.Path

    def predict(self, images: Any, *, top: int = 5, batch_size: int = 64) -> list[Prediction]:
        """The likeliest classes of each image, best first.

        Args:
            images: a list of what `transform` takes, or one such thing. Folders, and files that may be damaged, are
                for `linsight.train.predict`.
            top: how many classes.
            batch_size: how many images at a time.

        Raises:
            ImageError: an image cannot be read.
        """
        given = list(images) if isinstance(images, list | tuple) else [images]
        normalise = Normalise(self.recipe, next(self.model.parameters()).device)
        trained = Trained(self.model, self.recipe, self.classes, self.path)
        found: list[Prediction] = []
        training = self.model.training
        try:
            model = fused(self.model.eval())
            for start in range(0, len(given), batch_size):
                part = given[start : start + batch_size]
                pixels = torch.stack([self.transform.pixels(image) for image in part])
                best = probabilities(model, pixels, normalise, None).sort(descending=True)
                for place, (image, values, indices) in enumerate(zip(part, *best, strict=True), start):
                    found.append(likeliest(trained, pathlib.Path(_name(image, place)), values, indices, top))
        finally:
            self.model.train(training)
        return found


def load_run(source: str | pathlib.Path, *, device: str = "cpu") -> LoadedRun:
    """Load a trained run: its folder, or the best.safetensors in it.

    >>> run = linsight.load_run("runs/NAME")
    >>> run.predict("photo.jpg")[0].classes
    >>> logits = run.model(run.transform("photo.jpg")[None])

    Raises:
        CheckpointError: nothing there, not such a file, damaged, or not of this model.
    """
    trained = load_trained(source)
    at_home = trained.path.name == WEIGHTS  # of an exported file, what lies beside it may be of another run
    recipe = (kept_recipe(trained.path.parent) if at_home else None) or trained.recipe
    size = image_size(recipe, trained.model)
    summary = trained.path.parent / SUMMARY
    return LoadedRun(
        trained.model.to(pick_device(device)),
        trained.classes,
        Transform(recipe, size),
        size,
        *statistics(recipe),
        recipe,
        json.loads(summary.read_text(encoding="utf-8")) if at_home and summary.exists() else {},
        trained.path,
    )


def _name(image: Any, place: int | None = None) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return "the image" if place is None else f"image {place}"
