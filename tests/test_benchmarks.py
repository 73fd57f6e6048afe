"""The comparison of all hosts measures what it says, and loses nothing."""

import csv
import sys
from pathlib import Path

import pytest
import timm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import hosts

from linsight.bench import TIMM, Cell, Group, Setting, Side, Subject, build, cost
from linsight.models import HOSTS, VARIANTS


def test_each_published_model_is_beside_softmax_on_its_host():
    pairs = hosts.pairs()
    assert {name for name, variant in VARIANTS.items() if "compact" not in variant.host} >= pairs.keys()
    assert {"inline_deit_tiny", "inline_pvt_tiny", "inline_swin_base_384", "focused_pvt_v2_b5"} <= pairs.keys()
    assert pairs["inline_pvt_tiny"] == pairs["focused_pvt_tiny"] == "pvt_tiny"
    assert pairs["inline_swin_base_384"] == "swin_base_patch4_window12_384"
    for softmax in pairs.values():
        assert timm.is_model(softmax) if softmax in TIMM.values() else softmax in HOSTS


def test_windows_do_not_grow_with_the_image():
    swin = build(Subject("model", "swin_tiny_patch4_window7_224"), (448, 448), "meta")
    assert {stage.blocks[0].window_size for stage in swin.layers} == {(7, 7)}
    found = cost(Subject("model", "pvt_v2_b0"), (224, 224))
    assert (found["param_count"], found["gmacs"]) == (3.67, 0.57)


@pytest.mark.full
@pytest.mark.timeout(180)  # of a machine that is busy: it starts a process
def test_a_run_writes_a_table_and_a_csv_file(tmp_path, capsys):
    path = tmp_path / "hosts.csv"
    options = ["--sizes", "32:2", "--seconds", "0", "--threads", "1", "--csv", str(path)]
    assert hosts.main(["--models", "inline_deit_tiny,inline_diet_tiny", *options]) == 1
    with path.open(newline="") as file:
        missing, ours, softmax = csv.DictReader(file)
    assert (ours["model"], ours["beside"]) == ("inline_deit_tiny", "deit_tiny_patch16_224")
    assert (softmax["model"], softmax["beside"]) == ("deit_tiny_patch16_224", "")
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
    shown = float(lines[4].split(" | ")[hosts.HEADER.index("time ratio")].split()[0])
    assert shown == pytest.approx(float(ours["train_ratio"]), abs=0.01) and "did you mean" in lines[2]


def test_a_row_of_the_table_has_both_sides():
    ours, softmax = Subject("model", "inline_deit_tiny"), Subject("model", "pvt_tiny")
    sides = {ours: Side(times=[1.0, 4.0, 3.0, 9.0]), softmax: Side({"gmacs": 2.5}, [2.0, 2.0, 2.0])}
    row = hosts.table_row(Group((ours,), softmax), Cell("infer", 64, 64, 4, Setting()), sides)
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
