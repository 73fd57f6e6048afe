"""Runs of several processes are those of one: the global batch decides, not how many compute it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES
from small import assert_same_end, boxed_squares, colours, masked_squares

HERE = Path(__file__).parent


pytestmark = pytest.mark.timeout(900)  # of twenty kills, on a busy machine; else half a minute
QUICK = (
    "norms-2",
    "sharded parts-2",
    "elastic",
    "refused",
    "guest",
)  # made at once: to import everything takes seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the script makes of a case, in a folder; of quick ones, of all of them at the first."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    colours(folder / "data", {"blue": 17, "green": 15, "red": 18})
    masked_squares(folder / "masks", {"train": 12, "val": 3})
    boxed_squares(folder / "boxes", {"train": 12, "val": 3})

    def make(name):
        if name not in found:
            names = QUICK if name in QUICK else (name,)
            command = [sys.executable, HERE / "ranks.py", folder, *names]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr
            found.update(json.loads(done.stdout.splitlines()[-1]))
        return found[name], folder

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
        assert mine.keys() == yours.keys() and {"top1", "miou", "ap"} & mine.keys()
        for name in mine.keys() - {"seconds", "images_per_second"}:
            exact = name in ("skipped", "top1")
            if not name.startswith("ap"):  # precision of a run that knows nothing is in the last digit of its scores
                assert mine[name] == (yours[name] if exact else pytest.approx(yours[name], rel=tolerance)), name


ALL = [f"{name}-{world}" for name, (_, several) in CASES.items() for world in several]


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.full) for case in ALL]
)
def test_several_are_one(made, case):
    found, folder = made(case)
    name, _, world = case.rpartition("-")
    lines = [path.read_text() for path in sorted(folder.glob(f"{name}-*.err-*"))]
    assert found == {"1": [0], world: [0] * int(world)}, lines
    # Muon's iteration rounds to bfloat16
    assert_close(folder / f"{name}-1", folder / case, 2e-3 if name == "muon" else 2e-4)


def test_a_batch_that_is_too_small_is_refused(made):
    found, folder = made("refused")
    (norms, said), (few, other) = found["norms"], found["few"]
    assert norms == few == [2, 2]
    assert said == (
        "batch_size=3 is of all 2 processes together: take 4 or more, for each to have two images for its batch norms\n"
    )
    assert other == "batch_size=1 is of all 2 processes together: take 2 or more, for each to have an image\n"
    assert not (folder / "refused-few").exists()


def test_processes_that_were_joined_before_stay_so(made):
    found, folder = made("guest")
    lines = [path.read_text() for path in sorted(folder.glob("guest.err-*"))]
    assert found == [0, 0], lines


def test_a_run_goes_on_with_another_number_of_processes(made):
    found, folder = made("elastic")
    assert found == {"whole": [0], "begun": [143], "two": [143] * 2, "sharded": [143] * 3, "one": [0]}
    assert_close(folder / "whole", folder / "elastic")


@pytest.mark.full
@pytest.mark.parametrize(("world", "kills"), [(1, 20), (2, 20)])
def test_a_killed_run_is_ended_by_the_same_command(made, world, kills):
    """At random moments, in training, evaluation and saving: one of its processes, or all."""
    name = f"killed-{world}-{kills}"
    told, folder = made(name)
    assert told["whole"] == [0] and told["first"] == told["last"] == [0] * world and told["killed"] == kills
    assert set(told["others"]) <= {0, 2}  # who lost another says so, in a line
    run, whole = folder / f"killed-{world}", folder / f"killed-{world}-whole"
    if world == 1:
        assert_same_end(whole, run)
    else:
        assert_close(whole, run)
    assert not [path for path in run.iterdir() if path.name.startswith(".") and path.suffix in (".pt", ".safetensors")]
