"""Floor 5, the main job: train a model by a recipe, evaluate it, predict with it.

>>> from linsight.train import resolve, train
>>> summary = train(resolve("digits", {"epochs": 2}), out="runs/quick")
"""

from ._data import Data, open_data
from ._exits import evaluate_exits
from ._loop import resume, train
from ._model import Trained, load_trained
from ._predict import Prediction, evaluate, predict
from ._predict_stream import Tiling, predict_stream, save_stream
from ._recipe import Recipe, resolve, suggest
from ._signals import Interrupted
from .recipes import RECIPES

__all__ = [
    "RECIPES",
    "Data",
    "Interrupted",
    "Prediction",
    "Recipe",
    "Tiling",
    "Trained",
    "evaluate",
    "evaluate_exits",
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
