"""What is measured with whom, what it costs, and the files: timm's columns, failures as rows, whole at any moment."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from linsight import bench, cli
from linsight.bench import operators, roofline, run, steps
from linsight.bench.rows import step_columns
from linsight.errors import LinsightError
from linsight.models import VARIANTS

SETTING = bench.Setting(threads=1, seconds=0, dim=16, heads=2)
CPU = torch.device("cpu")


def operator(name):
    return bench.Subject("operator", name)


def model(name, attention=""):
    return bench.Subject("model", name, attention)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command: `(exit code, standard output, standard error)`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["linsight", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def test_models_stand_beside_softmax_on_their_host():
    swins, deits = bench.plan_groups(["inline_swin_tiny", "inline_deit_tiny", "focused_swin_tiny"])
    assert swins.subjects == (model("inline_swin_tiny"), model("focused_swin_tiny"))
    assert swins.beside == model("swin_tiny_patch4_window7_224")
    assert deits.sides == [model("inline_deit_tiny"), model("deit_tiny_patch16_224")]
    (mixed,) = bench.plan_groups(["swin_tiny"], ["agent", "inline+inline+softmax+softmax"])
    assert [side.label for side in mixed.sides] == [
        "swin_tiny[agent]",
        "swin_tiny[inline,inline,softmax,softmax]",
        "swin_tiny_patch4_window7_224",
    ]
    (other,) = bench.plan_groups(["mlla_tiny"], beside="resnet18")
    assert other.beside == model("resnet18")
    assert bench.plan_groups(["inline"], beside="none") == (bench.Group((operator("inline"),)),)
    (all_,) = bench.plan_groups(["inline_deit_*"], beside="none")
    assert set(all_.subjects) == {model(name) for name in VARIANTS if name.startswith("inline_deit_")}


def test_operators_are_those_with_a_core():
    (group,) = bench.plan_groups(["*"])
    assert group.beside == operator("softmax") and operator("weightformer") not in group.sides


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["softmax", "inline", "mlla"])
def test_an_operator_costs_what_its_formula_says(name, train):
    facts, step = operators.operator_step(name, (3, 4), 2, CPU, None, dim=16, heads=2, train=train, compiled=False)
    step()
    tokens = 2 * 12 * 16 * 4  # bytes of one of q, k, v and the output
    if name == "softmax":
        assert facts["flops"] == (3 if train else 1) * 2 * (2 * 2 * 12 * 12 * 16)
        assert facts["gmacs"] == 2 * 12 * 12 * 16 / 1e9
    parameters = 4e6 * facts["param_count"]
    used = 4 if name == "inline" else 3  # and x, of which it makes its convolution
    expected = 3 * (used * tokens + parameters) + 2 * tokens if train else (used + 1) * tokens + parameters
    assert facts["bytes"] == expected


def test_traffic_is_what_operators_read_and_write():
    x = torch.ones(10, 10)
    with roofline.Traffic() as traffic:
        y = x.view(100).expand(3, 100) + 1  # the view costs nothing, the expanded input 400 bytes
        y.add_(y)
    assert traffic.bytes == (400 + 1200) + (1200 + 1200)


def test_the_roofline_is_the_longer_of_two_times():
    peaks = {"peak_tflops": 2.0, "peak_gb_per_sec": 50.0}
    assert roofline.roofline({"flops": 1e12, "bytes": 10e9}, peaks, 1.0) == (50, "operations")
    assert roofline.roofline({"flops": 1e12, "bytes": 40e9}, peaks, 2.0) == (40, "bytes")
    assert roofline.roofline({"flops": 1e12, "bytes": 40e9}, {}, 2.0) is None


def test_ratios_are_those_of_rounds():
    ours, theirs = bench.Side(times=[1.0, 4.0, 3.0, 9.0]), bench.Side({"gmacs": 2.5}, [2.0, 2.0, 2.0])
    assert bench.ratios(ours, theirs) == [0.5, 2.0, 1.5]
    columns = step_columns(bench.Cell("infer", 64, 32, 4, SETTING), ours, theirs)
    assert [columns[f"infer_ratio{part}"] for part in ("", "_min", "_max")] == [1.5, 0.5, 2.0]
    assert (columns["infer_step_time"], columns["infer_samples_per_sec"]) == (3500, round(4 / 3.5, 3))
    assert columns["infer_img_size"] == "64x32"


def test_a_run_has_timms_columns_and_a_row_for_what_fails(here, command):
    path = here / "all.csv"
    options = ["--sizes", "2x3:2,4", "--seconds", "0", "--threads", "1", "--dim", "16", "--heads", "2"]
    code, out, err = command("bench", "inline,linear", *options, "--csv", str(path), "--html", str(here / "a.html"))
    assert code == 0 and f"wrote {path}" in out and err.count("\n") == 12
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timms = ["model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs"]
    timms += ["param_count", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size"]
    assert set(timms) <= rows[0].keys() == set(bench.COLUMNS)
    assert [row["model"] for row in rows] == ["inline", "linear", "softmax"] * 2
    assert [row["infer_img_size"] for row in rows] == ["2x3"] * 3 + ["4"] * 3
    assert [row["tokens"] for row in rows] == ["6"] * 3 + ["16"] * 3
    for row in rows:
        for step in ("infer", "train"):
            assert row[f"{step}_rounds"] == "3" and row[f"{step}_error"] == "" == row["error"]
            assert (row[f"{step}_ratio"] == "") == (row["model"] == "softmax")
            milliseconds, batch = float(row[f"{step}_step_time"]), int(row[f"{step}_batch_size"])
            assert float(row[f"{step}_step_time_min"]) <= milliseconds <= float(row[f"{step}_step_time_max"])
            assert float(row[f"{step}_samples_per_sec"]) == pytest.approx(1000 * batch / milliseconds, rel=1e-2)
            assert float(row[f"{step}_roofline"]) > 0 and row[f"{step}_bound"] in ("operations", "bytes")
        assert row["peak_tflops"] == "2.0" and row["threads"] == "1"
    assert rows[2]["infer_form"] in ("flash_attention", "math")
    (kept,) = bench.results_folder().glob("*.csv")
    assert kept.read_text() == path.read_text()

    page = (here / "a.html").read_text()
    for outside in ("http", "src=", 'href="/', "url(/", "@import"):
        assert outside not in page
    assert page.count("<svg") == 1 and page.count("<tr>") == 1 + 2 * len(rows) and "inline" in page

    code, out, _ = command("advise", "--size", "48", "--dim", "16", "--heads", "2", "--device", "cpu", "--json")
    found = json.loads(out)
    assert found["tokens"] == 9 and {row["name"] for row in found["choices"]} == {"inline", "linear", "softmax"}


def test_what_fails_is_a_row_and_the_rest_is_measured(here):
    group = bench.Group((operator("inlin"), operator("linear")), operator("softmax"))
    plan = bench.Plan((group,), ((2, 2, 1),), SETTING, ("infer",))
    (done,) = bench.bench(plan)
    failed, linear, softmax = done.rows
    assert "did you mean 'inline'" in failed["error"] == failed["infer_error"]
    assert "infer_step_time" not in failed and linear["infer_ratio"] and softmax["infer_step_time"]
    _, body = bench.table(done.rows)
    assert [len(line) for line in body] == [10] * 3 and "did you mean" in body[0][4]


def test_models_are_measured_on_images(here):
    group = bench.Group((model("inline_compact_pico"),), model("compact_pico", "linear"))
    plan = bench.Plan((group,), ((16, 8, 2),), SETTING)
    *_, done = bench.bench(plan)
    ours, beside = done.rows
    assert (ours["beside"], beside["model"], ours["tokens"]) == ("compact_pico[linear]", "compact_pico[linear]", 1)
    for row in done.rows:
        assert row["error"] == "" and row["infer_img_size"] == "16x8" and row["infer_gbytes"] > 0
        assert row["train_gbytes"] > 2 * row["infer_gbytes"] and row["infer_gmacs"] == row["train_gmacs"]
        assert row["param_count"] > 0


def test_a_training_step_of_a_model_is_three_forwards_of_each_image():
    subject = model("compact_pico", "inline")
    cells = [bench.Cell(step, 16, 8, batch, SETTING) for step, batch in (("infer", 1), ("train", 1), ("train", 3))]
    forward, training, several = (steps.make(subject, cell)[0]["flops"] for cell in cells)
    assert forward == bench.cost(subject, (16, 8))["flops"] > 0
    assert (training, several) == (3 * forward, 9 * forward)


def test_stopping_leaves_whole_files(here, command, monkeypatch):
    measure = steps.measure

    def stops(cell, sides, send):
        if cell.height == 4:
            raise KeyboardInterrupt
        measure(cell, sides, send)

    monkeypatch.setattr(run.bench, "__defaults__", (stops,))
    options = ["--sizes", "2,4", "--seconds", "0", "--dim", "16", "--heads", "2", "--steps", "infer"]
    code, _, err = command("bench", "linear", *options, "--out", str(here / "out"))
    assert code == 130 and "stopped" in err
    assert sorted(path.name for path in (here / "out").iterdir()) == ["bench.csv", "bench.html", "bench.svg"]
    linear, softmax = bench.read_rows(here / "out" / "bench.csv")
    assert (linear["model"], linear["tokens"], softmax["model"]) == ("linear", 4, "softmax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench inlin", "did you mean 'inline'"),
        ("bench inline,deit_tiny_patch16_224", "mechanisms and models cannot be measured together"),
        ("bench inline --attention agent", "--attention is for models"),
        ("bench vit_tiny --attention inlin", "did you mean 'inline'"),
        ("bench vit_tiny --attention inline+softmax", "this host has 1"),
        ("bench resnet18 --attention inline", "without a linsight host"),
        ("bench weightformer", "'weightformer' is a whole block"),
        ("bench inline --beside vit_tiny", "unknown operator 'vit_tiny'"),
        ("bench vit_tiny --beside inline", "unknown model 'inline'"),
        ("bench inline --sizes 14x", "'14x' is no size"),
        ("bench inline --sizes 0", "'0' is no size"),
        ("bench inline --heads 5", "5 heads do not divide a width of 192"),
        ("bench inline --steps forward", "unknown step 'forward'"),
        ("bench inline --device gpu", "device 'gpu' cannot be used"),
        ("bench inline --device cpu --amp fp16", "amp=fp16 needs a GPU"),
        ("bench inline --amp float", "unknown --amp 'float'"),
        ("bench inline --device cpu --cuda-graphs", "CUDA graphs need a CUDA device"),
        ("bench inline --csv no/such/folder/a.csv", "cannot be written"),
        ("bench inline --html no/such/folder/a.html", "cannot be written"),
        ("bench inline --plot a.txt", "must end with"),
        ("bench inline --batch 0", "--batch"),
        ("bench ,", "nothing to measure"),
        ("advise --size 14,x", "'x' is no size"),
        ("advise --size 224 --device tpu9", "unknown device 'tpu9'"),
        ("advise --size 224 --from none.csv", "'none.csv' cannot be read"),
        ("advise --size 224 --device cpu --dim 64", "make them with 'linsight bench"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, here, command, monkeypatch):
    monkeypatch.chdir(here)
    code, out, err = command(*arguments.split())
    assert (code, out) == (2, "") and message in err and err.startswith("linsight: ") and err.count("\n") == 1
    assert not list(here.glob("**/*.csv"))


def test_other_files_are_refused():
    with pytest.raises(LinsightError, match="no file of 'linsight bench'"):
        bench.read_rows(Path(__file__))


def test_peaks_are_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "best_of", lambda act, device: 0.5)
    found = roofline.measure_peaks(CPU, torch.bfloat16)
    assert found == {"peak_tflops": 2 * 1536**3 / 0.5 / 1e12, "peak_gb_per_sec": 2 * 2**28 / 0.5 / 1e9}
