"""A small share of `benchmarks/mutated_runs.py`: damaged run folders and recipes are gone on with, or one line."""

import importlib.util
import shutil
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def mutated():
    """The script, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("mutated_runs", BENCHMARKS / "mutated_runs.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "mutated_runs", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def base(mutated, tmp_path_factory):
    return mutated.make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("kind", "count"), [("state", 40), ("config", 25), ("metrics", 20), ("summary", 20), ("recipe", 70)]
)
def test_no_traceback_and_nothing_executed(mutated, base, tmp_path, kind, count, monkeypatch):
    marker, ends = tmp_path / "executed", []
    monkeypatch.setattr(mutated.Hostile, "marker", str(marker))
    monkeypatch.chdir(tmp_path)

    def hang(*_):
        raise mutated.Hung

    before = signal.signal(signal.SIGALRM, hang)
    try:
        for seed in range(count):
            folder = tmp_path / "case"
            ends.append(mutated.judged(mutated.prepared(kind, base, folder, seed), marker))
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    faults = [(seed, *end) for seed, end in enumerate(ends) if end[0] not in ("went on", "one line")]
    assert not faults, faults[0]
    assert {end for end, _ in ends} == {"went on", "one line"}


def test_what_goes_wrong_is_seen(mutated, tmp_path):
    marker = tmp_path / "executed"
    assert mutated.judged(lambda: 1 / 0, marker)[0] == "traceback"
    assert mutated.judged(lambda: marker.write_text("x"), marker)[0] == "executed" and not marker.exists()

    def several():
        raise mutated.LinsightError("one\ntwo")

    assert mutated.judged(several, marker)[0] == "several lines"
