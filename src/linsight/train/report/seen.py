"""One pass of trained weights over the images that a run was evaluated on, for its page."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from markupsafe import Markup
from PIL import Image
from torch import nn

from linsight.data.images import Batch, Samples, loader
from linsight.data.random import Batches
from linsight.tasks import Shown, Task

from ..evaluation import answered, score
from .look import Outcome, look, numbered
from .page import Section, isolated, paragraph, table

_METER = Markup('<meter min="0" max="1" value="{:.4f}"></meter>')
_FIGURE = Markup('<figure><img alt="" src="data:image/{};base64,{}"><figcaption>{}</figcaption></figure>')
_LARGEST = 64  # pixels of a side up to which a picture is kept without loss


class Watch(NamedTuple):
    """A way to go through a loader, and a call after each batch."""

    over: Callable[[Iterable[Batch]], Iterable[Batch]]
    after_batch: Callable[[Batch], None] = lambda batch: None


def seen(
    task: Task,
    model: nn.Module,
    samples: Samples,
    batch_size: int,
    workers: int,
    dtype: torch.dtype | None,
    watch: Watch,
) -> tuple[Outcome | None, Sequence[Shown]]:
    """Guesses of classes that a model makes of `samples`, or what its task, which has begun, shows of it.

    Raises:
        LinsightError: no image can be read, or the model gives what is no number.
    """
    pin = task.inputs.device.type == "cuda"
    if task.sorts:
        batches = watch.over(numbered(samples, batch_size, workers, pin))
        outcome = look(model, batches, samples.source, task.inputs, dtype, watch.after_batch)
        return outcome, _compared(task, model, outcome, samples, batch_size, workers, dtype, watch)
    order = Batches(len(samples), batch_size, shuffle=False)
    feed = loader(samples, order, workers=min(workers, len(order)), pin=pin, collate=task.collate)

    def told() -> Iterable[Batch]:
        for batch in watch.over(feed):
            watch.after_batch(batch)
            yield batch

    return None, task.examine(samples, told(), lambda batch: answered(task, model, batch, dtype))


def _compared(
    task: Task,
    model: nn.Module,
    outcome: Outcome,
    samples: Samples,
    batch_size: int,
    workers: int,
    dtype: torch.dtype | None,
    watch: Watch,
) -> Sequence[Shown]:
    """Parts of the page on the controls of a classifier, which see the same images."""
    measures: dict[str, dict[str, float]] = {"": {"top1": 100 * float((outcome.truths == outcome.guesses).mean())}}
    order = Batches(len(samples), batch_size, shuffle=False)
    for name, control in task.controls(model).items():
        feed = loader(samples, order, workers=min(workers, len(order)), pin=False, collate=task.collate)
        measures[name] = score(task, control, watch.over(feed), dtype, watch.after_batch).measures
    return task.compared(measures)


def section(shown: Shown) -> Section:
    """A part of the page."""
    body = paragraph(shown.words) if shown.words else Markup()
    if shown.rows:
        numbers = [column for column in range(1, len(shown.head)) if column not in shown.shares]
        cells = [
            [
                _METER.format(value) if column in shown.shares else isolated(value, 60) if column == 0 else value
                for column, value in enumerate(row)
            ]
            for row in shown.rows
        ]
        body += table(shown.head, cells, numbers=numbers)
    if shown.pictures:
        figures = Markup("\n").join(
            _FIGURE.format(*_stored(image), isolated(words, 90)) for image, words in shown.pictures
        )
        body += Markup('<div class="pictures wide">\n{}\n</div>').format(figures)
    return Section(shown.title, body)


def _stored(image: Image.Image) -> tuple[str, str]:
    """The kind of a picture, and its file in base64."""
    kind, file = "png" if max(image.size) <= _LARGEST else "jpeg", io.BytesIO()
    image.save(file, kind, **({} if kind == "png" else {"quality": 85}))
    return kind, base64.b64encode(file.getvalue()).decode()
