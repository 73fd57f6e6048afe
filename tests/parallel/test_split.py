"""Sequences split over ranks: outputs and gradients are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .launch import RUNS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked here")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch = str(Path(__file__).with_name("launch.py"))
    done = subprocess.run(
        [sys.executable, launch, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}, done.stderr


@pytest.mark.parametrize("run", ["two", "four"])
@pytest.mark.parametrize("name", RUNS["two"][2])
def test_ranks_do_what_one_process_does(found, run, name):
    results, said = found
    for rank in range(RUNS[run][0]):
        assert f"{run}-{rank}" in results, said
        assert results[f"{run}-{rank}"].get(name, "not reached: see the first case that failed") == ""
