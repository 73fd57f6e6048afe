"""The benchmark of dense tasks: what it measures, that it goes on, and what it writes."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from linsight.bench import Setting, Side

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import dense_speed

SMALL = ["--models", "inline_compact_nano", "--beside", "compact_pico"]


@pytest.mark.parametrize("part", dense_speed.PARTS)
@pytest.mark.parametrize("step", ["infer", "train"])
def test_a_step_of_each_part_does_what_it_says(part, step):
    cell = dense_speed.Cell(part, step, 64, 32, Setting(threads=1))
    facts, act = dense_speed.make("compact_pico", cell)
    model = dense_speed.build(part, "compact_pico")
    assert facts == {"params": sum(parameter.numel() for parameter in model.parameters())}
    before = torch.get_rng_state()
    act()
    assert step == "infer" or part != "detect" or not torch.equal(torch.get_rng_state(), before), "regions are drawn"


def test_the_largest_images_are_not_trained_on():
    found = [cell[:3] for cell in dense_speed.cells(dense_speed.parse(["--parts", "segment", "--streamed", "0"]))]
    assert [side for _, step, side in found if step == "train"] == [512, 1024]
    assert [side for _, step, side in found if step == "infer"] == [512, 1024, 2048]


def test_the_page_says_what_was_found_and_what_was_not(tmp_path):
    swin = Side({"params": 30_000_000, "peak_mb": 812.0}, [0.2, 0.25, 0.3])
    ours = Side({"params": 25_000_000, "peak_mb": 400.4}, [0.1, 0.1, 0.1])
    told = dict.fromkeys(dense_speed.FACTS, "x")
    rows = []
    for size in (512, 1024):
        for name, side in (("ours", ours), ("swin", swin), ("net", Side(error="killed"))):
            row = {"part": "detect", "step": "train", "side": size, "model": name, **told}
            rows.append(row | dense_speed.numbers(side, swin))
    text = dense_speed.text_of(rows, "python x.py")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "|  | M params | 512 pixels | 1,024 pixels |",
        "| --- | --- | --- | --- |",
        "| `ours` | 25.0 | 100 (0.40), 400 MB | 100 (0.40), 400 MB |",
        "| `swin` | 30.0 | 250, 812 MB | 250, 812 MB |",
        "| `net` | - | killed | killed |",
    ]
    assert "### A detector, `faster_rcnn`, 80 classes, training" in text


@pytest.mark.full
@pytest.mark.timeout(300)  # of a machine that is busy: it starts a process
def test_a_run_is_a_table_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    page = tmp_path / "dense.md"
    page.write_text("# before\n<!-- results: dense -->\nold\n<!-- end: dense -->\nafter\n")
    path = tmp_path / "rows.csv"
    options = [*SMALL, "--parts", "segment", "--steps", "infer", "--sides", "32", "--streamed", "64", "--tile", "32"]
    options += ["--seconds", "0", "--threads", "1", "--csv", str(path), "--docs", str(tmp_path)]
    assert dense_speed.main(options) == 0, capsys.readouterr().err
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["side"], row["model"]) for row in rows] == [
        (step, side, name)
        for step, side in (("infer", "32"), ("stream", "64"))
        for name in ("inline_compact_nano", "compact_pico")
    ]
    ours, beside, streamed, not_streamed = rows
    assert float(ours["ratio"]) > 0 and float(ours["ms"]) > 0 and ours["rounds"] == "3" and beside["ratio"] == ""
    assert float(streamed["ms"]) > 0 and streamed["error"] == ""
    assert not_streamed["ms"] == "" and not_streamed["error"], "softmax sees an image at once"
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text and "in tiles" in text

    class Idle:
        def __init__(self, *given): ...

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def run(self, cell, names):
            raise AssertionError(f"{cell} was measured before")

    monkeypatch.setattr(dense_speed, "Worker", Idle)
    assert dense_speed.main(options) == 0
    with pytest.raises(AssertionError, match="'backbone'"):
        dense_speed.main([*options, "--parts", "backbone"])
    assert dense_speed.main([*options, "--threads", "2"]) == 2
    assert "has rows of threads 1: name another file with --csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "segmnt"], "did you mean 'segment'"),
        (["--steps", "training"], "unknown step"),
        (["--models", "inline_swim_tiny"], "did you mean 'inline_swin_tiny'"),
        (["--docs", "no/such/folder"], "no/such/folder"),
        (["--sides", "2048"], "--train-up-to is 1024"),
    ],
)
def test_what_cannot_be_used_is_one_line(options, message, capsys):
    assert dense_speed.main([*SMALL, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
