"""Policies for models with exits, and `linsight eval --budget`."""

import csv
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import colours

from linsight import create_model
from linsight.errors import LinsightError
from linsight.tasks import ClassifyRecipe
from linsight.tasks.exits import (
    FACTORS,
    POWERS,
    Outcome,
    Scored,
    Setting,
    calibrate,
    choose,
    curve,
    leaving,
    outcome,
    paying,
    quotas,
    static,
)
from linsight.train.model import save

COSTS = (1e9, 2e9, 3.5e9, 4e9)
powers, seeds = st.floats(0.05, 8), st.integers(0, 10_000)


def scored(seed, images=200, right=(0.4, 0.7, 0.6, 0.8)):
    """Exits that are right more often where they are sure."""
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(images, len(right), generator=generator)
    correct = torch.rand(images, len(right), generator=generator) < torch.tensor(right) * (0.6 + 0.8 * confidences)
    return Scored(confidences, correct)


def costs(exits):
    """Each exit that is passed by saves a bit."""
    return [COSTS[k - 1] - 1e7 * (k - 1 - sum(j < k for j in exits)) for k in exits]


def test_settings_are_the_published_ones():
    assert len(POWERS) == 33
    assert POWERS[:2] == (0.2, 0.25) and POWERS[16:19] == (1.0, 1.0, 20 / 19) and POWERS[-1] == 4.0
    first, second, third, fourth = quotas(1.0)
    assert first == pytest.approx(0.25 * 0.85)
    assert second == pytest.approx((1 - first) / 3)
    assert third == pytest.approx((1 - first - second) / 4)
    assert fourth == pytest.approx(3 * third)


@given(powers, st.tuples(*[st.floats(0, 1)] * 3))
def test_quotas_are_shares(power, factors):
    shares = quotas(power, factors)
    assert sum(shares) == pytest.approx(1) and min(shares) >= -1e-12
    assert all(share == 0 for share, factor in zip(shares, factors, strict=False) if factor == 0)
    assert quotas(2 * power, factors)[0] <= shares[0] + 1e-12  # a larger p keeps images longer


@given(seeds, powers, st.integers(5, 300))
def test_calibrated_shares_are_the_quotas(seed, power, images):
    """But for the fraction of an image that each exit rounds down; brute force as in the publication."""
    confidences, wanted = scored(seed, images).confidences, quotas(power)
    thresholds = calibrate(confidences, wanted)
    found = torch.bincount(leaving(confidences, thresholds), minlength=4)
    assert found[:3].tolist() == [math.floor(images * quota) for quota in wanted[:3]]
    out = set()
    for k, threshold in enumerate(thresholds):
        ranked = [i for i in confidences[:, k].argsort(descending=True).tolist() if i not in out]
        count = math.floor(images * wanted[k])
        assert threshold == (confidences[ranked[count - 1], k] if count else math.inf)
        out |= {i for i in range(images) if confidences[i, k] >= threshold}


def test_equal_confidences_leave_together():
    confidences = torch.tensor([[0.5, 0.1]] * 4 + [[0.9, 0.1]])
    assert calibrate(confidences, (0.5, 0.5)) == (0.5,)
    assert calibrate(torch.ones(4, 3), (0.5, 0.4, 0.1)) == (1.0, math.inf)  # nobody is left for the second exit


@given(seeds)
def test_thresholds_grow_with_p(seed):
    confidences = scored(seed).confidences
    first = [calibrate(confidences, quotas(power))[0] for power in POWERS]
    assert first == sorted(first)


@given(seeds)
def test_settings_pass_by_what_does_not_pay(seed):
    calibration, report = scored(seed), scored(seed + 1)
    used = paying(calibration)
    tops = calibration.accuracies()
    assert used[0] == 1 and all(tops[b - 1] > tops[a - 1] for a, b in itertools.pairwise(used))
    settings, alone = curve(calibration, report, costs)
    assert len(settings) == len(POWERS) and len(alone) == 4
    cheapest, dearest = costs(used)[0] / 1e9, costs(used)[-1] / 1e9
    for setting in settings:
        for found in (setting.calibration, setting.report):
            assert sum(found.shares) == pytest.approx(1)
            assert all(share == 0 for k, share in enumerate(found.shares, 1) if k not in used)
            assert cheapest - 1e-9 <= found.gmacs <= dearest + 1e-9
            known = dict(zip(used, costs(used), strict=True))
            assert found.gmacs == pytest.approx(sum(found.shares[k - 1] * known[k] for k in used) / 1e9)
    for k, setting in enumerate(alone):
        assert setting.report.shares[k] == 1 and setting.report.top1 == pytest.approx(report.accuracies()[k])
        assert setting.report.gmacs == costs((k + 1,))[0] / 1e9


def test_a_worse_last_exit_is_passed_by_too():
    calibration = scored(0, 500, (0.3, 0.9, 0.4, 0.5))
    assert paying(calibration) == (1, 2)
    settings, _ = curve(calibration, calibration, costs)
    assert all(setting.thresholds[1:] == (0.0, 0.0) and sum(setting.report.shares[:2]) == 1 for setting in settings)


def test_an_exit_as_good_as_one_before_does_not_pay():
    correct = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    assert paying(Scored(torch.rand(3, 4), correct)) == (1, 2)
    assert paying(Scored(torch.rand(3, 3), correct[:, [0, 0, 1]])) == (1, 3)


def test_thresholds_know_nothing_of_the_images_reported_on():
    calibration, one, other = scored(0), scored(1), scored(2, 50)
    for a, b in zip(curve(calibration, one, costs)[0], curve(calibration, other, costs)[0], strict=True):
        assert a.thresholds == b.thresholds and a.calibration == b.calibration and a.report != b.report


@given(seeds, st.floats(1.0, 4.0))
def test_the_chosen_setting_meets_the_budget(seed, budget):
    settings, alone = curve(scored(seed), scored(seed + 1), costs)
    chosen = choose([*settings, *alone], budget)
    assert chosen.calibration.gmacs <= budget
    fitting = [s.calibration.top1 for s in (*settings, *alone) if s.calibration.gmacs <= budget]
    assert chosen.calibration.top1 == max(fitting)


def test_a_budget_below_the_first_exit_is_refused():
    cheap = Setting("", (), Outcome((1.0,), 0.123456, 50.0), Outcome((1.0,), 0.2, 50.0))
    with pytest.raises(LinsightError, match=r"give 0\.1236 or more"):
        choose([cheap], 0.1)
    assert choose([cheap], 0.1236) is cheap


def test_outcomes_by_hand():
    found = Scored(torch.tensor([[0.9, 0.1], [0.2, 0.6]]), torch.tensor([[True, False], [True, False]]))
    assert outcome(found, (0.5,), (1.0, 3.0)) == Outcome((0.5, 0.5), 2.0, 50.0)
    assert outcome(found, static(2, 2), (1.0, 3.0)) == Outcome((0.0, 1.0), 3.0, 0.0)
    assert FACTORS == (0.85, 1.0, 0.5)


@pytest.fixture
def weights(tmp_path):
    """A run's file of a model with exits, for three colours, untrained."""
    recipe = ClassifyRecipe(model="dynp_resnet18_025_t32_cifar", img_size=(8,), mean=(0.5,) * 3, std=(0.2,) * 3)
    path = tmp_path / "run" / "best.safetensors"
    path.parent.mkdir()
    save(path, create_model(recipe.model, num_classes=3).state_dict(), recipe, {"classes": ("blue", "green", "red")})
    return path


def test_eval_with_a_budget(weights, folder, linsight, tmp_path):
    options = ["--data", folder, "--device", "cpu", "--amp", "off", "--workers", "0"]
    code, out, err = linsight("eval", weights, *options, "--budget", "all")
    assert (code, err) == (0, "") and "30 reported on; 30 others set the thresholds" in out
    assert out.count("p = ") == 33 and out.count(" exit ") >= 4
    found = json.loads((weights.parent / "exits.json").read_text())
    assert len(found["settings"]) == 33 and found["chosen"] is None and found["img_size"] == [8, 8]
    costs = [row["gmacs"] for row in found["exits"]]
    assert costs == sorted(costs) and costs[-1] < 0.01
    with open(weights.parent / "exits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows[:4]] == [row["top1"] for row in found["exits"]]
    assert (weights.parent / "exits.png").stat().st_size > 1000

    code, out, err = linsight(
        "eval", weights, *options, "--budget", 1.0001 * costs[2], "--json", "--out", tmp_path / "new" / "there"
    )
    found = json.loads(out)
    assert code == 0 and found["chosen"]["calibration"]["gmacs"] <= found["budget"]
    assert sorted(path.name for path in (tmp_path / "new" / "there").iterdir()) == [
        "exits.csv",
        "exits.json",
        "exits.png",
    ]


def test_what_is_wrong_with_a_budget_is_one_line(weights, folder, linsight, tmp_path):
    options = ["--data", folder, "--device", "cpu", "--workers", "0"]
    plain = tmp_path / "plain.safetensors"
    recipe = ClassifyRecipe(model="inline_compact_pico", img_size=(8,))
    save(plain, create_model(recipe.model, num_classes=3).state_dict(), recipe, {"classes": ("blue", "green", "red")})
    one = colours(tmp_path / "one", {"blue": 1})
    for arguments, line in (
        ([plain, *options, "--budget", "1"], "'inline_compact_pico' has no exits to stop at"),
        ([weights, *options, "--budget", "1e-9"], "is less than the first exit costs"),
        ([weights, *options, "--budget", "some"], "is no number of G multiply-adds"),
        ([weights, *options, "--out", tmp_path], "--out goes with --budget"),
        ([weights, "--data", one, "--workers", "0", "--budget", "all"], "too few images to calibrate on"),
    ):
        code, out, err = linsight("eval", *arguments)
        assert code == 2 and line in err and err.count("\n") == 1 and out == "", err
    assert not list(weights.parent.glob("exits.*"))
