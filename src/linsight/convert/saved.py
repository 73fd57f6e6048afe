"""Converted models on disk: a folder with their weights, and a table of what was replaced by what.

The weights are a safetensors file with the names of the model's library, and those of the mechanisms beside them.
Nothing in the folder is executed.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from linsight.errors import CheckpointError, LinsightError
from linsight.runtime.files import read_json, replacing, write_json, writing

from .conversion import ConvertedLayer, convert, converted_layers
from .hybrid import Hybrid
from .seams import SEAMS

TABLE, WEIGHTS = "linearized.json", "model.safetensors"
_FORMAT = 1
_SHOWN = 3  # keys in a message


def save_linearized(model: nn.Module, folder: str | pathlib.Path) -> None:
    """Write a converted model to a folder, which is made if need be: its weights, and then the table.

    Raises:
        LinsightError: the model has no converted layer, or the folder cannot be written.
    """
    rows = converted_layers(model)
    if not rows:
        raise LinsightError("the model has no converted layer: save it as its own library does")
    folder = pathlib.Path(folder).expanduser()
    described: dict[str, Any] = {"library": None}
    for seam in SEAMS:
        found = seam.describe(model)
        if found is not None:
            described = {"library": seam.library, **found}
            break
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as path:
            save_model(model, str(path))
        write_json(
            folder / TABLE,
            {
                "format": _FORMAT,
                "source": described,
                "layers": told_layers(model),
            },
        )


def load_linearized(folder: str | pathlib.Path, model: nn.Module | None = None) -> nn.Module:
    """The converted model that a folder holds, in evaluation mode.

    Args:
        model: one of the kind that was converted, not converted itself, with any weights; it is changed and given back.
            Without it, it is built by its library, where the folder tells how.

    Raises:
        CheckpointError: the folder holds no converted model, is damaged, or another model was given.
        LinsightError: it does not tell how its model is built.
    """
    folder = pathlib.Path(folder).expanduser()
    table = read_json(folder / TABLE)
    rows = _read_rows(table.get("layers"), f"'{folder / TABLE}'")
    if model is None:
        model = _built(_mapping(table.get("source"), f"'{folder / TABLE}'"), folder)
    convert(model, rows)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{folder / WEIGHTS}' cannot be read: {error}") from error
    own = model.state_dict()
    held = {tensor.data_ptr() for key, tensor in own.items() if key in weights}  # tied tensors are saved once
    wrong = [key for key, tensor in own.items() if key not in weights and tensor.data_ptr() not in held]
    wrong += [key for key, tensor in weights.items() if key not in own or own[key].shape != tensor.shape]
    if wrong:
        shown = ", ".join(sorted(wrong)[:_SHOWN])
        raise CheckpointError(
            f"'{folder}' holds another model than this {type(model).__name__}: {len(wrong)} tensors differ, as {shown}"
        )
    model.load_state_dict(weights, strict=False)
    return model.eval()


def told_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The converted layers of a model by their names, as a file of JSON tells of them; `convert_again` reads that."""
    return {name: _row(row) for name, row in converted_layers(model).items()}


def convert_again(model: nn.Module, told: Any) -> None:
    """Convert layers of a softmax model, in place, as `told_layers` told of one of its kind.

    Raises:
        CheckpointError: it is no such table.
        LinsightError: see `convert`.
    """
    convert(model, _read_rows(told, "linearized"))


def _read_rows(told: Any, where: str) -> dict[str, ConvertedLayer]:
    rows = {name: _read_row(name, row, where) for name, row in _mapping(told, where).items()}
    if not rows:
        raise CheckpointError(f"{where} names no converted layer")
    return rows


def _row(row: ConvertedLayer) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(row).items() if value not in ({}, None)}


def _read_row(name: str, row: Any, where: str) -> ConvertedLayer:
    fields = {field.name for field in dataclasses.fields(ConvertedLayer)}
    row = _mapping(row, where)
    if "attention" not in row or row.keys() - fields:
        raise CheckpointError(f"{where}: the row of {name} is none of a converted layer")
    grid = row.get("grid")
    hybrid = row.get("hybrid")
    try:
        made = None if hybrid is None else Hybrid(**_mapping(hybrid, where))
    except TypeError as error:
        raise CheckpointError(f"{where}: the row of {name} has a hybrid that is none: {error}") from error
    return ConvertedLayer(**{**row, "grid": tuple(grid) if isinstance(grid, list) else grid, "hybrid": made})


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is no table of a converted model")
    return value


def _built(described: Mapping[str, Any], folder: pathlib.Path) -> nn.Module:
    library = described.get("library")
    for seam in SEAMS:
        if seam.library == library:
            try:
                return seam.rebuild({key: value for key, value in described.items() if key != "library"})
            except LinsightError:
                raise
            except Exception as error:
                raise CheckpointError(f"'{folder}': {library} cannot build its model: {error}") from error
    raise LinsightError(f"'{folder}' does not tell how its model is built: pass one, load_linearized(folder, model)")
