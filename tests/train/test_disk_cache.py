"""Decoded images in files: the same images, whole or absent, for one process or several."""

import errno
import json
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from small import TINY, assert_same_end, colours, truncate
from test_run import Cut, interrupt

from linsight.errors import LinsightError
from linsight.runtime.files import write_json
from linsight.runtime.signals import Interrupted
from linsight.train import resolve, resume, train
from linsight.train.progress import Silent


class Kept(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def recipe(data, **fields):
    plain = {"in_chans": 3, "mean": (), "std": (), "cache": "off", "batch_size": 8, "val_fraction": 0.25, "hflip": 0.5}
    return resolve("digits", {**TINY, **plain, "data": str(data), "crop_mode": "rrc", **fields})


@pytest.fixture
def data(tmp_path):
    """Images of two sizes and a damaged one."""
    folder = colours(tmp_path / "data", {"a": 12, "b": 12, "c": 12})
    Image.fromarray(np.zeros((20, 9, 3), np.uint8)).save(folder / "a" / "2.png")
    truncate(folder / "b" / "3.png")
    return folder


def test_training_through_either_cache_is_the_one_without(data, tmp_path):
    notes = {}
    for cache in ("off", "memory", "disk"):
        report = Kept()
        train(recipe(data, cache=cache, cache_dir=str(tmp_path / "kept")), out=tmp_path / cache, report=report)
        notes[cache] = [note for note in report.notes if "unreadable" in note]
    for cache in ("memory", "disk"):
        assert_same_end(tmp_path / "off", tmp_path / cache)
        assert notes[cache] == notes["off"] and len(notes["off"]) == TINY["epochs"]


def test_images_are_decoded_once_and_anew_when_a_file_changes(data, tmp_path):
    def decoded(**fields):
        report = Kept()
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        train(recipe(data, cache="disk", cache_dir=str(tmp_path / "kept"), epochs=1, **fields), out=out, report=report)
        return [note for note in report.notes if note.startswith("decoding")]

    (line,) = decoded()
    assert line.startswith(f"decoding 36 images into '{tmp_path / 'kept'}")  # for both parts of a folder
    assert decoded() == [] and decoded(val_fraction=0.3) == [] and decoded(seed=1) == []
    assert decoded(fill=0.0) and len(list((tmp_path / "kept").iterdir())) == 2
    os.utime(data / "a" / "0.png", (1, 1))
    assert decoded()
    shutil.copy(data / "a" / "0.png", data / "b" / "3.png")
    assert decoded() and len([name for name in os.listdir(tmp_path / "kept") if name.startswith(".")]) == 0


def test_a_run_may_go_on_through_the_cache(data, tmp_path):
    train(recipe(data), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe(data), out=tmp_path / "cut", report=Cut(2, interrupt))
    resume(tmp_path / "cut", overrides={"cache": "disk", "cache_dir": str(tmp_path / "kept"), "workers": 2})
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_run_folder_of_before_is_read(data, tmp_path):
    train(recipe(data, cache="memory"), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe(data, cache="memory"), out=tmp_path / "cut", report=Cut(2, interrupt))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    config["recipe"]["cache"] = True
    for name in ("order", "epoch_images", "cache_dir"):
        del config["recipe"][name]
    write_json(tmp_path / "cut" / "config.json", config)
    resume(tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("where", ["a file", "no room", "a full disk", "none foreseen"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(data, tmp_path, monkeypatch, where):
    kept = tmp_path / "kept"
    if where == "a file":
        kept.write_text("")
    elif where == "no room":
        shutil.move(colours(tmp_path / "more", {"x": 220}) / "x", data / "x")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    elif where == "a full disk":

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(np, "savez", full)
    else:
        monkeypatch.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(errno.EACCES, "denied")))
    with pytest.raises(LinsightError) as caught:
        train(recipe(data, cache="disk", cache_dir=str(kept)), out=tmp_path / "run")
    assert "\n" not in str(caught.value) and str(kept) in str(caught.value)
    assert where == "a file" or "cache=off goes without" in str(caught.value)
    assert not kept.is_dir() or not os.listdir(kept)
    assert not (tmp_path / "run").exists()


def test_damaged_files_are_one_line(data, tmp_path):
    chosen = recipe(data, cache="disk", cache_dir=str(tmp_path / "kept"), epochs=1)
    train(chosen, out=tmp_path / "a")
    (folder,) = (tmp_path / "kept").iterdir()
    for name in ("pixels.bin", "table.npz", "about.json"):
        whole = (folder / name).read_bytes()
        truncate(folder / name)
        with pytest.raises(LinsightError, match=r"are damaged .*: remove them"):
            train(chosen, out=tmp_path / "b")
        (folder / name).write_bytes(whole)


def test_what_a_killed_process_left_is_removed_when_it_is_old(data, tmp_path):
    chosen = recipe(data, cache="disk", cache_dir=str(tmp_path / "kept"), epochs=1)
    train(chosen, out=tmp_path / "a")
    (folder,) = (tmp_path / "kept").iterdir()
    for name, age in (("new", 0), ("old", 7200)):
        left = folder.with_name(f".{folder.name}-{name}")
        shutil.copytree(folder, left)
        for path in (left, *left.iterdir()):
            os.utime(path, (time.time() - age,) * 2)
    shutil.rmtree(folder)
    train(chosen, out=tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "kept")) == [f".{folder.name}-new", folder.name]


def test_two_processes_at_once_decode_once(data, tmp_path):
    context = multiprocessing.get_context("fork")
    start, lines = context.Barrier(2), context.Queue()

    def run(number):
        report = Kept()
        start.wait()
        chosen = recipe(data, cache="disk", cache_dir=str(tmp_path / "kept"), epochs=1)
        train(chosen, out=tmp_path / f"run{number}", report=report)
        lines.put([note for note in report.notes if note.startswith("decoding")])

    running = [context.Process(target=run, args=(number,)) for number in range(2)]
    for process in running:
        process.start()
    found = lines.get(timeout=30) + lines.get(timeout=30)
    for process in running:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1
    assert_same_end(tmp_path / "run0", tmp_path / "run1")
