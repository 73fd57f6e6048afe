"""Places where mechanisms are compared: a small host, images, and a budget, the same for all mechanisms.

`recall` is a task that no convolution and no pooling can do. An image is an empty grid of cells, in a few of which, at
random places, stands a key with a value; one more cell repeats one of the keys, as a question, and the class is the
value that stands with it. The question must find its key wherever that is: mixing over the whole grid, by content. It
is the associative recall of language models (arXiv 2312.04927) on an image.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from linsight.errors import LinsightError
from linsight.runtime.files import user_cache

CIFAR10 = Path("../shared/data/cifar10")
KEYS, VALUES, PAIRS = 4, 4, 2  # keys and values there are, and pairs in an image
SMALL = {"stem": ((16, 1),), "stages": ((32, 2, 1),)}  # a host whose models go on at larger grids
QUICK = {"batch_size": 32, "lr": 4e-3}  # what narrow models learn most with in a small budget


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """One comparison: what is in an image, and how a model of it is trained.

    host: arguments of the compact host.  grid: height and width of the tokens.  side: pixels of an image.
    recipe: fields on top of the recipe cifar10.  epochs, subset, test: the budget, images to train on and to evaluate.
    make: writes the images into a folder, where they are not real ones.  after: the place whose run with the same
    mechanism and seed a run goes on from.
    """

    name: str
    about: str
    grid: int
    side: int
    classes: int
    host: Mapping[str, Any]
    epochs: int
    subset: int
    test: int
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    make: Callable[[Path, int, int], None] | None = None
    after: str = ""

    def data(self, given: Path | None) -> Path:
        """The folder of the images: the given one, else the one that is made once and kept in the user's cache."""
        if given is not None:
            return given
        if self.make is None:
            return CIFAR10
        folder = user_cache("places") / f"{self.name}-{self.subset}-{self.test}"
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            self.make(partial, self.subset, self.test)
            partial.rename(folder)
        return folder


def recall_image(grid: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Pixels `(2 * grid, 2 * grid, 3)` of one image, in 0..255, and its class.

    A cell is of 2x2 pixels. Its upper two have the bits of the key as red and green, its lower two those of the value;
    blue tells the cells apart: pairs have it above, the question below.
    """
    pixels = np.full((grid, 2, grid, 2, 3), 128, np.uint8)
    cells = rng.choice(grid * grid, PAIRS + 1, replace=False)
    keys, values = rng.choice(KEYS, PAIRS, replace=False), rng.integers(VALUES, size=PAIRS)
    asked = rng.integers(PAIRS)

    def put(cell: int, key: int, value: int, question: bool) -> None:
        for line, number, blue in ((0, key, not question), (1, value, question)):
            pixels[cell // grid, line, cell % grid] = [255 * (number & 1), 255 * (number >> 1 & 1), 255 * blue]

    for pair in range(PAIRS):
        put(cells[pair], keys[pair], values[pair], question=False)
    put(cells[PAIRS], keys[asked], 0, question=True)
    return pixels.reshape(2 * grid, 2 * grid, 3), int(values[asked])


def write_recall(folder: Path, subset: int, test: int, *, grid: int) -> None:
    """`subset` images to train on and `test` others to evaluate, as Parquet files."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=VALUES)})
    for number, (split, count) in enumerate((("train", subset), ("test", test))):
        rng = np.random.default_rng(number)
        images, labels = [], []
        for _ in range(count):
            pixels, label = recall_image(grid, rng)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            images.append({"bytes": file.getvalue(), "path": None})
            labels.append(label)
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _recall(grid: int, subset: int, epochs: int, test: int = 1000, after: str = "", **more: Any) -> Place:
    recipe = {"crop_mode": "none", "crop_padding": 0, "hflip": 0.0, "interpolation": "nearest", "smoothing": 0.0}
    recipe |= {"mean": (0.5,) * 3, "std": (0.5,) * 3} | QUICK | more
    about = f"recall on {grid}x{grid} tokens: a question finds the value of its key, wherever that stands"
    return Place(
        f"recall-{grid}",
        about + (f"; the runs of {after} go on" if after else ""),
        grid,
        2 * grid,
        VALUES,
        SMALL,
        epochs,
        subset,
        test,
        recipe,
        functools.partial(write_recall, grid=grid),
        after,
    )


PLACES = {
    place.name: place
    for place in (
        Place(
            "cifar10",
            "CIFAR-10 on 8x8 tokens: four blocks of width 64",
            8,
            32,
            10,
            {"stem": ((24, 1), (48, 2)), "stages": ((64, 4, 2),)},
            5,
            6000,
            3000,
        ),
        _recall(4, 12000, 10),
        _recall(8, 6000, 2, after="recall-4", lr=2e-3),
        _recall(16, 6000, 1, after="recall-8", lr=5e-4),
        # 16 large images at a time stay in the caches
        _recall(64, 1000, 1, test=500, after="recall-16", lr=5e-4, accumulate=2),
    )
}


def place(name: str) -> Place:
    """A place by its name; one line names them all where there is none of that name."""
    if name not in PLACES:
        raise LinsightError(f"there is no place '{name}' to compare at: {', '.join(PLACES)}")
    return PLACES[name]
