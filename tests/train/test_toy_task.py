"""A task registered here, from one class, goes through train, resume, evaluate and predict: nothing else is edited."""

import dataclasses
import json

import pytest
from pydantic import Field
from small import colours

from linsight import load_run
from linsight.data.datasets import open_data, open_evaluation
from linsight.errors import LinsightError, UnknownNameError
from linsight.recipe import Recipe
from linsight.records import Positive
from linsight.tasks import Column, Task, list_tasks, register, unregister
from linsight.train import Interrupted, evaluate, load_trained, predict, resolve, resume, train
from linsight.train.progress import Silent

TINY = {"model_args": "depth=1,embed_dim=16,num_heads=2,patch_size=4", "model": "vit_tiny", "attention": "inline"}
SMALL = {**TINY, "img_size": 8, "in_chans": 3, "mean": "", "std": "", "hflip": 0, "crop_mode": "none"}
RUN = {**SMALL, "epochs": 8, "lr": 0.02, "batch_size": 4, "figures": False, "workers": 0, "warmup_epochs": 0}


class ColourRecipe(Recipe):
    power: Positive = Field(default=2.0, description="of the error")


@dataclasses.dataclass
class Colour:
    file: str
    red: float
    green: float
    blue: float


class Off:
    """The mean distance of a channel, in levels."""

    def __init__(self):
        self.total = self.count = 0

    def update(self, found, batch):
        self.total += float((found.float().cpu() - mean_colour(batch)).abs().sum() * 255)
        self.count += found.numel()

    def compute(self):
        return {"loss": self.total / self.count / 255, "off": self.total / self.count}


def mean_colour(batch):
    return batch.images.float().mean((2, 3)) / 255


class MeanColour(Task):
    name = "colour"
    about = "the mean colour of an image"
    record = ColourRecipe
    best = "off"
    smaller = True
    outputs = 3
    columns = (Column("off", "off by", ".1f", "levels"),)

    def open(self):
        data = open_data(self.recipe)
        return dataclasses.replace(data, classes=())

    def open_evaluation(self, split, *, in_order=False):
        return open_evaluation(self.recipe, split, ("blue", "green", "red"), in_order)

    def loss(self, student, batch, epoch):
        if not len(batch.images):
            return None
        found = student.forward(self.inputs(batch.images))
        wanted = mean_colour(batch).to(found.device)
        return (found - wanted).abs().pow(self.recipe.power).mean(), len(found)

    def measure(self):
        return Off()

    def predictions(self, answers, files, top):
        return [Colour(file, *answer) for file, answer in zip(files, answers.tolist(), strict=True)]

    def table(self, found):
        return ["file", "colour"], [[one.file, f"{one.red:.2f} {one.green:.2f} {one.blue:.2f}"] for one in found]


@pytest.fixture(autouse=True)
def task():
    yield register(MeanColour)
    unregister("colour")


@pytest.fixture
def photos(tmp_path):
    return colours(tmp_path / "data", {"red": 8, "green": 8, "blue": 8}, size=(8, 8))


def recipe(photos, **changes):
    return resolve("digits", {**RUN, "task": "colour", "data": str(photos), "power": "1.5", **changes})


class At(Silent):
    """Stops in the middle of a run."""

    def step(self, epoch, step, images, loss):
        if (epoch, step) == (3, 2):
            raise KeyboardInterrupt


def test_it_trains_and_what_decides_is_the_smallest_error(photos, tmp_path):
    summary = train(recipe(photos), out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["task"] == "colour" and summary["off"] == min(row["off"] for row in rows) < 40 < rows[0]["off"]
    assert summary["best_epoch"] == 1 + [row["off"] for row in rows].index(summary["off"])
    assert summary["last_off"] == rows[-1]["off"] and "top1" not in summary and "classes" not in summary
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["power"] == 1.5


def test_a_stopped_run_goes_on_to_the_same_end(photos, tmp_path):
    train(recipe(photos), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe(photos, save_every=1), out=tmp_path / "run", report=At())
    summary = resume(tmp_path / "run")
    weights = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1] and summary["epochs"] == 8


def test_it_is_evaluated_and_predicts(photos, tmp_path, linsight):
    summary = train(recipe(photos), out=tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    assert trained.recipe.task == "colour" and trained.classes == ()
    found = evaluate(trained)
    assert found["off"] == pytest.approx(summary["off"]) and found["task"] == "colour"
    image = next(photos.glob("red/*"))
    (colour,), bad = predict(trained, [image])
    assert isinstance(colour, Colour) and colour.red > max(colour.green, colour.blue) and bad == []
    code, out, _ = linsight("predict", tmp_path / "run", image)
    assert code == 0 and f"{colour.red:.2f} {colour.green:.2f} {colour.blue:.2f}" in out
    code, out, _ = linsight("predict", tmp_path / "run", image, "--json")
    assert json.loads(out)["predictions"] == [dataclasses.asdict(colour)]
    code, _, err = linsight("predict", tmp_path / "run", image, "--out", tmp_path / "a.csv")
    assert code == 2 and "predicts no classes" in err and not (tmp_path / "a.csv").exists()
    code, out, _ = linsight("eval", tmp_path / "run")
    assert code == 0 and f"{found['off']:.1f} levels" in out


def test_its_fields_are_its_own(photos):
    with pytest.raises(UnknownNameError, match="unknown recipe field 'mixup'"):
        recipe(photos, mixup=0.5)
    with pytest.raises(UnknownNameError, match="unknown recipe field 'power'"):
        resolve("digits", {"power": 2})
    with pytest.raises(UnknownNameError, match="unknown task 'color': did you mean 'colour'"):
        resolve("digits", {"task": "color"})
    with pytest.raises(LinsightError, match="there is a task 'colour' already"):
        register(MeanColour)
    assert [one.name for one in list_tasks()][:3] == ["classify", "budget", "distil"] and list_tasks()[-1] is MeanColour


def test_its_run_in_python(photos, tmp_path):
    train(recipe(photos), out=tmp_path / "run")
    run = load_run(tmp_path / "run")
    (colour,) = run.predict(next(photos.glob("blue/*")))
    assert colour.blue > colour.red
    answer = run(run.transform(next(photos.glob("blue/*")))[None])[0]
    assert answer.tolist() == pytest.approx([colour.red, colour.green, colour.blue], abs=1e-5)
