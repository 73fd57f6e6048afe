"""A saved state is looked at before it is used: what is damaged in it is said in a line, and nothing is executed."""

import copy
import json
import math
import os
import pathlib
import shutil

import pytest
import torch
from small import TINY
from timm.optim import create_optimizer_v2
from torch import nn

from linsight.errors import CheckpointError, LinsightError
from linsight.train import Interrupted, resolve, resume, train
from linsight.train.moments import fitting, require_scale
from linsight.train.progress import Silent
from linsight.train.state import read_rows, read_state, require_within


class Cut(Silent):
    """Stops a run after some steps."""

    def __init__(self, steps):
        self.left = steps

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), 15)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after a step of its second epoch."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(Interrupted):
        train(resolve("digits", {**TINY, "batch_size": 384, "ema": 0.5}), out=run, report=Cut(5))
    return run


@pytest.fixture
def run(stopped, tmp_path):
    return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


def refused(run):
    with pytest.raises(LinsightError) as error:
        resume(run)
    assert "\n" not in str(error.value)
    return str(error.value)


SPOILED = [
    ("epoch", -1, "its epoch -1 is not a number of epochs"),
    ("epoch", "1", "its epoch '1' is not a number of epochs"),
    ("epoch", 7, "it has 1 lines, and 7 epochs are done"),
    ("step", 1.5, "its step 1.5 is not a number of steps"),
    ("step", 10**6, "it is after step 1000000 of epoch 2, and the run has 2 of 3 steps"),
    ("best", [0.5], "its best (list of 1) is not a measure and its epoch"),
    ("best", [math.nan, 1], "its best (list of 2) is not a measure"),
    ("best", [50.0, 2], "its best epoch 2 is none of the 1 that are done"),
    ("sums", [0.0, 1, 2.0, 3.0, math.inf], "its sums (list of 5) is not five sums"),
    ("bad", ["a", 1], "its bad (list of 2) is not a list of lines"),
    ("place", {"epoch": 0}, "its place (dict of 1) is not a place in a stream"),
    ("bad_updates", [1], "its bad_updates (list of 1) is not two counts"),
    ("model", 3, "its model 3 is not weights by name"),
    ("ema", None, "the ema of the state in"),
]


@pytest.mark.parametrize(("name", "value", "line"), SPOILED, ids=lambda value: str(value)[:20])
def test_an_entry_that_no_run_writes_is_named(run, name, value, line):
    state = torch.load(run / "state.pt", weights_only=True)
    torch.save({**state, name: value}, run / "state.pt")
    assert line in refused(run)


def test_a_state_that_lacks_an_entry_is_refused(run):
    state = torch.load(run / "state.pt", weights_only=True)
    for name in ("epoch", "optimiser", "sums"):
        torch.save({key: value for key, value in state.items() if key != name}, run / "state.pt")
        assert f"is damaged: it has no '{name}'" in refused(run)
    torch.save([1], run / "state.pt")
    assert "it holds a list" in refused(run)
    (run / "state.pt").unlink()
    (run / "state.pt").mkdir()
    assert "it is no file" in refused(run)


def test_states_of_before_are_taken_up(run):
    state = torch.load(run / "state.pt", weights_only=True)
    del state["bad_updates"], state["place"], state["new"]
    torch.save(state, run / "state.pt")
    assert resume(run)["epochs"] == 2


WEIGHTS = {
    "complex": lambda value: value.to(torch.complex64),
    "double": lambda value: value.double(),
    "sparse": lambda value: value.to_sparse(),
    "number": lambda value: 0.5,
    "shape": lambda value: value[None],
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("entry", ["model", "ema"])
def test_weights_are_plain_tensors_of_the_model(run, entry, change):
    state = torch.load(run / "state.pt", weights_only=True)
    name = next(iter(state[entry]))
    state[entry][name] = change(state[entry][name])
    torch.save(state, run / "state.pt")
    assert f"'{name}'" in refused(run)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x02.", bytes(range(256)) * 40, b"\0" * 5000])
def test_random_bytes_are_one_line(run, content):
    (run / "state.pt").write_bytes(content)
    assert "state.pt' is damaged: " in refused(run)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("old", [False, True])
def test_nothing_in_a_state_is_executed(run, tmp_path, old):
    state = torch.load(run / "state.pt", weights_only=True)
    state["bad"] = Hostile(tmp_path / "executed")
    torch.save(state, run / "state.pt", _use_new_zipfile_serialization=not old)
    assert "is damaged" in refused(run) and not (tmp_path / "executed").exists()
    torch.load(run / "state.pt", weights_only=False)["bad"].close()  # by another reader, it would have been
    assert (tmp_path / "executed").exists()


ROWS = [
    (lambda rows: [], "it has 0 lines, and 1 epochs are done"),
    (lambda rows: ["{"], "is damaged: "),
    (lambda rows: ["[]"], "its line 1 is not of epoch 1"),
    (lambda rows: [json.dumps({**rows[0], "epoch": 3})], "its line 1 is not of epoch 1"),
    (lambda rows: [json.dumps({**rows[0], "epoch": True})], "its line 1 is not of epoch 1"),
    (lambda rows: [json.dumps({**rows[0], "top1": None})], "its line 1 has top1=None, which is no number"),
    (lambda rows: [json.dumps({**rows[0], "lr": math.nan})], "its line 1 has lr=nan, which is no number"),
    (lambda rows: [json.dumps({**rows[0], "skipped": [1]})], "its line 1 has skipped=[1], which is no number"),
    (lambda rows: ["[" * 5000], "is damaged: "),
]


@pytest.mark.parametrize(("change", "line"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_metrics_are_looked_at_too(run, change, line):
    path = run / "metrics.jsonl"
    path.write_text("\n".join(change([json.loads(text) for text in path.read_text().splitlines()])))
    said = refused(run)
    assert "metrics.jsonl' is damaged: " in said and line in said
    path.write_bytes(b"\xff\xfe")
    assert "metrics.jsonl' is damaged: " in refused(run)
    path.unlink()
    assert "there is no such file, and 1 epochs are done" in refused(run)


def test_rows_that_the_state_does_not_cover_are_forgotten(stopped):
    state = read_state(stopped / "state.pt")
    recipe = resolve("digits", {**TINY})
    assert [row["epoch"] for row in read_rows(stopped / "metrics.jsonl", state["epoch"], recipe)] == [1]
    assert read_rows(stopped / "metrics.jsonl", 0, recipe) == []
    require_within(state, 2, 3, stopped / "state.pt")
    with pytest.raises(CheckpointError, match="it is after step 2 of epoch 2, and the run has 1 of 3 steps"):
        require_within(state, 1, 3, stopped / "state.pt")


def optimiser(name="adamw", lr=1e-3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    return model, create_optimizer_v2(model, name, lr=lr, weight_decay=0.05)


def steps(name, count):
    """The state of an optimiser after some steps."""
    model, opt = optimiser(name)
    for _ in range(count):
        opt.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        opt.step()
    return opt.state_dict()


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum", "lamb", "lion", "adafactor", "rmsproptf", "muon"])
def test_the_state_of_an_optimiser_fits_another_of_its_kind(name):
    for count in (0, 1, 8):
        _, fresh = optimiser(name, lr=0.5)
        state = steps(name, count)
        fresh.load_state_dict(fitting(state, fresh, "x"))
        assert fresh.param_groups[0]["lr"] == 1e-3 and len(fresh.state_dict()["state"]) == len(state["state"])


def test_options_that_an_earlier_version_did_not_know_are_the_own_ones():
    _, fresh = optimiser()
    state = steps("adamw", 1)
    for group in state["param_groups"]:
        del group["maximize"]
    fresh.load_state_dict(fitting(state, fresh, "x"))
    assert fresh.param_groups[0]["maximize"] is False


def put(*way):
    """A change of a nest: what is at a place becomes another value."""
    *way, last, value = way

    def change(state):
        for key in way:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


OTHERS = [
    (put("param_groups", []), "other groups of parameters"),
    (put("param_groups", 0, "lr", "x"), "group 0 has lr='x'"),
    (put("param_groups", 0, "lr", math.nan), "group 0 has lr=nan"),
    (put("param_groups", 0, "betas", (-0.9, 0.999)), r"group 0 has betas=\(-0.9, 0.999\)"),
    (put("param_groups", 0, "betas", 3), "group 0 has betas=3"),
    (put("param_groups", 0, "amsgrad", True), "group 0 has amsgrad=True"),
    (put("param_groups", 0, "new", 1), "group 0 has new, which it does not know"),
    (put("param_groups", 0, "params", [9]), "group 0 has other parameters"),
    (put("state", 99, {}), "state of parameter 99, of which there is none"),
    (put("state", 0, "exp_avg", lambda value: value[:1]), "the state of parameter 0 has another exp_avg"),
    (put("state", 0, "exp_avg", lambda value: value.double()), "the state of parameter 0 has another exp_avg"),
    (put("state", 0, "step", torch.tensor(math.nan)), "the state of parameter 0 has another step"),
    (put("state", 0, "step", 1.5), "the state of parameter 0 has another step"),
    (put("state", 0, "new", 1), "the state of parameter 0 differs by new"),
    (put("state", None), "other groups"),
]


@pytest.mark.parametrize(("change", "line"), OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_an_optimiser_cannot_take_up_is_named(change, line):
    _, fresh = optimiser()
    state = copy.deepcopy(steps("adamw", 1))
    change(state)
    with pytest.raises(CheckpointError, match=f"'x' is of another optimiser, or damaged: .*{line}"):
        fitting(state, fresh, "x")


def test_the_state_of_a_scaler_is_looked_at():
    scaler = torch.amp.GradScaler("cpu")
    require_scale(scaler.state_dict(), scaler, "x")
    for value in ("x", math.nan, -1.0, 0, None):
        with pytest.raises(CheckpointError, match="the scaler has scale="):
            require_scale({**scaler.state_dict(), "scale": value}, scaler, "x")
    require_scale({}, torch.amp.GradScaler("cpu", enabled=False), "x")
