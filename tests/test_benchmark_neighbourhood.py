"""The benchmark of neighbourhoods: its mask, small, as it is run, and where its table goes."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import neighbourhood

from linsight.errors import LinsightError
from linsight.ops import AxisWindow

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.full
def test_both_forms_are_equal_and_the_table_goes_into_the_docs(tmp_path, capsys):
    page = tmp_path / "how-fast.md"
    page.write_bytes((DOCS / "how-fast.md").read_bytes())
    small = "--sides 9 --kernel 3 --dilation 2 --heads 1 --width 4 --seconds 0 --threads 1"
    assert neighbourhood.main([*small.split(), "--docs", str(tmp_path)]) == 0, capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    row = re.search(r"^\| 81 \| windows \| \S+ \(([\d.]+)\) .* \(([\d.]+)\) .*\| (\S+) \|$", text, re.MULTILINE)
    assert float(row[1]) > 0 and float(row[2]) > 0 and float(row[3]) < 1e-5
    assert "dilation 2; 1 x 1 heads of 4, float32; cpu" in text and text.startswith("# How fast?\n")
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(LinsightError, match="no place for the table"):
        neighbourhood.document(tmp_path, "text")


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (3, 3)])
def test_the_mask_of_flex_is_that_of_the_windows(monkeypatch, kernel, dilation):
    compile = torch.compile  # without C++, which takes seconds
    monkeypatch.setattr(torch, "compile", lambda run, **more: compile(run, **{"backend": "eager", **more}))
    ways = neighbourhood.forms(10, AxisWindow(kernel, dilation), torch.device("cpu"), flex_too=True)
    tokens = torch.randn(3, 1, 100, 2, 16)
    torch.testing.assert_close(ways[neighbourhood.FLEX](*tokens), ways[neighbourhood.DENSE](*tokens))
    with pytest.raises(LinsightError, match="odd --kernel"):
        neighbourhood.masked_flex(10, AxisWindow(4, 1))
