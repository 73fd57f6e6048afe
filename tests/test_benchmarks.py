"""The benchmarks measure what they say, and lose nothing: not what takes too long, nor what ends the process."""

import csv
import functools
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import _cells
import hosts

import strange_sides
from linsight.models import HOSTS, VARIANTS

CPU = torch.device("cpu")


def test_each_published_model_is_beside_softmax_on_its_host():
    pairs = hosts.pairs()
    assert {name for name, variant in VARIANTS.items() if "compact" not in variant.host} >= pairs.keys()
    assert {"inline_deit_tiny", "inline_pvt_tiny", "inline_swin_base_384", "focused_pvt_v2_b5"} <= pairs.keys()
    assert pairs["inline_pvt_tiny"] == pairs["focused_pvt_tiny"] == "pvt_tiny"
    assert pairs["inline_swin_base_384"] == "swin_base_patch4_window12_384"
    for softmax in pairs.values():
        assert timm.is_model(softmax) if softmax in hosts.TIMM.values() else softmax in HOSTS


def test_windows_do_not_grow_with_the_image():
    swin = hosts.build("swin_tiny_patch4_window7_224", 448, "meta")
    assert {stage.blocks[0].window_size for stage in swin.layers} == {(7, 7)}
    assert hosts.cost("pvt_v2_b0", 224) == {"param_count": 3.67, "gmacs": 0.57}


def test_a_run_writes_a_table_and_a_csv_file(tmp_path, capsys):
    path = tmp_path / "hosts.csv"
    options = ["--sizes", "32:2", "--seconds", "0", "--threads", "1", "--csv", str(path)]
    assert hosts.main(["--models", "inline_deit_tiny,inline_diet_tiny", *options]) == 1
    with path.open(newline="") as file:
        ours, softmax, missing = csv.DictReader(file)
    assert (ours["model"], ours["beside"]) == ("inline_deit_tiny", "deit_tiny_patch16_224")
    assert (softmax["model"], softmax["beside"]) == ("deit_tiny_patch16_224", "inline_deit_tiny")
    assert (missing["model"], missing["infer_step_time"]) == ("inline_diet_tiny", "")
    assert "did you mean 'inline_deit_tiny'" in missing["error"]
    for row in (ours, softmax):
        for step in ("infer", "train"):
            numbers = {key.removeprefix(f"{step}_"): value for key, value in row.items() if key.startswith(step)}
            assert (numbers["batch_size"], numbers["img_size"], numbers["rounds"]) == ("2", "32", "3")
            assert numbers["error"] == "" and (numbers["ratio"] == "") == (row is softmax)
            milliseconds = float(numbers["step_time"])
            assert float(numbers["step_time_min"]) <= milliseconds <= float(numbers["step_time_max"])
            assert float(numbers["samples_per_sec"]) == pytest.approx(2000 / milliseconds, rel=1e-2)
        assert float(row["param_count"]) > 5 and row["threads"] == "1" and row["timm"] == timm.__version__
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [len(line.split(" | ")) for line in lines] == [len(hosts.HEADER)] * 5
    shown = float(lines[3].split(" | ")[hosts.HEADER.index("time ratio")].split()[0])
    assert shown == pytest.approx(float(ours["train_ratio"]), abs=0.01) and "did you mean" in lines[4]


def test_ratios_are_those_of_rounds():
    ours, theirs = _cells.Side(times=[1.0, 4.0, 3.0, 9.0]), _cells.Side({"gmacs": 2.5}, [2.0, 2.0, 2.0])
    assert hosts.ratios(ours, theirs) == [0.5, 2.0, 1.5]
    cell = hosts.Cell("infer", 64, 4, "cpu", "off", 1, 0.0)
    columns = hosts.csv_columns(cell, ours, theirs)
    assert [columns[f"infer_ratio{part}"] for part in ("", "_min", "_max")] == [1.5, 0.5, 2.0]
    assert (columns["infer_step_time"], columns["infer_samples_per_sec"]) == (3500, round(4 / 3.5, 3))
    row = hosts.table_row(("inline_deit_tiny", "pvt_tiny"), cell, [ours, theirs])
    assert row[:2] == ["inline_deit_tiny", "pvt_tiny (ours: timm has none)"] and row[6] == "1.50 (0.50..2.00)"
    assert row[11:13] == ["-", "2.50"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--device", "gpu"], "device 'gpu' cannot be used"), (["--csv", "no/such/folder/a.csv"], "no/such/folder")],
)
def test_what_cannot_be_used_is_one_line(options, message, capsys):
    assert hosts.main(["--models", "none", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_rounds_alternate_and_a_side_that_fails_leaves_the_other(monkeypatch):
    monkeypatch.setattr(_cells, "SAMPLE", 0)
    order = []

    def step(name):
        order.append(name)
        if name == "late" and order.count(name) == 4:
            raise torch.OutOfMemoryError("out of memory\nat length")

    def make(name):
        if name == "never":
            raise ValueError("cannot be built")
        return {"params": 1}, functools.partial(step, name)

    sent = []
    names = {0: "good", 1: "late", 2: "never"}
    _cells.alternate(names, make, lambda *message: sent.append(message), CPU, 0)
    assert order == ["good", "late", "good", "late", "late", "good", "good", "late"]
    errors = {side: value for side, kind, value in sent if kind == "error"}
    assert errors == {1: "out of memory", 2: "cannot be built"}
    assert [side for side, kind, _ in sent if kind == "time"] == [0, 1, 1, 0, 0]
    assert sent[1] == (0, "facts", {"params": 1})


def test_memory_is_that_of_the_step():
    if not _cells._reset_peak():
        pytest.skip("only Linux counts the peak of a process")
    assert 60 < _cells._peak(lambda: torch.ones(2**24).sum(), CPU) < 90  # 64 MiB of float32


def test_what_takes_too_long_or_kills_the_process_is_said_and_the_rest_measured():
    with _cells.Worker(strange_sides.measure, limit=3) as worker:
        spun, worked, died = worker.run(None, ("spins", "works", "dies"))
    assert spun.error == "took more than 3 s" and not spun.times
    assert died.error.startswith("killed") and not died.times
    assert len(worked.times) == _cells.ROUNDS and not worked.error
