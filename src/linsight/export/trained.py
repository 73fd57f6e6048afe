"""A trained model on its way out, and an exported file in the place of a trained model."""

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linsight.data.images import statistics
from linsight.errors import CheckpointError, LinsightError
from linsight.runtime.files import require_place
from linsight.tasks import ClassifyRecipe
from linsight.tasks.building import image_size
from linsight.train import Trained, load_trained
from linsight.train.model import packed

from .facts import Facts
from .files import SUFFIXES, Opened, data_of, open_exported
from .onnx import OPSET, export_onnx
from .placing import placing
from .program import export_aoti, export_program
from .served import Served
from .trace import traced
from .verify import Exported, compare


def facts_of_trained(trained: Trained, size: tuple[int, int], *, dynamic: bool = True) -> Facts:
    """The facts of a file of a trained model, for images of `size`."""
    recipe = trained.recipe
    mean, std = statistics(recipe)
    return Facts(
        model=recipe.model,
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


def served(trained: Trained, size: tuple[int, int]) -> Served:
    """A trained model with what it does to images, from pixels to probabilities."""
    recipe = trained.recipe
    return Served(
        trained.model,
        size,
        *statistics(recipe),
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.eval_crop,
    )


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
        LinsightError: it is of a task whose models are not exported.
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
        if not trained.task.exports:
            raise LinsightError(
                f"a model of the task {trained.task.name} is not exported: it gives lists of objects, and files hold "
                f"graphs of tensors; linsight.load_run uses it"
            )
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
            again = load_trained(temporary).model
            checks = compare(of.reference, again, [(x, x) for x, _ in of.inputs], of.limit, "the file of weights")
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
        CheckpointError: as of `open_exported`; or the file gives no logits of its classes.
    """
    opened = open_exported(path)
    facts = opened.facts
    model = _Classifier(opened)
    channels, *size = facts.input_size
    count = _count(model, path)
    if len(facts.classes) not in (0, count):
        raise CheckpointError(f"'{path}' names {len(facts.classes)} classes and answers {count}: export it again")
    told: dict[str, Any] = {
        "model": facts.model,
        "in_chans": channels,
        "img_size": tuple(size),
        "mean": facts.mean,
        "std": facts.std,
        "interpolation": facts.interpolation,
        "crop_pct": facts.crop_pct,
        "eval_crop": facts.crop_mode,
        "fill": facts.recipe.get("fill"),
    }
    recipe = ClassifyRecipe(**told)
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


class _Classifier(nn.Module):
    """An exported file as a classifier, that takes what a trained model does: float32 `(B, C, H, W)`, and gives logits.

    Pixels are uint8 `(B, C, H, W)` of whole images, one at a time; probabilities become logits by their logarithm.
    """

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.opened: Callable[[], Opened] = lambda: opened  # no part of this module: it is not cast, nor moved

    def forward(self, images: Tensor) -> Tensor:
        model, facts = self.opened()
        images = images.permute(0, 2, 3, 1) if facts.pixels else images.to(getattr(torch, facts.dtype))
        parts = images.split(1) if not facts.dynamic else [images]
        found: list[Any] = [model(part) for part in parts]
        answers = torch.cat([answer[-1] if isinstance(answer, list | tuple) else answer for answer in found])
        answers = answers.float().to(images.device)
        return answers.clamp_min(torch.finfo(torch.float32).tiny).log() if facts.pixels else answers


def _count(model: _Classifier, path: str | pathlib.Path) -> int:
    """How many classes a file tells apart."""
    facts = model.opened().facts
    answer = model(torch.zeros(1, *facts.input_size, dtype=torch.uint8 if facts.pixels else torch.float32))
    if answer.ndim != 2:
        raise CheckpointError(f"'{path}' gives maps {tuple(answer.shape)} and no classes: open it by open_exported")
    return answer.shape[1]
