"""Models in timm's layout: written into a folder, and pushed to the Hugging Face Hub in one commit."""

import contextlib
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import nn

import linsight
from linsight.convert.saved import told_layers
from linsight.errors import LinsightError
from linsight.fuse import is_fused
from linsight.models import HOSTS, VARIANTS, create_model, default_attention
from linsight.models.timm.fetch import speaking_to_hub
from linsight.models.timm.saved import CONFIG, WEIGHTS, read_config, repository
from linsight.runtime.files import read_json, write_json, write_text, writing
from linsight.train import LoadedRun, load_run
from linsight.train.hub import LOCAL, OWN, recipe_of
from linsight.train.model import save

from .about import About, check_licence, known_results, read_speed, shared_recipe
from .card import make_card

CARD = "README.md"
FILES = (CONFIG, WEIGHTS, CARD)


def save_for_hub(
    source: LoadedRun | nn.Module | str | pathlib.Path,
    folder: str | pathlib.Path,
    *,
    name: str = "",
    licence: str = "",
    classes: Sequence[str] = (),
) -> pathlib.Path:
    """Write a model into a folder in timm's layout, with a model card; the folder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` makes it again once linsight is imported, as does
    `linsight.from_pretrained(FOLDER)`, which knows its classes and how images are prepared, too. Nothing in it tells of
    folders of this machine. Files of these names that are in the folder are replaced.

    Args:
        source: a run, its folder, or a model that `create_model` made, ours or timm's.
        folder: made where it is not there.
        name: OWNER/NAME on the Hub, for the card.
        licence: of the weights, an identifier of the Hub, as apache-2.0; none is stated without it.
        classes: their names, of a model; a run knows its own.

    Raises:
        LinsightError: the model cannot be made again by its arguments, or the folder cannot be written, or is a run's.
    """
    folder = pathlib.Path(folder)
    run = source if isinstance(source, LoadedRun) else None if isinstance(source, nn.Module) else load_run(source)
    if name:
        name, _ = repository(name)
    model = _plain(run.model if run is not None else source)  # type: ignore[arg-type]
    labels = _labels(model, tuple(classes) or (run.classes if run is not None else ()))
    check_licence(licence)
    if (folder / CONFIG).exists() and "architecture" not in read_json(folder / CONFIG):
        raise LinsightError(f"'{folder}' has a {CONFIG} of something else, as of a run: give another folder")
    with writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
                _write(pathlib.Path(temporary), model, run, labels, name, licence)
                for file in FILES:
                    (pathlib.Path(temporary) / file).replace(folder / file)
        except BaseException:
            with contextlib.suppress(OSError):
                if made:
                    folder.rmdir()
            raise
    return folder


def _write(
    folder: pathlib.Path,
    model: nn.Module,
    run: LoadedRun | None,
    labels: tuple[str, ...],
    name: str,
    licence: str,
) -> None:
    """All files of the layout into an empty folder."""
    own: dict[str, Any] = {"version": linsight.__version__}
    data: dict[str, Any] = {}
    results: dict[str, float] = {}
    if run is not None:
        results = known_results(run.summary)
        own |= {"recipe": shared_recipe(run.recipe), "results": results}
        of = run.recipe
        data = {"input_size": (of.in_chans, *run.img_size), "mean": run.mean, "std": run.std}
        data |= {"interpolation": of.interpolation, "crop_pct": of.crop_pct, "crop_mode": of.eval_crop}
    config: dict[str, Any] = {OWN: own}
    if labels:
        config["label_names"] = list(labels)
        if run is not None and run.titles and labels == run.classes and len(set(labels)) == len(labels):
            config["label_descriptions"] = dict(zip(labels, run.titles, strict=True))
    try:
        save_config_for_hf(model, folder / CONFIG, model_config=config, data_config=data)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise LinsightError(f"'{type(model).__name__}' cannot be described for the Hub: {error}") from error
    written = read_config(folder)
    written.get("model_args", {}).pop("num_classes", None)  # told beside them; transformers would give it twice
    if layers := told_layers(model):
        if written["architecture"] not in {*VARIANTS, *HOSTS}:
            raise LinsightError("a converted model of another library has no layout on the Hub: take save_linearized")
        written.setdefault("model_args", {})["linearized"] = layers
    write_json(folder / CONFIG, written)
    _check_again(folder, model)
    recipe = run.recipe if run is not None else recipe_of(written, model)
    save(folder / WEIGHTS, model.state_dict(), recipe, {"classes": labels or _numbers(model)})
    write_text(folder / CARD, make_card(_about(model, written, run, results, labels, name, licence)))


def _about(
    model: nn.Module,
    config: dict[str, Any],
    run: LoadedRun | None,
    results: dict[str, float],
    labels: tuple[str, ...],
    name: str,
    licence: str,
) -> About:
    args = config.get("model_args") or {}
    architecture = str(args.get("base", config["architecture"]))
    known = architecture in VARIANTS or architecture in HOSTS
    attention = args.get("attention") or (default_attention(architecture) if known else "")
    shared = config[OWN].get("recipe") if results else None
    channels, height, width = get_model_input_config(model)["input_size"]
    size = (channels, *run.img_size) if run is not None else (channels, height, width)
    return About(
        name=name or architecture,
        architecture=architecture,
        attention=str(attention),
        params=sum(p.numel() for p in model.parameters()),
        input_size=size,
        outputs=int(config.get("num_classes") or 0),
        classes=labels,
        recipe=shared,
        results=results,
        data=str(shared.get("data", run.recipe.data)) if shared and run is not None else "",
        speed=read_speed(run.path.parent) if run is not None else (),
        licence=licence,
    )


def _plain(model: nn.Module) -> nn.Module:
    """The model that is described, without what wraps it."""
    for attribute in ("_orig_mod", "module"):  # of torch.compile, of DDP
        model = getattr(model, attribute, model)
    if is_fused(model):
        raise LinsightError("the model is fused, its weights folded: save the one that it was made of")
    if not isinstance(getattr(model, "pretrained_cfg", None), dict) or not hasattr(model, "num_features"):
        raise LinsightError(
            f"'{type(model).__name__}' does not tell how it is made: save a model that create_model made, and none of "
            f"features_only"
        )
    return model


def _labels(model: nn.Module, classes: tuple[str, ...]) -> tuple[str, ...]:
    count = int(getattr(model, "num_classes", 0) or 0)
    if len(classes) > count:
        raise LinsightError(f"{len(classes)} classes are named, and the model has {count}")
    return classes + tuple(map(str, range(len(classes), count))) if classes else ()


def _numbers(model: nn.Module) -> tuple[str, ...]:
    return tuple(map(str, range(int(getattr(model, "num_classes", 0) or 0))))


def _check_again(folder: pathlib.Path, model: nn.Module) -> None:
    """Raise unless the model that is made of the description has the same tensors."""
    with torch.device("meta"):
        again = create_model(f"{LOCAL}{folder}").state_dict()
    own = model.state_dict()
    odd = [key for key in {**own, **again} if key not in own or key not in again or own[key].shape != again[key].shape]
    if odd:
        raise LinsightError(
            f"the model has been changed since it was made: '{odd[0]}' and {len(odd) - 1} more tensors are not those "
            f"of its arguments; merge adapters, remove parametrizations, or make it anew"
        )


def push_to_hub(
    source: LoadedRun | nn.Module | str | pathlib.Path,
    name: str,
    *,
    private: bool | None = None,
    message: str = "",
    revision: str | None = None,
    licence: str = "",
    classes: Sequence[str] = (),
    card: bool = False,
) -> str:
    """Push a model to the Hub, as `save_for_hub` writes it, in one commit; the address of the commit.

    The repository is made where it is not there. The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        source, licence, classes: as of `save_for_hub`.
        name: OWNER/NAME.
        private: who may see a repository that is made; None: as the Hub has it, which is all, but in organisations
            that decided otherwise.
        message: of the commit.
        revision: a branch, made where it is not there; None: main.
        card: replace a model card that is there; without it, somebody's own stays.

    Raises:
        LinsightError: see `save_for_hub`; or no token, no right, no network.
    """
    owner, asked = repository(name)
    if asked is not None or "/" not in owner:
        raise LinsightError(f"'{name}' is no OWNER/NAME; a branch is given as revision")
    repository(owner, revision)
    if get_token() is None:
        raise LinsightError("no token for the Hub: log in with 'hf auth login', or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_hub(source, temporary, name=owner, licence=licence, classes=classes)
        api = HfApi(library_name="linsight", library_version=linsight.__version__)
        with speaking_to_hub(owner):
            api.create_repo(owner, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(owner, branch=revision, exist_ok=True)
            keep = not card and api.file_exists(owner, CARD, revision=revision)
            files = [file for file in FILES if not (keep and file == CARD)]
            done = api.create_commit(
                owner,
                [CommitOperationAdd(file, folder / file) for file in files],
                commit_message=message or f"Add the model, by linsight {linsight.__version__}",
                revision=revision,
            )
    return str(done.commit_url)
