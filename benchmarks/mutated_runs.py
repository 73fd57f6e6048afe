"""Mutated run folders and recipes: each is gone on with, or refused in one line; nothing in them is executed.

    python benchmarks/mutated_runs.py
    python benchmarks/mutated_runs.py --count 2000 --kinds state,recipe --seed 1 --keep FOLDER

A tiny run is stopped in its last epoch. Each case damages a copy of its folder in one way: bytes of `state.pt`, bytes
of the pickle in it, single values of any kind, objects that would run code; bytes and values of `config.json`,
`metrics.jsonl` and `summary.json`. Then the run is resumed to its end. Recipes are shipped ones with values of any
kind, as they are given in Python, and in files of YAML, TOML and JSON whose bytes are damaged. A traceback, several
lines, a file that hostile objects would write, or a case that takes longer than 20 seconds is a fault, which ends the
script with 1; --keep writes the folders of faults.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from _script import exit_status
from PIL import Image

from linsight.errors import LinsightError
from linsight.runtime.signals import Interrupted
from linsight.tasks import known_fields, read_recipe
from linsight.tasks.files import written
from linsight.train import RECIPES, resolve, resume, train
from linsight.train.progress import Silent

SECONDS = 20
MEMORY = 4 * 2**30  # bytes above what is used at the start: files may declare any size
RECIPE: dict[str, Any] = {
    "model": "vit_tiny",
    "attention": "inline",
    "img_size": 8,
    "model_args": "patch_size=4,embed_dim=8,depth=1,num_heads=1,global_pool=avg,class_token=False",
    "mean": "0.5,0.5,0.5",
    "std": "0.5,0.5,0.5",
    "in_chans": 3,
    "batch_size": 2,
    "epochs": 2,
    "warmup_epochs": 1,
    "ema": 0.5,
    "device": "cpu",
    "amp": "off",
    "workers": 0,
    "figures": False,
    "report": False,
    "cache": "memory",
}


class Hung(BaseException):
    """A case that takes too long."""


class Hostile:
    """An object that writes a file where it is unpickled."""

    marker = ""

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


class Stopping(Silent):
    """Asks the run to stop, after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, *done: Any) -> None:
        """See `Silent`."""
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGTERM)


class Base(NamedTuple):
    """What is damaged: the folder of a stopped run, of a finished one, and the state of the first."""

    stopped: pathlib.Path
    finished: pathlib.Path
    state: dict[str, Any]


def make_base(folder: pathlib.Path) -> Base:
    """Train the run that is damaged."""
    numbers = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(2):
            pixels = numbers.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{number}.png")
    recipe = resolve("digits", {**RECIPE, "data": str(folder / "data")})
    with contextlib.suppress(Interrupted):
        train(recipe, out=folder / "stopped", report=Stopping(3))
    shutil.copytree(folder / "stopped", folder / "finished")
    resume(folder / "finished")
    return Base(folder / "stopped", folder / "finished", torch.load(folder / "stopped" / "state.pt", weights_only=True))


# Damage


def odd(draw: random.Random, depth: int = 0) -> Any:
    """A value that nobody expects."""
    plain: list[Callable[[], Any]] = [
        lambda: None,
        lambda: draw.choice([True, False]),
        lambda: draw.choice([0, 1, -1, 2, 7, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
        lambda: draw.choice([0.0, -0.0, 0.5, 1.5, -1e-9, 1e-40, 1e30, 1e308, math.nan, math.inf, -math.inf]),
        lambda: draw.choice(
            ["", "x", "none", "nan", "1e400", "0x10", "1_0", "\0", "\n", "../../x", "~nobody/x", "a" * 300, "\ud800"]
        ),
        lambda: draw.choice(
            ["'\"{}", "$HOME", "%s%n", "{0.__class__}", "é̀", "\u202e", "1,2,3,4", "a=1,b=(", "http://"]
        ),
        lambda: draw.choice(
            ["http://", "https://no address", "hf-hub:", "/dev/zero", "ftp://x", "rand-m9", "adamw", "cpu", "-1"]
        ),
        lambda: draw.choice([b"", b"\x80", 1j, (1, 2), {1}, frozenset(), range(3), object]),
        lambda: draw.randrange(-1000, 1000),
        lambda: draw.uniform(-10, 10),
    ]
    nested: list[Callable[[], Any]] = [
        lambda: [odd(draw, depth + 1) for _ in range(draw.randrange(4))],
        lambda: {draw.choice(["a", "lr", "", 1, None, "self"]): odd(draw, depth + 1) for _ in range(draw.randrange(3))},
        lambda: deep(draw.choice([3, 90, 400, 900])),
    ]
    return draw.choice(plain if depth > 2 else plain * 2 + nested)()


def deep(levels: int) -> Any:
    """A list in a list in a list ..."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


def odd_tensor(draw: random.Random, like: Any) -> Any:
    """A tensor of another shape, kind or layout than `like`, or with values that are no numbers."""
    shape = tuple(like.shape) if isinstance(like, torch.Tensor) else (2,)
    kinds: list[Callable[[], Any]] = [
        lambda: torch.zeros(*shape, 2),
        lambda: torch.zeros(shape, dtype=draw.choice([torch.float64, torch.int64, torch.bool, torch.complex64])),
        lambda: torch.zeros(shape, dtype=torch.bfloat16),
        lambda: torch.full(shape, draw.choice([math.nan, math.inf, -1e30])),
        lambda: torch.zeros(draw.choice([(), (0,), (1,), (3, 3)])),
        lambda: torch.zeros(shape).to_sparse() if shape else torch.zeros(2).to_sparse(),
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
        lambda: torch.zeros(shape, device="meta"),
        lambda: torch.nn.Parameter(torch.zeros(shape)),
    ]
    return draw.choice(kinds)()


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of values in a nest of dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*above, key)
        if len(above) < 50:  # what was made odd before may be a deep nest
            yield from places(item, (*above, key))


def changed(draw: random.Random, value: Any, hostile: bool = False) -> Any:
    """A copy of a nest in which one to three values are odd, or missing, or new."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        every = list(places(value))
        if not every:
            return odd(draw)
        depth = draw.choice(sorted({len(place) for place in every}))
        *way, last = draw.choice([place for place in every if len(place) == depth])
        holder = value
        for key in way:
            holder = holder[key]
        act = draw.random()
        if act < 0.12:
            del holder[last]
        elif act < 0.2 and isinstance(holder, dict):
            holder[draw.choice(["new", 1, "", None, -1]) if hostile else "new"] = odd(draw)
        elif hostile and act < 0.25:
            holder[last] = Hostile()
        elif isinstance(holder[last], torch.Tensor) and act < 0.7:
            holder[last] = odd_tensor(draw, holder[last])
        elif isinstance(holder[last], int | float) and act < 0.5:
            holder[last] = draw.choice([-1, 0, 1, 2, 3, 10**9, 1e30, 0.5, holder[last] + 1, -holder[last]])
        else:
            holder[last] = odd(draw)
    return value


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Bytes of which some are others, missing or new."""
    data = bytearray(data)
    way = draw.choice(["flip", "flip", "flip", "cut", "insert", "zeros", "random", "repeat", "swap"])
    at = draw.randrange(max(len(data), 1))
    if way == "flip":
        for _ in range(draw.choice([1, 1, 2, 10, 100])):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "insert":
        data[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
    elif way == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif way == "random":
        data = bytearray(draw.randbytes(draw.choice([0, 1, 10, 5000])))
    elif way == "repeat":
        data += data[at:]
    else:
        data = data[at:] + data[:at]
    return bytes(data)


def repacked(draw: random.Random, data: bytes) -> bytes:
    """A state whose pickle has other bytes, in an archive whose check sums are right."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found, "w") as new:
        names = old.namelist()
        hurt = draw.choice(names) if draw.random() < 0.2 else next(name for name in names if name.endswith("data.pkl"))
        for name in names:
            content = old.read(name)
            if name == hurt:
                content = damaged(draw, content) if content else b"x"
            new.writestr(name, content, draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
    return found.getvalue()


# Cases


def mutate_state(base: Base, folder: pathlib.Path, draw: random.Random) -> str:
    """Damage state.pt in `folder`; the kind of damage."""
    path = folder / "state.pt"
    way = draw.choice(["bytes", "pickle", "pickle", "values", "values", "values"])
    if way == "bytes":
        path.write_bytes(damaged(draw, path.read_bytes()))
    elif way == "pickle":
        path.write_bytes(repacked(draw, path.read_bytes()))
    else:
        try:
            torch.save(
                changed(draw, base.state, hostile=True), path, _use_new_zipfile_serialization=draw.random() < 0.8
            )
        except Exception:  # what torch cannot save is no case
            path.write_bytes(b"")
    return way


def dumped(value: Any) -> str:
    """`value` as JSON as far as it goes, with what is no number."""
    try:
        return json.dumps(value, default=repr, skipkeys=True)
    except (ValueError, RecursionError):
        return "[" * 2000


def mutate_json(name: str) -> Callable[[Base, pathlib.Path, random.Random], str]:
    """Damage to a file of JSON, or of lines of it."""

    def mutate(base: Base, folder: pathlib.Path, draw: random.Random) -> str:
        path = folder / name
        if draw.random() < 0.3:
            path.write_bytes(damaged(draw, path.read_bytes()))
            return "bytes"
        lines = [path.read_text()] if name.endswith(".json") else path.read_text().splitlines()
        values = [json.loads(line) for line in lines]
        if draw.random() < 0.1:
            values[0] = odd(draw)
        else:
            place = draw.randrange(len(values))
            values[place] = changed(draw, values[place])
        text = "\n".join(map(dumped, values)) + "\n"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return "values"

    return mutate


def resumed(case: pathlib.Path) -> None:
    """Go on with a run to its end, or for some steps, as one may have been told to take a million epochs."""
    with contextlib.suppress(Interrupted):
        resume(case, report=Stopping(20))


def mutate_recipe(folder: pathlib.Path, draw: random.Random) -> Callable[[], Any]:
    """A recipe with odd values, or a damaged file of one; what reads it."""
    name = draw.choice(["digits", "photos", "cifar10", "finetune", "masks", "objects"])
    own, every = list(type(RECIPES[name].recipe).model_fields), list(known_fields())
    fields = draw.choice([own, own, own, every])
    given = {field: odd(draw) for field in draw.sample(fields, draw.choice([1, 1, 2, 5]))}
    way = draw.choice(["values", "values", "record", "file", "file", "bytes", "bytes"])
    if way == "values":
        return lambda: resolve(name, given)
    if way == "record":
        return lambda: read_recipe({**RECIPES[name].recipe.values(), **given})
    path = folder / f"recipe{draw.choice(['.yaml', '.toml', '.json'])}"
    recipe = RECIPES[name].recipe
    if path.suffix == ".yaml":
        text = written(recipe, all_fields=way != "file")
    elif path.suffix == ".json":
        text = dumped({**recipe.differences(), **given} if way == "file" else recipe.values())
    else:
        text = "".join(f"{key} = {dumped(value)}\n" for key, value in {**recipe.differences(), **given}.items())
    if way == "file" and path.suffix == ".yaml":
        text += "".join(f"{key}: {dumped(value)}\n" for key, value in given.items())
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(draw, data) if way == "bytes" else data)
    return lambda: resolve(str(path), {})


MUTATIONS: dict[str, Callable[[Base, pathlib.Path, random.Random], str]] = {
    "state": mutate_state,
    "config": mutate_json("config.json"),
    "metrics": mutate_json("metrics.jsonl"),
    "summary": mutate_json("summary.json"),
}
KINDS = (*MUTATIONS, "recipe")


def judged(act: Callable[[], Any], marker: pathlib.Path) -> tuple[str, str]:
    """The kind of end of `act`, and what it said."""
    said = io.StringIO()
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
        signal.setitimer(signal.ITIMER_REAL, 0)
        found = "went on", ""
    except LinsightError as error:
        found = ("several lines" if "\n" in str(error) else "one line"), str(error)
    except Hung:
        found = "hang", ""
    except Exception:
        traceback.print_exc(file=said)
        found = "traceback", said.getvalue()
    finally:
        with contextlib.suppress(Hung):  # the clock may strike just now
            signal.setitimer(signal.ITIMER_REAL, 0)
    if marker.exists():
        marker.unlink()
        return "executed", found[1]
    return found


def prepared(kind: str, base: Base, folder: pathlib.Path, seed: int) -> Callable[[], Any]:
    """The case of a kind and a seed, made in `folder`; what is done with it."""
    draw = random.Random(f"{kind} {seed}")
    if kind == "recipe":
        folder.mkdir()
        return mutate_recipe(folder, draw)
    shutil.copytree(base.finished if kind == "summary" else base.stopped, folder)
    MUTATIONS[kind](base, folder, draw)
    return lambda: resumed(folder)


def run(count: int, seed: int, kinds: list[str], keep: pathlib.Path | None) -> list[str]:
    """Try `count` cases of each kind and print a table; the faults."""
    torch.set_num_threads(1)
    faults: list[str] = []
    table: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory() as where:
        base = make_base(pathlib.Path(where))
        marker = pathlib.Path(where, "executed")
        Hostile.marker = str(marker)
        os.chdir(where)  # places that are relative are here
        for kind in kinds:
            found = table[kind] = collections.Counter()
            started = time.monotonic()
            for number in range(seed, seed + count):
                folder = pathlib.Path(where, "case")
                end, said = judged(prepared(kind, base, folder, number), marker)
                found[end] += 1
                if end not in ("went on", "one line"):
                    faults.append(f"{kind} {number}: {end}: {said.strip()}")
                    if keep is not None:
                        shutil.copytree(folder, keep / f"{kind}-{number}", dirs_exist_ok=True)
                shutil.rmtree(folder)
            ends = ", ".join(f"{end} {times}" for end, times in found.most_common())
            print(f"{kind:8} {count:6} cases in {time.monotonic() - started:5.0f} s: {ends}", flush=True)
        os.chdir("/")
    return faults


def main(arguments: argparse.Namespace) -> int:
    """Try all cases; 1 where one is a fault."""

    def hang(*signal: Any) -> None:
        raise Hung

    signal.signal(signal.SIGALRM, hang)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    faults = run(arguments.count, arguments.seed, arguments.kinds.split(","), arguments.keep)
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {','.join(KINDS)}")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the cases that are faults")
    sys.exit(exit_status(__file__, lambda: main(parser.parse_args())))
