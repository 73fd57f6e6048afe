"""The table of docs/deploy.md: what is timed together, and how it is told."""

import sys
from pathlib import Path

import pytest
import torch

from linsight.bench import Cell, Setting, Side, rounds

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import deploy
from deploy import Form

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"


def test_forms_of_a_model_stand_beside_softmax(monkeypatch, tmp_path):
    made = []

    def exported(folder, name, kind):
        made.append((name, kind))
        return Form(name, kind, f"{name}.{kind}", "" if kind != "aoti" else "no compiler")

    monkeypatch.setattr(deploy, "exported", exported)
    found = deploy.forms(tmp_path, "inline_deit_tiny", ["fused", "aoti", "onnx", "openvino"])
    assert found == [
        Form("inline_deit_tiny", "fused"),
        Form("inline_deit_tiny", "aoti", "inline_deit_tiny.aoti", "no compiler"),
        Form("inline_deit_tiny", "onnx", "inline_deit_tiny.onnx"),
        Form("inline_deit_tiny", "openvino", "inline_deit_tiny.onnx"),  # the same file
        Form("deit_tiny_patch16_224", "onnx", "deit_tiny_patch16_224.onnx"),
    ]
    assert ("inline_deit_tiny", "openvino") not in made


@pytest.mark.full
def test_all_forms_are_timed_in_the_same_rounds(monkeypatch):
    monkeypatch.setattr(rounds, "SAMPLE", 0)
    threads, order, found = torch.get_num_threads(), [], {}

    def send(side, kind, value):
        found.setdefault((side, kind), []).append(value)
        if kind == "time":
            order.append(side)

    forms = {
        0: Form("inline_deit_tiny", "eager"),
        1: Form("inline_deit_tiny", "fused"),
        2: Form("x", "aoti", error="no"),
    }
    try:
        deploy.measure(Cell("infer", 32, 32, 2, Setting(threads=1, seconds=0)), forms, send)
    finally:
        torch.set_num_threads(threads)
    assert order == [0, 1, 1, 0, 0, 1] and found[2, "error"] == ["no"]


def test_the_table_has_the_ratio_to_the_fused_model():
    fused, onnx = Form("m", "fused"), Form("m", "onnx", "m.onnx")
    softmax, failed = Form("s", "onnx", "s.onnx"), Form("m", "aoti", error="no compiler")
    small = {fused: Side(times=[0.1, 0.2]), onnx: Side(times=[0.05, 0.3]), softmax: Side(times=[0.2, 0.4])}
    sides = {(224, 1): small | {failed: Side(error="no compiler")}, (672, 2): {fused: Side(times=[1.0])}}
    assert deploy.table("m", sides).splitlines() == [
        "| ms (ratio to `fused`) | 1 x 224 | 2 x 672 |",
        "| --- | --- | --- |",
        "| `linsight.fuse` | 150 (1.00) | 1000 (1.00) |",
        "| AOTInductor | no compiler |",
        "| ONNX Runtime | 175 (1.00) |",
        "| softmax (`s`), ONNX Runtime | 300 (2.00) |",
    ]


def test_the_page_keeps_its_words(tmp_path, monkeypatch, capsys):
    page = tmp_path / "deploy.md"
    page.write_text(deploy.BLOCK.sub(lambda found: f"{found[1]}old\n", PAGE.read_text(encoding="utf-8")))
    monkeypatch.setattr(deploy, "run", lambda options: f"{options.models} {options.sizes} {options.ways}\n")
    options = ["--models", "inline_deit_tiny", "--sizes", "224:1,672:8", "--ways", "fused,onnx"]
    assert deploy.main([*options, "--docs", str(tmp_path)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "['inline_deit_tiny'] [(224, 1), (672, 8)] ['fused', 'onnx']" in text and "\nold\n" not in text
    assert text.startswith("# From a trained run to a server") and text.endswith("<!-- end -->\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "onx"], "did you mean 'onnx'"),
        (["--sizes", "224"], "--sizes 224: give PIXELS:BATCH"),
        (["--models", "inline_diet_tiny"], "did you mean 'inline_deit_tiny'"),
        (["--docs", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(options, message, capsys):
    assert deploy.main(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
