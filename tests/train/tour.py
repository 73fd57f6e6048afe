"""`python tour.py FOLDER` runs the commands of `tour.json`, small, in processes forked from one; prints one JSON."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from ranks import codes, fork

from linsight import cli

# Options that make it small, of which the command's own, if any, are left out.
QUICK = {"model": "vit_tiny", "batch-size": "10", "epochs": "1", "warmup-epochs": "0", "workers": "0"}


def arguments(verb, options, tiny):
    """The options of a command with those that make it small."""
    options = ["data" if option == "path/to/images" else option for option in options]
    if verb == "eval":
        return [verb, *options, "--batch-size", "7", "--workers", "0"]
    given = {option.removeprefix("--"): place for place, option in enumerate(options) if option.startswith("--")}
    for name in given.keys() & {"epochs", "model"}:
        options[given[name] + 1] = QUICK[name]
    if "resume" in given and options[given["resume"] + 1] != "auto":
        return [verb, *options]
    small = {name.replace("_", "-"): value for name, value in tiny.items()} | QUICK
    if "init" in given:  # which has a model of its own
        small = {name: value for name, value in small.items() if name not in ("model", "attention", "model-args")}
    if "data" not in given:
        small["data"] = "data"
    for name, value in small.items():
        if name not in given:
            options += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return [verb, *options]


def main(folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    tour, found = json.loads(Path("tour.json").read_text()), []
    for number, (launcher, verb, options) in enumerate(tour["commands"]):
        words = arguments(verb, options, tour["tiny"])

        def act(words=words):
            sys.argv = ["linsight", *words]
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main()

        world = 1 if launcher == "linsight" else 2
        ended = codes(fork(world, act, Path(f"{number}.err"), slurm=launcher == "srun"))
        found.append([words, ended, [path.read_text() for path in Path().glob(f"{number}.err-*")]])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
