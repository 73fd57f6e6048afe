"""A trained model on its way out, and an exported file in the place of a trained model."""

import pathlib
from collections.abc import Callable
from typing import Any

from torch import nn

from linsight.data.images import statistics
from linsight.errors import CheckpointError, LinsightError
from linsight.recipe import Recipe
from linsight.runtime.files import require_place
from linsight.runtime.text import printable
from linsight.tasks import record_of
from linsight.tasks.building import image_size
from linsight.train import Trained, load_trained
from linsight.train.model import packed

from .dense import ServedMasks, ServedObjects, as_graph
from .facts import Facts
from .files import SUFFIXES, data_of, open_exported
from .loaded import KINDS
from .onnx import OPSET, export_onnx
from .placing import placing
from .program import export_aoti, export_program
from .served import Pixels, Served
from .trace import traced
from .verify import Exported


def facts_of_trained(trained: Trained, size: tuple[int, int], *, dynamic: bool = True) -> Facts:
    """The facts of a file of a trained model, for images of `size`."""
    recipe = trained.recipe
    mean, std = statistics(recipe)
    return Facts(
        model=recipe.model,
        task=trained.task.exported,
        classes=trained.classes,
        titles=trained.titles,
        run=trained.run,
        input_size=(recipe.in_chans, *size),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.eval_crop,
        dynamic=dynamic,
        recipe={name: getattr(recipe, name) for name in recipe.kept()},
    )


def served(trained: Trained, size: tuple[int, int]) -> Pixels:
    """A trained model with what it does to images, from pixels to what its task is about.

    Raises:
        LinsightError: it does what has no form in a graph.
    """
    task = trained.task.exported
    if task not in SERVED:
        raise LinsightError(f"a model of the task {trained.task.name} has no form from pixels: export it without")
    return SERVED[task](trained.model, trained.recipe, size)


def _classes(model: nn.Module, recipe: Any, size: tuple[int, int]) -> Served:
    crop = {"crop_pct": recipe.crop_pct, "crop_mode": recipe.eval_crop}
    return Served(model, size, *statistics(recipe), interpolation=recipe.interpolation, **crop)


def _masks(model: nn.Module, recipe: Any, size: tuple[int, int]) -> ServedMasks:
    if recipe.eval_mode != "whole":
        raise LinsightError(f"eval_mode={recipe.eval_mode} has no form in a graph: export without --preprocess")
    return ServedMasks(model, *statistics(recipe), interpolation=recipe.interpolation, side=recipe.eval_side)


def _objects(model: nn.Module, recipe: Any, size: tuple[int, int]) -> ServedObjects:
    sides = {"side": recipe.eval_side, "longest": recipe.longest}
    return ServedObjects(model, *statistics(recipe), interpolation=recipe.interpolation, **sides)


SERVED: dict[str, Callable[..., Pixels]] = {"classify": _classes, "segment": _masks, "detect": _objects}


class ExportPlan:
    """The ways of a trained model into files.

    Args:
        trained: the model.
        sides: of the images, or one for both; () for the model's own.
        static: for one image of that size.
        preprocess: from pixels to probabilities.
        half: in float16.
        opset: of ONNX; None: the usual one.

    Raises:
        LinsightError: it has no such form.
    """

    def __init__(
        self,
        trained: Trained,
        sides: tuple[int, ...] = (),
        *,
        static: bool = False,
        preprocess: bool = False,
        half: bool = False,
        opset: int | None = None,
    ) -> None:
        self.trained, self.half, self.opset = trained, half, opset or OPSET
        height, width = (sides * 2)[:2] or image_size(trained.recipe, trained.model)
        self.facts = facts_of_trained(trained, (height, width), dynamic=not static)
        self.model = served(trained, (height, width)) if preprocess else trained.model

    def export(self, form: str, path: pathlib.Path) -> Exported:
        """Write the file of one form, and check it.

        Raises:
            LinsightError: see `export_onnx`.
        """
        if form == "safetensors":
            return self._weights(path)
        if form == "onnx":
            return export_onnx(self.model, path, facts=self.facts, half=self.half, opset=self.opset)
        ways = {"program": export_program, "compiled": export_aoti}
        return ways[form](self.model, path, facts=self.facts, half=self.half)

    def _weights(self, path: pathlib.Path) -> Exported:
        """Write weights with what it takes to use them, and load them again."""
        trained = self.trained
        state = trained.model.state_dict()
        if self.half:
            state = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
        require_place(path)
        with placing(path) as temporary, traced(trained.model, self.facts, half=self.half) as of:
            about = {"run": trained.run, "titles": trained.titles}
            recipe = trained.recipe.changed(img_size=self.facts.input_size[1:])
            temporary.write_bytes(packed(state, recipe, {**trained.task.facts, **about}))
            again = as_graph(load_trained(temporary).model)
            with of.telling(again):
                checks = of._replace(inputs=tuple((x, x) for x, _ in of.inputs)).check(again, "the file of weights")
        return Exported(path, "safetensors", checks, of.limit, facts=of.facts)

    def row(self, done: Exported) -> dict[str, Any]:
        """The facts that a report tells of a file."""
        files = [done.path, data_of(done.path)]
        return {
            "form": done.form,
            "file": str(done.path),
            "bytes": sum(file.stat().st_size for file in files if file.exists()),
            "takes": done.facts.layout if done.form != "safetensors" else "load_run, predict, eval",
            "img_size": self.facts.input_size[1:],
            "dynamic": self.facts.dynamic,
            "outputs": done.facts.outputs,
            "error": done.error,
            "limit": done.limit,
            "checks": [check._asdict() for check in done.checks],
            "float32_nodes": done.float32,
        }


def is_exported(source: str) -> bool:
    """True for the name of a file that `load_exported` reads."""
    return pathlib.Path(source).suffix.lower() in SUFFIXES


def load_exported(path: str | pathlib.Path) -> Trained:
    """An exported file as a trained model, for `predict` and `evaluate`: it runs on the CPU.

    Raises:
        CheckpointError: as of `open_exported`; or the file does not give what its task is about.
    """
    opened = open_exported(path)
    facts = opened.facts
    if facts.task not in KINDS:
        raise CheckpointError(f"'{path}' is of the task '{printable(facts.task)[:80]}': {', '.join(KINDS)} are known")
    model = KINDS[facts.task](opened, path)
    count = model.count()
    if len(facts.classes) not in (0, count):
        raise CheckpointError(f"'{path}' names {len(facts.classes)} classes and answers {count}: export it again")
    recipe = _recipe_of(facts)
    return Trained(
        model,
        recipe,
        facts.classes or tuple(map(str, range(count))),
        pathlib.Path(path),
        run=facts.run,
        titles=facts.titles,
        pixels=facts.pixels,
        fixed=not facts.dynamic or facts.pixels,
    )


def _recipe_of(facts: Facts) -> Recipe:
    """The recipe by which images are prepared for a file, and its answers are read."""
    channels, *size = facts.input_size
    told: dict[str, Any] = {
        "task": facts.task,
        "model": facts.model,
        "in_chans": channels,
        "img_size": tuple(size),
        "mean": facts.mean,
        "std": facts.std,
        "interpolation": facts.interpolation,
        "crop_pct": facts.crop_pct,
        "eval_crop": facts.crop_mode,
    }
    record = record_of(facts.task)
    if facts.pixels and "eval_side" in record.model_fields:
        told["eval_side"] = 0  # the graph resizes
    kept = {name: value for name, value in facts.recipe.items() if name in record.model_fields}
    return record(**{**kept, **told})
