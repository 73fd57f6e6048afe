"""Train a model by a recipe, evaluate it, predict with it.

>>> from linsight.train import resolve, train
>>> summary = train(resolve("digits", {"epochs": 2}), out="runs/quick")
"""

from linsight.recipe import Recipe
from linsight.runtime.signals import Interrupted

from ._predict import Prediction, predict
from .chosen import resolve, suggest
from .datasets import Data, open_data
from .evaluation import evaluate
from .exits import evaluate_exits
from .loaded import LoadedRun, load_run
from .loop import resume, train
from .model import Trained, load_trained
from .recipes import RECIPES
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
    "evaluate",
    "evaluate_exits",
    "load_run",
    "load_trained",
    "open_data",
    "predict",
    "predict_stream",
    "resolve",
    "resume",
    "save_stream",
    "suggest",
    "train",
]
