"""`predict_to`: the classes of any number of images, written into one file, by any number of processes."""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from linsight.data.feeds import readers, refuse
from linsight.data.images import Batch, Samples, loader, told
from linsight.data.inputs import Inputs, open_inputs
from linsight.data.values import check_fill
from linsight.data.watched import KILLED, watched
from linsight.errors import LinsightError
from linsight.fuse import fused
from linsight.recipe import Recipe
from linsight.runtime.device import autocast, pick_device, pick_dtype
from linsight.runtime.finite import require_finite
from linsight.runtime.launch import Copy, this_copy
from linsight.runtime.places import located
from linsight.runtime.signals import Interrupted, exit_code

from ._parts import Parts, Plan, begin, chunk_size, finish
from ._predict import require_top
from ._tables import require_table
from .evaluation import preparation, probabilities
from .model import Trained, asked_size
from .progress import Images

_NO_NUMBERS = "the model gives values that are no numbers"


@dataclasses.dataclass(frozen=True)
class Written:
    """How far a result is, after a call of `predict_to`.

    out: its file.
    images: how many it has, or will have.
    predicted: how many of them this call predicted, in so many `seconds`.
    unread: lines about images that this call could not read.
    left: how many of its `parts` others have still to predict; 0 where the result is there.
    errors: how many images of the result have an error; None where this call did not write it.
    """

    out: str
    images: int
    predicted: int = 0
    seconds: float = 0.0
    unread: tuple[str, ...] = ()
    left: int = 0
    parts: int = 0
    errors: int | None = None


def predict_to(
    trained: Trained,
    places: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    top: int = 5,
    logits: bool = False,
    features: bool = False,
    image_key: str | None = None,
    shard: tuple[int, int] = (1, 1),
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    amp: str = "auto",
    on_bad_image: str = "skip",
    fill: float | None = None,
    img_size: Any = None,
    report: Images | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Written:
    """Predict images into a file with a row for each, in their order; the row of a bad image says what is wrong.

    What is done is kept in parts, in the folder `out.parts`. A call that was stopped or killed goes on when it is made
    again; several processes, as of torchrun, share the parts, and the last one writes `out`, which is whole or absent.

    Args:
        trained: the model.
        places: image files, folders, .tar, .zip and .parquet files, patterns of them as `shard-{000..099}.tar`, and
            data sets of Hugging Face, `hfds/NAME`.
        out: a .csv, .jsonl or .parquet file.
        top: how many classes of each image.
        logits: what the model answers is told, too: not in a .csv.
        features: so is the pooled vector before its classifier.
        image_key: the column of images of a table, where it cannot be told.
        shard: `(i, n)`, i from 1 to n: predict one of n shares, for machines that know nothing of each other.
        workers: processes that read images; None: as many as fit.
        fill: the value of pixels that are no number; None: that of the training, if it had one.
        img_size: of the images, a side or height and width; by default, that of the run.
        report: hears how far it is.
        note: called with a line about what was left out, or not read as it is.

    Raises:
        LinsightError: a place or a setting that cannot be used, a file `out` or parts of another prediction, a bad
            image where those are refused, or the model gives no numbers.
        Interrupted: a signal asked to stop.
    """
    out, copy = located(out), this_copy()
    check_shard(*shard)
    require_top(top)
    if not trained.classes:
        raise LinsightError(f"'{trained.path}' predicts no classes, which a table has: leave --out out")
    extra = tuple(name for name, wanted in (("logits", logits), ("features", features)) if wanted)
    require_table(out, extra)
    settings: dict[str, Any] = {"batch_size": batch_size, "device": _device(device, copy), "amp": amp}
    settings |= {"on_bad_image": on_bad_image, "workers": workers}
    settings["img_size"] = asked_size(trained, img_size)
    recipe = trained.recipe.changed(**settings)
    if fill is not None:
        check_fill(fill)
        recipe = recipe.changed(fill=fill)
    note = note if copy.rank == 0 else lambda line: None  # one of all copies tells
    inputs = open_inputs(places, image_key=image_key, result=out)
    if inputs.torn and recipe.on_bad_image == "refuse":
        raise LinsightError(f"{inputs.torn[0]} (on_bad_image=skip takes what lies before)")
    for line in (*inputs.notes, *(f"{line}; what lies before is predicted" for line in inputs.torn)):
        note(line)
    asked = _Asked(trained, recipe, top, extra)
    parts = begin(out, asked.plan(inputs))
    if parts is None:
        note(f"'{out}' is finished: nothing was to do")
        return Written(str(out), len(inputs))
    release = parts.hold(f"share-{shard[0]}-of-{shard[1]}-{copy.rank + 1}-of-{copy.world}")
    try:
        share = shard[0] - 1 + shard[1] * copy.rank, shard[1] * copy.world
        work = _Work(asked, inputs, parts, range(share[0], parts.count, share[1]), report or Images())
        work.run(readers(recipe, copy), note)
        errors = finish(parts, out)
        left = 0 if errors is not None or out.exists() else len(parts.missing())
        return Written(
            str(out), len(inputs), work.predicted, work.seconds, tuple(work.unread), left, parts.count, errors
        )
    finally:
        release()


def check_shard(number: Any, of: Any) -> None:
    """Raise a LinsightError unless this is share `number` of `of`, counted from 1."""
    if not (isinstance(number, int) and isinstance(of, int) and 1 <= number <= of):
        raise LinsightError(f"shard {number}/{of} is none: they are counted from 1/{of} to {of}/{of}")


class _Asked:
    """A model, and what is asked of it for each image."""

    def __init__(self, trained: Trained, recipe: Recipe, top: int, extra: tuple[str, ...]) -> None:
        self.trained, self.recipe, self.extra = trained, recipe, extra
        self.titles = trained.titles or trained.classes
        self.top = min(top, len(self.titles))
        device = pick_device(recipe.device)
        self.dtype, _ = pick_dtype(recipe.amp, device)
        self.model: Any = fused(trained.model.to(device).eval())
        if "features" in extra and not hasattr(self.model, "forward_head"):
            raise LinsightError(f"'{trained.path}' gives classes, and no features: leave them out")
        self.way = preparation(trained, recipe, self.model, device)

    def plan(self, inputs: Inputs) -> Plan:
        """The result as it will be."""
        recipe = self.recipe
        images, times = inputs.marks()
        facts = {"weights": _digest(self.trained), **images, "top": str(self.top)}
        facts |= {
            "size of images": "x".join(map(str, self.way.size or ("their own",))),
            "amp": recipe.amp,
            "fill": str(recipe.fill),
        }
        facts |= {"more": ", ".join(self.extra)} if self.extra else {}
        chunk = chunk_size(len(inputs), recipe.batch_size)
        return Plan(len(inputs), chunk, self.titles, self.top, self.extra, facts, times)

    def rows(self, images: Tensor, name: str, trusted: bool) -> list[dict[str, Any]]:
        """For each of uint8 images `(B, C, H, W)`, places of classes, probabilities and arrays, or an error.

        name: of the first image.  trusted: the model gave numbers before, so that it is the image's fault if not.
        """
        arrays = self._answer(images)
        finite = torch.stack([array.isfinite().all(-1) for array in arrays.values()]).all(0)
        if not trusted and not finite.any():
            for array in arrays.values():
                require_finite(array, name)
        best = arrays.pop("probabilities").topk(self.top)
        return [
            {
                "classes": best.indices[i].tolist(),
                "probabilities": best.values[i].tolist(),
                **{name: array[i].numpy() for name, array in arrays.items()},
            }
            if finite[i]
            else {"error": _NO_NUMBERS}
            for i in range(len(images))
        ]

    @torch.inference_mode()
    def _answer(self, images: Tensor) -> dict[str, Tensor]:
        if not self.extra:
            return {"probabilities": probabilities(self.model, images, self.way.normalise, self.dtype)}
        found: dict[str, Tensor] = {}
        with autocast(self.way.normalise.device, self.dtype):
            x = self.way.normalise(images)
            if "features" in self.extra:
                x = self.model.forward_features(x)
                found["features"] = self.model.forward_head(x, pre_logits=True).flatten(1)
            found["logits"] = self.model.forward_head(x) if "features" in self.extra else self.model(x)
        found = {name: array.float().cpu() for name, array in found.items()}
        found["probabilities"] = found["logits"].softmax(-1)
        return {name: found[name] for name in ("probabilities", *self.extra)}


class _Work:
    """The share of one process: the parts with these numbers."""

    def __init__(self, asked: _Asked, inputs: Inputs, parts: Parts, numbers: range, report: Images) -> None:
        self.asked, self.inputs, self.parts, self.numbers, self.report = asked, inputs, parts, numbers, report
        self.predicted, self.seconds = 0, 0.0
        self.unread: list[str] = []
        self.notes: list[str] = []

    def run(self, most: int, note: Callable[[str], None]) -> None:
        """Predict the parts that are not there, and keep each."""
        recipe, way = self.asked.recipe, self.asked.way
        there = self.parts.there()
        left = [self.parts.images(number) for number in self.numbers if number not in there]
        total = sum(len(self.parts.images(number)) for number in self.numbers)
        done = total - sum(map(len, left))
        if done:
            note(f"going on: {done:,} of {total:,} images are done")
        samples = Samples(self.inputs, way.transform, recipe.in_chans, 0, recipe.fill)
        batches = _Batches(left, way.batch_size)
        workers = min(most, len(batches))
        feed = loader(samples, batches, workers=workers, pin=way.normalise.device.type == "cuda")
        started = time.perf_counter()
        self.report.begin(done, total)
        try:
            self._predict(batches, watched(feed, f"{KILLED}, and go on with the same command"))
        except KeyboardInterrupt as stopped:
            done = sum(len(self.parts.images(number)) for number in self.numbers if number in self.parts.there())
            line = f"stopped: {done:,} of {total:,} images are done; go on with the same command"
            raise Interrupted(line, exit_code(stopped)) from None
        finally:
            self.report.end()
        self.seconds = time.perf_counter() - started
        for line in told(self.notes):
            note(line)

    def _predict(self, batches: Iterable[list[tuple[int, ...]]], feed: Iterable[Batch]) -> None:
        rows: list[tuple[str, dict[str, Any]]] = []
        trusted = False
        for places, batch in zip(batches, feed, strict=True):
            refuse(self.asked.recipe, batch.bad)
            bad = iter(batch.bad)
            found: dict[int, dict[str, Any]] = {}
            if len(batch.images):
                name = f"'{self.inputs.name(int(batch.targets[0]))}' and {len(batch.images) - 1} more"
                answers = self.asked.rows(batch.images, name, trusted)
                found = dict(zip(batch.targets.tolist(), answers, strict=True))
                trusted = True
            self.unread += batch.bad
            self.notes += batch.notes
            for _, index in places:
                label = self.inputs.label(index)
                if index not in found:
                    found[index] = {"error": next(bad).removeprefix(f"{self.inputs.name(index)}: ")}
                rows.append((label, found[index]))
            self.predicted += len(places)
            self.report.step(len(places))
            number = places[-1][1] // self.parts.plan.chunk
            if places[-1][1] == self.parts.images(number)[-1]:
                self.parts.write(number, rows)
                rows = []


class _Batches:
    """The batches of ranges of images, none of which has images of two: so none depends on what was done before."""

    def __init__(self, ranges: Sequence[range], batch_size: int) -> None:
        self.ranges, self.batch_size = ranges, batch_size

    def __len__(self) -> int:
        return sum(-(-len(images) // self.batch_size) for images in self.ranges)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for images in self.ranges:
            for start in range(0, len(images), self.batch_size):
                yield [(0, index) for index in images[start : start + self.batch_size]]


def _device(name: str, copy: Copy) -> str:
    """The device called `name`; of several GPUs, each copy takes its own."""
    if copy.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{copy.local_rank % torch.cuda.device_count()}"
    return name


def _digest(trained: Trained) -> str:
    """A digest of the weights, or of their file where the model shows none, as an exported one."""
    found = hashlib.sha256()
    state = trained.model.state_dict()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if not state and trained.path.is_file():
        found.update(trained.path.read_bytes())
    return found.hexdigest()[:12]
