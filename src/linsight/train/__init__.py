"""Train a model by a recipe, evaluate it, predict with it.

>>> from linsight.train import resolve, train
>>> summary = train(resolve("digits", {"epochs": 2}), out="runs/quick")
"""

from typing import TYPE_CHECKING

from linsight.recipe import Recipe
from linsight.runtime.lazy import lazily
from linsight.runtime.signals import Interrupted

if TYPE_CHECKING:
    from linsight.data.datasets import Data, open_data
    from linsight.tasks import Prediction

    from ._parts import merge_predictions
    from ._predict import predict
    from .batch import Written, predict_to
    from .chosen import resolve, suggest
    from .evaluation import evaluate
    from .exits import evaluate_exits
    from .loaded import LoadedRun, from_pretrained, load_run
    from .loop import resume, train
    from .model import Trained, load_trained
    from .recipes import RECIPES
    from .report import write_report
    from .tiling import Tiling, predict_stream, save_stream

__all__ = [
    "RECIPES",
    "Data",
    "Interrupted",
    "LoadedRun",
    "Prediction",
    "Recipe",
    "Tiling",
    "Trained",
    "Written",
    "evaluate",
    "evaluate_exits",
    "from_pretrained",
    "load_run",
    "load_trained",
    "merge_predictions",
    "open_data",
    "predict",
    "predict_stream",
    "predict_to",
    "resolve",
    "resume",
    "save_stream",
    "suggest",
    "train",
    "write_report",
]

# Imported when they are asked for: the help of a command needs the recipes alone.
_HOMES = {
    "_parts": ("merge_predictions",),
    "_predict": ("predict",),
    "linsight.tasks": ("Prediction",),
    "batch": ("Written", "predict_to"),
    "chosen": ("resolve", "suggest"),
    "linsight.data.datasets": ("Data", "open_data"),
    "evaluation": ("evaluate",),
    "exits": ("evaluate_exits",),
    "loaded": ("LoadedRun", "from_pretrained", "load_run"),
    "loop": ("resume", "train"),
    "model": ("Trained", "load_trained"),
    "recipes": ("RECIPES",),
    "report": ("write_report",),
    "tiling": ("Tiling", "predict_stream", "save_stream"),
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
