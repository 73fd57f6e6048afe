"""The benchmark of detection: a guess without a look, whose precision is that of pycocotools, and what it writes."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small import OBJECTS, boxed_squares

from linsight.data.detection import open_objects
from linsight.train import resolve

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import raccoon


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return boxed_squares(tmp_path_factory.mktemp("raccoon") / "data", {"train": 8, "val": 5})


def told(photos, split):
    """Images by id, and boxes x, y, width, height with their images, of a file."""
    said = json.loads((photos / "annotations" / f"{split}.json").read_text())
    return {image["id"]: image for image in said["images"]}, said["annotations"]


def test_the_mean_box_and_its_precision_are_those_of_the_files(photos, tmp_path):
    data = open_objects(resolve("objects", {"data": str(photos)}))
    images, rows = told(photos, "train")
    shares = []
    for row in rows:
        (left, top, wide, high), image = row["bbox"], images[row["image_id"]]
        ends = left, top, left + wide, top + high
        shares.append([x / image[side] for x, side in zip(ends, ("width", "height") * 2, strict=True)])
    wanted = torch.tensor(shares).mean(0)
    box = raccoon.mean_box(data.train)
    torch.testing.assert_close(box, wanted)
    guesses = []
    for number, image in told(photos, "val")[0].items():
        left, right = (float(x) * image["width"] for x in wanted[0::2])
        top, bottom = (float(x) * image["height"] for x in wanted[1::2])
        guesses.append(
            {"image_id": number, "category_id": 4, "bbox": [left, top, right - left, bottom - top], "score": 1}
        )
    (tmp_path / "guesses.json").write_text(json.dumps(guesses))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(photos / "annotations" / "val.json"))
        found = COCOeval(truth, truth.loadRes(str(tmp_path / "guesses.json")), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    ours = raccoon.precision_of(box, data.val)
    assert ours["ap50"] > 0 and [ours["ap"], ours["ap50"]] == pytest.approx(100 * found.stats[:2])


def test_the_result_stands_in_the_page_and_a_finished_run_is_taken_as_it_is(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        raccoon,
        "resolve",
        lambda name, given: resolve("digits", {**OBJECTS, "method": "retinanet", "figures": True} | given),
    )
    page = tmp_path / "detect.md"
    page.write_text("# before\n<!-- results: raccoon -->\nold\n<!-- end: raccoon -->\nafter\n")
    options = ["--data", str(photos), "--out", str(tmp_path / "run"), "--docs", str(tmp_path)]
    for _ in range(2):
        assert raccoon.main([*options, "--epochs", "1", "--amp", "off"]) == 0, capsys.readouterr().err
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text
    assert "(detect.jpg)" in text and (tmp_path / "detect.jpg").read_bytes()[:2] == b"\xff\xd8"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0][0] == "| 5 photographs of raccoons" and [len(row) for row in rows] == [7] * 4
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert raccoon.main([*options[:-1], "no/such"]) == 2 and capsys.readouterr().err.count("\n") == 1
