"""A run folder that is damaged, gone, full or not ours: one line, and the last good state stays."""

import errno
import json
import math
import os
import pathlib
import shutil
import signal

import pytest
import torch
from test_commands import TINY, data  # noqa: F401

from linsight.data.watched import KILLED, watched
from linsight.errors import LinsightError
from linsight.runtime.files import hold, leftovers, remove_leftovers, replacing
from linsight.runtime.signals import Stop, Terminated, Unwinding
from linsight.train import Interrupted, resolve, resume, train
from linsight.train.progress import Silent
from linsight.train.run import LOCK, Run


class At(Silent):
    """Does something after some steps, once."""

    def __init__(self, steps, act):
        self.left, self.act = steps, act

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            self.act()


def recipe(data, **more):  # noqa: F811
    return resolve("digits", {**TINY, "data": data, "epochs": 2, "batch_size": 4, "workers": 0, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):  # noqa: F811
    """The folders of a stopped and of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(Interrupted):
        train(recipe(data), out=folder / "stopped", report=At(4, lambda: signal.raise_signal(signal.SIGINT)))
    shutil.copytree(folder / "stopped", folder / "finished")
    resume(folder / "finished")
    return folder


@pytest.fixture
def runs(made, tmp_path):
    return pathlib.Path(shutil.copytree(made, tmp_path / "runs"))


def change(path, **values):
    content = json.loads(path.read_text())
    for name, value in values.items():
        if value is KeyError:
            del content[name]
        else:
            content[name] = value
    path.write_text(json.dumps(content))


CONFIGS = [
    ({"threads": "x"}, "is damaged: threads='x' is not a whole number"),
    ({"threads": None}, "is damaged: threads=None is not a whole number"),
    ({"threads": True}, "is damaged: threads=True is not a whole number"),
    ({"threads": 30_000_000_000}, "is damaged: threads=30000000000 is not between 1 and 4096"),
    ({"threads": 4096}, r"threads=4096 are too many for this machine: \d+ at most \(--threads\)"),
    ({"threads": 0}, "is damaged: threads=0 is not between 1 and 4096"),
    ({"threads": KeyError}, "is damaged: it has no 'threads'"),
    ({"name": 3}, "is damaged: name=3 is not text"),
    ({"name": KeyError}, "is damaged: it has no 'name'"),
    ({"data": []}, r"is damaged: data=\[\] is not an object of JSON"),
    ({"data": {}}, "the data of .* has changed"),
    ({"recipe": None}, "is damaged: recipe=None is not an object of JSON"),
    ({"recipe": {"epochs": "x"}}, "the recipe in .*config.json' cannot be used: epochs='x' is not a whole number"),
    ({"recipe": {"epoch": 1}}, "cannot be used: unknown recipe field 'epoch': did you mean 'epochs'"),
    ({"recipe": {"task": []}}, r"cannot be used: unknown task '\[\]'"),
]


@pytest.mark.parametrize(("values", "line"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_that_no_run_writes(runs, linsight, values, line):
    change(runs / "stopped" / "config.json", **values)
    with pytest.raises(LinsightError, match=line) as error:
        resume(runs / "stopped")
    code, _, err = linsight("train", "--resume", runs / "stopped")
    assert (code, err) == (2, f"linsight: {error.value}\n")


SUMMARIES = [
    {"best_epoch": "x"},
    {"epochs": None},
    {"seconds": "1"},
    {"seconds": math.inf},
    {"folder": 3},
    {"classes": -1},
    {"classes": 10**12},
    {"task": "budget"},
    {"top1": "x"},
    {"last_top1": KeyError},
]


@pytest.mark.parametrize("values", SUMMARIES, ids=str)
def test_a_summary_that_no_run_writes(runs, linsight, values):
    assert linsight("train", "--resume", runs / "finished")[0] == 0
    change(runs / "finished" / "summary.json", **values)
    code, out, err = linsight("train", "--resume", runs / "finished")
    assert (code, out, err.count("\n")) == (2, "", 1) and "summary.json' is damaged: " in err


def test_a_state_of_random_bytes(runs, linsight):
    for content in (os.urandom(5000), b"", b"PK\x03\x04" + os.urandom(500), b"\x80\x02" + os.urandom(500)):
        (runs / "stopped" / "state.pt").write_bytes(content)
        code, _, err = linsight("train", "--resume", runs / "stopped")
        assert (code, err.count("\n")) == (2, 1) and "state.pt' is damaged: " in err


@pytest.mark.parametrize("steps", [1, 3])
def test_a_folder_that_vanishes(tmp_path, data, steps):  # noqa: F811
    run = tmp_path / "run"
    with pytest.raises(LinsightError) as error:
        train(recipe(data, save_every=1), out=run, report=At(steps, lambda: shutil.rmtree(run)))
    assert str(error.value) == f"'{run / 'state.pt'}' cannot be written: the folder '{run}' is gone, or never was"
    assert not run.exists()


def test_a_folder_that_becomes_a_file(tmp_path, data):  # noqa: F811
    run = tmp_path / "run"

    def replace():
        shutil.rmtree(run)
        run.write_text("")

    with pytest.raises(LinsightError, match=r"state\.pt' cannot be written: "):
        train(recipe(data, save_every=1), out=run, report=At(1, replace))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_written_leaves_the_last_good_state(runs, monkeypatch, number):
    run = runs / "stopped"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    plain, open_ = os.replace, pathlib.Path.open

    def full(self, mode="r", *args, **kwargs):
        if self.name.startswith(".state-") and "w" in mode:
            with open_(self, mode) as file:
                file.write(b"half")
            raise OSError(number, os.strerror(number))
        return open_(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(LinsightError) as error:
        patch.setattr(pathlib.Path, "open", full)
        resume(run, report=At(1, lambda: signal.raise_signal(signal.SIGTERM)))
    assert str(error.value) == f"'{run / 'state.pt'}' cannot be written: {os.strerror(number)}"
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before and os.replace is plain
    assert resume(run)["epochs"] == 2


def test_what_a_killed_save_left_is_removed_while_the_folder_is_held(runs):
    run = runs / "stopped"
    left = [run / name for name in (".state-0123abcd.pt", ".best-0123abcd.safetensors", ".metrics-deadbeef.jsonl")]
    mine = [
        run / name for name in (".state-0123.pt", ".notes-0123abcd.pt", "state-0123abcd.pt", ".report-0123abcd.html")
    ]
    for path in left + mine:
        path.write_text("x")
    (run / ".config-0123abcd.json").symlink_to("config.json")
    release = hold(run, LOCK)
    with pytest.raises(LinsightError, match="another run works in"):
        resume(run)
    assert all(path.exists() for path in left)  # of the run that holds it, perhaps
    release()
    resume(run)
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)
    assert (run / ".config-0123abcd.json").is_symlink()


def test_a_start_after_a_kill_in_its_first_write(tmp_path, data):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config-0123abcd.json").write_text("{")
    (run / LOCK).write_text("")
    train(recipe(data, epochs=1), out=run)
    assert not [name for name in os.listdir(run) if name.startswith(".")]
    (run / "note").write_text("")
    with pytest.raises(LinsightError, match="exists and is not empty"):
        Run.start(recipe(data), run, "run")


def test_leftovers_are_those_of_replacing(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "state.pt") as temporary:
        temporary.write_text("half")
        assert leftovers(tmp_path, ["state.pt"]) == [temporary] and leftovers(tmp_path, ["state.json"]) == []
        os.link(temporary, tmp_path / ".state-00000000.pt")
        raise KeyError
    remove_leftovers(tmp_path, ["state.pt"])
    assert os.listdir(tmp_path) == []


LOST = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated."),
    RuntimeError("Pin memory thread exited unexpectedly"),
    RuntimeError("unable to open shared memory object </torch_1_2> in read-only mode"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    EOFError(),
]


def broken(error, count=2):
    yield from range(count)
    raise error


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_worker_that_is_lost_is_one_line(error):
    found = []
    with pytest.raises(LinsightError, match=KILLED) as caught:
        found.extend(watched(broken(error)))
    assert caught.value.__cause__ is error
    with Unwinding(), pytest.raises(Terminated), Stop() as stop:
        signal.raise_signal(signal.SIGTERM)  # which a Stop hears, and whoever comes after it
        assert stop.code == 143
        list(watched(broken(error)))


def test_what_else_goes_wrong_is_not_taken_for_it():
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."),
        FileNotFoundError("x"),
    ):
        with pytest.raises(type(error)) as caught:
            list(watched(broken(error)))
        assert caught.value is error
    assert list(watched(range(3))) == [0, 1, 2]
    alone = torch.utils.data.DataLoader(range(2), num_workers=0, collate_fn=lambda item: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(watched(alone))


def test_a_connection_that_is_reset_under_sigterm_saves_the_state(tmp_path, data, monkeypatch):  # noqa: F811
    from linsight.train import trainer

    plain = trainer.open_feeds

    class Reset:
        def __init__(self, feed):
            self.feed = feed

        def __iter__(self):
            for number, item in enumerate(self.feed):
                if number == 1:
                    signal.raise_signal(signal.SIGTERM)
                    raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
                yield item

    def opened(*arguments):
        feeds = plain(*arguments)
        return type(feeds)(feeds.order, Reset(feeds.train), feeds.val, feeds.val_samples)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped in epoch 1, after 1 of") as stop:
        patch.setattr(trainer, "open_feeds", opened)
        train(recipe(data), out=tmp_path / "run")
    assert stop.value.code == 143 and resume(tmp_path / "run")["epochs"] == 2
