"""The task `segment`: losses and measures against their definitions, and a run from its images to its masks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import MASKS, assert_same_end, masked_squares

from linsight import load_run
from linsight.data.dense import Marked
from linsight.data.images import Batch
from linsight.data.masks import NONE
from linsight.errors import LinsightError
from linsight.tasks import task_of
from linsight.tasks.overlap import Overlap
from linsight.train import (
    Interrupted,
    Tiling,
    evaluate,
    load_trained,
    predict,
    predict_stream,
    resolve,
    resume,
    train,
)
from linsight.train.progress import Silent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return masked_squares(tmp_path_factory.mktemp("squares"), {"train": 12, "val": 4})


def recipe(photos, **changes):
    return resolve("digits", {**MASKS, "data": str(photos), **changes})


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    summary = train(recipe(photos, figures=True, report=True), out=folder)
    return folder, summary


def pixels(count=2, classes=3, size=(5, 7), none=0.3):
    torch.manual_seed(0)
    logits = torch.randn(count, classes, *size, dtype=torch.float64) * 2
    truth = torch.randint(classes, (count, *size))
    truth[torch.rand(count, *size) < none] = NONE
    return logits, truth


class Fixed:
    """A student whose answer is known."""

    def __init__(self, logits, auxiliary=None):
        self.found = (logits.float(), auxiliary)

    def forward(self, images):
        return self.found


def loss(logits, truth, beside=None, facts=None, **fields):
    task = task_of(
        resolve("digits", {"task": "segment", "smoothing": 0, **fields}), {"classes": tuple("abc"), **(facts or {})}
    )
    task.begin(torch.device("cpu"))
    size = tuple(truth.shape[1:])
    targets = [Marked(0, size, size, mask.to(torch.int16)) for mask in truth]
    batch = Batch(torch.zeros(len(truth), 3, *size, dtype=torch.uint8), targets, [])
    found, count = task.loss(Fixed(logits, beside), batch, 0)
    assert count == len(truth)
    return float(found)


def test_the_losses_are_as_they_are_defined():
    logits, truth = pixels()
    shares = logits.softmax(1).movedim(1, -1)
    known = truth != NONE
    each = -shares[known].gather(1, truth[known][:, None])[:, 0].log()
    plain = loss(logits, truth)
    assert plain == pytest.approx(float(each.mean()), rel=1e-5)
    hardest = each.sort(descending=True).values[: int(0.25 * len(each))]
    assert loss(logits, truth, ohem=0.25) == pytest.approx(float(hardest.mean()), rel=1e-5)
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    of_each = weights[truth[known]]
    weighted = float((each * of_each).sum() / of_each.sum())
    assert loss(logits, truth, facts={"weights": weights.tolist()}) == pytest.approx(weighted, rel=1e-5)
    overlaps = []
    for place in range(3):
        p, t = shares[..., place][known], (truth[known] == place).double()
        overlaps.append(1 - float(2 * (p * t).sum() / (p.sum() + t.sum())))
    assert loss(logits, truth, dice=0.7) == pytest.approx(plain + 0.7 * np.mean(overlaps), rel=1e-5)
    other_logits = logits.flip(1)
    other = loss(other_logits, truth)
    both = loss(logits, truth, other_logits.float(), auxiliary=0.25)
    assert both == pytest.approx(plain + 0.25 * other, rel=1e-5)
    nothing = torch.full_like(truth, NONE)
    assert loss(logits, nothing) == 0 and loss(logits, nothing, dice=1.0, ohem=0.5) == 0


def test_the_measures_are_as_they_are_defined():
    logits, truth = pixels(count=3, classes=4)
    truth[truth == 2] = 1  # a class that is nowhere in the truth
    guess = logits.argmax(1)
    meters = Overlap(5), Overlap(5)  # of which another is nowhere at all
    logits = torch.cat([logits, torch.full_like(logits[:, :1], -99)], 1)
    for number, meter in ((slice(0, 2), meters[0]), (slice(2, 3), meters[1])):
        targets = [Marked(0, (5, 7), (5, 7), mask) for mask in truth[number]]
        meter.update([*logits[number].float()], Batch(torch.empty(0), targets, []))
    meters[0].merge_state(meters[1])
    found, known = meters[0].compute(), truth != NONE
    overlaps, right = [], []
    for place in range(4):
        hit = ((guess == place) & (truth == place) & known).sum()
        there = (truth == place).sum()
        overlaps.append(float(hit / (((guess == place) & known).sum() + there - hit)))
        right += [float(hit / there)] if there else []
    assert found["miou"] == pytest.approx(100 * np.mean(overlaps)) and len(right) == 3
    assert found["macc"] == pytest.approx(100 * np.mean(right))
    assert found["pixels"] == pytest.approx(float(100 * (guess == truth)[known].double().mean()))
    shares = logits.softmax(1).movedim(1, -1)[known].gather(1, truth[known][:, None]).log()
    assert found["loss"] == pytest.approx(-float(shares.mean()), rel=1e-5)


def test_it_learns(run):
    folder, summary = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert summary["task"] == "segment" and summary["classes"] == 2
    assert summary["miou"] == max(row["miou"] for row in rows) > 75 and summary["macc"] > 80
    with Image.open(folder / "predictions.png") as picture:
        assert picture.width > 500
    page = (folder / "report.html").read_text()
    assert "mIoU" in page and "square" in page


def test_a_stopped_run_goes_on_to_the_same_end(photos, tmp_path):
    class At(Silent):
        def step(self, epoch, step, images, loss):
            if (epoch, step) == (1, 2):
                raise KeyboardInterrupt

    small = recipe(photos, epochs=3, cache="memory", color_jitter=0.2)
    train(small, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(small.changed(save_every=1, cache="off", workers=1), out=tmp_path / "run", report=At())
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_it_is_evaluated_at_any_size(run, photos):
    folder, summary = run
    trained = load_trained(folder)
    found = evaluate(trained, batch_size=3)
    assert found["miou"] == pytest.approx(summary["miou"], abs=1e-4), "of images of two sizes in one batch"
    elsewhere = evaluate(trained, data=str(photos), split="train")
    assert elsewhere["images"] == 12 and elsewhere["miou"] > 60


def test_windows_agree_with_the_whole_where_one_is_enough(run, photos):
    folder, _ = run
    trained = load_trained(folder)
    task = trained.task
    task.begin(torch.device("cpu"))
    images = torch.randn(1, 3, 24, 32)
    with torch.inference_mode():
        whole = task.answer(trained.model, images)
        slid = task_of(trained.recipe.changed(eval_mode="slide", img_size=(40, 40)), task.facts)
        assert torch.equal(slid.answer(trained.model, images), whole)
        slid = task_of(trained.recipe.changed(eval_mode="slide", img_size=(24, 16), eval_stride=0.5), task.facts)
        parts = [trained.model(images[..., start : start + 16]) for start in (0, 8, 16)]
        found = slid.answer(trained.model, images)
    assert torch.allclose(found[..., :8], parts[0][..., :8])
    assert torch.allclose(found[..., 8:16], (parts[0][..., 8:] + parts[1][..., :8]) / 2, atol=1e-6)


def test_it_predicts_masks(run, photos, tmp_path, linsight):
    folder, _ = run
    image = photos / "images/val/0.png"
    (found,), bad = predict(load_trained(folder), [image])
    assert bad == [] and found.mask.shape == (32, 24) and found.classes[0] == "ground"
    assert sum(found.shares) == pytest.approx(1) and found.shares[1] == pytest.approx((found.mask == 1).mean())
    assert load_run(folder).predict(image)[0].mask.tolist() == found.mask.tolist()
    code, out, _ = linsight("predict", folder, image, "--json")
    assert code == 0
    (told,) = json.loads(out)["predictions"]
    assert told == {
        "file": str(image),
        "classes": list(found.classes),
        "shares": [pytest.approx(x) for x in found.shares],
    }
    code, _, err = linsight("predict", folder, photos / "images" / "val", "--out", tmp_path / "masks")
    assert code == 0 and "4 files of masks" in err
    assert np.asarray(Image.open(tmp_path / "masks" / "0.png")).tolist() == found.mask.tolist()
    assert len(list((tmp_path / "masks").iterdir())) == 4


def test_what_does_not_go_together_is_refused(photos, tmp_path, linsight):
    for changes, match in (
        ({"draft": 8}, "draft=8 is not for images with masks"),
        ({"eval_stride": 0}, "eval_stride=0 never ends"),
        ({"decoder": "upnet"}, "upnet"),
        ({"mixup": 0.2}, "unknown recipe field 'mixup'"),
    ):
        with pytest.raises(LinsightError, match=match):
            train(recipe(photos, **changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [(64, 96), (70, 101)])
def test_an_image_in_tiles_has_the_mask_of_the_whole(run, tmp_path, linsight, size):
    folder, _ = run
    rng = np.random.default_rng(1)
    pixels = np.kron(rng.integers(0, 2, (7, 10, 1)), np.ones((12, 12, 1), int))[: size[0], : size[1]]
    pixels = np.concatenate([180 * pixels, 180 * (1 - pixels), 0 * pixels], -1) + rng.integers(0, 60, (*size, 3))
    path = tmp_path / "large.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    (whole,), _ = predict(load_trained(folder), [path])
    (tiled,), _ = predict_stream(load_trained(folder), [path], Tiling(tile=32, scratch=str(tmp_path / "maps")))
    assert 0.1 < whole.mask.mean() < 0.9 and (tiled.mask == whole.mask).mean() > 0.9999
    assert tiled.shares == pytest.approx(whole.shares)
    code, _, err = linsight("predict", folder, path, "--stream", "--tile", 32, "--out", tmp_path / "out")
    assert code == 0 and "1 files of masks" in err
    assert (np.asarray(Image.open(tmp_path / "out" / "large.png")) == tiled.mask).all()
    code, _, err = linsight("predict", folder, path, "--stream", "--output", "map", "--out", tmp_path / "a.npy")
    assert code == 2 and "--out FOLDER writes masks" in err


def test_a_page_shows_the_worst_and_the_best_of_all_images():
    """Of image i the first i rows of 20 are right."""
    task = task_of(resolve("digits", {"task": "segment"}), {"classes": ("a", "b")})
    rights = [3, 19, 7, 0, 12, 5, 16, 9, 1, 14, 20, 2, 11, 18, 4, 8]

    class Samples:
        class source:
            @staticmethod
            def name(place):
                return f"image of {rights[place]}"

    truth = torch.zeros(20, 6, dtype=torch.int16)
    marks = [Marked(place, (20, 6), (20, 6), truth) for place in range(len(rights))]
    images = torch.zeros(4, 3, 20, 6, dtype=torch.uint8)
    batches = [Batch(images, marks[start : start + 4], []) for start in range(0, len(rights), 4)]

    def answers(batch):
        guess = [(torch.arange(20) >= rights[mark.place])[:, None].expand(20, 6) for mark in batch.targets]
        return [torch.stack([(~wrong).float(), wrong.float()]) for wrong in guess]

    classes, worst, best = task.examine(Samples, batches, answers)
    named = [[words.partition(":")[0] for _, words in part.pictures] for part in (worst, best)]
    assert named[0] == [f"image of {right}" for right in sorted(rights)[:6]]
    assert named[1] == [f"image of {right}" for right in sorted(rights)[:-7:-1]]
    share = sum(rights) / (20 * len(rights))
    assert [row[0] for row in classes.rows] == ["b", "a"] and classes.rows[1][1] == pytest.approx(share)
