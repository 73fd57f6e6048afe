"""A trained run in Python: its model, with all that it takes to use it."""

import dataclasses
import os
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from linsight.data import decode
from linsight.data.images import MODE_OF, Normalise, statistics
from linsight.data.sources import Given
from linsight.errors import ImageError, LinsightError
from linsight.fuse import fused
from linsight.recipe import Recipe
from linsight.runtime.device import pick_device
from linsight.runtime.files import read_json
from linsight.tasks import task_of
from linsight.tasks.building import image_size

from .evaluation import answered
from .hub import about_run, is_saved, open_saved, place_of
from .model import WEIGHTS, Trained, load_trained, of_saved
from .run import SUMMARY, kept_recipe

_CPU = torch.device("cpu")


class Transform:
    """Makes of an image what a trained model takes: it is resized, cropped and normalised as in the run's evaluation.

    It takes an image of Pillow's, an array `(H, W)` or `(H, W, 3)`, a tensor `(H, W)` or `(3, H, W)`, or the path of a
    file, and gives float32 `(C, H, W)` on the CPU; of dense tasks each in its own shape. An ImageError says what cannot
    be read.
    """

    def __init__(self, recipe: Recipe, img_size: tuple[int, int]) -> None:
        self.mode = MODE_OF[recipe.in_chans]
        self._fill = recipe.fill
        self._samples = task_of(recipe).samples(Given([None], ["the image"]), img_size, training=False)
        self._normalise = Normalise(recipe, _CPU)

    def __call__(self, image: Any) -> Tensor:
        """See the class."""
        return self._normalise(self.pixels(image)[None])[0]

    def pixels(self, image: Any) -> Tensor:
        """The image before it is normalised, uint8 `(C, H, W)`."""
        upright = decode(image, self.mode, _name(image), self._fill).image
        return self._samples.prepared(self._samples.source, 0, upright)[0]


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
    titles: what to call the classes, where that is not their name.
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
    titles: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Any:
        """Output of the model for images that `transform` made, `(B, C, H, W)`: logits `(B, K)`, of a classifier."""
        return self.model(images)

    def predict(self, images: Any, *, top: int = 5, batch_size: int | None = None) -> list[Any]:
        """Predictions of images: of a classifier, a `Prediction` of its likeliest classes, best first.

        Of a segmenter, `Segmented`, with a mask; of a detector, `Detected`, with boxes in the pixels of the image.

        Args:
            images: a list of what `transform` takes, or one such thing. Folders, and files that may be damaged, are
                for `linsight.train.predict`.
            top: how many classes.
            batch_size: how many images at a time; None: 64, or what the task takes at once.

        Raises:
            ImageError: an image cannot be read.
            LinsightError: the model has no classes.
        """
        if not getattr(self.model, "num_classes", True):
            raise LinsightError(f"'{self.recipe.model}' has no classifier here: nothing to predict")
        given = list(images) if isinstance(images, list | tuple) else [images]
        task = task_of(self.recipe, {"classes": self.classes, "titles": self.titles})
        task.begin(next(self.model.parameters()).device)
        batch_size = min(task.at_once, 64) if batch_size is None else batch_size
        self.recipe.changed(batch_size=batch_size)  # refuses what is no number of images
        names = [_name(image, place) for place, image in enumerate(given)]
        samples = task.samples(Given(given, names, self.classes), self.img_size, training=False)
        found: list[Any] = []
        training = self.model.training
        try:
            model = fused(self.model.eval())
            for start in range(0, len(given), batch_size):
                batch = task.collate([samples[0, place] for place in range(start, min(start + batch_size, len(given)))])
                for line in batch.bad:
                    raise ImageError(line)
                found += task.predictions(answered(task, model, batch, None), names[start : start + batch_size], top)
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
    return _loaded(load_trained(source), device)


def from_pretrained(
    name: str | pathlib.Path, *, revision: str | None = None, device: str = "cpu", **kwargs: Any
) -> LoadedRun:
    """Load a model of the Hugging Face Hub, or of a folder: in timm's layout, or a run.

    >>> run = linsight.from_pretrained("OWNER/NAME")
    >>> run.predict("photo.jpg")[0].classes
    >>> logits = run(run.transform("photo.jpg")[None])  # run.model is the model

    Args:
        name: OWNER/NAME on the Hub, or a folder, which comes first; "hf-hub:" and "local-dir:" say which is meant.
        revision: a branch, a tag or a commit of the Hub; also OWNER/NAME@REVISION.
        device: where the model goes.
        kwargs: arguments of `create_model` in place of those that the folder tells, as num_classes or img_size.

    Raises:
        LinsightError: nothing there, no right to it, no network; or it is damaged, hostile, of another library, or has
            its weights as a pickle.
    """
    path = place_of(name, revision)
    if path.is_dir() and is_saved(path):
        return _loaded(of_saved(open_saved(path, **kwargs)), device)
    if kwargs:
        raise LinsightError(f"{', '.join(kwargs)}: a run is loaded as it was trained, leave it out")
    return load_run(path, device=device)


def _loaded(trained: Trained, device: str) -> LoadedRun:
    folder = trained.path.parent
    at_home = trained.path.name == WEIGHTS  # of an exported file, what lies beside it may be of another run
    recipe = (kept_recipe(folder) if at_home else None) or trained.recipe
    size = image_size(recipe, trained.model)
    return LoadedRun(
        trained.model.to(pick_device(device)),
        trained.classes,
        Transform(recipe, size),
        size,
        *statistics(recipe),
        recipe,
        read_json(folder / SUMMARY) if at_home and (folder / SUMMARY).exists() else about_run(folder),
        trained.path,
        trained.titles,
    )


def _name(image: Any, place: int | None = None) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return "the image" if place is None else f"image {place}"
