"""`python killed.py FOLDER`: predictions that are killed, and that several ranks share, in processes forked from one.

The folder has `best.safetensors` and `images`. It prints one JSON: what was seen, and the text of each result.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from linsight.errors import LinsightError
from linsight.train import load_trained, predict_to
from linsight.train.progress import Images

BATCH = 4


class Slow(Images):
    def step(self, images):
        time.sleep(0.005)


def die_at(times):
    """Die for good where a file is moved or removed for the n-th time."""
    left = iter(range(times - 1, -1, -1))

    def counted(act):
        def done(*args, **options):
            if next(left, None) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            act(*args, **options)

        return done

    for name in ("replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def child(act):
    """The process id of a copy of this process that does something and ends, with 2 where that is refused."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        act()
        code = 0
    except LinsightError as error:
        print(error, file=sys.stderr)
        code = 2
    finally:
        sys.stderr.flush()
        os._exit(code)


def code_of(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def count(parts):
    return len(list(parts.glob("part-*")))


def wait(parts, number):
    while count(parts) < number:
        time.sleep(0.001)


def main(folder):
    torch.set_num_threads(1)
    trained, images = load_trained(folder / "best.safetensors"), [folder / "images"]
    few = sorted((folder / "images").iterdir())[:6]
    found = {}

    def predict(name, places=images, **more):
        predict_to(trained, places, folder / name, batch_size=BATCH, device="cpu", amp="off", **{"workers": 0, **more})

    def text(name):
        assert sorted(os.listdir(folder / f"{name}.parts")) == ["plan.json"]
        return (folder / name).read_text()

    assert code_of(child(lambda: predict("whole.csv"))) == 0
    found["whole"] = text("whole.csv")

    draw = random.Random(0)
    seen = []
    for kill in range(6):
        number = child(lambda kill=kill: predict("killed.csv", report=Slow(), workers=kill % 2))
        wait(folder / "killed.csv.parts", (seen or [[0, 0]])[-1][1] + draw.randint(0, 2))
        time.sleep(draw.uniform(0, 0.01))
        os.kill(number, signal.SIGKILL)
        seen.append([code_of(number), count(folder / "killed.csv.parts"), (folder / "killed.csv").exists()])
    assert code_of(child(lambda: predict("killed.csv"))) == 0
    found["kills"], found["killed"] = seen, text("killed.csv")

    assert code_of(child(lambda: predict("few.csv", few))) == 0
    found["few"], found["died"] = text("few.csv"), []
    for times in range(1, 100):
        name = f"died-{times}.csv"

        def die(name=name, times=times):
            die_at(times)
            predict(name, few)

        code = code_of(child(die))
        assert code in (0, -signal.SIGKILL)
        if (folder / name).exists():
            assert (folder / name).read_text() == found["few"]
        predict(name, few)
        found["died"].append([code, text(name)])
        if code == 0:
            break

    def share(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        predict("shared.csv", report=Slow())

    ranks = [child(lambda rank=rank: share(rank)) for rank in range(2)]
    wait(folder / "shared.csv.parts", 3)
    os.kill(ranks[1], signal.SIGKILL)  # one is killed, the other ends
    found["first"] = [*map(code_of, ranks), (folder / "shared.csv").exists()]
    ranks = [child(lambda rank=rank: share(rank)) for rank in range(2)]
    found["ranks"], found["shared"] = [*map(code_of, ranks)], text("shared.csv")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
