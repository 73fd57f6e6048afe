"""The early-exit benchmark: which settings it shows, and where its table goes."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import early_exit

from linsight.errors import LinsightError
from linsight.models import ARCHITECTURES
from linsight.tasks.exits import Scored, curve
from linsight.train.exits import shown

DOCS = Path(__file__).parents[1] / "docs"


def found():
    confidences = torch.rand(400, 4)
    scored = Scored(confidences, torch.rand(400, 4) < torch.tensor([0.4, 0.6, 0.5, 0.8]) * (0.5 + confidences))
    settings, alone = curve(scored, scored, lambda exits: [(k + 4) * 10**6 for k in exits])
    return {"exits": [shown(setting) for setting in alone], "settings": [shown(setting) for setting in settings]}


def test_shown_are_each_exit_and_the_best_setting_of_each_budget():
    rows = early_exit.policies(found())
    assert early_exit.MODEL in ARCHITECTURES and list(rows)[:4] == [f"exit {k}" for k in (1, 2, 3, 4)]
    budgets = {int(match[1]): row for name, row in rows.items() if (match := re.search(r"at most (\d+) %", name))}
    assert list(budgets) == [70, 80, 90]  # the first exit alone costs 62.5 %
    assert all(row["calibration"]["gmacs"] <= share / 100 * 8e-3 for share, row in budgets.items())
    text = early_exit.table(rows, range(100, 100 + len(rows)))
    assert {line.count("|") for line in text.splitlines()} == {len(early_exit.HEADER) + 1}
    assert text.splitlines()[5].endswith("| 8.00 | " + f"{rows['exit 4']['top1']:.2f} | 103 |")


def test_the_result_goes_into_its_place_in_the_docs(tmp_path):
    (tmp_path / "exits.png").write_bytes(b"picture")
    text = (DOCS / "early-exit.md").read_text(encoding="utf-8")
    (tmp_path / "early-exit.md").write_text(text, encoding="utf-8")
    for result in ("first", "second"):
        early_exit.document(tmp_path, result, tmp_path)
    written = (tmp_path / "early-exit.md").read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- generated: early exit -->\n")
    assert (
        written
        == f"{head}<!-- generated: early exit -->\nsecond\n\n![](early-exit.png)\n{rest[rest.index('<!-- end') :]}"
    )
    assert (tmp_path / "early-exit.png").read_bytes() == b"picture"
    (tmp_path / "early-exit.md").write_text("no place", encoding="utf-8")
    with pytest.raises(LinsightError, match="no place for the table"):
        early_exit.document(tmp_path, "third", tmp_path)
