"""A short list weighs time against accuracy, says why, and leaves out what does not do what is needed."""

import csv
import json
import statistics

import pytest

from linsight import bench
from linsight.attention import list_attentions
from linsight.errors import LinsightError

TIMES = {"linear": 10.0, "inline": 12.0, "softmax": 20.0, "agent": 20.0, "focused": 15.0}
TOP1 = {"linear": (40.0, 42.0), "inline": (44.0, 46.0), "softmax": (43.0, 43.5), "agent": (50.0, 51.0)}


def choice(name, time=None):
    time = TIMES[name] if time is None else time
    return bench.Choice(name, time, None if name == "softmax" else time / 20, 0, (196, 3136), 1.0)


def advice(times=TIMES):
    found = sorted((choice(name, time) for name, time in times.items()), key=lambda c: c.milliseconds)
    return bench.Advice((), tuple(found), 784, {"device": "cpu: Xeon"})


def test_a_short_list_is_the_front_with_its_reasons():
    found = bench.shortlist(advice(), bench.Accuracies("cifar10", "a budget", TOP1))
    assert [pick.choice.name for pick in found.picks] == ["agent", "inline", "linear", "softmax"]
    reasons = {pick.choice.name: pick.reason for pick in found.picks}
    assert reasons["linear"] == "the fastest" and reasons["softmax"] == ""
    assert reasons["inline"] == "4.0 points more than linear, at 1.20 times its time"
    assert reasons["agent"] == "5.5 points more than inline, at 1.67 times its time"
    assert found.words[0].startswith("Accuracies: cifar10, a budget")
    spread = statistics.median(statistics.stdev(values) for values in TOP1.values())
    told = f"Seeds of one mechanism differ by {spread:.1f} points: what gains no more than that is not on the list."
    assert told in found.words
    one = bench.shortlist(advice({"agent": 5.0, "linear": 9.0}), bench.Accuracies("cifar10", "", TOP1))
    assert [pick.reason for pick in one.picks] == ["the fastest and the most accurate", ""]
    single = bench.shortlist(advice(), bench.Accuracies("cifar10", "", {**TOP1, "agent": (50.5,)}))
    told = {line.split(":")[0]: line for line in single.words}
    assert "50.5 % (of one seed), 20" in told["agent"] and "of one seed" not in told["inline"]


def test_what_gains_no_more_than_chance_is_not_on_the_list():
    def front(gain):
        top1 = {"linear": (40.0, 42.0), "inline": (40.0 + gain, 42.0 + gain), "agent": (43.5, 45.5)}
        return [
            pick.choice.name for pick in bench.shortlist(advice(), bench.Accuracies("", "", top1)).picks if pick.reason
        ]

    spread = statistics.stdev((40.0, 42.0))
    assert front(spread - 0.01) == ["agent", "linear"] and front(spread + 0.01) == ["agent", "inline", "linear"]
    assert front(2.4) == ["inline", "linear"]  # agent gains 1.1 more


def test_needs_are_met_and_what_has_no_time_is_told():
    accuracies = bench.Accuracies("cifar10", "", {**TOP1, "mlla": (60.0,), "favit": (50.0,)})
    found = bench.shortlist(advice(), accuracies, ["causal", "onnx"])
    able = {entry.name for entry in list_attentions(causal=True) if "onnx" not in entry.unmet}
    assert {pick.choice.name for pick in found.picks} == able & TOP1.keys()
    assert "Not in it, without causal: inline, agent." in found.words  # the fastest first
    assert any(line.startswith("Without a time at this size, so not in it: mlla (") for line in found.words)
    assert "Whole layers and blocks, which are timed in models alone, so not in it: favit." in found.words
    with pytest.raises(LinsightError, match="nothing was measured both in time and in accuracy, and with causal"):
        bench.shortlist(advice({"inline": 1.0}), accuracies, ["causal"])
    with pytest.raises(LinsightError, match="unknown need 'casual': did you mean 'causal'"):
        bench.shortlist(advice(), accuracies, ["casual"])


def written(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("place", "mechanism", "seed", "budget", "top1", "error"))
        writer.writeheader()
        writer.writerows(dict(zip(writer.fieldnames, row, strict=True)) for row in rows)
    return path


def test_accuracies_are_of_one_budget_and_the_later_run_counts(tmp_path):
    rows = [
        ("cifar10", "inline", 0, "small", 10, ""),
        ("cifar10", "inline", 0, "large", 40, ""),
        ("recall-16", "inline", 0, "large", 99, ""),
        ("cifar10", "inline", 1, "large", 42, ""),
        ("cifar10", "agent", 0, "large", "", "the loss became nan"),
        ("cifar10", "inline", 0, "large", 41, ""),
    ]
    path = written(tmp_path / "a.csv", rows)
    assert bench.read_accuracies("cifar10", path) == bench.Accuracies("cifar10", "large", {"inline": (41.0, 42.0)})
    assert bench.read_accuracies("recall-16", path).top1 == {"inline": (99.0,)}
    for bad in ("abc", "140", "nan", ""):
        written(path, [("cifar10", "inline", 0, "large", bad, "")])
        with pytest.raises(LinsightError, match="top1 is '"):
            bench.read_accuracies("cifar10", path)
    path.write_bytes(b"\xff\xfe\x00")
    for file, words in ((path, "cannot be read"), (tmp_path / "no.csv", "cannot be read"), (tmp_path, "cannot be")):
        with pytest.raises(LinsightError, match=words):
            bench.read_accuracies("cifar10", file)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(LinsightError, match="has no accuracies"):
        bench.read_accuracies("cifar10", path)


def test_accuracies_that_come_with_linsight_are_of_known_mechanisms():
    known = {entry.name for entry in list_attentions()}
    for place in ("cifar10", "recall-4", "recall-8", "recall-16", "recall-64"):
        found = bench.read_accuracies(place)
        assert "softmax" in found.top1 and found.top1.keys() <= known
        assert len(found.top1) > 50 and max(map(max, found.top1.values())) > 45  # chance is 10 % and 25 %


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = []
    for name in TIMES:
        for side in (14, 28, 56):
            row = {"kind": "operator", "model": name, "tokens": side * side, "dim": 192, "heads": 6, "date": "2025"}
            row |= {"device": "cpu: Xeon", "precision": "float32", "infer_batch_size": 1}
            row |= {"infer_step_time": TIMES[name] * side, "infer_img_size": side}
            rows.append(row | ({} if name == "softmax" else {"infer_ratio": TIMES[name] / 20, "beside": "softmax"}))
    bench.write_rows(tmp_path / "r.csv", rows, {})
    return ["advise", "--size", "448", "--device", "cpu", "--from", str(tmp_path / "r.csv")]


def test_the_command_lists_and_draws(results, tmp_path, linsight):
    code, out, _ = linsight(*results, "--accuracy", "--plot", tmp_path / "p.svg")
    assert code == 0 and "the fastest" in out and "focused" in out
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    code, out, _ = linsight(*results, "--accuracy", "--need", "causal", "--json")
    assert code == 0 and {pick["choice"]["name"] for pick in json.loads(out)["picks"]} == {"softmax", "linear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accuracy", "--task", "cifar"], "did you mean 'cifar10'?"),
        (["--accuracy", "--need", "strem"], "did you mean 'stream'?"),
        (["--accuracy", "--plot", "no/such/p.png"], "there is no folder 'no/such'"),
        (["--accuracy", "--plot", "p.txt"], ".svg, .png or .pdf"),
        (["--accuracy", "--model", "deit_tiny"], "leave out --model"),
        (["--need", "stream"], "are for --accuracy"),
    ],
)
def test_what_cannot_be_answered_is_one_line(results, options, message, linsight):
    code, _, err = linsight(*results, *options)
    assert code == 2 and message in err and err.count("\n") == 1
