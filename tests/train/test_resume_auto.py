"""The same command again: a run is begun, taken up or told; older states stand in for a damaged one."""

import json
import os

import pytest
import torch
from small import TINY, assert_same_end, truncate

from linsight.errors import CheckpointError, LinsightError
from linsight.runtime.signals import Interrupted
from linsight.train import resolve, resume, train
from linsight.train.progress import Silent


class Stops(Silent):
    """Asks to stop after some steps, and hears what is said."""

    def __init__(self, steps=10**9):
        self.left, self.notes = steps, []

    def note(self, text):
        self.notes.append(text)

    def step(self, *place):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def recipe(folder, **more):
    return resolve("digits", {**TINY, "data": str(folder), "epochs": 3, "batch_size": 16, "save_every": 1, **more})


def test_one_command_begins_takes_up_and_tells(folder, tmp_path):
    whole = train(recipe(folder), out=tmp_path / "whole")
    run = tmp_path / "run"
    for steps in (2, 3):
        with pytest.raises(Interrupted):
            train(recipe(folder), out=run, go_on=True, report=Stops(steps))
    heard = Stops()
    summary = train(recipe(folder, workers=1), out=run, go_on=True, report=heard)
    assert any("going on at epoch 2" in note for note in heard.notes)
    assert_same_end(tmp_path / "whole", run)
    assert summary["top1"] == whole["top1"]
    kept = (run / "best.safetensors").read_bytes()
    heard = Stops()
    assert train(recipe(folder), out=run, go_on=True, report=heard) == summary
    assert any("is finished" in note for note in heard.notes) and (run / "best.safetensors").read_bytes() == kept


def test_a_run_of_another_recipe_is_not_taken_up(folder, tmp_path):
    with pytest.raises(Interrupted):
        train(recipe(folder), out=tmp_path / "run", report=Stops(2))
    with pytest.raises(LinsightError, match=r"is of another recipe \(lr: .* there, 0\.5 here\)"):
        train(recipe(folder, lr=0.5), out=tmp_path / "run", go_on=True)
    with pytest.raises(LinsightError, match="give out"):
        train(recipe(folder), go_on=True)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(LinsightError, match=r"config\.json"):
        train(recipe(folder), out=tmp_path / "run", go_on=True)


def test_the_command_line_takes_up(folder, tmp_path, tiny_options, linsight):
    options = ["train", "--data", folder, *tiny_options, "--out", tmp_path / "run", "--resume", "auto"]
    first = linsight(*options)
    assert first[0] == 0 and "is finished" not in first[1]
    assert linsight(*options)[0] == 0
    code, _, err = linsight("train", "--resume", "auto")
    assert (
        code == 2
        and err == "linsight: Invalid value: --resume auto needs --out: the folder of the run, there or not yet\n"
    )


def test_states_are_kept_where_files_have_no_links(folder, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links on this disk")

    monkeypatch.setattr(os, "link", refuse)
    train(recipe(folder, keep_states=2, epochs=2), out=tmp_path / "run")
    kept = [torch.load(path, weights_only=True)["epoch"] for path in sorted((tmp_path / "run").glob("state*.pt"))]
    assert kept == [1, 2]


def test_states_before_the_last_one_are_kept(folder, tmp_path):
    train(recipe(folder), out=tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe(folder, keep_states=3), out=run, report=Stops(7))
    kept = sorted(path.name for path in run.glob("state*.pt"))
    assert kept == ["state-00001-0000002.pt", "state-00001-0000003.pt", "state.pt"]
    places = [torch.load(run / name, weights_only=True) for name in kept]
    assert [(state["epoch"], state["step"]) for state in places] == [(1, 2), (1, 3), (2, 0)]
    truncate(run / "state.pt")
    heard = Stops()
    resume(run, report=heard)
    assert any("is damaged" in note and "going on from 'state-00001-0000003.pt'" in note for note in heard.notes)
    assert_same_end(tmp_path / "whole", run)
    rows = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3] and len(list(run.glob("state*.pt"))) == 3


def test_where_every_state_is_damaged_it_is_said(folder, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe(folder, keep_states=2), out=run, report=Stops(5))
    for path in run.glob("state*.pt"):
        truncate(path)
    with pytest.raises(CheckpointError, match="is damaged"):
        resume(run)
