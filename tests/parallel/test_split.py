"""Sequences split over ranks: outputs and gradients are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .launch import RUNS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked here"),
    pytest.mark.timeout(300),  # the first test waits for all ranks
    pytest.mark.xdist_group("ranks"),  # which are started once
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of each run says of its cases; and what was printed."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launch.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}, done.stderr


@pytest.mark.parametrize(("run", "name"), [(run, name) for run in RUNS for name in RUNS[run].cases])
def test_each_rank(found, run, name):
    results, said = found
    for rank in set(range(RUNS[run].ranks)) - RUNS[run].dead:
        assert f"{run}-{rank}" in results, said
        assert results[f"{run}-{rank}"].get(name, "not reached: see the first case that failed") == ""
    for rank in RUNS[run].dead:
        assert f"{run}-{rank}" not in results
