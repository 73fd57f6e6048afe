"""Folders and repositories in timm's layout. Anyone may have made them: all is looked at before it is used."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from timm.models import PretrainedCfg, is_model
from timm.models import list_models as list_of_timm

from linsight.errors import CheckpointError, LinsightError, UnknownNameError
from linsight.runtime.files import read_json
from linsight.runtime.text import printable

from .fetch import speaking_to_hub

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.pth", "model.pth")
_CLASSES, _SIDE = 10**7, 65536
# Arguments of timm's factory, which are no matter of a model's description.
_NOT_SAVED = {"cache_dir", "checkpoint_path", "device", "dtype", "exportable", "no_jit", "pretrained", "scriptable"}
_NOT_SAVED |= {"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"}


# -- the description ---------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Description of a model by the `config.json` in a folder, of the kinds that timm's loader takes for granted.

    Raises:
        CheckpointError: there is none, it is damaged, of another library, or says what no model can be.
    """
    path = _inside(folder, CONFIG)
    try:
        config = read_json(path)
        _check_config(config)
    except UnknownNameError:
        raise
    except LinsightError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"'{path}': {error}") from error
    return config


def _check_config(config: dict[str, Any]) -> None:
    name = config.get("architecture")
    if not isinstance(name, str):
        other = config.get("model_type") or config.get("architectures")
        of = f"of another library ({_shown(other)})" if other else "of no model of timm's layout"
        raise LinsightError(f"it is {of}: it names no 'architecture'")
    if not is_model(name):
        raise UnknownNameError("architecture", printable(name)[:80], list_of_timm(), "of timm, or of linsight")
    for key, kinds in (("model_args", (dict,)), ("pretrained_cfg", (dict,)), ("label_names", (list, dict))):
        if config.get(key) is not None and not isinstance(config[key], kinds):
            raise LinsightError(f"{key}={_shown(config[key])} is no {' or '.join(kind.__name__ for kind in kinds)}")
    labels = config.get("label_names") or ()
    if not all(isinstance(label, str) for label in (labels.values() if isinstance(labels, dict) else labels)):
        raise LinsightError("label_names has a name that is no text")
    check_saved_args(config.get("model_args") or {})
    check_cfg(config.get("pretrained_cfg", {key: config[key] for key in _CFG if key in config}))
    if "num_classes" in config:
        check_cfg({"num_classes": config["num_classes"]})


def check_saved_args(given: Mapping[str, Any]) -> None:
    """Raise where the arguments of a saved model have some that are not a model's own, or no numbers."""
    for key, value in given.items():
        if key in _NOT_SAVED or not key.isidentifier():
            raise LinsightError(f"the argument '{printable(key)[:80]}' is none of a saved model")
        if not _finite(value):
            raise LinsightError(f"{key}={_shown(value)} has numbers that no model has")


def _finite(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, int | float) or (math.isfinite(value) and abs(value) <= _CLASSES)


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and 1 <= len(value) <= 4096 and all(map(_number, value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _image(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_whole(1, _SIDE), value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _names(value: Any) -> bool:
    return _text(value) or (isinstance(value, list | tuple) and all(map(_text, value)))


# Of the fields of a pretrained_cfg that something is done with: what they can be, and in words.
_CFG: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("input_size", "test_input_size", "min_input_size"), (_image, f"channels, height and width, of 1 to {_SIDE}")
    ),
    **dict.fromkeys(("mean", "std"), (_numbers, "a list of numbers")),
    **dict.fromkeys(
        ("crop_pct", "test_crop_pct"), (lambda value: _number(value) and 0 < value <= 4, "a number above 0")
    ),
    **dict.fromkeys(("interpolation", "crop_mode", "hf_hub_id", "hf_hub_filename", "architecture"), (_text, "text")),
    **dict.fromkeys(("first_conv", "classifier"), (_names, "text, or a list of texts")),
    "num_classes": (_whole(0, _CLASSES), f"a whole number of 0 to {_CLASSES}"),
    "label_offset": (_whole(0, _CLASSES), "a whole number, 0 or more"),
    "pool_size": (
        lambda value: isinstance(value, list | tuple) and all(map(_whole(0, _SIDE), value)),
        "a list of whole numbers",
    ),
}
_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}


def check_cfg(cfg: Mapping[str, Any]) -> None:
    """Raise unless the fields of a pretrained_cfg are of the kinds that they are taken for."""
    for key, value in cfg.items():
        if key not in _FIELDS:
            raise UnknownNameError("field of a pretrained_cfg", printable(str(key))[:80], _FIELDS)
        fits, words = _CFG.get(key, (None, ""))
        if value is not None and fits is not None and not fits(value):
            raise LinsightError(f"{key}={_shown(value)} of a pretrained_cfg must be {words}")


def _shown(value: Any) -> str:
    return printable(repr(value)[:60])


# -- the files ---------------------------------------------------------------------------------------------------------


def weights_in(folder: Path, *, pickled: bool = True) -> Path:
    """The file of weights in a folder: safetensors, or else PyTorch's where `pickled` files are taken.

    Raises:
        CheckpointError: there is none, or it lies elsewhere.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: '{folder}'")
    there = [name for name in (WEIGHTS, *PICKLED) if (folder / name).exists()]
    there += [path.name for end in ("*.safetensors", "*.pth", "*.bin", "*.pt") for path in sorted(folder.glob(end))]
    safe = [name for name in there if name.endswith(".safetensors")]
    if safe or (there and pickled):
        return _inside(folder, (safe or there)[0])
    if there:
        raise CheckpointError(
            f"'{folder}' has its weights as a pickle ({printable(there[0])}), which is not read here: ask for "
            f"safetensors; linsight.load_published(model, path) reads pickles of tensors alone"
        )
    several = " in one file" if (folder / f"{WEIGHTS}.index.json").exists() else ""
    raise CheckpointError(f"'{folder}' has no weights{several}: no {WEIGHTS}")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, which may be a link within it, or into the cache of the Hub."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"'{path}' is no file" if path.exists() else f"'{folder}' has no {name}")
    real, roots = path.resolve(), [folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()]
    if roots[0].parent.name == "snapshots":  # of a cache, whose files are links to its blobs
        roots.append(roots[0].parent.parent / "blobs")
    if not any(map(real.is_relative_to, roots)):
        raise CheckpointError(f"'{path}' is a link to what lies outside of its folder: put the file itself there")
    return path


# -- the Hub -----------------------------------------------------------------------------------------------------------

_REVISION = re.compile(r"[\w][\w.+/-]{0,200}")


def repository(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """OWNER/NAME and the revision of `name`, which may be OWNER/NAME@REVISION, as timm writes it.

    Raises:
        LinsightError: it is no such name.
    """
    name, at, inner = name.partition("@")
    with speaking_to_hub(name):
        validate_repo_id(name)
    found = revision or (inner if at else None)
    if found is not None and (not _REVISION.fullmatch(found) or ".." in found):
        raise LinsightError(f"revision '{printable(found)[:80]}' is no name of a branch, a tag or a commit")
    return name, found


def fetch(name: str, file: str, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """A file of a repository of the Hub, out of the cache where it is there; None where it has no such file.

    Raises:
        LinsightError: no such repository or revision, no right to it, or no network.
    """
    if file.startswith("/") or not all(part not in ("", ".", "..") for part in re.split(r"[\\/]", file)):
        raise CheckpointError(f"'{printable(file)[:80]}' is no name of a file in a repository")
    with speaking_to_hub(name):
        try:
            return Path(hf_hub_download(name, file, revision=revision, cache_dir=cache_dir, library_name="linsight"))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return None


def fetch_config(name: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder in the cache into which the `config.json` of a repository is fetched.

    Raises:
        LinsightError: see `fetch`, or it has none.
    """
    found = fetch(name, CONFIG, revision, cache_dir)
    if found is None:
        raise CheckpointError(f"'{name}' on the Hub has no {CONFIG}: it is no model in timm's layout")
    return found.parent


def fetch_weights(name: str, file: str | None = None, cache_dir: str | None = None, *, pickled: bool = True) -> Path:
    """The file of weights of a repository, OWNER/NAME@REVISION: safetensors, or else PyTorch's where these are taken.

    Raises:
        LinsightError: see `fetch`, or it has none.
    """
    owner, revision = repository(name)
    for candidate in [file] if file else [WEIGHTS, *(PICKLED[:1] if pickled else ())]:
        if (found := fetch(owner, candidate, revision, cache_dir)) is not None:
            return found
    raise CheckpointError(f"'{owner}' on the Hub has no {file or WEIGHTS}" + ("" if pickled else ": ask for it"))


@contextlib.contextmanager
def made_of(name: str) -> Iterator[None]:
    """Inside, timm makes a model of what a file says; whatever it stumbles over becomes one line about `name`."""
    try:
        yield
    except LinsightError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise LinsightError(f"'{printable(name)}' cannot be made: {reason:.200}") from error
