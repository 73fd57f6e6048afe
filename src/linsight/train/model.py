"""Building the model of a recipe; saving it with all that is needed to use it, and loading it again."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from timm.data import ImageNetInfo
from timm.models import is_model
from torch import Tensor, nn

from linsight.checkpoints import LoadReport, load_published, table_grids
from linsight.errors import CheckpointError, LinsightError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, create_model
from linsight.models.bounds import require_bounded
from linsight.recipe import Recipe
from linsight.runtime.files import replacing, to_json, writing
from linsight.runtime.places import located
from linsight.tasks import ClassifyRecipe, Task, read_recipe, task_of
from linsight.tasks.building import build as build
from linsight.tasks.building import image_size as image_size
from linsight.tasks.building import require_classifier as require_classifier

from .hub import PREFIX, Saved, fetched, is_saved, open_saved, weights_file
from .run import WEIGHTS as WEIGHTS
from .softmax import is_timm, start_from_timm


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with what it takes to use it: the recipe it was made by, and the names of its classes.

    path: the file of its weights.
    run: whether a run of ours wrote that file; published weights do not name their classes.
    titles: what to call the classes in a prediction, where that is not their name.
    pixels: the model takes whole images of uint8, each as large as it is, and prepares them itself.
    fixed: it takes images of one size, that of the recipe, or has its own way to bring them to it.
    facts: what else the weights tell of their task.
    """

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    path: pathlib.Path
    run: bool = True
    titles: tuple[str, ...] = ()
    pixels: bool = False
    fixed: bool = False
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task that it was trained for."""
        return task_of(self.recipe, {**self.facts, "classes": self.classes, "titles": self.titles})


def start_from(
    model: nn.Module, source: str, *, partial: bool = False, head: bool = True, from_size: tuple[int, ...] = ()
) -> LoadReport:
    """Fill a model from other weights; a classifier of another number of classes stays as it is.

    source: a run, a file, an address, a model of the Hub, or "timm/NAME", a softmax model.
    partial: so does all else that the weights lack, or have in another shape.
    head: False leaves any classifier as it is.
    from_size: side, or height and width, of the images they were made for, where the file does not tell.

    Raises:
        CheckpointError: they cannot be read safely, or are of another model.
    """
    size: Any = (from_size * 2)[:2] or None
    if is_timm(source):
        return start_from_timm(model, source, partial=partial, head=head, from_size=size)
    source = weights_file(source)
    report = load_published(model, source, strict=False, head=head, from_size=size)
    if report.mismatched and not partial:
        return load_published(model, source, head=False, from_size=size)
    return report


def left_new(model: nn.Module, report: LoadReport) -> list[str]:
    """The parameters that a load did not fill."""
    return sorted({name for name, _ in model.named_parameters()} - set(report.loaded))


def count_of(model: nn.Module, names: list[str]) -> str:
    """How many parameters these are, and the first few of them."""
    count = sum(model.get_parameter(name).numel() for name in names)
    more = ", ..." if names[4:] else ""
    return f"{count} parameters in {len(names)} tensors stay as initialised: {', '.join(names[:4])}{more}"


def asked_size(trained: Trained, img_size: Any) -> Any:
    """The size of images that was asked for, by default that of the run.

    Raises:
        LinsightError: the model takes images of its own size alone.
    """
    if img_size is None:
        return trained.recipe.img_size
    if trained.fixed:
        own = "x".join(map(str, trained.recipe.img_size))
        raise LinsightError(f"'{trained.path}' was exported for images of {own}, and takes no --img-size")
    return img_size


def save(path: pathlib.Path, state: dict[str, Tensor], recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write weights as `packed` makes them."""
    content = packed(state, recipe, facts)
    with writing(path), replacing(path) as temporary:
        temporary.write_bytes(content)


def packed(state: dict[str, Tensor], recipe: Recipe, facts: Mapping[str, Any]) -> bytes:
    """Weights as a file of safetensors, with the recipe's part that rebuilds the model in the metadata.

    facts: of its task, such as the names of its classes, and what else is to be told.
    """
    about = {"recipe": {name: getattr(recipe, name) for name in recipe.kept()}, **facts}
    about["grids"] = table_grids(state)  # of its position tables, which their rows do not tell
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    return _in_order(to_bytes(tensors, metadata={"format": "pt", "linsight": to_json(about)}))


def _in_order(content: bytes) -> bytes:
    """A file of safetensors with its metadata in order, so that the same weights are the same bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = to_json(header, ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_trained(source: str | pathlib.Path) -> Trained:
    """The model of a run folder or of its best.safetensors, in evaluation mode on the CPU.

    A folder in timm's layout is as good, here or on the Hub ("hf-hub:OWNER/NAME").

    Raises:
        CheckpointError: nothing there, not such a file, damaged, or not of this model.
    """
    path = fetched(str(source)) if str(source).startswith(PREFIX) else located(source)
    if path.is_dir():
        if is_saved(path):
            return of_saved(open_saved(path))
        if not (path / WEIGHTS).exists():
            raise CheckpointError(f"'{path}' is no finished run: it has no {WEIGHTS}")
        path = path / WEIGHTS
    if not path.is_file():  # nor a pipe, which may never end
        raise CheckpointError(f"no such run folder or weights: '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        way = "" if path.suffix == ".safetensors" else f" (weights of a paper: give the model and --checkpoint {path})"
        raise CheckpointError(f"'{path}' is no safetensors file, or is damaged: {error}{way}") from error
    if "linsight" not in metadata:
        raise CheckpointError(f"'{path}' does not say which model it is of: give the model and --checkpoint {path}")
    try:
        about = json.loads(metadata["linsight"])
        given = dict(about["recipe"])
        facts = {name: value for name, value in about.items() if name not in ("recipe", "grids")}
        classes, titles = (tuple(map(str, facts.get(name, ()))) for name in ("classes", "titles"))
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' says what model it is of in a way that cannot be read: {error}") from error
    recipe = read_recipe(given)
    task = task_of(recipe, {**facts, "classes": classes})
    require_bounded(recipe.model, task.build, path)
    model = task.build()
    load_state(model, state, str(path))
    titles = titles if len(titles) == len(classes) else ()
    return Trained(model.eval(), recipe, classes, path, run=bool(about.get("run", True)), titles=titles, facts=facts)


def of_saved(saved: Saved) -> Trained:
    """A model out of timm's layout as any other."""
    return Trained(saved.model, saved.recipe, saved.classes, saved.path, run=saved.named, titles=saved.titles)


def kept_fields(source: str) -> dict[str, Any]:
    """The fields of a recipe that `save` wrote, for a run that starts from that file; none where it is no such file."""
    try:
        path = pathlib.Path(weights_file(source))
        if not path.is_file():  # an address, or a pipe, which may never end
            return {}
        with safe_open(path, framework="pt") as file:
            kept = json.loads((file.metadata() or {})["linsight"])["recipe"]
        recipe = read_recipe(kept)
        fields = {name: getattr(recipe, name) for name in kept if name not in ("num_classes", "task")}
    except (
        SafetensorError,
        OSError,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # what is wrong, loading tells
        return {}
    return {**fields, **task_of(recipe).as_start()}


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load weights strictly; a mismatch is one line."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if missing or extra or shapes:
        odd = (missing + extra + shapes)[0]
        raise CheckpointError(
            f"'{source}' belongs to another model: {len(missing)} tensors missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape, as '{odd}'"
        )
    model.load_state_dict(state)


def load_source(
    source: str,
    checkpoint: str | None = None,
    from_size: str | None = None,
    *,
    hint: str = "",
    option: str = "--checkpoint",
) -> Trained:
    """A run, or a model by name with published weights: a file or an address, by default where its authors put them.

    from_size: of the images that such weights were made for, as text, where they do not tell.
    hint: another way than weights, told where a name has none.  option: how one gives the weights.

    Raises:
        CheckpointError: nothing there, or a name alone of a model whose weights linsight cannot fetch.
        LinsightError: `from_size` is none, or a run was given, which tells its own.
    """
    sides = Recipe.parse("from_size", from_size or "")
    if checkpoint is None and not located(source).exists() and (source in HOSTS or is_model(source)):
        entry = VARIANTS.get(source) or ARCHITECTURES.get(source)
        if entry is None or not entry.weights.startswith("https://"):
            raise CheckpointError(
                f"'{source}' is the name of a model, without weights: give published ones with {option} FILE, or "
                f"the folder of a run in place of the name{hint}"
            )
        checkpoint = entry.weights
    if checkpoint is not None:
        return load_named(source, checkpoint, from_size=(sides * 2)[:2] or None)
    if sides:
        raise LinsightError("--from-size goes with --checkpoint: a run tells the size of its images")
    return load_trained(source)


def load_named(name: str, checkpoint: str | None, *, from_size: tuple[int, int] | None = None) -> Trained:
    """The model called `name` with published weights, prepared for as its pretrained_cfg says.

    checkpoint: None leaves the weights as they are initialised.
    from_size: as of `load_published`.

    A thousand classes are taken for those of ImageNet-1K, by their WordNet ids; others are called by
    their index.
    """
    require_classifier(name)
    model = create_model(name)
    if checkpoint is not None:
        load_published(model, checkpoint, from_size=from_size)
    cfg: Any = model.pretrained_cfg
    recipe = ClassifyRecipe(
        model=name,
        in_chans=cfg["input_size"][0],
        img_size=tuple(cfg["input_size"][-2:]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        eval_crop=cfg["crop_mode"],
    )
    count = int(cfg["num_classes"])
    classes: tuple[str, ...] = tuple(map(str, range(count)))
    titles: tuple[str, ...] = ()
    if count == 1000:
        info = ImageNetInfo("imagenet-1k")
        classes = tuple(info.label_names())
        titles = tuple(f"{name} {info.label_name_to_description(name)}" for name in classes)
    return Trained(model.eval(), recipe, classes, pathlib.Path(checkpoint or name), run=False, titles=titles)
