"""The benchmark of segmentation: models by one budget, judged on the test split, and what the page is told."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from small import MASKS, masked_squares

from linsight.train import evaluate, load_trained, resolve

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import camvid


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return masked_squares(tmp_path_factory.mktemp("camvid") / "data", {"train": 6, "val": 3, "test": 2})


def test_models_have_the_budget_and_their_test_split_stands_in_the_page(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(camvid, "resolve", lambda name, given: resolve("digits", {**MASKS, "figures": True} | given))
    monkeypatch.setattr(camvid, "MODELS", {"inline": {}, "softmax": {"attention": "softmax"}})
    monkeypatch.setattr(camvid, "IGNORE", 255)
    monkeypatch.setattr(camvid, "seconds_of_epoch", lambda recipe: 10.0)
    page = tmp_path / "segment.md"
    page.write_text("# before\n<!-- results: camvid -->\n<!-- end: camvid -->\nafter\n")
    options = ["--data", str(photos), "--out", str(tmp_path / "runs"), "--docs", str(tmp_path), "--threads", "1"]
    for _ in range(2):
        assert camvid.main([*options, "--minutes", "0.4", "--amp", "off"]) == 0, capsys.readouterr().err
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith("<!-- end: camvid -->\nafter\n")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows] == ["CamVid, test split", "---", "inline", "softmax"]
    for name, row in zip(camvid.MODELS, rows[2:], strict=True):
        folder = tmp_path / "runs" / name
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # 24 s of epochs of 11
        assert json.loads((folder / "config.json").read_text())["recipe"]["ignore"] == camvid.IGNORE
        found = evaluate(load_trained(folder), split="test")
        assert row[2:4] == [f"{found['miou']:.1f}", f"{found['pixels']:.1f}"] and row[4] == "2"
    assert "(segment.jpg)" in text
    with Image.open(tmp_path / "segment.jpg") as picture:
        assert picture.format == "JPEG" and picture.width <= 1000
    assert camvid.main([*options[:4], "--docs", "no/such"]) == 2 and capsys.readouterr().err.count("\n") == 1
