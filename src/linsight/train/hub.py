"""Models in timm's layout, of a folder or of the Hugging Face Hub, with what it takes to use them."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_model_input_config
from torch import nn

from linsight.errors import CheckpointError, LinsightError
from linsight.models import create_model
from linsight.models.timm.saved import CONFIG, fetch_config, fetch_weights, read_config, repository, weights_in
from linsight.recipe import Recipe
from linsight.runtime.places import located
from linsight.tasks import ClassifyRecipe

from .run import WEIGHTS, kept_recipe

PREFIX, LOCAL = "hf-hub:", "local-dir:"
OWN = "linsight"  # the key of config.json under which is what timm has no place for


class Saved(NamedTuple):
    """A model out of timm's layout.

    recipe: how images are prepared for it, and how it was trained as far as that is told.
    classes, titles: names of its classes and what to call them, as of `Trained`; numbers where none are told.
    path: the file of its weights.  named: True where the classes have names.
    """

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    titles: tuple[str, ...]
    path: pathlib.Path
    named: bool


def is_saved(folder: pathlib.Path) -> bool:
    """True for a folder in timm's layout, which no run of ours works in."""
    if not (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        return False
    return kept_recipe(folder) is None


def fetched(name: str, revision: str | None = None) -> pathlib.Path:
    """The folder in the cache of a model on the Hub, OWNER/NAME or OWNER/NAME@REVISION, perhaps behind "hf-hub:".

    Raises:
        LinsightError: no such name, repository or revision, no weights as safetensors, or no network.
    """
    owner, asked = repository(name.removeprefix(PREFIX), revision)
    folder = fetch_config(owner, asked)
    commit = folder.name if folder.parent.name == "snapshots" else asked  # both files are of one commit
    return fetch_weights(f"{owner}@{commit}" if commit else owner, pickled=False).parent


def weights_file(source: str) -> str:
    """The file or address of weights to start from: of a run, of a folder in timm's layout, or of the Hub."""
    if source.startswith(PREFIX):
        return str(weights_in(fetched(source), pickled=False))
    if "://" in source:
        return source
    path = located(source)
    if path.is_dir():
        return str(weights_in(path, pickled=False) if is_saved(path) else path / WEIGHTS)
    return str(path)


def open_saved(folder: pathlib.Path, **kwargs: Any) -> Saved:
    """The model of a folder in timm's layout, in evaluation mode. kwargs: of `create_model`, in place of those kept.

    Raises:
        LinsightError: it is damaged, hostile, or of another library.
    """
    config = read_config(folder)
    path = weights_in(folder, pickled=False)
    model = create_model(f"{LOCAL}{folder}", pretrained=True, **kwargs).eval()
    named = {**config.get("pretrained_cfg", {}), **config}
    classes, titles, known = _classes(named, int(getattr(model, "num_classes", 0) or 0))
    return Saved(model, recipe_of(config, model), classes, titles, path, known)


def about_run(folder: pathlib.Path) -> dict[str, Any]:
    """The results that a folder in timm's layout tells of the run that it is from; empty where it tells none."""
    try:
        results = read_config(folder)[OWN]["results"]
    except (LinsightError, KeyError, TypeError):
        return {}
    return results if isinstance(results, dict) else {}


def recipe_of(config: Mapping[str, Any], model: nn.Module) -> Recipe:
    """The recipe that a `config.json` tells of; how images are prepared is told by the model's own `pretrained_cfg`.

    Raises:
        LinsightError: images are prepared in a way that linsight has no recipe for.
    """
    own = config.get(OWN)
    kept = own.get("recipe") if isinstance(own, dict) else None
    args = dict(config.get("model_args") or {})
    given: dict[str, Any]
    if isinstance(kept, dict):
        given = {name: value for name, value in kept.items() if name in ClassifyRecipe.model_fields}
    else:
        given = {
            "model": args.pop("base", config.get("architecture")),
            "attention": args.pop("attention", None),
            "attention_options": args.pop("attention_options", None) or {},
            "model_args": {key: value for key, value in args.items() if key not in _FIELDS_OF_ARGS},
        }
    cfg: Any = model.pretrained_cfg
    channels, *size = get_model_input_config(model)["input_size"]
    given |= {
        "in_chans": channels,
        "img_size": size,
        "num_classes": int(getattr(model, "num_classes", 0) or 0) or None,
        "mean": _of_each(cfg.get("mean") or (), channels),
        "std": _of_each(cfg.get("std") or (), channels),
    }
    given |= {field: cfg[key] for field, key in _OF_CFG.items() if cfg.get(key) is not None}
    return ClassifyRecipe(**given)


_FIELDS_OF_ARGS = ("img_size", "in_chans", "num_classes")
_OF_CFG = {"interpolation": "interpolation", "crop_pct": "crop_pct", "eval_crop": "crop_mode"}


def _of_each(values: Any, channels: int) -> tuple[float, ...]:
    """A number for each channel: their mean, where they are of other channels."""
    return tuple(values) if len(values) in (0, channels) else (sum(values) / len(values),) * channels


def _classes(config: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Names, titles, and whether they are told."""
    labels, about = config.get("label_names"), config.get("label_descriptions")
    names = {str(place): name for place, name in enumerate(labels)} if isinstance(labels, list) else labels or {}
    if names and int(config.get("num_classes", count)) == count:
        found = tuple(names.get(str(place), str(place)) for place in range(count))
        titles = tuple(str(about.get(name, name)) for name in found) if isinstance(about, dict) else ()
        return found, titles, True
    subset = None if labels else infer_imagenet_subset({"num_classes": count})
    if subset:
        info = ImageNetInfo(subset)
        found = tuple(info.label_names())
        return found, tuple(f"{name} {info.label_name_to_description(name)}" for name in found), False
    return tuple(map(str, range(count))), (), False


def place_of(name: str | pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """The folder or file that `name` is, or, of OWNER/NAME on the Hub, the folder that it is fetched into.

    A folder of this name comes before a repository; "hf-hub:" and "local-dir:" say which is meant.

    Raises:
        LinsightError: nothing there.
    """
    text = str(name)
    path = located(text.removeprefix(LOCAL))
    if not text.startswith(PREFIX) and path.exists():
        if revision is not None:
            raise LinsightError(f"revision={revision} is for the Hub, and '{path}' is here: leave it out")
        return path
    if isinstance(name, pathlib.Path) or text.startswith((LOCAL, ".", "/", "~", "\\")) or not text:
        raise CheckpointError(f"no such folder or file: '{path}'")
    if not text.startswith(PREFIX) and "/" not in text:
        raise CheckpointError(
            f"no such folder: '{path}'; a model on the Hub is called OWNER/NAME, "
            "and linsight.create_model makes one by its own name"
        )
    return fetched(text, revision)
