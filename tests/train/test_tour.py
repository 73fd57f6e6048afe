"""Each command of docs/train.md is run, small: its own options, on a few images, with as many processes as two."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from small import TINY, colours

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "train.md").read_text(encoding="utf-8")
LAUNCHED = re.compile(
    r"^(torchrun .*-m linsight\.cli|srun linsight|linsight) (train|eval) ?(.*?)(?:\s+#.*)?$", re.MULTILINE
)


def commands():
    """For each command: the launcher, the verb, and its options."""
    found = [(launcher.split()[0], verb, shlex.split(rest)) for launcher, verb, rest in LAUNCHED.findall(TEXT)]
    return [
        entry for entry in found if "--track" not in entry[2]
    ]  # of the section on trackers, which has its own tests


def test_every_command_runs_small(tmp_path):
    colours(tmp_path / "data", {"blue": 10, "green": 9, "red": 10})
    (tmp_path / "tour.json").write_text(json.dumps({"tiny": TINY, "commands": commands()}))
    assert {launcher for launcher, *_ in commands()} == {"linsight", "torchrun", "srun"} and len(commands()) >= 13
    done = subprocess.run([sys.executable, HERE / "tour.py", tmp_path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for command, codes, errors in json.loads(done.stdout.splitlines()[-1]):
        assert set(codes) == {0}, (command, codes, errors)
    summaries = {path.parent.name for path in tmp_path.glob("runs/*/summary.json")}
    assert {"mine", "next", "two", "large"} <= summaries
