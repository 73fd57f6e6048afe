"""Sequences split over ranks: outputs and gradients are those of one process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .launch import RUNS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked here"),
    pytest.mark.timeout(300),  # the first test waits for all ranks
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of each run says of its cases; and what was printed. One worker starts them, others wait."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = tmp_path_factory.mktemp("ranks") if alone else tmp_path_factory.getbasetemp().parent / "ranks"
    said = folder / "said.txt"
    try:
        folder.mkdir(exist_ok=alone)
    except FileExistsError:
        for _ in range(2800):
            if said.exists():
                break
            time.sleep(0.1)
    else:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("launch.py")), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        written = folder / "written"
        written.write_text(f"{done.returncode}\n{done.stderr}", encoding="utf-8")
        written.replace(said)
    code, _, text = said.read_text(encoding="utf-8").partition("\n")
    assert code == "0", text
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}, text


@pytest.mark.parametrize(("run", "name"), [(run, name) for run in RUNS for name in RUNS[run].cases])
def test_each_rank(found, run, name):
    results, text = found
    for rank in set(range(RUNS[run].ranks)) - RUNS[run].dead:
        assert f"{run}-{rank}" in results, text
        assert results[f"{run}-{rank}"].get(name, "not reached: see the first case that failed") == ""
    for rank in RUNS[run].dead:
        assert f"{run}-{rank}" not in results
