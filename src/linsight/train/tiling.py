"""A trained model on images of any size, at their own resolution, tile by tile."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from linsight.data.images import statistics
from linsight.errors import ImageError, LinsightError, UnknownNameError
from linsight.recipe import Recipe
from linsight.runtime.device import autocast, pick_device, pick_dtype
from linsight.runtime.files import replacing
from linsight.runtime.places import located
from linsight.runtime.signals import Interrupted, Stop
from linsight.streaming import stream

from ._predict import require_top
from .model import Trained
from .progress import Tiles

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How images are streamed; `tile` to `fill` are those of `linsight.stream`.

    fill: None is that of the training, if it had one.
    device, amp: as of `predict`.
    progress: told of every tile; the base class says nothing.
    """

    tile: int = 1024
    scratch: str | os.PathLike[str] | None = None
    resume: bool = False
    dtype: str = "float32"
    level: int | None = None
    mpp: float | None = None
    fill: float | None = None
    device: str = "auto"
    amp: str = "auto"
    progress: Tiles = dataclasses.field(default_factory=Tiles)


def predict_stream(
    trained: Trained,
    paths: Sequence[str | pathlib.Path],
    tiling: Tiling,
    *,
    top: int = 5,
    on_bad_image: str = "skip",
    note: Callable[[str], None] | None = None,
) -> tuple[list[Any], list[str]]:
    """`predict` for image files of any size, which are neither resized nor cropped. note: as of `predict`.

    Raises:
        Interrupted: SIGINT or SIGTERM; the message says how to go on.
        LinsightError: no such file, a folder, more than one image with `scratch`, no readable image at all, or a bad
            one where those are refused; a model that does not stream; maps that do not fit.
    """
    require_top(top)
    Recipe.parse("on_bad_image", on_bad_image)
    files = [located(path) for path in paths]
    if not files:
        raise LinsightError("no image is given: name image files")
    for file in files:
        _check_file(file)
    if tiling.scratch is not None and len(files) > 1:
        raise LinsightError(f"a scratch folder is for one image, and {len(files)} are given: give one at a time")
    task, done = trained.task, list[Any]()
    bad: list[str] = []
    for file in files:
        try:
            answer = _streamed(trained, file, task.streamed, tiling, note, more=file is not files[-1])
        except ImageError as error:
            if on_bad_image == "refuse":
                raise
            bad.append(str(error))
            continue
        done.append(task.of_stream(answer, str(file), top))
    if not done:
        raise LinsightError(f"no image could be read: {bad[0]}")
    return done, bad


def save_stream(
    trained: Trained,
    path: str | pathlib.Path,
    out: str | pathlib.Path,
    tiling: Tiling,
    *,
    output: Literal["features", "map"],
    note: Callable[[str], None] | None = None,
) -> tuple[int, ...]:
    """Write the features `(1, C)` or the last map `(h, w, C)` of an image file to `out`, a .npy; their shape.

    The file is whole or absent. Raises as `predict_stream`, or if `out` cannot be written.
    """
    file, out = located(path), located(out)
    _check_file(file)
    if output not in ("features", "map"):
        raise UnknownNameError("output", output, ("features", "map"))
    if out.suffix != ".npy":
        raise LinsightError(f"'{out}' is to be a NumPy file: let its name end in .npy")
    if out.is_dir():
        raise LinsightError(f"'{out}' is a folder: name a file in it")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise LinsightError(f"'{out}' cannot be written: '{out.parent}' is no folder that can be written to")
    found = _streamed(trained, file, output, tiling, note)
    shape, kept = tuple(found.shape), None
    try:
        with replacing(out) as temporary:
            if tiling.scratch is not None and output == "map":
                del found  # memory-mapped, from the file that is moved
                kept = pathlib.Path(tiling.scratch) / "map.npy"
                shutil.move(kept, temporary)
            else:
                np.save(temporary, found.float().cpu().numpy())
    except OSError as error:
        still = f"; the map is in '{kept}'" if kept is not None and kept.exists() else ""
        raise LinsightError(f"'{out}' cannot be written: {error.strerror or error}{still}") from error
    return shape


def _check_file(file: pathlib.Path) -> None:
    if not file.exists():
        raise LinsightError(f"no such image: '{file}'")
    if file.is_dir():
        raise LinsightError(f"'{file}' is a folder: a stream takes image files")


def _streamed(
    trained: Trained,
    file: pathlib.Path,
    output: Any,
    tiling: Tiling,
    note: Callable[[str], None] | None,
    more: bool = False,
) -> Tensor:
    """The output of `linsight.stream` for a file. more: others follow, so a stop with the last tile is one, too."""
    if tiling.dtype not in _DTYPES:
        raise UnknownNameError("dtype", tiling.dtype, _DTYPES)
    Recipe.parse_all({"device": tiling.device, "amp": tiling.amp})
    where = pick_device(tiling.device)
    precision, _ = pick_dtype(tiling.amp, where)
    mean, std = statistics(trained.recipe)
    share = 0.0

    def report(done: int, total: int) -> None:
        nonlocal share
        share = 100 * done / total
        tiling.progress.tile(done, total)
        if stop.code and (done < total or more):
            raise KeyboardInterrupt

    with Stop() as stop, autocast(where, precision), tiling.progress.of(str(file)):
        try:
            return stream(
                trained.model.to(where).eval(),
                file,
                tile=tiling.tile,
                output=output,
                scratch=tiling.scratch,
                resume=tiling.resume,
                dtype=_DTYPES[tiling.dtype],
                mean=mean,
                std=std,
                level=tiling.level,
                mpp=tiling.mpp,
                fill=trained.recipe.fill if tiling.fill is None else tiling.fill,
                report=report,
                note=note,
            )
        except KeyboardInterrupt:
            if not stop.code:
                raise
            way = "nothing is kept without --scratch FOLDER"
            if tiling.scratch is not None:
                way = f"go on with the same command and --resume (what is done is in '{tiling.scratch}')"
            raise Interrupted(f"stopped at {share:.0f} % of '{file}'; {way}", stop.code) from None
