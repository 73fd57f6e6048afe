"""`Task`: what a run learns. Everything that trains, evaluates or predicts asks it, and knows no task by name."""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from linsight.data.datasets import Data
from linsight.data.images import Batch, Normalise, Samples, collate, eval_transform, train_transform, whole_image
from linsight.data.sources import Source
from linsight.recipe import Recipe

from .building import build
from .meters import Meter


def in_row(measure: str) -> str:
    """The name of a measure beside the loss of training."""
    return "val_loss" if measure == "loss" else measure


class Column(NamedTuple):
    """A measure as people see it: its name, what to call it, how to write it, and its unit."""

    name: str
    label: str
    form: str = ".4f"
    unit: str = ""

    @property
    def key(self) -> str:
        """The name in `metrics.jsonl` and in summaries."""
        return in_row(self.name)

    def text(self, row: Mapping[str, Any], unit: bool = False) -> str:
        """The value in a row of `metrics.jsonl`, a summary, or what `evaluate` gives."""
        value = row[self.key] if self.key in row else row[self.name]
        return f"{value:{self.form}}{f' {self.unit}' if unit and self.unit else ''}"


@dataclasses.dataclass(frozen=True)
class Shown:
    """A part of the page of a run: its title, words, a table, and pictures with what to write below them.

    shares: columns of the table with numbers from 0 to 1, which are drawn as bars.
    """

    title: str
    words: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    shares: Sequence[int] = ()
    pictures: Sequence[tuple[Image.Image, str]] = ()


class Student(Protocol):
    """A model that learns, as a loss sees it."""

    model: nn.Module

    def forward(self, images: Any, *more: Any) -> Any:
        """The model's answer in training mode, in the dtype of mixed precision. more: what else it takes."""

    def taught(self, images: Tensor) -> Any:
        """The answer of the averaged weights, in evaluation mode and without a gradient."""

    def asked(self, model: nn.Module, images: Tensor) -> Any:
        """The answer of another model, in evaluation mode and without a gradient, in the dtype of mixed precision."""


class Loaded(Protocol):
    """A trained model that a task asks for by name: `linsight.train.Trained`, as a task sees it."""

    @property
    def model(self) -> nn.Module:
        """In evaluation mode, on the CPU."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that tells how images are prepared for it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes, in the order of the logits."""

    @property
    def run(self) -> bool:
        """True where those names are told, and are not only what the classes of published weights are called."""


Load = Callable[[str, str | None], Loaded]  # by a name, and by published weights where the name is a model's


class Task(abc.ABC):
    """One run's task. A subclass is a file; `register` makes it known.

    name, about: what it is called, and in a line.
    record: its kind of recipe.
    best: the measure that decides which epoch is kept; smaller: whether a smaller one is better.
    writes: what `write` makes of predictions, as in "masks"; "": nothing.
    sorts: it sorts images into classes, of which a run's page has a table.
    exported: the task of an exported file of its model, which `predict` and `evaluate` take it for.
    at_once: images that are evaluated or predicted together, where nobody says how many.
    streamed: the output of `linsight.stream` that its predictions are made of.

    facts: what the weights must tell, so that they can be used without the data: the names of classes, say. A task
    has them once `open` was called, or from the file of the weights.
    known: the facts that the run began with, where it goes on; None where it begins.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    record: ClassVar[type[Recipe]] = Recipe
    best: ClassVar[str]
    smaller: ClassVar[bool] = False
    writes: ClassVar[str] = ""
    sorts: ClassVar[bool] = False
    exported: ClassVar[str] = "classify"
    at_once: ClassVar[int] = 128
    streamed: ClassVar[str] = "logits"

    def __init__(self, recipe: Recipe, facts: Mapping[str, Any] | None = None) -> None:
        self.recipe: Any = recipe
        self.facts: dict[str, Any] = dict(facts or {})
        self.known: Mapping[str, Any] | None = None

    # Images

    @abc.abstractmethod
    def open(self) -> Data:
        """Open what the recipe trains on and is evaluated on; sets the facts.

        Raises:
            LinsightError: it cannot be used for the task.
        """

    @abc.abstractmethod
    def open_evaluation(self, split: str | None, *, in_order: bool = False) -> Source:
        """The images of the recipe's data to evaluate on, as `linsight.data.datasets.open_evaluation`."""

    def open_again(self) -> Source:
        """The very images that a run was evaluated on, held out or not."""
        facts = self.facts
        source = self.open().val
        self.facts = facts
        return source

    def samples(self, source: Source, size: tuple[int, int] | None, *, training: bool) -> Samples:
        """Images of a source as the model is given them, before they are normalised. size: None for each in its own."""
        recipe = self.recipe
        transform: Callable[[Image.Image], Tensor] = whole_image
        if size is not None:
            transform = (train_transform if training else eval_transform)(recipe, size)
        draft = recipe.draft if training else 0
        return Samples(source, transform, recipe.in_chans, recipe.seed, recipe.fill, draft)

    @staticmethod
    def collate(samples: list[Any]) -> Batch:
        """A batch of samples, some of which may be lines about why there is none."""
        return collate(samples)

    # The model

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes, in the order of the model's answers; none where it has none."""
        return tuple(self.facts.get("classes", ()))

    @property
    def outputs(self) -> int:
        """How many numbers the model gives for an image, or for what it answers in one, where the recipe is silent."""
        return len(self.classes)

    def build(self) -> nn.Module:
        """The model, with fresh weights."""
        return build(self.recipe, self.outputs)

    def as_start(self) -> Mapping[str, Any]:
        """Fields of a recipe that make the same model in a run of another task, where those of `recipe` do not."""
        return {}

    # What it learns

    def begin(self, device: torch.device) -> None:
        """Get ready to learn, and to be evaluated, on a device."""
        self.inputs = Normalise(self.recipe, device)

    def around(self, model: nn.Module, load: Load) -> nn.Module:
        """The module that learns, once `begin` was called: `model`, or one around it that gives the loss more.

        Parameters of its own are trained, and kept in the state of the run, not with the weights. In evaluation mode it
        answers as `model` does. It is called on training alone, and may `load` other models, which it does not hold.
        """
        return model

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most have nothing to say
        """Raise a LinsightError where the recipe asks for what this model cannot learn by."""

    def new(self, model: nn.Module) -> Collection[str] | None:
        """Names of the parameters that begin anew, where the task itself fills all others; None where it fills none."""
        return None

    def usable(self, count: int) -> int:
        """How many of `count` images the loss takes."""
        return count

    @abc.abstractmethod
    def loss(self, student: Student, batch: Batch, epoch: int) -> tuple[Tensor, int] | None:
        """The mean loss of a batch in `epoch`, and the number of its images; None where none could be read."""

    # How well it does it

    @abc.abstractmethod
    def measure(self) -> Meter:
        """A new meter: `update(outputs, batch)` by batches; `compute()` gives measures by name, `loss` among them."""

    def answer(self, model: nn.Module, inputs: Tensor) -> Any:
        """The answer of a model in evaluation mode for a batch of images that are as it takes them."""
        return model(inputs)

    def answers(self, model: nn.Module, batch: Batch) -> Any:
        """The answer of a model in evaluation mode for a batch as it was read, once `begin` was called."""
        return self.answer(model, self.inputs(batch.images))

    @property
    @abc.abstractmethod
    def columns(self) -> Sequence[Column]:
        """The measures that people are shown, `best` first."""

    # What is shown of it

    def draw(self, path: Any, samples: Samples, answers: Callable[[Batch], Any]) -> None:  # noqa: B027 - as above
        """A picture of what the model makes of some images. answers: of a batch, float32 on the CPU."""

    def examine(self, samples: Samples, batches: Iterable[Batch], answers: Callable[[Batch], Any]) -> Sequence[Shown]:
        """Parts of a run's page on all images that it was evaluated on.

        batches: of `samples`, in order.  answers: as of `draw`.
        """
        return ()

    def controls(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Models that the page of a run judges beside `model`, by names; on its device, in evaluation mode."""
        return {}

    def compared(self, measures: Mapping[str, Mapping[str, float]]) -> Sequence[Shown]:
        """Parts of a run's page on what it began with and what it is judged beside.

        measures: of each of `controls`, and of the trained model under "".
        """
        return ()

    def places(self, batch: Batch) -> list[int]:
        """The places, in their source, of the images of a batch whose source has its places as classes."""
        return batch.targets.tolist()

    @abc.abstractmethod
    def predictions(self, answers: Any, files: Sequence[str], top: int) -> list[Any]:
        """For each image a dataclass with `file`, for `linsight predict`. answers: float32, on the CPU."""

    def of_stream(self, answer: Tensor, file: str, top: int) -> Any:
        """The prediction for an image that went through the model in tiles. answer: its `streamed` output."""
        (found,) = self.predictions(answer.float().cpu(), [file], top)
        return found

    def told(self, found: Any) -> dict[str, Any]:
        """A prediction as JSON has it."""
        return dataclasses.asdict(found)

    def write(self, found: Sequence[Any], folder: pathlib.Path) -> list[pathlib.Path]:
        """Write predictions into a folder, of a task that `writes`; the files."""
        raise NotImplementedError

    @abc.abstractmethod
    def table(self, found: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
        """Predictions as a table: its head, and its rows."""
