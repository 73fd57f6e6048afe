"""Steps take turns, and nothing is lost: not what takes too long, nor what ends the process."""

import functools
import multiprocessing
import os
import types

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


class Clock:
    """A clock that goes on by so many seconds with each step, the first of which takes longer."""

    def __init__(self, *seconds):
        self.seconds, self.now, self.steps = seconds, 0.0, 0

    def step(self):
        self.now += self.seconds[min(self.steps, len(self.seconds) - 1)]
        self.steps += 1


def test_a_step_takes_its_share_of_a_sample_of_at_least_a_tenth_of_a_second(monkeypatch):
    clock = Clock(7.0, 0.02)
    monkeypatch.setattr(rounds, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    assert rounds.timed(clock.step, 1, CPU) == 7 and rounds.timed(clock.step, 4, CPU) == pytest.approx(0.02)
    assert clock.steps == 5
    monkeypatch.setattr(rounds, "peak_of", lambda act, device: act())
    clock.steps, sent = 0, []
    rounds.alternate({0: None}, lambda _: ({}, clock.step), lambda *message: sent.append(message), CPU, 100.0)
    times = [value for _, kind, value in sent if kind == "time"]
    assert times == pytest.approx([0.02] * len(times)) and len(times) == pytest.approx(1000, abs=2)  # of 5 steps each
    assert clock.steps == 2 + 5 * len(times)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_takes_too_long_or_kills_the_process_is_said_and_the_rest_measured(monkeypatch):
    forked = multiprocessing.get_context("fork")  # three times, as to import torch anew takes seconds
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: forked)
    with Worker(strange_sides.measure, limit=2) as worker:
        spun, worked, died = worker.run(None, ("spins", "works", "dies"))
        worker.close()  # at once: a forked process holds both ends of its pipe, and does not see one closed
    assert spun.error == "took more than 2 s" and not spun.times
    assert died.error.startswith("killed") and not died.times
    assert len(worked.times) == rounds.ROUNDS and not worked.error
