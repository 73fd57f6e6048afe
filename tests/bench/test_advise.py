"""Curves on logarithmic axes, where they cross, and honest answers from made-up results."""

import pytest

from linsight import bench
from linsight.attention import list_attentions
from linsight.bench import at, crossings, pays_from
from linsight.errors import LinsightError

SIDES = (14, 28, 56)
STEPS = ("infer", "train")
QUESTION = bench.Question(448, 448, device="cpu")


def rows_of(name, time, *, device="cpu: Xeon", precision="float32", softmax=lambda n: 1e-4 * n**2, sides=SIDES, **more):
    """Results as they are read from a file: `time(tokens)` in milliseconds of two images."""
    found = []
    for side in sides:
        tokens = float(side * side)
        row = {"kind": "operator", "model": name, "tokens": tokens, "dim": 192.0, "heads": 6.0, "date": "2025"}
        row |= {"beside": "" if name == "softmax" else "softmax", "device": device, "precision": precision}
        row |= {"infer_batch_size": 2.0, "infer_step_time": time(tokens), "infer_img_size": str(side)}
        if name != "softmax":
            row["infer_ratio"] = time(tokens) / softmax(tokens)
        found.append(row | more)
    return found


def quadratic(n):
    return 1e-4 * n**2


def linear(n):
    return 5e-2 * n  # passes the quadratic one at 500 tokens


def test_between_sizes_curves_are_straight_on_logarithmic_axes():
    curve = {10.0: 1.0, 1000.0: 100.0}
    assert at(curve, 100) == (pytest.approx(10), 1) and at(curve, 10) == (1, 1)
    assert at(curve, 4000) == (pytest.approx(400), 4) and at(curve, 5) == (pytest.approx(0.5), 2)
    assert at({10.0: 1.0}, 10) == (1, 1) and at({10.0: 1.0}, 11) is None and at({}, 1) is None


def test_crossings_are_exact():
    ratio = {float(n): linear(n) / quadratic(n) for n in (196, 784, 3136)}
    assert crossings(ratio) == [(pytest.approx(500), True)] and pays_from(ratio) == pytest.approx(500)
    assert crossings({n: 1 / r for n, r in ratio.items()}) == [(pytest.approx(500), False)]
    assert crossings({1.0: 2.0, 10.0: 1.0, 100.0: 0.5}) == [(pytest.approx(10), True)]
    steep = {1.0: 64.0, 10.0: 2.0, 100.0: 0.5, 1000.0: 0.1}  # between the two sizes beside it, whatever is farther
    assert crossings(steep) == [(pytest.approx(10**1.5), True)] and pays_from(steep) == pytest.approx(10**1.5)
    again = {1.0: 2.0, 100.0: 0.5, 10000.0: 2.0, 1000000.0: 0.5}  # from the last one on
    assert pays_from(again) == pytest.approx(100000)
    twice = {1.0: 0.5, 100.0: 2.0, 10000.0: 0.5}
    assert crossings(twice) == [(pytest.approx(10), False), (pytest.approx(1000), True)]
    assert pays_from(twice) == pytest.approx(1000)
    assert pays_from({1.0: 0.9, 2.0: 0.5}) == 0 and pays_from({1.0: 0.5, 2.0: 1.5}) is None and pays_from({}) is None


def test_the_fastest_is_named_with_the_place_where_it_passes_softmax():
    rows = rows_of("inline", linear) + rows_of("focused", lambda n: 3 * linear(n)) + rows_of("softmax", quadratic)
    found = bench.advise(rows, QUESTION)
    assert found.tokens == 784 and [choice.name for choice in found.choices] == ["inline", "softmax", "focused"]
    inline = found.choices[0]
    assert inline.milliseconds == pytest.approx(784 * 5e-2 / 2) and inline.ratio == pytest.approx(500 / 784)
    assert inline.from_tokens == pytest.approx(500) and found.choices[2].from_tokens == pytest.approx(1500)
    assert "inline is the fastest, 1.57 times as fast as softmax" in found.words[0]
    assert found.words[1:] == ("softmax is faster below 500 tokens here; from there on inline is.",)


def test_softmax_is_named_where_it_is_faster():
    rows = rows_of("inline", linear) + rows_of("softmax", quadratic)
    found = bench.advise(rows, bench.Question(320, 320, device="cpu"))  # between 14x14 and 28x28
    assert found.choices[0].name == "softmax" and found.choices[1].ratio == pytest.approx(500 / 400)
    assert "softmax is the fastest, 1.25 times as fast as inline: 8 ms an image against 10 ms" in found.words[0]
    slow = rows_of("inline", lambda n: 100 * linear(n)) + rows_of("softmax", quadratic)
    assert bench.advise(slow, QUESTION).words[1] == "softmax is faster at the largest size measured, too."
    even = rows_of("inline", lambda n: 1.02 * quadratic(n)) + rows_of("softmax", quadratic)
    assert "inline and softmax take the same time" in bench.advise(even, QUESTION).words[0]


def test_far_beyond_what_was_measured_is_a_guess():
    rows = rows_of("inline", linear) + rows_of("softmax", quadratic)
    near = bench.advise(rows, bench.Question(16 * 56, 16 * 100, device="cpu"))
    assert len(near.words) == 2 and near.choices[0].beyond == pytest.approx(100 / 56)
    far = bench.advise(rows, bench.Question(16 * 112, 16 * 112, device="cpu"))
    assert "from 196 to 3,136 tokens only: this is 4 times beyond" in far.words[-1]
    assert far.choices[0].milliseconds == pytest.approx(linear(112**2) / 2)


def test_what_was_measured_less_far_does_not_make_the_answer_a_guess():
    rows = rows_of("inline", linear) + rows_of("softmax", quadratic) + rows_of("agent", quadratic, sides=SIDES[:2])
    (lead, *_), choices = (found := bench.advise(rows, bench.Question(896, 896, device="cpu"))).words, found.choices
    assert [choice.name for choice in choices if choice.beyond > 1] == ["agent"]
    assert "inline is the fastest" in lead and "beyond" not in lead
    assert "beyond" in bench.advise(rows, bench.Question(1792, 1792, device="cpu")).words[0]


def test_results_of_another_device_or_precision_are_named_as_such():
    cpu = rows_of("inline", linear) + rows_of("softmax", quadratic)
    gpu = rows_of("inline", quadratic, device="cuda: H100", precision="bf16 mixed precision", date="2026")
    assert bench.advise(cpu + gpu, QUESTION).where["device"] == "cpu: Xeon"
    assert bench.advise(cpu + gpu, bench.Question(224, 224, device="cuda")).where["device"] == "cuda: H100"
    other = bench.advise(cpu, bench.Question(448, 448, device="cuda", precision="bf16"))
    assert other.words[0] == "No results of cuda: these are of another device, cpu: Xeon."
    assert other.words[1] == "No results in bf16: these are in float32."


def test_later_results_count_and_failures_are_told():
    rows = rows_of("inline", quadratic) + rows_of("softmax", quadratic) + rows_of("inline", linear)
    failed = rows_of("agent", linear)
    for row in failed[1:]:
        row |= {"infer_step_time": None, "infer_ratio": None, "infer_error": "out of memory"}
    found = bench.advise(rows + failed, QUESTION)
    assert found.choices[0].milliseconds == pytest.approx(linear(784) / 2)
    assert found.words[-1] == "Not in it: agent, failed at 3,136 tokens: out of memory."


def test_without_results_the_command_that_makes_them_is_named():
    rows = rows_of("inline", linear)
    with pytest.raises(LinsightError, match=r"width 64 with 2 heads \(there are those of width/heads 192/6\): .*bench"):
        bench.advise(rows, bench.Question(224, 224, dim=64, heads=2))
    with pytest.raises(LinsightError, match=r"linsight bench .* --steps train"):
        bench.advise(rows, bench.Question(224, 224, train=True))
    with pytest.raises(LinsightError, match=r"linsight bench swin_tiny --attention inline,agent"):
        bench.advise(rows, bench.Question(224, 224, model="swin_tiny"))


def test_what_comes_with_linsight_answers_where_nothing_was_measured(tmp_path, monkeypatch, linsight):
    shipped, cores = bench.shipped_results(), {entry.name for entry in list_attentions() if entry.kind == "core"}
    assert {row["model"] for row in shipped} == cores
    assert {(row["dim"], row["heads"]) for row in shipped} == {(192, 6)}
    assert {row["tokens"] for row in shipped} == {side * side for side in (14, 28, 56, 112)}
    times = {(row["model"], row["tokens"], step): row[f"{step}_step_time"] for row in shipped for step in STEPS}
    for row in shipped:
        for step in STEPS:
            ratio, beside = row[f"{step}_ratio"], times["softmax", row["tokens"], step]
            if ratio and row["tokens"] > 196:  # of the same rounds, so not quite that of the medians
                assert 0.5 < ratio * beside / times[row["model"], row["tokens"], step] < 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, _ = linsight("advise", "--size", "1024", "--device", "cpu", "--accuracy")
    assert code == 0 and out.startswith(f"Measured on another machine, {shipped[0]['device']}: ") and "mlla" in out
    code, _, err = linsight("advise", "--size", "1024", "--device", "cpu", "--dim", "64", "--heads", "2")
    assert code == 2 and "there are those of width/heads 192/6" in err
    (tmp_path / "linsight" / "bench").mkdir(parents=True)
    bench.write_rows(tmp_path / "linsight" / "bench" / "own.csv", rows_of("inline", linear), {})
    code, out, _ = linsight("advise", "--size", "224", "--device", "cpu")
    assert code == 0 and "another machine" not in out


def test_models_are_chosen_among_by_images():
    more = {"kind": "model", "beside": "vit", "dim": None, "heads": None}
    rows = rows_of("linear_vit", linear, sides=(224, 896), **more)
    rows += rows_of("vit", quadratic, sides=(224, 896), **{**more, "beside": ""})
    found = bench.advise(rows, bench.Question(448, 448, patch=8, device="cpu", model="vit"))
    assert found.tokens == 56**2 and found.choices[0].measured == (28**2, 112**2)
    assert found.choices[0].milliseconds == pytest.approx(linear(448**2) / 2)
