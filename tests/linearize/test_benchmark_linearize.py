"""The benchmark of conversions: a teacher, students and controls, once each, and what the page is told of them."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from grey_levels import write_grey_levels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import linearize as benchmark
from linsight.train import load_trained

MODEL = "patch_size=8,embed_dim=16,depth=2,num_heads=2,global_pool=avg,class_token=False"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_grey_levels(tmp_path_factory.mktemp("data"))


def updates(run):
    """Of the whole model, as the optimiser has counted them."""
    state = torch.load(run / "state.pt", weights_only=True)["optimiser"]["state"]
    (steps,) = {int(found["step"]) for found in state.values() if "step" in found}
    return steps


@pytest.mark.full
def test_all_runs_are_done_once_and_told(data, tmp_path, monkeypatch, capsys):
    small = {"STUDENTS": ("hedgehog", "mean"), "SCRATCH": ("linear",), "LARGER": ("softmax", "hedgehog")}
    small |= {"MODEL": {"model": "vit_tiny", "model_args": MODEL}, "TIMED": (32, 64)}
    small |= {"BATCH": 8, "IMAGES": 80, "AT_SIDE": 16}
    small["run_speed"] = lambda run, sizes, setting: [
        {"infer_step_time": time} for size in sizes for time in ((1.5, 3.0) if size[0] == 32 else (2.0, ""))
    ]
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    page, file = tmp_path / "linearize.md", tmp_path / "runs.csv"
    page.write_text("# Words\n\n<!-- results: vision -->\n<!-- end: vision -->\n\nMore\n")
    options = ["--data", str(data), "--out", str(tmp_path / "runs"), "--csv", str(file), "--threads", "1"]
    options += ["--epochs", "8", "--seeds", "1", "--workers", "0", "--docs", str(tmp_path)]
    monkeypatch.setattr(benchmark, "streamed", lambda options: f"streamed at {options.side}")
    assert benchmark.main(options) == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    names = [(row["kind"], row["attention"], row["seed"]) for row in rows]
    seeds = [("student", "hedgehog"), ("student", "mean"), ("scratch", "linear")]
    wanted = [(*pair, "0") for pair in seeds]
    assert names == [*wanted, ("larger", "softmax", "0"), ("larger", "hedgehog", "0")]
    assert {row["updates"] for row in rows[:3]} == {"4"} and {row["updates"] for row in rows[3:]} == {"2"}
    assert len({row["teacher"] for row in rows}) == 1
    assert {name: updates(tmp_path / "runs" / name) for name in ("student-hedgehog-0", "scratch-linear-0")} == {
        "student-hedgehog-0": 3,  # beside one for each of its layers alone
        "scratch-linear-0": 4,
    }
    grids = {name: load_trained(tmp_path / "runs" / f"larger-{name}-0").recipe.img_size for name in small["LARGER"]}
    assert grids == {"softmax": (64,), "hedgehog": (64,)}
    text = page.read_text()
    assert (
        "\nstreamed at 4096\n" in text
        and text.startswith("# Words")
        and text.endswith("<!-- end: vision -->\n\nMore\n")
    )
    assert "| mean, the control | " in text and "| linear, from scratch | " in text
    assert f"| hedgehog | {float(rows[-1]['top1']):.1f} | 1.5 (0.50) | 2.0 (nan) |" in text
    assert f"| softmax | {float(rows[-2]['top1']):.1f} | 3.0 | nan |" in text
    assert (tmp_path / "linearize-vision.png").read_bytes()[:4] == b"\x89PNG"
    sent = []
    run = tmp_path / "runs" / "larger-hedgehog-0"
    benchmark.measure((tmp_path, 96, 32, 0, 1), {0: str(run)}, lambda *message: sent.append(message))
    ((place, kind, facts),) = sent
    assert (place, kind) == (0, "facts") and facts["off"] < 1e-4 and facts["seconds"] > 0 and facts["anon_mb"] > 0
    capsys.readouterr()
    before = file.read_bytes()
    assert benchmark.main(options[:-2]) == 0 and file.read_bytes() == before
    assert "epoch" not in capsys.readouterr().out
    # in a process of its own
    ((run, found),) = benchmark.learned({names[1]: (tmp_path / "runs" / "student-mean-0", "finetune", {})}, jobs=2)
    assert run == names[1] and f"{found['last_top1']:.2f}" == rows[1]["top1"]


def test_the_best_stand_first_and_seeds_are_averaged():
    rows = [
        {"kind": kind, "attention": name, "seed": seed, "top1": top1, "teacher": "80.0"}
        for kind, name, seed, top1 in (
            ("student", "mean", 0, "60.0"),
            ("student", "inline", 0, "78.0"),
            ("student", "inline", 1, "79.0"),
            ("scratch", "softmax", 0, "55.5"),
            ("larger", "softmax", 0, "90.0"),
        )
    ]
    assert benchmark.groups(rows) == {
        "inline": [78.0, 79.0],
        "mean, the control": [60.0],
        "softmax, from scratch": [55.5],
    }
    assert benchmark.table(rows).splitlines()[3:5] == [
        "| inline | 78.5 ± 0.7 | 98.1 % |",
        "| mean, the control | 60.0 | 75.0 % |",
    ]


def test_what_cannot_be_used_is_one_line(tmp_path, capsys):
    (tmp_path / "linearize.md").write_text("# Words\n")
    assert benchmark.main(["--docs", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "has no place for the result" in err and err.count("\n") == 1
