"""Whatever ends a run: signals to it and to its workers, a second run in its folder, copies of it, a full disk."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_commands import TINY, data  # noqa: F401
from torch.utils.data import DataLoader

from linsight.data.images import start_worker
from linsight.data.watched import KILLED, watched
from linsight.errors import LinsightError
from linsight.runtime import signals
from linsight.runtime.files import hold, require_folder, write_json, writing
from linsight.runtime.launch import Copy, require_rank, this_copy
from linsight.runtime.signals import Interrupted, Stop, Terminated, Unwinding, without_interrupt
from linsight.tasks import classify
from linsight.tasks import task as tasks
from linsight.train import loop, resolve, resume, train, trainer
from linsight.train.progress import Silent


class At(Silent):
    """Does something after some steps, once."""

    def __init__(self, steps, act):
        self.left, self.act, self.notes = steps, act, []

    def note(self, text):
        self.notes.append(text)

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            self.act()


def to_the_group(number, times=2):
    """The signal to this process and its workers, as `timeout` and schedulers send it, more than once."""
    for _ in range(times):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
        signal.raise_signal(number)


def recipe(data, **more):  # noqa: F811
    return resolve("digits", {**TINY, "data": data, "epochs": 3, "batch_size": 4, "workers": 2, **more})


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heard():
    """SIGHUP is heard, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_signal_to_the_group_saves_the_state(data, tmp_path, number):  # noqa: F811
    run = tmp_path / "run"
    before = {n: signal.getsignal(n) for n in STOPS}
    with pytest.raises(
        Interrupted, match=rf"stopped in epoch 2, .*; go on with: linsight train --resume {run}"
    ) as stop:
        train(recipe(data), out=run, report=At(6, lambda: to_the_group(number)))
    assert stop.value.code == 128 + number and "\n" not in str(stop.value)
    assert {n: signal.getsignal(n) for n in STOPS} == before
    assert sorted(os.listdir(run)) == ["best.safetensors", "config.json", "metrics.jsonl", "state.pt"]
    notes = At(0, None)
    assert resume(run, report=notes)["epochs"] == 3 and any("going on at epoch 2" in note for note in notes.notes)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_signal_during_an_evaluation(data, tmp_path, monkeypatch):  # noqa: F811
    before = loop.Trainer.after_val_batch

    def stopped(trainer, batch):
        to_the_group(signal.SIGTERM)
        before(trainer, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped in epoch 1") as stop:
        patch.setattr(loop.Trainer, "after_val_batch", stopped)
        train(recipe(data), out=tmp_path / "run")
    assert stop.value.code == 143 and resume(tmp_path / "run")["epochs"] == 3


def test_a_signal_before_the_first_step(data, tmp_path, monkeypatch):  # noqa: F811
    def during(*arguments):
        to_the_group(signal.SIGTERM)

    for module, step in ((classify, "open_data"), (tasks, "build"), (trainer, "open_feeds")):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped at once; nothing was writ") as s:
            patch.setattr(module, step, during)
            train(recipe(data), out=tmp_path / "run")
        assert s.value.code == 143 and not (tmp_path / "run").exists()
    with pytest.raises(Interrupted):
        train(recipe(data), out=tmp_path / "run", report=At(1, lambda: to_the_group(signal.SIGTERM)))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="go on with: linsight train --resume"):
        patch.setattr(classify, "open_data", during)
        resume(tmp_path / "run")
    assert resume(tmp_path / "run")["epochs"] == 3


def test_a_command_that_is_stopped_says_so(linsight, monkeypatch):
    from linsight import catalogue

    for number in STOPS:
        monkeypatch.setattr(catalogue, "list_models", lambda number=number: to_the_group(number, 3))
        code, _, err = linsight("list")
        assert (code, err) == (128 + number, "linsight: stopped\n")


def test_a_repeated_signal_is_one_request_until_it_was_long_ago(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    for number, patience in signals.REQUESTS.items():
        with Stop() as stop:
            to_the_group(number, 3)
            assert stop.code == 128 + number
            now[0] += patience + 1
            with pytest.raises(Terminated) as again:
                signal.raise_signal(number)
            assert again.value.code == 128 + number
    with Unwinding():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the second of `timeout` does not break what clears up
        with Stop() as stop:  # what heard it went on
            assert stop.code == 143
        with pytest.raises(Terminated), Unwinding():
            pass


def test_ctrl_c_is_not_for_a_program_that_is_started():
    command = [sys.executable, "-c", "import time; time.sleep(0.2); print('whole')"]
    with pytest.raises(KeyboardInterrupt), without_interrupt():
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        child.send_signal(signal.SIGINT)  # before Python can ignore it
        signal.raise_signal(signal.SIGINT)  # put off
    assert child.communicate() == ("whole\n", "")


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop, Unwinding():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.code
        signals.outlive()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)


def test_a_worker_that_is_killed_is_one_line(data, tmp_path):  # noqa: F811
    def kill():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()

    with pytest.raises(LinsightError, match=r"was killed.*set workers lower; go on with: linsight train --resume"):
        train(recipe(data, epochs=9, batch_size=1, save_every=1), out=tmp_path / "run", report=At(2, kill))


def test_what_a_worker_cannot_send_is_not_waited_for():
    feed = DataLoader(range(4), collate_fn=lambda item: lambda: item, num_workers=1, worker_init_fn=start_worker)
    with pytest.raises(LinsightError, match=KILLED):
        list(watched(feed))


def test_out_of_memory_is_one_line(data, tmp_path, monkeypatch):  # noqa: F811
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(loop.Trainer, "_update", full)
    with pytest.raises(LinsightError, match="out of memory with batch_size=4: set it lower"):
        train(recipe(data, workers=0), out=tmp_path / "run")


def test_a_folder_is_of_one_run_at_a_time(data, tmp_path):  # noqa: F811
    run, said = tmp_path / "run", []

    def second():
        for call in (lambda: resume(run), lambda: train(recipe(data), out=run)):
            with pytest.raises(LinsightError) as refused:
                call()
            said.append(str(refused.value))

    train(recipe(data, workers=0), out=run, report=At(2, second))
    assert "another run works in" in said[0] and "is not empty" in said[1]
    assert not any(name.startswith(".") for name in os.listdir(run))


def test_two_runs_that_begin_at_once_are_not_mixed(data, tmp_path, monkeypatch):  # noqa: F811
    run, build = tmp_path / "run", tasks.build

    def meanwhile(*arguments):
        monkeypatch.setattr(tasks, "build", build)
        train(recipe(data, workers=0, seed=1), out=run)
        return build(*arguments)

    monkeypatch.setattr(tasks, "build", meanwhile)
    with pytest.raises(LinsightError, match="is not empty"):
        train(recipe(data, workers=0, seed=2), out=run)
    assert json.loads((run / "config.json").read_text())["recipe"]["seed"] == 1


def test_a_lock_ends_with_its_process(tmp_path):
    program = f"""
import sys
sys.argv = ["linsight"]  # a process of the command, which imports nothing large
import pathlib
from linsight.runtime.files import hold
hold(pathlib.Path({str(tmp_path)!r}), "lock")
print("held", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(LinsightError, match="another run works in"):
        hold(tmp_path, "lock")
    process.kill()
    process.communicate()
    release = hold(tmp_path, "lock")
    with pytest.raises(LinsightError, match="another run works in"):  # nor twice in one process
        hold(tmp_path, "lock")
    release()
    hold(tmp_path, "lock")()
    assert os.listdir(tmp_path) == []


COPIES = [
    {"WORLD_SIZE": "2"},
    {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"PMI_SIZE": "3", "PMI_RANK": "3"},
]


@pytest.mark.parametrize("variables", COPIES, ids=lambda variables: min(variables))
def test_copies_that_do_not_know_which_they_are(variables, tmp_path, data, monkeypatch, linsight):  # noqa: F811
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LinsightError, match=r"copies would train the same run.*which.*torchrun"):
        train(recipe(data), out=tmp_path / "run")
    code, out, err = linsight("train", "--out", tmp_path / "run")
    assert code == 2 and out == "" and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_one_process_of_a_launcher_is_none_too_many():
    job = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}  # a script that has not started its tasks
    one = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    for alone in ({"WORLD_SIZE": "1", "RANK": "0"}, job, one, {"WORLD_SIZE": "x"}, {}):
        require_rank(alone)
        assert this_copy(alone) == Copy()
    assert this_copy({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}) == Copy(1, 2, 1, 1)


def test_a_full_disk_is_one_line(tmp_path, data, monkeypatch):  # noqa: F811
    for write in (lambda file: torch.save({"x": torch.zeros(10**5)}, file), lambda file: file.write(b"x" * 10**6)):
        with pytest.raises(LinsightError, match=r"'state.pt' cannot be written: No space left"), writing("state.pt"):  # noqa: SIM117
            with open("/dev/full", "wb", buffering=0) as file:
                write(file)
    with pytest.raises(LinsightError, match="cannot be written: Not a directory"):
        (tmp_path / "file").write_text("")
        with writing(tmp_path / "file" / "x.json"):
            write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(LinsightError, match="is a file: give a folder"):
        require_folder(tmp_path / "file")
    with pytest.raises(LinsightError, match="nothing can be written"):
        require_folder(tmp_path / "file" / "run")

    def full(state, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LinsightError, match=r"state.pt' cannot be written: No space left on device"):
        train(recipe(data, workers=0), out=tmp_path / "run")
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]
