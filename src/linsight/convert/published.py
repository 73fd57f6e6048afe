"""Converted diffusion models as others published them: files of their attention alone, for a model of diffusers.

LinFusion's (arXiv 2409.02097) are folders: the attentions are numbered in the file, and `modules_list` in `config.json`
has for each number `module_name`, `dim_n`, `heads` and `projection_mid_dim`. The model is converted as it says.

CLEAR's (arXiv 2412.16112) hold the tensors that differ from FLUX.1's, by their names there. Radius and down-sampling
are not told, so the model is converted first.

>>> unet = load_converted(pipe.unet, "LinFusion-XL")
>>> flux = linearize(pipe.transformer, "clear", radius=16, down_factor=4)
>>> load_converted(flux, "clear_16_down_4.safetensors", in_place=True)
"""

import copy
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from linsight.checkpoints.keys import key_map, to_ours
from linsight.checkpoints.read import read
from linsight.checkpoints.unwrap import unwrap
from linsight.errors import CheckpointError, LinsightError
from linsight.runtime.files import read_json

from .conversion import ConvertedLayer, attentions, convert, new_parameters
from .mixing import mixings

CONFIG = "config.json"
_NUMBERED = re.compile(r"(\d+)\.(.+)")
_ROW = {"module_name": str, "heads": int, "projection_mid_dim": int | None}  # what a row of `modules_list` tells
_ENDINGS = ("safetensors", "bin", "pth", "pt")
_SHOWN = 3  # keys in a message


def load_converted(
    model: nn.Module,
    source: str | pathlib.Path | Mapping[str, object],
    *,
    modules: Sequence[Mapping[str, Any]] | None = None,
    in_place: bool = False,
) -> nn.Module:
    """A copy of `model` with the attention that a published file holds. All is checked before anything is loaded.

    Args:
        model: the network of a pipeline, `pipe.unet` or `pipe.transformer`; converted where the file does not tell how.
        source: a folder or a file, an http(s) address, or a state dict.
        modules: the rows of `modules_list`, where they are not in a `config.json` beside the file.
        in_place: change `model` itself.

    Raises:
        CheckpointError: the source cannot be read safely, is none of these, or is of another model.
        LinsightError: the model cannot be converted as it says, or is to be converted first.
    """
    tensors, table, name = _opened(source)
    numbered = [bool(_NUMBERED.fullmatch(key)) for key in tensors]
    if not in_place:
        model = copy.deepcopy(model)
    if any(numbered):
        if not all(numbered):
            raise CheckpointError(f"{name} has numbered attentions, and beside them '{_first(tensors, numbered)}'")
        tensors = _by_name(model, tensors, modules or table, name)
    elif not mixings(model):
        raise LinsightError(
            f"{name} does not tell how its model was converted: do so first, as linearize(model, 'clear', radius=8)"
        )
    rules = key_map(model)
    state = {to_ours(key, rules): tensor for key, tensor in tensors.items()}
    _check(model, state, name, whole=any(numbered))
    model.load_state_dict(state, strict=False)
    return model


def _opened(source: str | pathlib.Path | Mapping[str, object]) -> tuple[dict[str, Tensor], Any, str]:
    """The tensors of a source, the table of its attentions if there is one, and its name."""
    if isinstance(source, Mapping):
        return unwrap(source, "the state dict", ema=None).tensors, None, "the state dict"
    name, path = str(source), pathlib.Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        files = [file for ending in _ENDINGS for file in sorted(path.glob(f"*.{ending}"))]
        if not files:
            raise CheckpointError(f"'{path}' holds no weights, as a file of safetensors")
        source = files[0]
    tensors = unwrap(read(source), name, ema=None).tensors
    config = folder / CONFIG
    return tensors, read_json(config).get("modules_list") if config.is_file() else None, name


def _by_name(model: nn.Module, tensors: Mapping[str, Tensor], table: Any, name: str) -> dict[str, Tensor]:
    """Tensors of numbered attentions by the names of these, in a model that is converted as the table says."""
    if not isinstance(table, Sequence) or not all(
        isinstance(row, Mapping) and all(isinstance(row.get(key), kind) for key, kind in _ROW.items()) for row in table
    ):
        raise CheckpointError(
            f"{name} has numbered attentions: pass modules=, the 'modules_list' of its {CONFIG}, with a row for each"
        )
    done = mixings(model)
    rows = {
        row["module_name"]: ConvertedLayer("linfusion", {"mid_dim": row.get("projection_mid_dim") or 0}, index)
        for index, row in enumerate(table)
    }
    if rows.keys() - done.keys():
        found = attentions(model)
        for row in table:
            heads = getattr(found.get(row["module_name"], (None,))[0], "heads", row["heads"])
            if heads != row["heads"]:
                raise CheckpointError(f"{name}: {row['module_name']} has {row['heads']} heads, in the model {heads}")
        convert(model, {layer: row for layer, row in rows.items() if layer not in done})
    renamed = {}
    for key, tensor in tensors.items():
        number, rest = _NUMBERED.fullmatch(key).groups()  # type: ignore[union-attr]
        if int(number) >= len(table):
            raise CheckpointError(f"{name} has an attention {number}, but its table has {len(table)} rows")
        layer = table[int(number)]["module_name"]
        own = hasattr(model.get_submodule(layer), rest.partition(".")[0])
        renamed[f"{layer}.{rest}" if own else f"{layer}.processor.{rest}"] = tensor
    return renamed


def _check(model: nn.Module, state: Mapping[str, Tensor], name: str, whole: bool) -> None:
    """Raise a CheckpointError unless `state` fills all mechanisms of a model, and nothing beside their attentions.

    whole: it is to fill these attentions, too.
    """
    own, layers = model.state_dict(), mixings(model)
    inside = tuple(f"{layer}." for layer in layers)
    strange = [key for key in state if key not in own]
    if strange:
        raise CheckpointError(
            f"{name} has {_some(strange)} that the model has no place for: was it converted with the options of the "
            f"file, as down_factor= of 'clear'?"
        )
    outside = [key for key in state if not key.startswith(inside)]
    if outside:
        raise CheckpointError(f"{name} has {_some(outside)} outside of the attentions that were converted")
    wanted = [key for key in own if key.startswith(inside)] if whole else new_parameters(model)
    lacking = [key for key in wanted if key not in state]
    lacking += [layer for layer in layers if not any(key.startswith(f"{layer}.") for key in state)]
    if lacking:
        raise CheckpointError(f"{name} lacks {_some(lacking)}, which the converted model has")
    shapes = [key for key, tensor in state.items() if tensor.shape != own[key].shape]
    if shapes:
        key = shapes[0]
        raise CheckpointError(
            f"{name} is of another model: {_some(shapes)} have other shapes, {tuple(state[key].shape)} and here "
            f"{tuple(own[key].shape)}"
        )


def _some(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensors ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"


def _first(tensors: Mapping[str, Tensor], numbered: Sequence[bool]) -> str:
    return next(key for key, number in zip(tensors, numbered, strict=True) if not number)
