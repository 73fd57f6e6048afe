import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from small import TINY, colours, truncate

from linsight.errors import CheckpointError, LinsightError
from linsight.runtime.device import pick_device
from linsight.runtime.signals import Interrupted
from linsight.train import load_trained, resolve, resume, train
from linsight.train.progress import Silent, reporter

# Every source of randomness and of state is on: dropped paths, erasing, mixing, copies, averaging and what is learnt
# from it in the last two epochs, a schedule.
RANDOM = {
    **TINY,
    "batch_size": 256,
    "drop_path": 0.2,
    "re_prob": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "ema": 0.9,
    "ema_warmup": True,
    "mesa": 1.0,
    "mesa_start": 0.4,
    "aug_repeats": 2,
    "clip_grad": 1.0,
    "hflip": 0.5,
    "epochs": 3,
}
STEPS = 5  # of an epoch: 1,438 digits


class Cut(Silent):
    """Does something after a given number of steps, or in the midst of an evaluation."""

    def __init__(self, at, act):
        self.left, self.act, self.notes = at, act, []

    def note(self, text):
        self.notes.append(text)

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            self.act()


def interrupt():
    signal.raise_signal(signal.SIGINT)


class Killed(BaseException):
    """What SIGKILL leaves behind: nothing runs after it."""


def kill():
    raise Killed


def outcome(folder):
    """All that must not depend on stops: metrics without times, final weights, best weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["images_per_second"]
    state = torch.load(folder / "state.pt", weights_only=True)
    with safe_open(folder / "best.safetensors", framework="pt") as file:
        best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return rows, {**state["model"], **{f"ema.{k}": v for k, v in state["ema"].items()}}, best


def same(a, b):
    assert a[0] == b[0]
    for ours, theirs in zip(a[1:], b[1:], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(resolve("digits", RANDOM), out=folder)
    return outcome(folder)


@pytest.mark.parametrize("stops", [(1,), (STEPS,), (3, 7, 1)], ids=str)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, uninterrupted, stops):
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    for number, at in enumerate(stops):
        with pytest.raises(Interrupted, match=f"linsight train --resume {folder}") as stopped:
            if number == 0:
                train(resolve("digits", RANDOM), out=folder, report=Cut(at, interrupt))
            else:
                resume(folder, report=Cut(at, interrupt))
        assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    resume(folder)
    same(outcome(folder), uninterrupted)


def test_an_epoch_has_the_images_that_are_asked_for(tmp_path):
    report = Cut(0, None)
    train(resolve("digits", {**TINY, "epochs": 2, "batch_size": 32, "epoch_images": 70}), out=tmp_path, report=report)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {int(found["step"]) for found in state["optimiser"]["state"].values()} == {4}
    assert any(", 70 an epoch, " in note for note in report.notes)


@pytest.mark.parametrize(("at", "save_every"), [(STEPS + 4, 2), (STEPS + 4, 0), (1, 0)])
def test_a_killed_run_goes_on_from_its_last_state_without_its_later_metrics(tmp_path, uninterrupted, at, save_every):
    folder = tmp_path / "run"
    report = Cut(at, kill)
    with pytest.raises(Killed):
        train(resolve("digits", {**RANDOM, "save_every": save_every}), out=folder, report=report)
    if at > 1:  # as if it had been killed between the metrics and the state of an epoch
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": 2, "top1": 101}) + "\n")
    resume(folder, report=(report := Cut(0, kill)))
    expected = {(9, 2): "epoch 2, step 3", (9, 0): "epoch 2, step 1"}.get((at, save_every))
    assert expected is None or any(expected in note for note in report.notes)
    same(outcome(folder), uninterrupted)


def test_a_run_that_got_sigkill_itself_resumes(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    program = f"""
import os, signal
from linsight.train import resolve, train
from linsight.train.progress import Silent
class Kill(Silent):
    def step(self, epoch, step, images, loss):
        if (epoch, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
train(resolve("digits", {RANDOM!r} | {{"save_every": 2, "workers": 1}}), out={str(folder)!r}, report=Kill())
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=55)
    assert ended.returncode == -signal.SIGKILL
    resume(folder, overrides={"workers": "0"})
    same(outcome(folder), uninterrupted)


def test_a_resumed_run_has_the_threads_it_started_with(tmp_path):
    threads = torch.get_num_threads()
    try:
        with pytest.raises(Killed):
            train(resolve("digits", {**RANDOM, "threads": threads + 1}), out=tmp_path / "run", report=Cut(1, kill))
        torch.set_num_threads(threads)
        with pytest.raises(Killed):
            resume(tmp_path / "run", report=Cut(1, kill))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_stop_in_the_midst_of_an_evaluation_keeps_the_epoch(tmp_path, uninterrupted, monkeypatch):
    from linsight.train import loop

    folder = tmp_path / "run"
    before = loop.Trainer.after_val_batch

    def stopped(trainer, batch):
        interrupt()
        before(trainer, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"after {STEPS} of {STEPS} steps"):
        patch.setattr(loop.Trainer, "after_val_batch", stopped)
        train(resolve("digits", RANDOM), out=folder)
    resume(folder)
    same(outcome(folder), uninterrupted)


def test_results_do_not_depend_on_workers_or_memory(tmp_path, uninterrupted):
    train(resolve("digits", {**RANDOM, "workers": 2, "cache": False}), out=tmp_path / "run")
    same(outcome(tmp_path / "run"), uninterrupted)


def test_the_run_folder_has_what_is_needed_later(tmp_path, folder):
    out = tmp_path / "run"
    recipe = resolve(
        "digits",
        {
            **TINY,
            "data": str(folder),
            "in_chans": 3,
            "mean": (),
            "std": (),
            "epochs": 12,
            "batch_size": 8,
            "lr": "1e-2",
            "figures": True,
            "warmup_epochs": 0,
        },
    )
    summary = train(recipe, out=out, name="colours")
    assert sorted(file.name for file in out.iterdir()) == [
        "best.safetensors",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "predictions.png",
        "state.pt",
        "summary.json",
    ]
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["top1"] == 100.0 and summary["top5"] == 100.0 and summary["epochs"] == 12
    trained = load_trained(out)
    assert summary["params"] == sum(p.numel() for p in trained.model.parameters())
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["lr"] == 0.01 and config["data"]["classes"] == ["blue", "green", "red"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[0]["train_loss"] > rows[-1]["train_loss"] and rows[-1]["lr"] < rows[0]["lr"]
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_is_left_as_it_is(tmp_path):
    summary = train(resolve("digits", {**TINY, "epochs": 1, "batch_size": 512}), out=tmp_path / "run")
    report = Cut(0, kill)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    assert resume(tmp_path / "run", report=report) == summary
    assert "is finished" in report.notes[0]
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}


def stopped_run(out, **overrides):
    with pytest.raises(Interrupted):
        train(resolve("digits", {**TINY, "batch_size": 512, **overrides}), out=out, report=Cut(1, interrupt))
    return out


def test_what_cannot_be_resumed_is_said_in_one_line(tmp_path, folder):
    with pytest.raises(LinsightError, match="is no run folder"):
        resume(folder)
    run = stopped_run(tmp_path / "run")
    with pytest.raises(LinsightError, match="a resumed run keeps its lr; what may change: cache"):
        resume(run, overrides={"lr": "1"})
    with pytest.raises(LinsightError, match="unknown recipe field 'wrkers': did you mean 'workers'"):
        resume(run, overrides={"wrkers": "1"})
    state = torch.load(run / "state.pt", weights_only=True)
    del state["model"]["head.fc.bias" if "head.fc.bias" in state["model"] else "head.bias"]
    torch.save(state, run / "state.pt")
    with pytest.raises(CheckpointError, match="belongs to another model: 1 tensors missing"):
        resume(run)
    truncate(run / "state.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        resume(run)
    (run / "config.json").write_text("{")
    with pytest.raises(LinsightError, match=r"config.json' is damaged"):
        resume(run)


def test_changed_data_is_noticed(tmp_path, folder):
    run = stopped_run(tmp_path / "run", data=str(folder), in_chans=3, mean=(), std=(), batch_size=4)
    (folder / "red" / "0.png").unlink()
    with pytest.raises(LinsightError, match="has changed"):
        resume(run)


def test_a_folder_in_use_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LinsightError, match="exists and is not empty: go on with --resume"):
        train(resolve("digits", TINY), out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_input_leaves_no_folder(tmp_path):
    for overrides in ({"model": "vit_tyny"}, {"data": str(tmp_path / "none")}, {"attention": "inlin"}):
        with pytest.raises(LinsightError):
            train(resolve("digits", {**TINY, **overrides}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(LinsightError, match=r"the loss became (nan|inf) in epoch \d+.*lower lr"):
        train(resolve("digits", {**TINY, "opt": "sgd", "lr": "1e30", "sched": "none", "save_every": 1}), out=run)
    state = torch.load(run / "state.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize("cache", [False, True])
def test_bad_images_are_counted_or_refused(tmp_path, cache):
    data = colours(tmp_path / "data", {"a": 16, "b": 16})
    for name in ("0", "1", "2"):
        truncate(data / "a" / f"{name}.png")
    options = {
        **TINY,
        "data": str(data),
        "in_chans": 3,
        "mean": (),
        "std": (),
        "cache": cache,
        "mixup": 0.2,
        "batch_size": 2,
        "epochs": 1,
    }
    report = Cut(0, kill)
    train(resolve("digits", options), out=tmp_path / "skip", report=report)
    row = json.loads((tmp_path / "skip" / "metrics.jsonl").read_text())
    assert row["skipped"] == 3
    assert any("skipped 3 unreadable images" in note and "0.png" in note for note in report.notes)
    with pytest.raises(LinsightError, match=r"unreadable image .*\d\.png: "):
        train(resolve("digits", {**options, "on_bad_image": "refuse"}), out=tmp_path / "refuse")


def test_no_readable_image_at_all_is_an_error(tmp_path):
    data = colours(tmp_path / "data", {"a": 4, "b": 4})
    for file in data.rglob("*.png"):
        file.write_text("no image")
    for cache in (False, True):
        options = {**TINY, "data": str(data), "in_chans": 3, "mean": (), "std": (), "cache": cache}
        with pytest.raises(LinsightError, match=r"could be read: .*not an image"):
            train(resolve("digits", options), out=tmp_path / f"run{cache}")


def test_precision_and_device_are_checked(tmp_path):
    with pytest.raises(LinsightError, match="amp=fp16 needs a GPU"):
        train(resolve("digits", {**TINY, "amp": "fp16"}), out=tmp_path / "a")
    with pytest.raises(LinsightError, match="device 'gpu' cannot be used"):
        train(resolve("digits", {**TINY, "device": "gpu"}), out=tmp_path / "b")
    with pytest.raises(LinsightError, match=r"device 'gpu' cannot be used: .*auto takes the best there is") as caught:
        pick_device("gpu")
    assert len(str(caught.value)) < 300  # torch lists all that it knows
    summary = train(resolve("digits", {**TINY, "amp": "bf16", "epochs": 1, "batch_size": 512}), out=tmp_path / "c")
    assert summary["val_loss"] > 0


def test_a_missing_extra_is_named_before_anything_is_done(tmp_path, monkeypatch):
    for module, match, overrides in (
        ("sklearn.datasets", "scikit-learn", {}),
        ("matplotlib", "--no-figures", {"figures": True}),
    ):
        with monkeypatch.context() as patch, pytest.raises(LinsightError, match=rf"{match}.*\.\[train\]"):
            patch.setitem(sys.modules, module, None)
            train(resolve("digits", {**TINY, **overrides}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bars_show_speed_and_time_left_on_a_terminal_and_lines_elsewhere(tmp_path):
    texts = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
        shown = reporter(console)
        train(resolve("digits", {**TINY, "batch_size": 512}), out=tmp_path / f"run{terminal}", report=shown)
        texts.append(console.file.getvalue())
    assert all(word in texts[0] for word in ("images/s  loss", "left", "epoch 2/2", "4/4"))
    assert texts[1].count("\n") == 3 and "left" not in texts[1]


@pytest.mark.parametrize("about", ["{", "[]", "{}", '{"recipe": 3, "classes": []}'])
def test_weights_with_damaged_metadata_are_one_line(tmp_path, about):
    save_file({"x": torch.zeros(1)}, tmp_path / "best.safetensors", metadata={"linsight": about})
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_trained(tmp_path)
    assert "\n" not in str(caught.value)
