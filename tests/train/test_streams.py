"""Streams: the order of lanes for any number of processes, from any step on; and runs on Parquet files as streams."""

import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small import TINY, assert_same_end
from test_run import Cut, Killed, interrupt, kill

from linsight.data.images import Samples, eval_transform
from linsight.data.lanes import StreamFeed, count_lanes, part
from linsight.data.random import Batches
from linsight.errors import ImageError, LinsightError
from linsight.runtime.signals import Interrupted
from linsight.train import evaluate, load_trained, open_data, resolve, resume, train

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
SIZES = [31, 1, 90, 0, 17, 64, 40, 5, 77, 12, 33, 50]  # rows of shards


class Toy:
    """A table whose rows are numbers; it tells which shards were begun, and from which row on."""

    label = "toy"

    def __init__(self, sizes=SIZES):
        self.sizes, self.num_shards, self.begun = sizes, len(sizes), []
        self.starts = [0, *itertools.accumulate(sizes)]

    def rows(self, shard, start=0):
        self.begun.append((shard, start))
        yield from range(self.starts[shard] + start, self.starts[shard + 1])

    def source(self, rows):
        return Numbers(rows)


class Numbers:
    """Rows as a source: the class of each is its number."""

    def __init__(self, rows):
        self.targets = rows

    def decoded(self, index, mode, fill, draft):
        if self.targets[index] == 100:
            raise ImageError("row 100: is no image")
        return Drawn(self.targets[index])

    def name(self, index):
        return f"row {self.targets[index]}"


class Drawn:
    """An image of one number."""

    notes = ()

    def __init__(self, number):
        self.image = number


def noisy(number):
    return torch.tensor([number, torch.randint(1000, ()).item()])


def feed(table, *, start=0, epoch=0, shuffle=True, place=None, size=16, length=None, **more):
    batches = Batches(length or sum(table.sizes), size, seed=7, shuffle=shuffle)
    batches.epoch, batches.start, batches.place = epoch, start, place
    samples = Samples(table, noisy, 3, 7)
    return StreamFeed(table, samples, batches, **{"workers": 0, "pin": False, **more}), batches


def seen(found):
    """The numbers and the noise of each batch, and its bad images."""
    return [(batch.images.tolist(), batch.targets.tolist(), batch.bad) for batch in found]


@pytest.mark.parametrize(("size", "lanes"), [(16, 8), (100, 8), (6, 4), (7, 2), (5, 4), (9, 1)])
def test_every_batch_has_a_part_of_each_lane(size, lanes):
    parts = [part(size, lane, lanes) for lane in range(lanes)]
    assert sum(parts) == size and max(parts) - min(parts) <= 1
    assert size % 2 or parts == parts[::-1]


def test_lanes_are_a_power_of_two_for_each_count_of_shards():
    assert [count_lanes(shards, 128) for shards in (1, 2, 3, 7, 8, 1000)] == [1, 2, 2, 4, 8, 8]
    assert (count_lanes(1000, 1024), count_lanes(1000, 4), count_lanes(20, 4096)) == (32, 4, 16)


def test_an_epoch_is_a_function_of_seed_and_epoch_for_any_number_of_processes():
    toy = Toy()
    whole = seen(feed(toy)[0])
    assert len(whole) == sum(SIZES) // 16
    assert seen(feed(toy)[0]) == whole != seen(feed(toy, epoch=1)[0])
    for workers in (1, 2, 3):
        assert seen(feed(toy, workers=workers)[0]) == whole
    shares = [seen(feed(toy, rank=rank, world=4)[0]) for rank in range(4)]
    for step, (_, numbers, _) in enumerate(whole):
        parts = [shares[rank][step][1] for rank in range(4)]
        ends = [[numbers[:2] + numbers[-2:], numbers[2:4] + numbers[-4:-2]][rank] for rank in range(2)]
        if len(numbers) == 16:  # images that mixing pairs are in one share
            assert parts[:2] == ends
        assert sorted(itertools.chain(*parts)) == sorted(numbers)
    drawn = [number for _, numbers, _ in whole for number in numbers]
    assert sum(len(bad) for *_, bad in whole) <= 2 and len(set(drawn)) > 0.6 * len(drawn)
    with pytest.raises(LinsightError, match=r"8 lanes of shards, which 8 processes do not share evenly: .* up to 4,"):
        feed(toy, world=8)


def test_even_shards_give_each_image_once():
    table = Toy([24] * 8)
    numbers = [number for _, batch, _ in seen(feed(table)[0]) for number in batch]
    assert sorted(numbers) == sorted(set(range(192)) - {100}) and numbers != sorted(numbers)
    assert len({number // 24 for number in numbers[:16]}) == 8


@pytest.mark.parametrize("start", [1, 9, 25])
def test_it_goes_on_at_any_step_with_its_place_or_without(start):
    whole, batches = feed(Toy())
    rows = seen(itertools.islice(whole, start))
    place = batches.place
    rest = seen(feed(Toy(), start=start, place=place)[0])
    assert rows + rest == seen(feed(Toy())[0])
    assert seen(feed(Toy(), start=start)[0]) == rest == seen(feed(Toy(), start=start, place=place, workers=2)[0])
    assert seen(feed(Toy(), start=start, place={**place, "step": start + 1})[0]) == rest  # of another step: left alone
    halves = []  # on two processes, from the place of one
    for rank in range(2):
        halves.append(seen(feed(Toy(), start=start, place=place, rank=rank, world=2)[0]))
    assert [sorted(a[1] + b[1]) for a, b in zip(*halves, strict=True)] == [sorted(batch[1]) for batch in rest]


def test_a_place_spares_the_reading_of_what_was_before():
    table = Toy([600] * 16)
    found, batches = feed(table)
    list(itertools.islice(found, 500))
    later = Toy([600] * 16)
    next(iter(feed(later, start=500, place=batches.place)[0]))
    assert len(later.begun) == 8 and all(start == 168 for _, start in later.begun)  # of 3 blocks of 256


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_has_each_image_once(workers, world):
    found = [seen(feed(Toy(), shuffle=False, workers=workers, rank=rank, world=world)[0]) for rank in range(world)]
    numbers = [number for part in found for _, batch, _ in part for number in batch]
    assert sorted(numbers) == sorted(set(range(sum(SIZES))) - {100})
    assert [bad for part in found for *_, bad in part if bad] == [["row 100: is no image"]]
    if world == 1:
        assert found[0] == seen(feed(Toy(), shuffle=False)[0])


def test_shards_without_a_row_are_one_line():
    with pytest.raises(LinsightError, match="'toy' has shards without a row"):
        list(feed(Toy([0] * 8), size=1, length=16)[0])


def png(level):
    data = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), level, np.uint8)).save(data, "png")
    return {"bytes": data.getvalue(), "path": None}


def parquet(folder, split, sizes, kind=None):
    number = itertools.count()
    folder.mkdir(exist_ok=True)
    for place, size in enumerate(sizes):
        levels = list(itertools.islice(number, size))
        kinds = {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=["a", "b", "c"])}
        columns = {"image": [png(4 * (i % 60)) for i in levels], "label": [i % 3 for i in levels]}
        if kinds["label"] == datasets.Value("string"):
            columns["label"] = [f"k{i % 3}" for i in levels]
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(folder / f"{split}-{place:05}-of-{len(sizes):05}.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = parquet(tmp_path_factory.mktemp("streams") / "d", "train", [9, 20, 4, 16, 11])
    return parquet(folder, "val", [7, 2, 5])


def recipe(data, **fields):
    plain = {"in_chans": 3, "mean": (), "std": (), "cache": "off", "batch_size": 8, "hflip": 0.5, "crop_mode": "rrc"}
    return resolve("digits", {**TINY, **plain, "data": f"hfids/{data}", **fields})


def test_parquet_files_are_streams(folder):
    data = open_data(recipe(folder))
    assert data.classes == ("a", "b", "c") and (len(data.train), len(data.val)) == (60, 14)
    rows = [row for shard in range(data.train.num_shards) for row in data.train.rows(shard)]
    assert [row.target for row in rows] == [i % 3 for i in range(60)]
    assert rows[9].name == f"'hfids/{folder}', shard 1, row 0"
    assert [row.name for row in data.train.rows(1, 18)] == [row.name for row in rows[27:29]]
    batches = Batches(14, 4, shuffle=False)
    samples = Samples(data.val, eval_transform(recipe(folder), (8, 8)), 3, 0)
    found = list(data.val.feed(samples, batches, workers=0, pin=False))
    assert sorted(int(batch.images[i, 0, 0, 0]) for batch in found for i in range(len(batch.images))) == [
        4 * i for i in sorted([*range(14)])
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_stream_ends_alike_however_it_was_stopped(folder, tmp_path, workers):
    train(recipe(folder), out=tmp_path / "whole")
    chosen = recipe(folder, workers=workers, save_every=2)
    with pytest.raises(Interrupted):
        train(chosen, out=tmp_path / "cut", report=Cut(3, interrupt))
    with pytest.raises(Killed):
        resume(tmp_path / "cut", report=Cut(8, kill))
    resume(tmp_path / "cut", overrides={"workers": 2 - workers})
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    scores = evaluate(load_trained(tmp_path / "cut"), workers=workers, batch_size=4, device="cpu", amp="off")
    assert scores["images"] == 14


def test_pictures_of_guesses_are_of_the_first_images(folder, tmp_path):
    summary = train(recipe(folder, figures=True, epochs=1), out=tmp_path / "run")
    assert (tmp_path / "run" / "predictions.png").exists() and summary["val_images"] == 14


def test_what_a_stream_cannot_do_is_one_line(folder, tmp_path):
    parquet(tmp_path / "text", "train", [6], datasets.Value("string"))
    parquet(tmp_path / "text", "val", [6], datasets.Value("string"))
    parquet(tmp_path / "numbers", "train", [6], datasets.Value("int64"))
    parquet(tmp_path / "numbers", "val", [6], datasets.Value("int64"))
    parquet(tmp_path / "alone", "train", [6])
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "0.png")
    for given, word in (
        (recipe(tmp_path / "alone"), "a stream holds nothing out: name one with val_split="),
        (recipe(tmp_path / "text"), "does not tell its classes"),
        (recipe(tmp_path / "numbers"), "say how many with num_classes="),
        (recipe(tmp_path / "images"), "hfids/ reads Parquet files"),
        (recipe(folder, train_split="train[:9]"), "unknown split"),
        (recipe(folder, num_classes=2), "num_classes=2, but"),
    ):
        with pytest.raises(LinsightError) as caught:
            open_data(given)
        assert word in str(caught.value) and "\n" not in str(caught.value)
    for field, value in (("cache", "memory"), ("aug_repeats", 2)):
        with pytest.raises(LinsightError, match=f"{field}={value} needs data in random access"):
            train(recipe(folder, **{field: value}), out=tmp_path / "run")
    found = open_data(recipe(tmp_path / "numbers", num_classes=4, epoch_images=100))
    assert found.classes == ("0", "1", "2", "3") and len(found.train) == 100


def test_rows_that_cannot_be_used_are_skipped_and_files_that_cannot_be_read_end_the_run(tmp_path):
    folder = parquet(tmp_path / "d", "train", [12, 12])
    parquet(folder, "val", [6])
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [png(0), None, {"bytes": b"no", "path": None}] * 4, "label": [None, 0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / "train-00001-of-00002.parquet")
    report = Cut(0, kill)
    train(recipe(folder, epochs=1, warmup_epochs=0), out=tmp_path / "run", report=report)
    (line,) = [note for note in report.notes if note.startswith("skipped 12")]
    assert "has no label that is known" in line
    whole = (folder / "train-00000-of-00002.parquet").read_bytes()
    data = open_data(recipe(folder))
    (folder / "train-00000-of-00002.parquet").write_bytes(whole[:100])
    with pytest.raises(LinsightError, match=r"cannot read 'hfids/.*', shard 0, from row 0") as caught:
        list(data.train.rows(0))
    assert "\n" not in str(caught.value)
