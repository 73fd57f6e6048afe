"""Steps take turns, and nothing is lost: not what takes too long, nor what ends the process."""

import functools

import pytest
import strange_sides
import torch

from linsight.bench import Worker, rounds

CPU = torch.device("cpu")


def test_rounds_alternate_and_a_side_that_fails_leaves_the_other(monkeypatch):
    monkeypatch.setattr(rounds, "SAMPLE", 0)
    order = []

    def step(name):
        order.append(name)
        if name == "late" and order.count(name) == 4:
            raise torch.OutOfMemoryError("out of memory\nat length")

    def make(name):
        if name == "never":
            raise ValueError("cannot be built")
        return {"params": 1}, functools.partial(step, name)

    sent = []
    names = {0: "good", 1: "late", 2: "never"}
    rounds.alternate(names, make, lambda *message: sent.append(message), CPU, 0)
    assert order == ["good", "late", "good", "late", "late", "good", "good", "late"]
    errors = {side: value for side, kind, value in sent if kind == "error"}
    assert errors == {1: "out of memory", 2: "cannot be built"}
    assert [side for side, kind, _ in sent if kind == "time"] == [0, 1, 1, 0, 0]
    assert sent[1] == (0, "facts", {"params": 1})


def test_a_side_that_knows_its_memory_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(rounds, "SAMPLE", 0)
    monkeypatch.setattr(rounds, "peak_of", lambda act, device: pytest.fail("measured"))
    sent = []
    rounds.alternate({0: ""}, lambda _: ({"peak_mb": 5.0}, int), lambda *message: sent.append(message), CPU, 0)
    assert [kind for _, kind, _ in sent].count("time") == rounds.ROUNDS


def test_memory_is_that_of_the_step():
    if not rounds.reset_peak():
        pytest.skip("only Linux counts the peak of a process")
    assert 60 < rounds.peak_of(lambda: torch.ones(2**24).sum(), CPU) < 90  # 64 MiB of float32


@pytest.mark.timeout(180)  # it starts three processes
def test_what_takes_too_long_or_kills_the_process_is_said_and_the_rest_measured():
    with Worker(strange_sides.measure, limit=3) as worker:
        spun, worked, died = worker.run(None, ("spins", "works", "dies"))
    assert spun.error == "took more than 3 s" and not spun.times
    assert died.error.startswith("killed") and not died.times
    assert len(worked.times) == rounds.ROUNDS and not worked.error
