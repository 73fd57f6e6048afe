"""The page "How fast?" is made of what was measured."""

import sys
from pathlib import Path

import pytest
import torch

from linsight.attention import list_attentions
from linsight.bench import Done, Subject, cost
from linsight.models import VARIANTS
from linsight.ops import Grid

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import how_fast


def test_the_floor_mixes_nothing():
    model = how_fast.build(how_fast.FLOOR, (32, 32), "cpu").eval()
    tokens = model.blocks[0].attn(torch.randn(1, 5, 192), Grid(2, 2, 1))
    assert tokens.shape == (1, 5, 192)
    cores = [block.attn.core for block in model.blocks]
    assert len(cores) == 12 and {type(core) for core in cores} == {how_fast.Floor}
    ours, floor = (cost(subject, (224, 224), how_fast.build) for subject in (how_fast.INLINE, how_fast.FLOOR))
    linear = 12 * 197 * (3 * 192**2 + 192**2 + 8 * 192**2) + 196 * 768 * 192 + 192 * 1000
    assert floor["flops"] == 2 * linear and floor["flops"] < ours["flops"]


def test_every_part_names_models_that_are_there():
    assert set(how_fast.PYRAMIDS) <= VARIANTS.keys()
    options = how_fast.parse([])
    (operators,) = how_fast.plans(options)["operators"]
    assert {Subject("operator", name) for name in ("inline", "agent", "softmax")} <= set(operators.groups[0].sides)
    (whole,) = how_fast.plans(options)["whole"]
    measured = {side.name for side in operators.groups[0].sides} | {side.attention for side in whole.groups[0].sides}
    assert measured == {entry.name for entry in list_attentions()} | {""}
    for subject in whole.groups[0].subjects:
        assert how_fast.build(subject, (224, 224), "meta").num_classes == 1000
    without = how_fast.build(Subject("model", how_fast.SOFTMAX.name, "axial"), (32, 32), "cpu").eval()
    assert without(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_memory_is_told_by_size():
    rows = [{"model": "inline", "tokens": n, "infer_peak_mb": mb} for n, mb in ((1, 0.5), (100, 1234.0))]
    lines = how_fast.memory([*rows, {"model": "softmax", "tokens": 1}, {"model": "softmax", "tokens": 100}], "infer")
    assert lines.splitlines()[2:] == ["| `inline` | 0.5 | 1234 |", "| `softmax` | - | - |"]


@pytest.mark.parametrize(("step", "last"), [("infer", "| 10 tokens |"), ("train", "| not up to here |")])
def test_lines_tell_where_a_mechanism_passes_softmax(step, last):
    rows = []
    for n, ratio in ((1, 10.0), (100, 0.1 if step == "infer" else 2.0)):
        rows.append({"model": "inline", "tokens": n, f"{step}_step_time": 1.0, f"{step}_ratio": ratio})
        rows.append({"model": "softmax", "tokens": n, f"{step}_error": "out of memory"})
    lines = how_fast.by_size(rows, step).splitlines()
    assert lines[2].startswith("| `inline` | 1 (10.00) | 1 (") and lines[2].endswith(last)
    assert lines[3] == "| `softmax` | out of memory | out of memory | - |"


def test_the_page_keeps_its_words(tmp_path, monkeypatch, capsys):
    page = tmp_path / "how-fast.md"
    places = "".join(
        f"<!-- generated: how fast, {part} -->\nold {part}\n<!-- end -->\n" for part in ("whole", "pyramids")
    )
    page.write_text(f"Before.\n{places}After.\n")
    row = {"kind": "model", "model": "m", "tokens": 1, "infer_batch_size": 1, "infer_img_size": 8}

    def measured(plan, measure):
        yield Done(
            how_fast.room.Cell("infer", 8, 8, 1, plan.setting),
            plan.groups[0],
            {},
            [row],
            {"device": "cpu: x", "precision": "float32"},
        )

    monkeypatch.setattr(how_fast.room, "bench", measured)
    arguments = ["--parts", "pyramids", "--docs", str(tmp_path), "--csv", str(tmp_path / "a.csv")]
    assert how_fast.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("Before.\n<!-- generated") and text.endswith("<!-- end -->\nAfter.\n")
    assert "old whole\n" in text and "old pyramids" not in text  # a part has a place of its own
    assert "| `m` | 8 |" in text and "device cpu: x" in text and "--parts pyramids" in text
    assert (tmp_path / "a.csv").read_text().count("\n") == 3  # of two plans
    assert how_fast.main(["--parts", "pyramid"]) == 2 and "did you mean 'pyramids'" in capsys.readouterr().err
    assert how_fast.main(["--docs", str(tmp_path / "none")]) == 2
