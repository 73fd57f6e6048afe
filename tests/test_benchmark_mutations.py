"""The list of faults fits the code, and what runs it tells a fault that is noticed from one that is not."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import mutations

from linsight.errors import LinsightError

ROOT = Path(__file__).parents[1]
FAULTS = mutations.faults()
ROOMS = ("ops", "attention", "models", "checkpoints", "streaming", "parallel")
ROOMS += ("train", "bench", "fuse", "convert", "export", "data", "tasks")


@pytest.mark.parametrize("file", dict.fromkeys(fault.file for fault in FAULTS))
def test_every_fault_can_be_put_into_its_file(file):
    path = ROOT / "src" / "linsight" / file
    text = path.read_text(encoding="utf-8")
    for fault in FAULTS:
        if fault.file == file:
            assert fault.applied(text) != text and fault.what
            compile(fault.applied(text), file, "exec")
            assert all((ROOT / part).is_file() for part in fault.tests if part.startswith("tests/"))


def test_there_are_faults_in_every_room():
    assert {fault.file.split("/")[0] for fault in FAULTS} == set(ROOMS)
    assert len(FAULTS) >= 80 and len(set(FAULTS)) == len(FAULTS)
    assert len({(fault.file, fault.what) for fault in FAULTS}) == len(FAULTS)


@pytest.fixture
def house(tmp_path):
    """A package of one file, with a test of one of its two functions."""
    package = tmp_path / "src" / "linsight"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n")
    (tmp_path / "test_it.py").write_text("import linsight\n\n\ndef test_two():\n    assert linsight.double(2) == 4\n")
    return tmp_path


def fault(old, new, tests=("test_it.py",)):
    return mutations.Fault("__init__.py", tests, "a change", old, new)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="tests are forked there")
def test_a_fault_is_noticed_or_survives(house, tmp_path):
    chosen = [fault("2 * x", "2 - x"), fault("3 * x", "4 * x"), fault("2 * x", "3 * x")]
    with mutations.Copy(tmp_path / "copy", house, preload=()) as copy:
        found = list(mutations.verdicts(chosen, copy))
        assert [verdict.noticed for _, verdict in found] == [True, False, True]
        assert found[0][1].by == "test_it.py::test_two"
        before = (house / "src" / "linsight" / "__init__.py").read_text()
        assert (tmp_path / "copy" / "linsight" / "__init__.py").read_text() == before
        with pytest.raises(LinsightError, match=r"no tests are found by no_such\.py"):
            list(mutations.verdicts([fault("2 * x", "x", ("no_such.py",))], copy))
        (tmp_path / "copy" / "linsight" / "__init__.py").write_text("def double(x):\n    return x\n")
        with pytest.raises(LinsightError, match=r"fail as it is: test_it\.py::test_two"):
            list(mutations.verdicts(chosen, copy))


def test_what_cannot_be_tried_is_one_line(capsys):
    with pytest.raises(LinsightError, match="is there 2 times, not once"):
        fault("return", "yield").applied("return or return")
    assert mutations.main(["--only", "no/such"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "mutations.py: no fault begins with or says no/such\n"


def test_the_list_tells_all(capsys):
    assert mutations.main(["--list", "--only", "bench/"]) == 0
    assert "bench/_curves.py: the first crossing for the last\n" in capsys.readouterr().out
