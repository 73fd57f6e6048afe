"""Data in COCO's form: where files lie, what they say, how they may be damaged, and average precision on them."""

import contextlib
import io
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from linsight.data.coco import CocoFolder
from linsight.data.detection import ObjectSamples, Scene, open_evaluated_objects, open_objects
from linsight.data.images import Batch
from linsight.data.objects import Objects, packed_masks, unpacked_masks
from linsight.errors import ImageError, LinsightError, MissingExtraError
from linsight.tasks import record_of
from linsight.tasks.coco_ap import AveragePrecision

SIZE = (24, 32)  # height and width
SQUARE = [4.0, 6.0, 10.0, 8.0]  # x, y, width, height
POLYGON = [[4, 6, 14, 6, 14, 14, 4, 14]]


def about(**changes):
    """What a small file says: ids of categories with a gap, an image without an object, a crowd."""
    images = [{"id": 7 * place, "file_name": f"{place}.png", "height": 24, "width": 32} for place in (1, 2, 3)]
    square = {"bbox": SQUARE, "segmentation": POLYGON, "area": 80.0, "iscrowd": 0}
    runs = {"size": [24, 32], "counts": [24 * 16, 24 * 16]}  # the right half, column by column
    return {
        "images": images,
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 21, "category_id": 9, **square},
            {"id": 2, "image_id": 7, "category_id": 3, **square, "area": 11.0},
            {"id": 3, "image_id": 7, "category_id": 9, "bbox": [16, 0, 16, 24], "iscrowd": 1, "segmentation": runs},
        ],
        **changes,
    }


def saved(folder, said=None, file="annotations/train.json", images="images"):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(about() if said is None else said))
    (folder / images).mkdir(parents=True, exist_ok=True)
    for place in (1, 2, 3):
        Image.new("RGB", SIZE[::-1], (place, 0, 0)).save(folder / images / f"{place}.png")
    return folder


def read(folder, masks=False, split="train", **changes):
    return CocoFolder(saved(folder, about(**changes)), masks).open(split)


@pytest.mark.parametrize(
    "file, images, split",
    [
        ("annotations/train.json", "images", "train"),
        ("annotations/instances_train2017.json", "train2017", "train2017"),
        ("annotations/instances_val.json", "images/val", "val"),
        ("annotations/val.json", "val2017", "val"),
        ("annotations/test.json", ".", "test"),
        ("valid/_annotations.coco.json", "valid", "valid"),
    ],
)
def test_files_and_images_are_found_where_data_sets_have_them(tmp_path, file, images, split):
    saved(tmp_path, None, file, images)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    if not file.startswith("valid"):
        (tmp_path / "annotations" / "captions_train2017.json").write_text("[]")
    place = CocoFolder(tmp_path)
    source = place.open(split)
    assert list(place.splits) == [split] and len(source) == 3 and source.notes == ()
    assert [source.image(index, "RGB").getpixel((0, 0))[0] for index in range(3)] == [1, 2, 3]


def test_labels_are_counted_from_0_in_the_order_of_ids(tmp_path):
    source = read(tmp_path)
    assert (source.classes, source.category_ids, source.image_ids) == (("cat", "dog"), (3, 9), (7, 14, 21))
    first, second, third = map(source.beside, range(3))
    assert first.boxes.tolist() == [[4, 6, 14, 14], [16, 0, 32, 24]] and first.size == SIZE
    assert (first.labels.tolist(), first.crowds.tolist()) == ([0, 1], [False, True])
    assert first.areas.tolist() == [11, 16 * 24]  # of the file, else of the box
    assert second.boxes.shape == (0, 4) and third.labels.tolist() == [1]
    assert first.learned().labels.tolist() == [0] and first.learned().crowds.tolist() == [False]
    assert source.under(("dog", "bird", "cat")).beside(0).labels.tolist() == [2, 0]
    with pytest.raises(LinsightError, match="objects of 'cat', which the model was not trained on: it knows 'dog'"):
        source.under(("dog",))


def test_masks_are_those_of_polygons_and_run_lengths(tmp_path):
    masks = read(tmp_path, masks=True).beside(0).masks()
    square, half = np.zeros(SIZE), np.zeros(SIZE)
    square[6:14, 4:14], half[:, 16:] = 1, 1
    assert masks.dtype == torch.uint8 and np.array_equal(masks.numpy(), np.stack([square, half]))
    assert read(tmp_path, masks=True).beside(1).masks().shape == (0, *SIZE)
    assert read(tmp_path).beside(0).outlines == ()


def changed(place, kind="annotations", **fields):
    rows = about()[kind]
    rows[place] = {**rows[place], **fields}
    return {kind: rows}


HUGE = {"size": [24, 32], "counts": [24 * 32 + 1]}


@pytest.mark.parametrize(
    "changes, masks, note",
    [
        (
            changed(0, bbox=[4, 6, 0, 8]),
            False,
            "1 object whose box has no width or no height: left out (the first is '1')",
        ),
        (changed(0, bbox=[4, 6, -3, 8]), False, "no width or no height"),
        (changed(0, bbox=[4, 6, float("nan"), 8]), False, "without a box of four finite numbers"),
        (changed(0, bbox=[4, 6, 10**400, 8]), False, "without a box of four finite numbers"),
        (changed(0, bbox="1234"), False, "without a box of four finite numbers"),
        (changed(0, bbox=None), False, "without a box of four finite numbers"),
        (changed(0, bbox=[30, 6, 1e-9, 8]), False, "no width or no height"),
        (changed(0, bbox=[32, 6, 10, 8]), False, "lies outside of its image: left out"),
        (changed(0, image_id=[1]), False, "of an image that is not in the file: left out"),
        (changed(0, segmentation=[[1, 2, 3, 4]]), True, "without an outline that can be used: left out"),
        (changed(0, segmentation=[[1, 2, 3, 4, float("nan"), 6]]), True, "without an outline"),
        (changed(0, segmentation=[[1, 2, 3, 4, 1e12, 6]]), True, "without an outline"),
        (changed(0, segmentation=HUGE), True, "without an outline"),
        (changed(0, segmentation={"size": [5, 5], "counts": "abc"}), True, "without an outline"),
    ],
)
def test_objects_that_cannot_be_used_are_left_out_and_told(tmp_path, changes, masks, note):
    source = read(tmp_path, masks, **changes)
    assert len(source.beside(2).boxes) == 0 and len(source.beside(0).boxes) == 2
    (line,) = source.notes
    assert note in line and "\n" not in line


def test_boxes_are_cut_at_the_border(tmp_path):
    source = read(tmp_path, **changed(0, bbox=[-5, 6, 100, 8]))
    assert source.beside(2).boxes.tolist() == [[0, 6, 32, 14]]
    assert "1 object whose box reaches beyond its image: cut at the border" in source.notes[0]
    rounded = read(tmp_path, **changed(0, bbox=[-0.4, 6, 32.9, 8]))
    assert rounded.beside(2).boxes.tolist() == [[0, 6, 32, 14]] and rounded.notes == ()


def test_ids_of_objects_may_come_twice(tmp_path):
    source = read(tmp_path, **changed(1, id=1))
    assert len(source.beside(0).boxes) == 2 and "with an id that another one has, too: kept" in source.notes[0]


@pytest.mark.parametrize("as_written", [float, str], ids=["7.0", "'7'"])
def test_numbers_are_read_as_programs_write_them(tmp_path, as_written):
    kinds = {"images": ("id", "height", "width"), "categories": ("id",), "annotations": ("image_id", "category_id")}
    said = about()
    for kind, names in kinds.items():
        for row in said[kind]:
            row.update({name: as_written(row[name]) for name in names})
    said["annotations"][0]["area"] = "80"
    for rows in (said, {**about(), "images": said["images"]}, {**about(), "annotations": said["annotations"]}):
        source = CocoFolder(saved(tmp_path, rows)).open("train")
        assert (source.category_ids, source.image_ids, source.notes) == ((3, 9), (7, 14, 21), ())
        assert source.beside(0).labels.tolist() == [0, 1] and source.beside(2).areas.tolist() == [80]


@pytest.mark.parametrize("value", ["0", "false", "", float("nan"), None, False])
def test_only_what_says_so_is_a_crowd(tmp_path, value):
    assert read(tmp_path, **changed(0, iscrowd=value)).beside(2).crowds.tolist() == [False]
    assert read(tmp_path, **changed(0, iscrowd="1")).beside(2).crowds.tolist() == [True]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_of_the_encoding_and_the_separators_of_windows_are_read(tmp_path, encoding):
    said = about()
    for row in said["images"]:
        row["file_name"] = "images\\" + row["file_name"]
    path = saved(tmp_path, said) / "annotations" / "train.json"
    path.write_bytes(path.read_text().encode(encoding))
    source = CocoFolder(tmp_path).open("train")
    assert len(source) == 3 and source.image(2, "RGB").getpixel((0, 0)) == (3, 0, 0)


def test_a_file_under_two_ids_is_told(tmp_path):
    (note,) = read(tmp_path, **changed(1, "images", file_name="1.png")).notes
    assert "1 file of" in note and "under several ids" in note and "'1.png'" in note


def test_why_no_object_is_left_is_told(tmp_path):
    saved(tmp_path, about(annotations=[{**row, "image_id": "a"} for row in about()["annotations"]]))
    with pytest.raises(LinsightError, match=r"learn from in its 2 images \(.*of an image that is not in the file"):
        open_objects(recipe(tmp_path))


@pytest.mark.parametrize(
    "changes, line",
    [
        (
            changed(0, category_id=5),
            "the annotation '1' is of the category '5', which is not in the file (it has '3', '9')",
        ),
        (changed(0, category_id=None), "of the category 'None'"),
        (changed(0, category_id=True), "of the category 'True'"),
        (changed(1, "images", id=7), "the image number 2 has the id '7', as one before it"),
        (changed(1, "images", id=None), "the image number 2 has no id"),
        (changed(1, "images", file_name=""), "has no file_name"),
        (changed(1, "images", file_name="../../secret.png"), "must be below the folder of images"),
        (changed(1, "images", file_name="/secret.png"), "must be below the folder of images"),
        (changed(1, "images", height=0), "has no height and width"),
        (changed(0, "categories", name="cat"), "two categories of the name 'cat'"),
        (changed(0, "categories", id=3), "two categories of the id '3'"),
        (changed(0, "categories", name=None), "lacks a name"),
        ({"categories": []}, "has no category: an object is of one"),
        ({"images": []}, "has no image"),
        ({"images": {}}, "has no list 'images'"),
        ({"annotations": [5]}, "number 1 of 'annotations' is no object, but a int"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(tmp_path, changes, line):
    with pytest.raises(LinsightError) as caught:
        read(tmp_path, **changes)
    assert line in str(caught.value) and "train.json" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_and_lacking_files_are_told(tmp_path):
    with pytest.raises(LinsightError, match="has no file of objects in COCO's form"):
        CocoFolder(tmp_path)
    saved(tmp_path)
    path = tmp_path / "annotations" / "train.json"
    with pytest.raises(LinsightError, match=r"unknown split .* 'val'"):
        CocoFolder(tmp_path).open("val")
    path.write_text(path.read_text()[:200])
    with pytest.raises(LinsightError, match="is damaged, or no JSON"):
        CocoFolder(tmp_path).open("train")
    bare = [{name: value for name, value in row.items() if name != "segmentation"} for row in about()["annotations"]]
    with pytest.raises(LinsightError, match="no object with an outline: take a method without masks"):
        read(tmp_path, masks=True, annotations=bare)


def test_images_that_are_not_there_are_left_out(tmp_path):
    saved(tmp_path)
    (tmp_path / "images" / "2.png").unlink()
    source = CocoFolder(tmp_path).open("train")
    assert source.image_ids == (7, 21) and source.beside(1).labels.tolist() == [1]
    assert "1 image of" in source.notes[0] and "left out, not in" in source.notes[0] and "'2.png'" in source.notes[0]
    for place in (1, 3):
        (tmp_path / "images" / f"{place}.png").unlink()
    with pytest.raises(LinsightError, match=r"no image of .* is there, as '1\.png': looked in"):
        CocoFolder(tmp_path).open("train")


def test_a_package_that_is_missing_is_told(tmp_path, monkeypatch):
    objects = read(tmp_path, masks=True).beside(0)
    for name in ("pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"masks of objects needs the package 'pycocotools': .*\[dense\]"):
        objects.masks()
    with pytest.raises(MissingExtraError, match="average precision needs the package 'pycocotools'"):
        AveragePrecision(("cat",))
    assert len(read(tmp_path).beside(0).boxes) == 2  # which are told without it


def recipe(folder, **fields):
    return record_of("detect")(data=str(folder), **fields)


def test_data_of_one_split_is_held_out_from(tmp_path):
    saved(tmp_path)
    data = open_objects(recipe(tmp_path, val_fraction=0.4))
    assert (len(data.train), len(data.val)) == (2, 1) and data.train.annotated and data.val.classes == ("cat", "dog")
    assert any("1 of its 3 images are held out" in note for note in data.notes)
    with pytest.raises(LinsightError, match="no split to evaluate on: name one with val_split="):
        open_evaluated_objects(recipe(tmp_path), None, data.classes)
    with pytest.raises(LinsightError, match="has no object to learn from in its 3 images"):
        saved(tmp_path, about(annotations=[]), "annotations/val.json")
        open_objects(recipe(tmp_path, train_split="val", val_split="train"))


def test_boxes_and_masks_follow_the_pixels(tmp_path):
    saved(tmp_path, about(annotations=about()["annotations"][:1]))
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[6:14, 4:14] = 255
    Image.fromarray(pixels).save(tmp_path / "images" / "3.png")
    source = CocoFolder(tmp_path, masks=True).open("train")
    asked = recipe(tmp_path, method="mask_rcnn", sides=(48, 60, 72), longest=120, part=0.5, interpolation="nearest")
    samples, seen = ObjectSamples(source, asked, training=True), set()
    for epoch in range(12):
        image, scene, _ = samples[epoch, 2]
        seen.add(tuple(image.shape))
        assert scene.size == tuple(image.shape[1:]) and scene.own == SIZE
        white = image[0] > 127
        rows, columns = torch.where(white)
        if len(scene.objects.boxes) == 0:  # cut away, or but for a pixel
            assert len(rows) <= 72
            continue
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert scene.objects.boxes[0].tolist() == pytest.approx([float(side) for side in drawn], abs=2)
        assert (scene.masks[0].bool() == white).float().mean() > 0.93  # but for pixels of the border
    assert len(seen) > 4
    image, scene, _ = samples[0, 1]  # without an object
    assert scene.objects.boxes.shape == (0, 4) and scene.masks.shape == (0, *image.shape[1:])
    image, scene, _ = ObjectSamples(source, recipe(tmp_path, eval_side=48, longest=60), training=False)[0, 2]
    assert image.shape == (3, 45, 60) and scene.size == (45, 60)
    assert scene.objects.boxes.tolist() == [[4, 6, 14, 14]]  # as the file has them


def test_images_of_another_size_than_their_boxes_are_bad(tmp_path):
    saved(tmp_path)
    Image.new("RGB", (24, 32)).save(tmp_path / "images" / "1.png")
    samples = ObjectSamples(CocoFolder(tmp_path).open("train"), recipe(tmp_path), training=True)
    assert samples[0, 0] == "1.png: is 24x32 pixels, upright, and its boxes are for 32x24"


CLASSES = ("cat", "dog", "bird")


def made_up(count=12, size=(60, 80), seed=0):
    """Objects of images, and detections: objects that are moved, and others."""
    rng = np.random.default_rng(seed)

    def boxes(number):
        start = rng.uniform(0, 40, (number, 2))
        return np.concatenate([start, start + rng.uniform(4, 38, (number, 2))], 1).astype(np.float32)

    def masks(places):
        found = torch.zeros(len(places), *size)
        for mask, (left, top, right, bottom) in zip(found, places.round().astype(int), strict=True):
            mask[top:bottom, left:right] = 1
        return packed_masks(found)

    rows = []
    for number in range(count):
        truth = boxes(number % 4)
        labels, crowds = rng.integers(0, 2, len(truth)), rng.random(len(truth)) < 0.2  # no bird is there
        areas = (truth[:, 2:] - truth[:, :2]).prod(1) * (50 if number % 3 else 1)
        tensors = map(torch.from_numpy, (truth, labels, crowds, areas))
        objects = Objects(*tensors, size, tuple({**run, "counts": run["counts"].decode()} for run in masks(truth)))
        guess = np.concatenate([truth + rng.normal(0, 2, truth.shape).astype(np.float32), boxes(2)])
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        guess = guess.clip(0, 59)
        kinds = np.concatenate([labels, rng.integers(0, 3, 2)])
        scores = torch.from_numpy(rng.random(len(guess)).astype(np.float32))
        answer = {"boxes": torch.from_numpy(guess), "labels": torch.from_numpy(kinds), "scores": scores}
        rows.append(({**answer, "masks": masks(guess)}, Scene(number, size, size, objects)))
    return rows


def counted(rows, masks=True):
    meter = AveragePrecision(CLASSES, masks)
    for answer, scene in rows:
        meter.update([answer], Batch(torch.empty(1, 3, *scene.size), [scene], []))
    return meter


def by_hand(rows, kind, folder):
    """What pycocotools says of files with the same objects and detections, under other ids."""
    images, truths, guesses = [], [], []
    for answer, scene in rows:
        own, size = scene.objects, {"height": scene.size[0], "width": scene.size[1]}
        images.append({"id": 100 + scene.place, **size})
        for place in range(len(own.boxes)):
            left, top, right, bottom = own.boxes[place].tolist()
            row = {"id": len(truths) + 1, "image_id": 100 + scene.place, "category_id": 5 + int(own.labels[place])}
            row |= {"bbox": [left, top, right - left, bottom - top], "area": float(own.areas[place])}
            truths.append({**row, "iscrowd": int(own.crowds[place]), "segmentation": own.outlines[place]})
        for place in range(len(answer["boxes"])):
            left, top, right, bottom = answer["boxes"][place].tolist()
            shape = {"bbox": [left, top, right - left, bottom - top]}
            if kind == "segm":
                run = answer["masks"][place]
                shape = {"segmentation": {**run, "counts": run["counts"].decode()}}
            row = {"image_id": 100 + scene.place, "category_id": 5 + int(answer["labels"][place])}
            guesses.append({**row, **shape, "score": float(answer["scores"][place])})
    kinds = [{"id": 5 + label, "name": name} for label, name in enumerate(CLASSES)]
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": truths, "categories": kinds}))
    (folder / "guess.json").write_text(json.dumps(guesses))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        found = COCOeval(truth, truth.loadRes(str(folder / "guess.json")), kind)
        found.evaluate()
        found.accumulate()
        found.summarize()
    return found


def test_precision_is_that_of_pycocotools_on_the_same_files(tmp_path):
    rows = made_up()
    measures = counted(rows).compute()
    for kind, before in (("bbox", ""), ("segm", "mask_")):
        expected = by_hand(rows, kind, tmp_path)
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        said = dict(zip(names, expected.stats[:6], strict=True))
        there = {before + name: 100 * value for name, value in said.items() if value >= 0}
        assert {"ap", "ap_small", "ap_medium"} <= said.keys() and 5 < there[f"{before}ap"] < 95
        assert {name: measures[name] for name in there} == pytest.approx(there)
        cat = expected.eval["precision"][:, :, 0, 0, 2]
        assert measures[f"{before}ap:cat"] == pytest.approx(100 * cat[cat > -1].mean())
        assert f"{before}ap:bird" not in measures


def test_several_processes_count_as_one():
    rows = made_up()
    one, other = counted(rows[:5]), pickle.loads(pickle.dumps(counted(rows[5:])))
    one.merge_state(other)
    assert one.compute() == counted(rows).compute()


def test_precision_is_100_of_the_objects_themselves_and_0_of_nothing():
    rows = made_up()
    same, none = [], []
    for _, scene in rows:
        own = scene.objects
        kept = ~own.crowds
        ones = torch.ones(int(kept.sum()))
        same.append(({"boxes": own.boxes[kept], "labels": own.labels[kept], "scores": ones}, scene))
        none.append(({name: values[:0] for name, values in same[-1][0].items()}, scene))
    assert counted(same, masks=False).compute()["ap"] == pytest.approx(100)
    assert counted(none, masks=False).compute()["ap"] == 0
    empty = [(answer, scene) for answer, scene in none if not len(scene.objects.boxes)]
    with pytest.raises(LinsightError, match="no object to find in 3 images"):
        counted(empty, masks=False).compute()


def by_columns(mask):
    """The lengths of runs of a mask, column by column, of zeros first."""
    runs, last = [0], False
    for pixel in mask.T.flatten().tolist():
        runs = [*runs[:-1], runs[-1] + 1] if pixel == last else [*runs, 1]
        last = pixel
    return runs


def test_run_lengths_are_those_of_pycocotools():
    masks = torch.rand(3, 9, 7) > 0.5
    for mask, run in zip(masks, packed_masks(masks), strict=True):
        assert mask_tools.area(run) == mask.sum()
        assert run == mask_tools.frPyObjects({"size": [9, 7], "counts": by_columns(mask)}, 9, 7)
    assert torch.equal(unpacked_masks(packed_masks(masks)), masks.to(torch.uint8)) and packed_masks(masks[:0]) == []
    with pytest.raises(ImageError, match="damaged run lengths"):
        unpacked_masks([{"size": [9, 7], "counts": b"garbage!!"}])


STORED = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_objects_turn_with_an_image_that_is_stored_turned(tmp_path, orientation):
    """Boxes and outlines that were told in pixels as they are stored, as their height and width say."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[6:14, 4:20] = 255  # upright
    stored, exif = Image.fromarray(pixels).transpose(STORED[orientation]), Image.Exif()
    exif[274] = orientation
    rows, columns = np.where(np.asarray(stored)[..., 0])
    left, top, right, bottom = (int(x) for x in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    box = {"bbox": [left, top, right - left, bottom - top], "image_id": 7, "category_id": 3, "iscrowd": 0}
    polygon = [[left, top, right, top, right, bottom, left, bottom]]
    runs = {"size": [32, 24], "counts": by_columns(np.asarray(stored)[..., 0] > 0)}
    rows = [{"id": 1, **box, "segmentation": polygon}, {"id": 2, **box, "segmentation": runs}]
    saved(tmp_path, about(**changed(0, "images", height=32, width=24), annotations=rows))
    stored.save(tmp_path / "images" / "1.png", exif=exif)
    source = CocoFolder(tmp_path, masks=True).open("train")
    image, scene, _ = ObjectSamples(source, recipe(tmp_path, eval_side=0), training=False)[0, 0]
    assert (
        image.shape[1:] == scene.own == scene.objects.size == SIZE
        and image[0].numpy().tolist() == pixels[..., 0].tolist()
    )
    assert scene.objects.boxes.tolist() == [[4, 6, 20, 14]] * 2
    assert torch.equal(scene.objects.masks(), torch.from_numpy(pixels[None, ..., 0] // 255).expand(2, -1, -1))
    asked = recipe(tmp_path, method="mask_rcnn", sides=(24,), hflip=0)
    image, scene, _ = ObjectSamples(source, asked, training=True)[0, 0]
    assert scene.objects.boxes.tolist() == [[4, 6, 20, 14]] * 2 and torch.equal(scene.masks[0], scene.masks[1])
    assert ((image[0] > 127) == scene.masks[0].bool()).all()
