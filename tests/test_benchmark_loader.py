"""The benchmark of the reader: small, as it is run, and where its table goes."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import loader

from linsight.errors import LinsightError

DOCS = Path(__file__).parents[1] / "docs"
SMALL = "--images 32 --sides 64x48 --size 32 --shards 8 --workers 0,1 --batch 8 --seconds 0.01 --rounds 1"
MODEL = "--model inline_compact_nano --device cpu"


def test_each_kind_of_data_has_its_speed_in_the_docs(tmp_path, capsys):
    page = tmp_path / "big-data.md"
    page.write_bytes((DOCS / "big-data.md").read_bytes())
    assert loader.main([*SMALL.split(), *MODEL.split(), "--docs", str(tmp_path)]) == 0, capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 7 and {kind.split(",")[0] for kind, *_ in rows} >= {
        "`cache=disk`",
        "Parquet files",
        "tar shards",
    }
    assert all(int(rate) > 0 for _, *rates in rows for rate in rates)
    assert "`inline_compact_nano` trains **" in text and text.startswith("# Big data\n")
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(LinsightError, match="no place for the table"):
        loader.document(tmp_path, "text")
