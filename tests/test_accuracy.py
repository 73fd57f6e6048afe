"""The benchmark of accuracy trains each mechanism once a seed, keeps what it has, and hides no failure."""

import csv
import dataclasses
import functools
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import torch

from grey_levels import write_grey_levels

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import _accuracy_docs as docs
import _places
import accuracy

from linsight.attention import list_attentions
from linsight.bench import TOO_LONG, Side
from linsight.models import create_model
from linsight.train import load_trained, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_grey_levels(tmp_path_factory.mktemp("data"))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_mechanism_is_trained_once_a_seed_and_timed(data, tmp_path, capsys):
    path, page = tmp_path / "accuracy.csv", tmp_path / "accuracy.md"
    page.write_text("# Words\n\n<!-- generated: accuracy -->\nold\n<!-- end -->\n\nMore words\n")
    budget = ["--data", str(data), "--epochs", "1", "--subset", "64", "--test", "20", "--seconds", "0.001"]
    options = [*budget, "--only", "linear,softmax", "--jobs", "1", "--csv", str(path)]
    assert accuracy.main([*options, "--seeds", "3"]) == 0
    first = rows(path)
    assert sorted(row["mechanism"] for row in first) == ["linear", "softmax"]
    for row in first:
        assert (row["seed"], row["error"], row["kind"], row["threads"]) == ("3", "", "core", "1")
        assert 0 <= float(row["top1"]) <= 100 and float(row["top1"]) % 5 == 0
        assert float(row["seconds"]) > 0 and float(row["forward_images_per_second"]) > 0
        assert float(row["training_images_per_second"]) > 0
    assert len({(row["params"], row["mmacs"]) for row in first}) == 2
    assert {row["place"] for row in first} == {"cifar10"}

    capsys.readouterr()
    again = ["--seeds", "3", "--seconds", "0", "--docs", str(tmp_path)]
    assert accuracy.main([*options, *again]) == 0
    assert rows(path) == first
    out = capsys.readouterr().out
    assert "0 runs to do, 2 done before" in out
    assert accuracy.main([*options, "--seeds", "3,4", "--seconds", "0", "--as-it-is"]) == 0
    assert rows(path) == first and docs.table(first) in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# Words\n") and text.endswith("<!-- end -->\n\nMore words\n") and "old" not in text
    assert "1 epochs of 64 images, 20 to evaluate; cpu: " in text and docs.table(first) in text
    assert "| images/s, forward | images/s, training |\n" in text and ", runs 2 of seed 3, torch " in text
    assert (tmp_path / "accuracy-cifar10.png").read_bytes()[:4] == b"\x89PNG" and "(accuracy-cifar10.png)" in text


def test_a_run_is_the_same_for_all_but_the_mechanism_and_the_seed(data):
    setting = accuracy.Setting("cifar10", str(data), 5, 6000, 3000, "cpu", "off", 1, 0.0, "")
    first, second = (accuracy.recipe(setting, *run) for run in (("linear", 0), ("softmax", 7)))
    differing = {name for name in vars(first) if getattr(first, name) != getattr(second, name)}
    assert differing == {"attention", "seed"}
    assert (first.train_split, first.val_split, first.epochs) == ("train[:6000]", "test[:3000]", 5)
    assert (first.opt, first.warmup_epochs, first.threads, first.workers) == ("adamw", 1, 1, 0)


@pytest.mark.parametrize("mechanism", accuracy.FORMS)
def test_a_form_for_few_tokens_is_one_of_the_same_function(mechanism):
    few, many = (_places.PLACES[name] for name in ("recall-4", "recall-64"))
    assert accuracy.form(mechanism, few) and not accuracy.form(mechanism, many) and not accuracy.form("linear", few)
    own = accuracy.build(mechanism, few, "cpu").eval()
    usual = create_model("compact_nano", attention=mechanism, img_size=few.side, num_classes=few.classes, **few.host)
    usual.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, few.side, few.side)
    torch.testing.assert_close(own(x), usual.eval()(x))


@pytest.mark.parametrize("place", _places.PLACES.values(), ids=lambda place: place.name)
def test_whatever_is_registered_fits_the_host(place):
    kinds = accuracy.chosen(["*"])
    assert kinds.keys() == {entry.name for entry in list_attentions()}
    for name in kinds:
        model = accuracy.build(name, place, "meta")
        assert accuracy.count_parameters(model) > 10_000
        assert [grid for _, grid in model.grids((place.side, place.side))] == [(place.grid, place.grid)]


def answer(pixels):
    """What the question of an image of recall asks for, read off its pixels."""
    cells = pixels.reshape(pixels.shape[0] // 2, 2, -1, 2, 3)
    assert (cells[:, :, :, 0] == cells[:, :, :, 1]).all()
    cells = cells[:, :, :, 0].transpose(0, 2, 1, 3).reshape(-1, 2, 3).astype(int)
    cells = [cell // 255 for cell in cells if (cell != 128).any()]
    assert len(cells) == _places.PAIRS + 1
    pairs = {(cell[0, 0], cell[0, 1]): cell[1, 0] + 2 * cell[1, 1] for cell in cells if cell[0, 2] == 1}
    ((question,),) = [[(cell[0, 0], cell[0, 1]) for cell in cells if cell[1, 2] == 1]]
    return pairs[question]


def test_an_image_of_recall_has_one_answer_anywhere():
    rng, places, labels = np.random.default_rng(0), set(), []
    for _ in range(300):
        pixels, label = _places.recall_image(5, rng)
        assert pixels.shape == (10, 10, 3) and answer(pixels) == label
        places |= {tuple(place) for place in np.argwhere((pixels != 128).any(-1))}
        labels.append(label)
    assert len(places) == 100 and min(np.bincount(labels, minlength=4)) > 50


def test_images_of_recall_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = dataclasses.replace(_places.place("recall-16"), subset=8, test=4)
    folder = place.data(None)
    found = datasets.load_dataset("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "hf"))
    assert {name: len(split) for name, split in found.items()} == {"train": 8, "test": 4}
    for split in found.values():
        for row in split:
            assert answer(np.asarray(row["image"])) == row["label"]
    assert len({np.asarray(row["image"]).tobytes() for split in found.values() for row in split}) == 12
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert place.data(None) == folder and made == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert place.data(tmp_path) == tmp_path


def test_ranks_are_as_wide_as_chance_is():
    found = {"a": [50.0, 51.0, 49.0], "b": [49.5, 50.5, 48.5], "c": [40.0, 41.0, 39.0], "lost": []}
    assert docs.ranks(found) == {"a": "1-2", "b": "1-2", "c": "3", "lost": "-"}
    assert docs.ranks({"a": [50.0], "b": [10.0]}) == {"a": "-", "b": "-"}  # one seed says nothing of chance
    many = {str(number): [50.0 + number] for number in range(20)}
    assert set(docs.ranks(many | {"a": [10.0, 12.0]}).values()) == {"-"}, "nor do two seeds of one of many"
    assert docs.ranks(many | {"a": [10.0, 10.1], "b": [11.0, 11.1], "c": [5.0, 5.1]})["c"] == "23"
    differ = docs.tells_apart(found)
    pooled = scipy.stats.tukey_hsd(*(found[name] for name in "abc"))
    assert differ("a", "c") == (pooled.pvalue[0, 2] < 0.05) and differ("a", "b") == (pooled.pvalue[0, 1] < 0.05)
    near = {"a": [50.0, 51.0, 49.0], "b": [47.6, 48.6, 46.6], "c": [47.0, 48.0, 46.0]}
    pooled = scipy.stats.tukey_hsd(*near.values()).pvalue
    differ = docs.tells_apart(near)
    assert [differ("a", name) for name in "bc"] == [pooled[0, 1] < 0.05, pooled[0, 2] < 0.05] == [False, True]
    assert docs.ranks(near) == {"a": "1-2", "b": "1-3", "c": "2-3"}


def test_failures_are_told_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def fails(workers, units, slow):
        for ((name, seed, setting),) in units:
            lost = name == "linear" and seed == 1
            row = {"place": setting.place, "mechanism": name, "seed": seed}
            yield row | ({"error": "the loss became nan"} if lost else {"error": "", "top1": 40.0 + seed, "seconds": 1})

    monkeypatch.setattr(accuracy, "train_all", fails)
    path = tmp_path / "a.csv"
    options = ["--only", "linear,softmax", "--seconds", "0", "--csv", str(path)]
    assert accuracy.main(options) == 0
    assert [row["top1"] for row in rows(path) if row["error"]] == [""]
    out = capsys.readouterr().out
    assert "| `linear` | 1-2 | 41.00 ± 1.41, 1 of 3 failed | 40.00 42.00 | +0.00 |" in out
    assert "| `softmax` | 1-2 | 41.00 ± 1.00 | 40.00 41.00 42.00 | +0.00 |" in out
    assert "`linear`, seed 1, failed: the loss became nan" in out and "images/s" not in out


def test_equal_ones_share_their_place():
    found = {"a": [100.0], "b": [100.0, 100.0], "c": [99.0], "lost": [], "late": []}
    assert docs.order(found) == {"a": 1.5, "b": 1.5, "c": 3.0, "lost": 4.5, "late": 4.5}


def test_all_places_are_one_table():
    def ran(place, **top1):
        return [
            {"place": place, "mechanism": name, "kind": "core", "seed": str(seed), "error": "", "top1": str(value)}
            for name, values in top1.items()
            for seed, value in enumerate(values)
        ]

    lost = {"mechanism": "slow", "kind": "core", "seed": "0", "error": f"{TOO_LONG} 9 s", "top1": ""}
    found = {
        _places.place("cifar10"): [*ran("cifar10", a=[50, 51], b=[40, 41]), lost],
        _places.place("recall-8"): ran("recall-8", a=[70.0, 70.2], b=[99, 99.2], slow=[60, 60.2], all_new=[20, 20.2]),
    }
    assert docs.overview(found).splitlines() == [
        "| mechanism | place on average | cifar10 | recall-8 |",
        "| --- | --- | --- | --- |",
        "| `a` | 1.5 | 50.5 (1) | 70.1 (2) |",
        "| `b` | 1.5 | 40.5 (2) | 99.1 (1) |",
        "| `slow` | 3.0 | - | 60.1 (3) |",
        "| `all_new` | - | - | 20.1 (4) |",
    ]


def test_runs_go_on_from_those_of_another_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def small(name, grid, **more):
        make = functools.partial(_places.write_recall, grid=grid)
        budget = {"epochs": 1, "subset": 128, "test": 16}
        return dataclasses.replace(
            _places.place(name), name=name, grid=grid, side=2 * grid, make=make, **budget, **more
        )

    for name, grid in (("recall-4", 4), ("recall-8", 5), ("recall-16", 6)):
        monkeypatch.setitem(_places.PLACES, name, small(name, grid))
    options = accuracy.parse(["--place", "recall-16", "--runs", str(tmp_path)])
    setting = accuracy.setting_of(options, "recall-16", torch.device("cpu"))
    assert setting.start.place == "recall-8" and setting.budget.endswith(
        "to evaluate, after 1 epochs of 128 at recall-8, after 1 epochs of 128 at recall-4"
    )
    sent = []
    for _ in range(2):
        accuracy.work(("run", setting), {0: "linear 3"}, lambda *message: sent.append(message))
    assert [kind for _, kind, _ in sent] == ["facts", "facts"], sent
    assert sent[0][2]["top1"] == sent[1][2]["top1"]
    assert setting.start.folder("linear", 3) != dataclasses.replace(setting.start, amp="bf16").folder("linear", 3)
    kept = load_trained(setting.start.folder("linear", 3))
    assert kept.recipe.img_size == (10,)
    before = setting.start.start.folder("linear", 3)
    assert load_trained(before).recipe.img_size == (8,)
    assert accuracy.recipe(setting.start, "linear", 3).init == str(before)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")] == []
    still = accuracy.recipe(setting, "linear", 3).changed(lr=1e-30, weight_decay=0.0)
    train(still, out=tmp_path / "still")
    for ours, theirs in zip(load_trained(tmp_path / "still").model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Clock:
    """A worker that notes its runs; `linear` takes too long at the place `recall-8`."""

    def __init__(self):
        self.runs = []

    def run(self, cell, sides):
        (name,) = sides
        self.runs.append(f"{cell[1].place} {name}")
        return [Side(error=f"{TOO_LONG} 10 s" if self.runs[-1].startswith("recall-8 linear") else "")]


def test_one_worker_takes_a_mechanism_through_all_places():
    options = accuracy.parse(["--place", "recall-8,cifar10"])
    settings = [accuracy.setting_of(options, name, torch.device("cpu")) for name in options.place]
    units = [[(name, seed, setting) for setting in settings] for seed in (0, 1) for name in ("softmax", "inline")]
    workers = [Clock(), Clock()]
    rows = list(accuracy.train_all(workers, units, {}))
    assert len(rows) == 8 and all(row["error"] == "" for row in rows)
    for worker in workers:
        assert [run.split()[0] for run in worker.runs] == ["recall-8", "cifar10"] * (len(worker.runs) // 2)
        for first, second in zip(worker.runs[::2], worker.runs[1::2], strict=True):
            assert first.split()[1:] == second.split()[1:]


def test_what_takes_too_long_is_not_tried_again():
    options = accuracy.parse(["--place", "recall-8,recall-16,cifar10"])
    settings = [accuracy.setting_of(options, name, torch.device("cpu")) for name in options.place]
    units = [[(name, seed, setting) for setting in settings] for seed in (0, 1) for name in ("softmax", "linear")]
    worker = Clock()
    rows = accuracy.train_all([worker], units, {})
    late = "seed 0 took more than 10 s at recall-8"
    assert {(row["mechanism"], row["seed"], row["place"]): row["error"] for row in rows if row["error"]} == {
        ("linear", 0, "recall-8"): "took more than 10 s",
        ("linear", 0, "recall-16"): f"not tried: {late}",
        ("linear", 1, "recall-8"): f"not tried: {late}",
        ("linear", 1, "recall-16"): f"not tried: {late}",
    }
    assert [run for run in worker.runs if "linear" in run] == [
        "recall-8 linear 0",
        "cifar10 linear 0",
        "cifar10 linear 1",
    ]


def test_what_took_too_long_before_is_not_tried_again(tmp_path, monkeypatch):
    path, known = tmp_path / "a.csv", []

    def told(workers, units, slow):
        known.append(dict(slow))
        for ((name, seed, setting),) in units:
            yield {"place": setting.place, "mechanism": name, "seed": seed, "error": f"{TOO_LONG} 10 s"}

    monkeypatch.setattr(accuracy, "train_all", told)
    for seed in "01":
        options = ["--only", "linear", "--seeds", seed, "--seconds", "0", "--csv", str(path)]
        assert accuracy.main(options) == 0
    assert known == [{}, {("cifar10", "linear"): "seed 0 took more than 10 s at cifar10"}]


def test_rows_of_other_processors_count():
    row = {"place": "a", "budget": "b", "device": "cpu: one", "precision": "float32"}
    assert accuracy.comparable(row) == accuracy.comparable(row | {"device": "cpu: another"})
    for key in ("place", "budget", "precision"):
        assert accuracy.comparable(row) != accuracy.comparable(row | {key: "other"})
    assert accuracy.comparable(row) != accuracy.comparable(row | {"device": "cuda: one"})


def test_what_diverges_is_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setitem(accuracy.TRAINING, "lr", 1e30)
    monkeypatch.setitem(accuracy.TRAINING, "opt", "sgd")
    setting, sent = accuracy.Setting("cifar10", str(data), 2, 80, 20, "cpu", "off", 1, 0.0, str(tmp_path)), []
    accuracy.work(("run", setting), {0: "linear 0"}, lambda *message: sent.append(message))
    ((side, kind, line),) = sent
    assert (side, kind) == (0, "error") and line.startswith("the loss became") and "\n" not in line


def test_a_stopped_run_leaves_no_row(tmp_path, monkeypatch):
    def stopped(*_):
        yield {"place": "cifar10", "mechanism": "linear", "seed": 0, "error": "", "top1": 50.0, "seconds": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "train_all", stopped)
    assert accuracy.main(["--only", "linear", "--csv", str(tmp_path / "a.csv")]) == 130
    assert [row["seed"] for row in rows(tmp_path / "a.csv")] == ["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "linaer"], "did you mean 'linear'?"),
        (["--place", "cifar10,cifar"], "no place 'cifar' to compare at: cifar10, recall-4, recall-8"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--csv", "no/such/folder/a.csv"], "no/such/folder"),
        (["--csv", __file__], "is no file of this benchmark"),
    ],
)
def test_what_cannot_be_used_is_one_line(options, message, capsys):
    assert accuracy.main(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_page_without_a_place_for_the_result_is_refused(tmp_path):
    with pytest.raises(accuracy.LinsightError, match=r"accuracy.md' is not there, or has no line"):
        docs.write(tmp_path, {}, [])
