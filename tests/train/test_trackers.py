"""Logs of a run: each point is there once, whatever stopped the run."""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from small import TINY

from linsight.errors import LinsightError, MissingExtraError
from linsight.runtime.signals import Interrupted
from linsight.train import resolve, resume, trackers, train
from linsight.train.progress import Silent

STEPS = 12  # of an epoch: 48 images by 4
QUICK = {**TINY, "epochs": 3, "batch_size": 4, "in_chans": 3}


class Killed(BaseException):
    """What SIGKILL leaves behind: nothing runs after it."""


class Cut(Silent):
    """Raises after a given number of steps. updates: what it was told of each before, by its number."""

    def __init__(self, at, error):
        self.left, self.error, self.notes, self.updates = at, error, [], {}

    def update(self, done, *told):
        self.updates[done] = told

    def note(self, text):
        self.notes.append(text)

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.fixture
def quick(folder):
    """A recipe for colours, changed."""
    return lambda **changes: resolve("digits", {**QUICK, "data": folder, **changes})


@pytest.fixture(autouse=True)
def every(monkeypatch):
    monkeypatch.setattr(trackers, "EVERY", 5)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder):
    """What is in the files of tensorboard, as `{name: [(step, value)]}`, in their order, doubled or not."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found = {}
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                content = tensor_util.make_ndarray(value.tensor)
                found.setdefault(value.tag, []).append((event.step, content if content.ndim else content.item()))
    return found


def check(found, folder, points):
    """All epochs once, with all columns, and all points of the loss."""
    for name in rows(folder)[0]:
        column = [(row["epoch"] * STEPS, pytest.approx(row[name], rel=1e-6)) for row in rows(folder)]
        assert found[f"epoch/{name}"] == column, name
    assert [step for step, _ in found["step/loss"]] == [step for step, _ in found["step/lr"]] == points


def test_tensorboard_has_each_point_once_after_kills(quick, tmp_path):
    pytest.importorskip("tensorboard")
    folder, first = tmp_path / "run", Cut(STEPS + 9, Killed())
    with pytest.raises(Killed):
        train(quick(track="tensorboard"), out=folder, report=first)
    with pytest.raises(Killed):  # the steps from the end of the first epoch on are made again
        resume(folder, report=Cut(11, Killed()))
    resume(folder)
    found = logged(folder)
    check(found, folder, [5, 10, 15, 20, 25, 30, 35])
    sums = {done: loss_sum for done, (loss_sum, images, lr) in first.updates.items()}
    means = [sums[5] / 20, (sums[10] - sums[5]) / 20, sums[15] / 12, (sums[20] - sums[15]) / 20]  # of batches of 4
    assert [value for _, value in found["step/loss"][:4]] == pytest.approx(means, rel=1e-5)
    assert [value for _, value in found["step/lr"][:4]] == pytest.approx([first.updates[n][2] for n in (5, 10, 15, 20)])
    row = rows(folder)[0]
    assert first.updates[STEPS][0] / 48 == pytest.approx(row["train_loss"]) and first.updates[STEPS][2] == row["lr"]
    ((_, text),) = found["recipe/text_summary"]
    assert b'"model": "vit_tiny"' in text[0]


def test_a_run_that_is_tracked_late_has_its_first_epochs_and_the_picture(quick, tmp_path):
    pytest.importorskip("tensorboard")
    folder, recipe = tmp_path / "run", quick(epochs=2, figures=True)
    with pytest.raises(Killed):
        train(recipe, out=folder, report=Cut(STEPS + 3, Killed()))
    resume(folder, overrides={"track": "tensorboard"})
    found = logged(folder)
    check(found, folder, [15, 20])
    ((step, picture),) = found["predictions"]
    assert step == 2 * STEPS and picture[2][:4] == b"\x89PNG"


class Fake:
    """A package of one log, as wandb's; its runs go on where they ended."""

    def __init__(self, monkeypatch, name, fails_at=None):
        self.runs, self.inits, self.fails_at = {}, [], fails_at
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="there")
        module.init, module.Image = self.init, lambda path: path
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **given):
        self.inits.append(given)
        self.kept = self.runs.setdefault(given["name"], [])
        return self

    def log(self, values, step):
        if step == self.fails_at:
            raise ConnectionError("no network\nat all")
        self.kept.append((step, values))

    def finish(self):
        self.kept.append("finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_logs_go_on_under_one_name(quick, tmp_path, monkeypatch, name):
    fake = Fake(monkeypatch, name)
    folder, recipe = tmp_path / "my run", quick(epochs=2, track=name, figures=True)
    with pytest.raises(Interrupted):
        train(recipe, out=folder, report=Cut(STEPS + 9, KeyboardInterrupt()))
    resume(folder)
    first, second = fake.inits
    assert first == second and first["project"] == "linsight" and first["resume"] == "allow"
    assert first["name"].startswith("my-run-") and first["config"]["batch_size"] == 4
    assert (first.get("id"), first.get("dir")) == ((first["name"], str(folder)) if name == "wandb" else (None, None))
    (entries,) = fake.runs.values()
    assert entries.count("finished") == 2
    entries = [entry for entry in entries if entry != "finished"]
    assert entries.pop() == (2 * STEPS, {"predictions": str(folder / "predictions.png")})
    found = {}
    for step, values in entries:
        for key, value in values.items():
            found.setdefault(key, []).append((step, value))
    check(found, folder, [5, 10, 15, 20])


def test_a_log_that_fails_is_left_out_and_the_run_goes_on(quick, tmp_path, monkeypatch):
    lost, kept = Fake(monkeypatch, "wandb", fails_at=10), Fake(monkeypatch, "trackio")
    report = Cut(0, None)
    train(quick(epochs=1, warmup_epochs=0, track="wandb,trackio"), out=tmp_path / "run", report=report)
    assert "track=wandb is left out from here on: no network" in report.notes
    assert [step for step, _ in next(iter(lost.runs.values()))] == [5]
    assert [step for step, _ in next(iter(kept.runs.values()))[:-1]] == [5, 10, STEPS]


def test_a_log_that_cannot_be_opened_is_one_line(quick, tmp_path, monkeypatch):
    fake = Fake(monkeypatch, "wandb")
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **given: fake.missing)
    with pytest.raises(LinsightError, match=r"^track=wandb cannot be used: 'Fake' object has no"):
        train(quick(track="wandb"), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("track", "error", "words"),
    [
        ("tensorbord", LinsightError, r"unknown tracker \(track\) 'tensorbord': did you mean 'tensorboard'"),
        ("tensorboard", MissingExtraError, r"track=tensorboard needs the package 'tensorboard': pip install"),
        ("trackio, wandb", LinsightError, "^track=trackio needs the package 'trackio': pip install trackio$"),
    ],
)
def test_what_is_unknown_or_not_installed_is_one_line_before_anything_is_built(
    quick, tmp_path, monkeypatch, track, error, words
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("linsight.tasks.classify.open_data", lambda recipe: pytest.fail("opened the data"))
    with pytest.raises(error, match=words):
        train(quick(track=track), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"tensorboard": 3}', '{"name": 1, "wandb": ["x", {}]}'])
def test_a_damaged_file_of_places_is_as_none(tmp_path, monkeypatch, content):
    fake = Fake(monkeypatch, "wandb")
    (tmp_path / "track.json").write_text(content)
    listener = trackers.tracked("wandb", tmp_path, {}, Silent())
    listener.begin(1, 10, 0, 0)
    for done in range(1, 11):
        listener.update(done, 2.0 * done, done, 0.1)
    listener.end()
    (entries,) = fake.runs.values()
    assert entries == [(5, {"step/loss": 2.0, "step/lr": 0.1}), (10, {"step/loss": 2.0, "step/lr": 0.1}), "finished"]
