"""Memory that is freed and asked for again while `kept_memory` is entered: pages are not cleared anew."""

import contextlib
import os
import platform
import subprocess
import sys

import pytest
from small import TINY

from linsight.runtime.heap import kept_memory
from linsight.train import resolve, train
from linsight.train.trainer import Trainer

PROGRAM = """
import os, resource
import torch
from linsight.runtime.heap import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 * 2**20)  # 48 MiB, above all that glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
for chosen in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
    os.environ |= chosen
    usual = faults()
    with kept_memory() as kept:
        with kept_memory():
            torch.ones(12 * 2**20)
        inside = faults()  # none, or those of one block; of what is entered twice, the last exit decides
    print(kept, usual, inside, faults())
"""


@pytest.mark.full  # it starts a process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc has mallopt")
def test_pages_are_kept_while_it_is_entered():
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=bare, capture_output=True, text=True, check=True)
    for line, kept in zip(done.stdout.splitlines(), (True, False), strict=True):
        told, usual, inside, after = line.split()
        usual, inside, after = int(usual), int(inside), int(after)
        assert told == str(kept) and usual > 100
        assert after > usual / 2 and (inside < usual / 4 if kept else inside > usual / 2)


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    with kept_memory() as kept:
        assert not kept


def test_it_is_entered_while_a_run_trains_on_a_cpu(tmp_path, monkeypatch):
    entered = []
    run = Trainer.run_epochs

    @contextlib.contextmanager
    def kept():
        entered.append("in")
        yield
        entered.append("out")

    def watched(trainer, stop):
        entered.append("trains")
        return run(trainer, stop)

    monkeypatch.setattr("linsight.train.loop.kept_memory", kept)
    monkeypatch.setattr(Trainer, "run_epochs", watched)
    train(resolve("digits", {**TINY, "epochs": 1, "device": "cpu"}), out=tmp_path / "run")
    assert entered == ["in", "trains", "out"]
