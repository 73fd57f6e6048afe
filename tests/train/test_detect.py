"""The task `detect`: a run from its images to its boxes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import OBJECTS, assert_same_end, boxed_squares

from linsight import load_run
from linsight.data.coco import CocoFolder
from linsight.data.detection import Scene
from linsight.data.objects import Objects, unpacked_masks
from linsight.errors import LinsightError
from linsight.tasks import task_of
from linsight.train import Interrupted, evaluate, load_trained, predict, resolve, resume, train
from linsight.train.progress import Silent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return boxed_squares(tmp_path_factory.mktemp("data") / "squares", {"train": 12, "val": 4})


def recipe(photos, **changes):
    return resolve("digits", {**OBJECTS, "data": str(photos), **changes})


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    summary = train(recipe(photos, figures=True, report=True), out=folder)
    return folder, summary


def test_a_run_learns_and_is_shown(run):
    folder, summary = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"] and summary["ap50"] > 30
    assert summary["ap"] == max(row["ap"] for row in rows)
    assert {"ap50", "ap75", "mask_ap", "mask_ap50"} <= rows[-1].keys()
    with Image.open(folder / "predictions.png") as picture:
        assert picture.width > 400
    page = (folder / "report.html").read_text()
    assert "Classes" in page and "1 objects" in page and "square" in page


def test_evaluation_gives_what_the_run_gave(run):
    folder, summary = run
    found = evaluate(load_trained(folder), device="cpu", workers=0, batch_size=3)
    assert found["images"] == 4 and found["ap"] == pytest.approx(summary["ap"])


def test_predictions_are_in_the_pixels_of_files(run, photos, tmp_path):
    trained = load_trained(run[0])
    found, bad = predict(trained, [photos / "val"], device="cpu")
    assert len(found) == 4 and bad == []
    source = CocoFolder(photos, masks=True).open("val")
    for place, entry in enumerate(found):
        height, width = entry.size
        assert entry.size == source.beside(place).size
        assert 0 < len(entry.boxes) == len(entry.masks) == len(entry.scores) <= 10
        assert (np.array(entry.boxes) <= [width, height] * 2).all()
        assert {tuple(mask["size"]) for mask in entry.masks} == {entry.size}
    files = trained.task.write(found, tmp_path / "out")
    assert [path.name for path in files] == ["detections.json", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    said = json.loads(files[0].read_text())
    assert said["categories"] == [{"id": 1, "name": "square"}] and len(said["images"]) == 4
    first = said["annotations"][0]
    assert {"bbox", "score", "segmentation", "category_id", "image_id", "area"} <= first.keys()
    left, top, wide, high = first["bbox"]
    assert [left, top, left + wide, top + high] == pytest.approx(found[first["image_id"] - 1].boxes[0])
    head, rows = trained.task.table(found)
    assert head[0] == "file" and len(rows) >= 4


def test_a_loaded_run_finds_objects_in_images_of_any_kind(run, photos):
    path = photos / "val" / "1.png"
    (wanted,), _ = predict(load_trained(run[0]), [path], device="cpu", amp="off")
    loaded = load_run(run[0])
    with Image.open(path) as image:
        pixels = np.array(image)
        kinds = [path, image.copy(), pixels, torch.from_numpy(pixels).movedim(-1, 0)]
    kinds.append(kinds[-1] / 255)
    assert len(wanted.boxes) > 0
    for found in loaded.predict(kinds):
        assert found.size == wanted.size and found.classes == wanted.classes
        assert np.allclose(found.boxes, wanted.boxes, atol=0.01) and np.allclose(found.scores, wanted.scores, atol=1e-4)
        masks = unpacked_masks(found.masks)
        assert masks.shape == (len(found.boxes), *found.size)
        assert (masks == unpacked_masks(wanted.masks)).float().mean() > 0.999
    image = loaded.transform(path)
    with Image.open(path) as own:
        assert image.shape[1:] == own.size[::-1], "in its own shape: its shorter side is eval_side already"
    with torch.no_grad():
        (answer,) = loaded([image])
    assert {"boxes", "labels", "scores", "masks"} == answer.keys()


def test_a_stopped_run_goes_on_to_the_same_end(photos, tmp_path):
    class At(Silent):
        def step(self, epoch, step, images, loss):
            if (epoch, step) == (1, 2):
                raise KeyboardInterrupt

    small = recipe(photos, epochs=2, color_jitter=0.2, part=0.5, sides="40,48")
    train(small, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(small.changed(save_every=1, workers=1), out=tmp_path / "run", report=At())
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


class Fixed:
    """A student that keeps what it was asked."""

    def forward(self, *given):
        self.given = given
        return {"one": torch.tensor(1.5), "other": torch.tensor(0.25)}


def test_the_loss_is_the_sum_of_the_detectors():
    task, student = task_of(resolve("digits", {"task": "detect"}), {"classes": ("a",)}), Fixed()
    task.begin(torch.device("cpu"))
    none, label = torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    samples = []
    for size in ((4, 6), (5, 3)):
        objects = Objects(torch.tensor([[0.0, 0, 2, 2]]), label, none, torch.ones(1), size)
        samples.append((torch.full((3, *size), 9, dtype=torch.uint8), Scene(0, size, size, objects), ()))
    loss, count = task.loss(student, task.collate([*samples, "3.png: is damaged"]), 0)
    images, targets = student.given
    assert (float(loss), count) == (1.75, 2)
    assert [tuple(image.shape) for image in images] == [(3, 4, 6), (3, 5, 3)]  # without what pads them
    assert targets[1]["boxes"].tolist() == [[0, 0, 2, 2]] and "masks" not in targets[1]
    assert task.loss(student, task.collate(["3.png: is damaged"]), 0) is None


def test_answers_are_brought_to_the_pixels_of_the_file():
    task = task_of(resolve("digits", {"task": "detect", "method": "mask_rcnn"}), {"classes": ("a",)})
    task.begin(torch.device("cpu"))
    masks = torch.zeros(1, 1, 10, 20)
    masks[..., 2:6, 5:15] = 1
    given = {"boxes": torch.tensor([[5.0, 2, 15, 6]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    sample = (torch.zeros(3, 10, 20, dtype=torch.uint8), Scene(0, (30, 40), (10, 20)), ())
    (answer,) = task.answers(lambda images: [{**given, "masks": masks}], task.collate([sample]))
    assert answer["boxes"].tolist() == [[10, 6, 30, 18]] and answer["size"] == (30, 40)
    (found,) = task.predictions([answer], ["x.png"], 5)
    told = task.told(found)
    assert told["masks"][0]["size"] == [30, 40] and isinstance(told["masks"][0]["counts"], str)
    assert found.classes == ("a",) and found.boxes == ((10.0, 6.0, 30.0, 18.0),)


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"method": "mask_rnn"}, "mask_rcnn"),
        ({"draft": 64}, "draft=64 is not for images with objects"),
        ({"compile": True}, "the heads of a detector get another number of boxes"),
        ({"sides": ""}, "sides"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(fields, line):
    with pytest.raises(LinsightError, match=line):
        resolve("digits", {"task": "detect", **fields})


def test_data_without_objects_is_refused_in_a_line(tmp_path):
    with pytest.raises(LinsightError, match="no such data folder"):
        train(recipe(tmp_path / "none"), out=tmp_path / "run")
    with pytest.raises(LinsightError, match="no file of objects in COCO's form"):
        train(recipe(tmp_path), out=tmp_path / "run")
