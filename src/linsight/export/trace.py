"""The start of every export: the model in evaluation mode, an example, free dimensions, inputs to check with."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import linsight
from linsight.attention import check_way
from linsight.errors import LinsightError
from linsight.fuse import fused

from .dense import Found, as_graph
from .facts import Facts
from .runs import one_line
from .served import Pixels, Served
from .verify import OBJECTS, PIXELS, TOLERANCE, Checked, Run, answers, compare, error_of, evaluation, unseen

T = TypeVar("T")
_BATCH = 2  # of the example: one image would be taken for a constant
_SIDE = 128  # of the example, or more: so would one place in the coarsest map


class Traced(NamedTuple):
    """A model ready to be exported.

    reference: what it is compared with, in float32 where the model is in half precision.
    example: the input that it is traced with.  dims: its free dimensions by number, {} for none.
    inputs: others to check with, of other batches and sizes where these are free: the reference's, and the model's.
    limit: the largest error that is accepted.
    """

    model: nn.Module
    reference: nn.Module
    facts: Facts
    example: Tensor
    dims: dict[int, str]
    inputs: tuple[tuple[Tensor, Tensor], ...]
    limit: float

    def attempt(self, form: str, export: Callable[[], T]) -> T:
        """The result of `export`.

        Raises:
            LinsightError: it raised, in one line.
        """
        try:
            return export()
        except (LinsightError, OSError):
            raise
        except Exception as error:
            way = "; --static exports for one size" if self.dims else ""
            raise LinsightError(f"'{self.facts.model}' has no {form} form: {one_line(error)}{way}") from error

    def check(self, run: Run, form: str, first: bool = False) -> tuple[Checked, ...]:
        """The errors of an exported file, at all inputs, or at the first alone; see `compare`."""
        inputs = self.inputs[:1] if first else self.inputs
        return compare(self.reference, run, inputs, self.limit, form, static=not self.dims, measure=self.measure)

    def measure(self, found: list[Tensor], wanted: list[Tensor]) -> float:
        """The error of outputs."""
        if not isinstance(self.reference, Found):
            return error_of(found, wanted)
        return self.reference.error_of(*(dict(zip(self.facts.outputs, of, strict=True)) for of in (found, wanted)))

    @contextlib.contextmanager
    def telling(self, *others: nn.Module) -> Iterator[None]:
        """While entered, there are objects in the inputs to check with, for a detector and for others of its kind."""
        kept = [(model, model.least) for model in (self.reference, self.model, *others) if isinstance(model, Found)]
        try:
            if kept:
                least = kept[0][0].telling([x for x, _ in self.inputs])
                for model, _ in kept:
                    model.least = least
            yield
        finally:
            for model, least in kept:
                model.least = least

    def told(self, checks: tuple[Checked, ...]) -> Facts:
        """The facts with what was checked."""
        return self.facts._replace(checks=tuple((check.shape, check.error) for check in checks))


def _large(size: tuple[int, int]) -> tuple[int, int]:
    """The size of the example for images of a size: of small ones, up to four times as large a side."""
    return tuple(side * min(4, -(-_SIDE // side)) for side in size)  # type: ignore[return-value]


@contextlib.contextmanager
def traced(
    model: nn.Module, facts: Facts | None, tolerance: float | None = None, half: bool = False, way: str = ""
) -> Iterator[Traced]:
    """The forms for inference of `model`, which stays as it is, with what to trace and check them with.

    tolerance: the largest error that is accepted; by default, 1e-4 of the largest number, 1e-3 for pixels. In half
    precision twice that of the model itself in it is, too.  way: of `linsight.attention.WAYS`, where it is one.
    """
    if not isinstance(model, nn.Module):
        raise LinsightError(f"a model is exported, a torch.nn.Module: a {type(model).__name__} came")
    facts = facts or facts_of(model)
    check_way(model, way)
    model = as_graph(model)
    if any(p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).cpu()
    single = isinstance(model, Found)
    if single and half:
        raise LinsightError(
            f"'{facts.model}' has no form in half precision, whose numbers tell no places beyond a few hundred pixels: "
            f"leave --half out"
        )
    facts = facts._replace(pixels=isinstance(model, Pixels), single=single, version=linsight.__version__)
    with evaluation(model):
        reference = fused(model)
        given = _halved(reference) if half else reference
        dtype = _dtype(given)
        if half and _dtype(reference) != torch.float32:
            raise LinsightError(f"half precision is made of float32, and the model is {facts.dtype} already")
        size = facts.input_size
        names = {0: "batch", 1: "height", 2: "width"} if facts.pixels else {0: "batch", 2: "height", 3: "width"}
        if single:
            del names[0]
        batch, dims = 1 if single else _BATCH, names if facts.dynamic else {}
        shapes: list[tuple[int, ...]] = [(1, *size[1:])] * 3
        if facts.dynamic:  # in small images there is little to find
            shapes = [*unseen(batch, _large(size[1:]) if single else size[1:])]
            shapes = [(1, *shape[1:]) for shape in shapes] if single else shapes
        examples = [_images(facts, number, *shape) for number, shape in enumerate(shapes)]
        shape = (batch, *_large(size[1:])) if facts.dynamic else (1, *size[1:])
        example = _cast(_images(facts, 0, *shape), dtype)
        pairs = tuple((_cast(x, _dtype(reference)), _cast(x, dtype)) for x in examples)
        limit = (OBJECTS if single else PIXELS if facts.pixels else TOLERANCE) if tolerance is None else tolerance
        answers(given, example)  # which says in one line what is wrong with it
        with torch.no_grad():
            outputs = tuple(_names(given(example), given))
        facts = facts._replace(
            dtype=str(dtype).removeprefix("torch."),
            inputs=("pixels" if facts.pixels else "images",),
            outputs=outputs,
        )
        of = Traced(given, reference, facts, example, dims, pairs, limit)
        if half:
            found = [of.measure(answers(given, mine), answers(reference, x)) for x, mine in pairs]
            of = of._replace(limit=max(limit, 2 * max(found)))
        yield of


def facts_of(model: nn.Module) -> Facts:
    """The facts of a model, by its `pretrained_cfg`."""
    if isinstance(model, Pixels):
        inner = facts_of(model.model)
        sides = model.size if isinstance(model, Served) else inner.input_size[1:]
        return inner._replace(input_size=(len(model.mean), *sides), **model.preparation())
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    known: dict[str, Any] = {name: cfg[name] for name in ("interpolation", "crop_pct", "crop_mode") if cfg.get(name)}
    known |= {name: tuple(cfg[name]) for name in ("input_size", "mean", "std") if cfg.get(name)}
    return Facts(model=str(cfg.get("architecture") or type(model).__name__), **known)


def _images(facts: Facts, number: int, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(number + batch + height + width)
    channels = facts.input_size[0]
    if facts.pixels:
        return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8, generator=generator)
    return torch.randn(batch, channels, height, width, generator=generator)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _halved(model: nn.Module) -> nn.Module:
    """A copy in float16, but for the pixels that it prepares."""
    twin = copy.deepcopy(model)
    (twin.model if isinstance(twin, Pixels) else twin).half()
    return twin


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _names(given: Any, model: nn.Module) -> list[str]:
    """Names of the outputs: their own, those of the layers that maps are of, or numbers."""
    if isinstance(given, Tensor):
        return [*(model.outputs if isinstance(model, Pixels) else ("output",))]
    count = len(tree_leaves(given))
    info: Any = getattr(model, "feature_info", None)
    names = [*given] if isinstance(given, dict) else [*getattr(given, "_fields", ())]
    if not names and hasattr(info, "module_name"):
        names = list(info.module_name())
    return list(map(str, names)) if len(names) == count else [f"output_{i}" for i in range(count)]
