"""Runs of several processes are those of one: the global batch decides, not how many compute it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES
from small import colours

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the script makes of cases, in a folder."""
    folder = tmp_path_factory.mktemp("ranks")
    colours(folder / "data", {"blue": 17, "green": 15, "red": 18})

    def make(*names):
        done = subprocess.run(
            [sys.executable, HERE / "ranks.py", folder, *names], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), folder

    return make


def states(folder):
    state = torch.load(folder / "state.pt", weights_only=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state, rows


def assert_close(one, other, tolerance=2e-4):
    """Two runs have the same weights, averages and moments, and metrics, but for rounding."""
    (ours, our_rows), (theirs, their_rows) = states(one), states(other)
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in ours[part].items():
            torch.testing.assert_close(tensor, theirs[part][name], rtol=tolerance, atol=tolerance, msg=f"{part} {name}")
    for mine, yours in zip(ours["optimiser"]["state"].values(), theirs["optimiser"]["state"].values(), strict=True):
        assert all(mine[name].shape == yours[name].shape for name in mine if hasattr(mine[name], "shape"))
    for name, tensor in ours["beside"].items():
        torch.testing.assert_close(tensor, theirs["beside"][name], rtol=tolerance, atol=tolerance)
    for mine, yours in zip(our_rows, their_rows, strict=True):
        assert mine["skipped"] == yours["skipped"] and mine["top1"] == yours["top1"]
        assert mine["train_loss"] == pytest.approx(yours["train_loss"], rel=tolerance)
        assert mine["val_loss"] == pytest.approx(yours["val_loss"], rel=tolerance)


def check(made, name):
    found, folder = made(name)
    assert set(found[name]) == {"1", *map(str, CASES[name][1])}
    for world, codes in found[name].items():
        lines = [path.read_text() for path in sorted(folder.glob(f"{name}-{world}.err-*"))]
        assert codes == [0] * int(world), lines
        # Muon's iteration rounds to bfloat16
        assert_close(folder / f"{name}-1", folder / f"{name}-{world}", 2e-3 if name == "muon" else 2e-4)


@pytest.mark.parametrize("name", ["norms", "sharded parts"])
def test_several_are_one(made, name):
    check(made, name)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("norms", "sharded parts")])
def test_several_are_one_in_every_way(made, name):
    check(made, name)


def test_a_run_goes_on_with_another_number_of_processes(made):
    found, folder = made("elastic")
    codes = found["elastic"]
    assert codes == {"whole": [0], "begun": [143], "two": [143] * 2, "sharded": [143] * 3, "one": [0]}
    assert_close(folder / "whole", folder / "elastic")
