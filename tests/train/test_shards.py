"""Shards of WebDataset: which image and which class each sample has, by splits, in any order and again."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from small import TINY, assert_same_end, truncate
from test_run import Cut, interrupt

from linsight.data.images import decode
from linsight.data.random import TOGETHER, Batches
from linsight.errors import LinsightError
from linsight.runtime.signals import Interrupted
from linsight.train import evaluate, load_trained, open_data, resolve, resume, train


def picture(level, kind="png"):
    data = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), level, np.uint8)).save(data, kind)
    return data.getvalue()


def shard(path, samples):
    """A tar of samples: a key, and the content of each extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                about = tarfile.TarInfo(f"{key}.{extension}")
                content = content.encode() if isinstance(content, str) else content
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    return path


def shards(folder, split, count, each, classes=3):
    """Shards of images whose level says their number, whose class is that number modulo the classes."""
    for number in range(count):
        samples = [
            (f"{i:06}", {"cls": str(i % classes), "png": picture(i)}) for i in range(number * each, (number + 1) * each)
        ]
        shard(folder / f"{split}-{number:04}.tar", samples)
    return folder


def recipe(data, **fields):
    plain = {"in_chans": 3, "mean": (), "std": (), "cache": "off", "batch_size": 8}
    return resolve("digits", {**TINY, **plain, "data": str(data), **fields})


def levels(source):
    return [decode(source, i, "RGB").getpixel((0, 0))[0] for i in range(len(source))]


def test_samples_are_images_with_the_class_beside_them(tmp_path):
    shards(tmp_path / "d", "train", 3, 10)
    shards(tmp_path / "d", "val", 1, 6)
    data = open_data(recipe(tmp_path / "d"))
    assert data.classes == ("0", "1", "2") and (len(data.train), len(data.val)) == (30, 6)
    assert levels(data.train) == list(range(30)) and data.train.targets == [i % 3 for i in range(30)]
    assert data.train.name(12) == "train-0001.tar!000012.png"
    moved = pickle.loads(pickle.dumps(data.train))  # for other processes
    assert levels(moved) == list(range(30)) and list(moved.shards) == [0] * 10 + [1] * 10 + [2] * 10
    (tmp_path / "d" / "classes.txt").write_text("cat\ndog\ncrane\ncrane\n")
    named = open_data(recipe(tmp_path / "d"))
    assert named.classes == ("cat", "dog", "crane (2)", "crane (3)")
    assert named.notes == tuple(
        f"'{tmp_path / 'd'}' has no image to {purpose} of 1 of 4 classes: 'crane (3)'"
        for purpose in ("train on", "evaluate on")
    )


def test_patterns_folders_of_splits_and_single_shards(tmp_path, monkeypatch):
    shards(tmp_path / "d" / "train", "a", 12, 3)
    shards(tmp_path / "d" / "val", "a", 1, 3)
    whole = open_data(recipe(tmp_path / "d"))
    assert (len(whole.train), len(whole.val)) == (36, 3) and levels(whole.train) == list(range(36))
    monkeypatch.chdir(tmp_path / "d")
    some = open_data(recipe("train/a-{0002..0010}.tar"))
    assert sorted(levels(some.train) + levels(some.val)) == list(range(6, 33))
    assert len(open_data(recipe("*/a-*.tar")).train) == 36  # by their splits
    alone = open_data(
        recipe(shard(tmp_path / "one.tar", [(f"{i}", {"jpg": b"", "cls": f"{i % 2}"}) for i in range(30)]))
    )
    assert (len(alone.train), len(alone.val)) == (24, 6)
    with pytest.raises(LinsightError, match=r"no such image, folder or archive: 'train/a-0012\.tar'"):
        open_data(recipe("train/a-{0010..0012}.tar"))
    os.remove("train/a-0000.tar")
    shard(tmp_path / "d" / "train" / "a-0000.tar", [("x/0", {"png": picture(0)})])
    with pytest.raises(LinsightError, match="has no samples as of WebDataset"):
        open_data(recipe("train/a-{0000..0001}.tar"))


LABELS = {
    "names": ([("0", {"png": b"", "txt": "dog\n"}), ("1", {"png": b"", "txt": "cat"})], {}, ("cat", "dog"), [1, 0]),
    "numbers are in their order": (
        [(f"{i}", {"png": b"", "cls": str(i)}) for i in (10, 9)],
        {},
        tuple(map(str, range(11))),
        [10, 9],
    ),
    "a mark of the encoding": (
        [(f"{i}", {"png": b"", "cls": f"\ufeff{i}\r\n".encode()}) for i in range(2)],
        {},
        ("0", "1"),
        [0, 1],
    ),
    "a key in JSON": (
        [(f"{i}", {"png": b"", "json": json.dumps({"label": 1 - i, "id": i})}) for i in range(2)],
        {},
        ("0", "1"),
        [1, 0],
    ),
    "a named key": (
        [(f"{i}", {"png": b"", "cls": "0", "json": json.dumps({"kind": f"k{i}"})}) for i in range(2)],
        {"label_key": "kind"},
        ("k0", "k1"),
        [0, 1],
    ),
    "a file that is named": (
        [(f"{i}", {"png": b"", "cls": "0", "kind.cls": f"{i}"}) for i in range(2)],
        {"label_key": "kind.cls"},
        ("0", "1"),
        [0, 1],
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_read_from_what_is_there(tmp_path, case):
    samples, fields, classes, targets = LABELS[case]
    for split in ("train", "val"):
        shard(tmp_path / f"{split}-0.tar", samples)
    data = open_data(recipe(tmp_path, **fields))
    assert (data.classes, data.train.targets, data.val.targets) == (classes, targets, targets)


BAD = {
    "no text": ([("0", {"png": b"", "txt": b"\xff"})], {}, "is no class, but a text that is no UTF-8"),
    "two images": ([("0", {"png": b"", "jpg": b"", "cls": "0"})], {}, "several images (png, jpg): say which to use"),
    "a text": ([("0", {"png": b"", "txt": "a dog\non grass"})], {}, "is no class, but a text (a dog ...)"),
    "no label": ([("0", {"png": b"", "json": "{}"})], {}, "no label in its samples, as in '0.cls'"),
    "one without": ([("0", {"png": b"", "cls": "0"}), ("1", {"png": b"", "cls": "-1"})], {}, "has no label"),
    "no JSON": ([("0", {"png": b"", "json": "{"})], {}, "has no readable JSON"),
    "a number of no class": ([("0", {"png": b"", "cls": "9" * 30})], {}, "these are no numbers of classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_samples_that_cannot_be_used_are_one_line(tmp_path, case):
    samples, fields, word = BAD[case]
    shard(tmp_path / "train-0.tar", samples)
    with pytest.raises(LinsightError) as caught:
        open_data(recipe(tmp_path, **fields))
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_sample_is_left_out_and_told(tmp_path):
    samples = [(f"{i}", {"cls": f"{i % 2}", "png": picture(i), "seg.png": picture(0)}) for i in range(40)]
    odd = [("40", {"cls": "1"}), (".hidden", {"png": b""}), ("__index", {"png": b""}), ("./._41", {"png": b""})]
    data = open_data(recipe(shard(tmp_path / "a.tar", samples + odd)))
    assert len(data.train) + len(data.val) == 40
    assert f"1 sample of '{tmp_path / 'a.tar'}' without an image left out" in data.notes


def test_the_index_is_kept_for_this_very_file(tmp_path, monkeypatch):
    path = shard(tmp_path / "d" / "train.tar", [(f"{i}", {"png": picture(i), "cls": str(i // 5)}) for i in range(10)])
    shard(tmp_path / "d" / "val.tar", [("0", {"png": picture(0), "cls": "0"})])
    whole, about = path.read_bytes(), path.stat()
    assert open_data(recipe(path.parent)).classes == ("0", "1")
    place = whole.rindex(b"1" + bytes(511))
    path.write_bytes(whole[:place] + b"2" + whole[place + 1 :])
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert open_data(recipe(path.parent)).classes == ("0", "1")  # by the index
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert open_data(recipe(path.parent)).classes == ("0", "1", "2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # where no folder can be made
    assert open_data(recipe(path.parent)).classes == ("0", "1", "2")


def test_a_damaged_shard_is_one_line_and_a_damaged_image_is_skipped(tmp_path):
    folder = shards(tmp_path / "d", "train", 2, 12)
    shards(folder, "val", 1, 6)
    whole = (folder / "train-0001.tar").read_bytes()
    truncate(folder / "train-0001.tar")
    with pytest.raises(LinsightError, match=r"train-0001.tar' is no readable tar"):
        open_data(recipe(folder))
    (folder / "train-0001.tar").write_bytes(whole)
    data = open_data(recipe(folder))
    (folder / "train-0001.tar").write_bytes(whole[:2000])  # behind our back
    assert "train-0001.tar!000023.png: " in decode(data.train, 23, "RGB")
    assert not isinstance(decode(data.train, 11, "RGB"), str)


def test_shards_in_random_order_a_few_at_a_time():
    shard_of = np.repeat(np.arange(30), 20)
    batches = Batches(600, 40, seed=3, shuffle=True, shards=shard_of)
    whole = list(batches)
    order = [index for batch in whole for _, index in batch]
    assert sorted(order) == list(range(600)) and order != sorted(order)
    windows = [set(shard_of[order[i : i + 20 * TOGETHER]]) for i in range(0, 600, 20 * TOGETHER)]
    assert [len(window) for window in windows] == [8, 8, 8, 6] and set().union(*windows) == set(range(30))
    assert len({shard_of[i] for i in order[:40]}) == TOGETHER  # and these are mixed
    batches.start = 7
    assert list(batches) == whole[7:]
    batches.epoch, batches.start = 1, 0
    assert next(iter(batches)) != whole[0]


def test_a_run_by_shards_resumes_exactly_and_evaluates_each_image_once(tmp_path):
    folder = shards(tmp_path / "d", "train", 12, 4)
    shards(folder, "val", 3, 7)
    chosen = recipe(folder, order="shards", hflip=0.5, scale="0.3,1", crop_mode="rrc")
    train(chosen, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(chosen, out=tmp_path / "cut", report=Cut(4, interrupt))
    resume(tmp_path / "cut", overrides={"workers": 2})
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    scores = evaluate(load_trained(tmp_path / "cut"), workers=2, batch_size=8, device="cpu", amp="off")
    assert scores["images"] == 21
    with pytest.raises(LinsightError, match="order=shards is for images in shards"):
        train(resolve("digits", {**TINY, "order": "shards"}), out=tmp_path / "digits")
