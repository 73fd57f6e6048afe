"""Measuring without a process of its own, and without what takes long: see `here`."""

import pytest

from linsight.bench import Side, rounds, run, steps

PEAKS = {"peak_tflops": 2.0, "peak_gb_per_sec": 50.0}


class Here:
    """A `Worker` that measures in this process."""

    def __init__(self, measure, limit):
        self.measure = measure

    def run(self, cell, sides):
        found = [Side() for _ in sides]

        def send(side, kind, value):
            if kind == "time":
                found[side].times.append(value)
            elif kind == "facts":
                found[side].facts.update(value)
            elif kind == "error":
                found[side].error = value

        self.measure(cell, dict(enumerate(sides)), send)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs measure here, each step once a round; results are kept in `tmp_path / "cache"`."""
    monkeypatch.setattr(run, "Worker", Here)
    monkeypatch.setattr(rounds, "SAMPLE", 0)
    monkeypatch.setattr(steps, "measure_peaks", lambda device, dtype: PEAKS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path
