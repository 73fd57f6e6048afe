"""The facts of an exported file, as JSON in its metadata."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from linsight.errors import CheckpointError
from linsight.runtime.files import to_json

KEY = "linsight"  # of the metadata
DTYPES = ("float32", "float16", "bfloat16", "float64")


class Facts(NamedTuple):
    """A file's own account of itself.

    model: its name.  classes: their names, in the order of the outputs; () where unknown.
    input_size: channels, height and width.  mean, std: of each channel, in 0..1.
    task: by which its answers are read.
    dynamic: batch, height and width are free.  single: the batch is not: it takes one image at a time.
    pixels: the graph takes uint8 `(B, H, W, C)`, and gives what people read: probabilities, a mask, boxes.
    recipe: the fields by which a run rebuilds its model; {} of no run.
    titles: what to call the classes in a prediction, where that is not their name.
    run: the classes are those of a run's data, not the indices or WordNet ids of published weights.
    interpolation, crop_pct, crop_mode: how images are brought to the input size, in timm's words.
    dtype: of the weights.  inputs, outputs: names in the graph.
    version: of linsight.  checks: the shapes that the file was compared at, and the errors found.
    """

    model: str = ""
    classes: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    task: str = "classify"
    dynamic: bool = True
    single: bool = False
    pixels: bool = False
    recipe: Mapping[str, Any] = {}
    titles: tuple[str, ...] = ()
    run: bool = False
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    dtype: str = "float32"
    inputs: tuple[str, ...] = ("images",)
    outputs: tuple[str, ...] = ("output",)
    version: str = ""
    checks: tuple[tuple[tuple[int, ...], float], ...] = ()

    @property
    def layout(self) -> str:
        """The input in a word: its axes, as they lie."""
        batch = "1" if self.single else "B"
        return f"uint8 ({batch}, H, W, C)" if self.pixels else f"{self.dtype} ({batch}, C, H, W)"

    def dumps(self) -> str:
        """The facts as JSON."""
        return to_json(self._asdict())

    @classmethod
    def loads(cls, text: str, path: Path) -> "Facts":
        """The facts of the file `path`.

        Raises:
            CheckpointError: it has none, or not such.
        """
        if not text:
            raise CheckpointError(
                f"'{path}' was not exported by linsight: its metadata lacks '{KEY}', which tells the classes and how "
                f"images are prepared"
            )
        try:
            given = _tuples(json.loads(text))
            facts = cls(**{name: value for name, value in given.items() if name in cls._fields})
        except (ValueError, TypeError, AttributeError, RecursionError):
            facts = None
        if facts is None or not _sound(facts):
            raise CheckpointError(f"'{path}' says what it takes in a way that cannot be read: export it again")
        return facts


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _sound(facts: Facts) -> bool:
    """True where each fact has a value that it can have: the file may be anybody's."""
    texts = ("model", "task", "interpolation", "crop_mode", "dtype", "version")
    lists = ("classes", "titles", "inputs", "outputs")
    channels = facts.input_size[0] if isinstance(facts.input_size, tuple) and facts.input_size else 0
    return (
        all(isinstance(getattr(facts, name), str) for name in texts)
        and facts.dtype in DTYPES
        and all(isinstance(getattr(facts, name), bool) for name in ("dynamic", "single", "pixels", "run"))
        and all(_all(getattr(facts, name), str) for name in lists)
        and isinstance(facts.recipe, dict)
        and _all(facts.input_size, int)
        and len(facts.input_size) == 3
        and all(0 < side <= 65536 for side in facts.input_size)
        and all(_numbers(getattr(facts, name), channels) for name in ("mean", "std"))
        and all(facts.std)
        and _number(facts.crop_pct)
        and 0 < facts.crop_pct <= 1
        and len(facts.titles) in (0, len(facts.classes))
    )


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(type(value) is kind for value in values)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, tuple) and len(values) in (0, count) and all(map(_number, values))
