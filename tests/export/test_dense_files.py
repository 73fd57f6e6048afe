"""Segmenters and detectors as files: masks and boxes are those of their runs, at sizes that the export did not see."""

import json

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from small_runs import CLASSES, DETECT, SEGMENT, write_run
from torchvision.ops import batched_nms
from torchvision.ops import boxes as box_ops

from linsight import create_detector, load_run
from linsight.errors import CheckpointError, LinsightError
from linsight.export import Facts, export_onnx, export_program, load_exported, open_exported
from linsight.export.trained import ExportPlan
from linsight.models.dense import METHODS
from linsight.train import load_trained, predict

pytestmark = pytest.mark.timeout(300)  # of a machine that is busy
FORMS = {"onnx": "m.onnx", "program": "m.pt2", "safetensors": "m.safetensors"}
SMALL = {"num_classes": 3, "channels": 8, "hidden": 16, "detections": 30, "attention": "linear"}
SMALL |= {"stem": ((8, 1),), "stages": ((16, 1, 2), (16, 1, 2))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures of three sizes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (height, width) in enumerate(((24, 32), (47, 33), (60, 90))):
        pixels = np.kron(rng.integers(0, 255, (12, 12, 3)), np.ones((8, 8, 1)))[:height, :width]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def made(folder, recipe):
    torch.manual_seed(0)
    return write_run(folder, recipe)


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return made(tmp_path_factory.mktemp("segment") / "run", SEGMENT)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return made(tmp_path_factory.mktemp("detect") / "run", DETECT)


def exported(linsight, run, path, form, *options):
    code, out, err = linsight("export", run, f"--{form}", path, *options, "--json")
    assert (code, err) == (0, ""), err
    (row,) = json.loads(out)
    assert row["error"] <= row["limit"] and len(row["checks"]) == 3
    return row


def assert_same_masks(path, run, photos):
    """An exported file and its run predict the same masks, but for pixels that a rounding decides."""
    wanted, _ = predict(load_trained(run), [photos], device="cpu", amp="off")
    loaded = load_trained(path) if path.suffix == ".safetensors" else load_exported(path)
    found, bad = predict(loaded, [photos], device="cpu", amp="off")
    assert bad == [] and loaded.task.name == "segment" and loaded.classes == CLASSES
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.mask.shape == theirs.mask.shape and (mine.mask != theirs.mask).mean() < 0.01
        assert len(theirs.classes) > 1


def assert_same_objects(path, run, photos, close=0.01):
    wanted, _ = predict(load_trained(run), [photos], device="cpu", amp="off")
    loaded = load_trained(path) if path.suffix == ".safetensors" else load_exported(path)
    found, bad = predict(loaded, [photos], device="cpu", amp="off")
    assert bad == [] and loaded.task.name == "detect" and sum(len(entry.boxes) for entry in wanted) > 3
    same = total = 0  # nobody trained it: objects as good as the same change places
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.size == theirs.size and abs(len(mine.boxes) - len(theirs.boxes)) <= 1
        for name, score, box in zip(theirs.classes, theirs.scores, theirs.boxes, strict=True):
            others = [place for place, other in enumerate(mine.classes) if other == name]
            near = [np.abs(np.array(mine.boxes[place]) - box).max() / max(mine.size) for place in others]
            apart = [abs(mine.scores[place] - score) for place in others]
            same += any(a < close and b < close for a, b in zip(near, apart, strict=True))
            total += 1
    assert same >= 0.9 * total > 0


def test_an_onnx_file_of_a_segmenter_is_its_run(masks, photos, tmp_path, linsight):
    path = tmp_path / "m.onnx"
    row = exported(linsight, masks, path, "onnx")
    assert (row["takes"], row["outputs"]) == ("float32 (B, C, H, W)", ["output"])
    assert_same_masks(path, masks, photos)
    opened = open_exported(path)
    images = torch.randn(3, 3, 31, 50)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(images), load_run(masks).model(images), rtol=1e-4, atol=1e-5)
    code, _, err = linsight("predict", path, photos, "--out", tmp_path / "out")
    assert code == 0 and "3 files of masks" in err
    assert np.asarray(Image.open(tmp_path / "out" / "2.png")).shape == (60, 90)


@pytest.mark.full
def test_an_onnx_file_of_a_detector_is_its_run(objects, photos, tmp_path, linsight):
    path = tmp_path / "m.onnx"
    row = exported(linsight, objects, path, "onnx")
    assert (row["takes"], row["outputs"]) == ("float32 (1, C, H, W)", ["boxes", "labels", "scores"])
    assert_same_objects(path, objects, photos)
    code, _, err = linsight("predict", path, photos, "--out", tmp_path / "out")
    assert code == 0 and "4 files of objects" in err
    opened = open_exported(path)
    assert opened.facts.single and opened.facts.task == "detect"
    boxes, labels, scores = opened.model(torch.zeros(1, 3, 33, 70))
    assert boxes.shape == (len(scores), 4) and labels.shape == scores.shape and (scores > 0.3).all()
    with pytest.raises(LinsightError, match=r"takes float32 \(1, 3, any, any\): float32 \(2, 3, 33, 70\) came"):
        opened.model(torch.zeros(2, 3, 33, 70))
    (least,) = (tensor for tensor in onnx.load(path).graph.initializer if tensor.name.endswith("score_thresh"))
    assert onnx.numpy_helper.to_array(least) == pytest.approx(0.3), "as the run has it, not as it was checked"


@pytest.mark.parametrize("kind", ["masks", "objects"])
def test_weights_are_a_run_again(kind, photos, tmp_path, linsight, request):
    run, path = request.getfixturevalue(kind), tmp_path / "m.safetensors"
    exported(linsight, run, path, "safetensors")
    {"masks": assert_same_masks, "objects": assert_same_objects}[kind](path, run, photos)


@pytest.mark.full
@pytest.mark.parametrize("form", ["onnx", "program"])
@pytest.mark.parametrize("side", [0, 40])
def test_pixels_in_and_a_mask_out(side, form, photos, tmp_path, linsight):
    run = made(tmp_path / "run", SEGMENT.changed(eval_side=side))
    path = tmp_path / FORMS[form]
    row = exported(linsight, run, path, form, "--preprocess")
    assert (row["takes"], row["outputs"]) == ("uint8 (B, H, W, C)", ["mask"])
    assert_same_masks(path, run, photos)
    pixels = torch.randint(0, 256, (2, 50, 41, 3), dtype=torch.uint8)
    mask = open_exported(path).model(pixels)
    assert mask.shape == (2, 50, 41) and mask.dtype == torch.uint8 and mask.max() < 3


@pytest.mark.full
@pytest.mark.parametrize("form", ["onnx", "program"])
@pytest.mark.parametrize("method", ["faster_rcnn", "mask_rcnn"])
def test_pixels_in_and_objects_out(method, form, photos, tmp_path, linsight):
    run = made(tmp_path / "run", DETECT.changed(method=method))
    path = tmp_path / FORMS[form]
    row = exported(linsight, run, path, form, "--preprocess")
    names = ["boxes", "labels", "scores", *(["masks"] if method == "mask_rcnn" else [])]
    assert (row["takes"], row["outputs"]) == ("uint8 (1, H, W, C)", names)
    assert_same_objects(path, run, photos, close=0.02)


@pytest.mark.full
@pytest.mark.parametrize("export", [export_onnx, export_program])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves(method, export, tmp_path):
    model = Graph(method).model
    path = tmp_path / ("m.onnx" if export is export_onnx else "m.pt2")
    done = export(model, path, facts=Facts(model="small", input_size=(3, 64, 96)))
    assert done.error < 1e-3 and done.facts.outputs[:3] == ("boxes", "labels", "scores")
    assert ("masks" in done.facts.outputs) == ("mask" in method)
    run, nothing = open_exported(path).model, torch.full((1, 3, 64, 64), 1e-3)
    found = run(nothing)
    found = found if isinstance(found, list) else [found[name] for name in done.facts.outputs]
    (wanted,) = model([nothing[0]])
    assert len(found[0]) == len(wanted["boxes"])


@pytest.mark.full
def test_a_static_file_takes_one_size(objects, photos, tmp_path, linsight):
    path = tmp_path / "m.onnx"
    row = exported(linsight, objects, path, "onnx", "--static", "--img-size", "40,54")
    assert row["img_size"] == [40, 54]
    code, _, err = linsight("predict", path, photos / "0.png")  # 40 x 53 as it is resized
    assert code == 2 and "takes float32 (1, 3, 40, 54)" in err and err.count("\n") == 1


def test_windows_have_no_form_from_pixels(masks, tmp_path, linsight):
    plan = load_trained(made(tmp_path / "run", SEGMENT.changed(eval_mode="slide")))
    with pytest.raises(LinsightError, match="eval_mode=slide has no form in a graph: export without --preprocess"):
        ExportPlan(plan, preprocess=True)


def test_half_precision_is_not_for_places(objects, tmp_path, linsight):
    code, out, err = linsight("export", objects, "--onnx", tmp_path / "m.onnx", "--half")
    assert (code, out) == (2, "") and "no form in half precision" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


class Graph:
    """A detector's own answer beside that of its graph."""

    def __init__(self, method):
        torch.manual_seed(0)
        self.model, self.image = create_detector("compact_pico", method, **SMALL).eval(), torch.rand(1, 3, 65, 90)
        for parameter in self.model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
        self.graph = self.model.as_graph().eval()
        with torch.no_grad():
            self.graph.least = self.graph.telling([self.image])
        self.heads = [part for part in self.model.modules() if hasattr(part, "detections_per_img")]
        for part in self.heads:
            part.score_thresh = self.graph.least


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_finds_what_its_detector_finds(method):
    pair = Graph(method)
    image, least = pair.image, pair.graph.least
    with torch.no_grad():
        (wanted,) = pair.model([image[0]])
        assert len(wanted["scores"]) > 3
        assert pair.graph.error_of(pair.graph(image), wanted) < 1e-5
        pair.graph.least = 1.0
        assert {name: len(values) for name, values in pair.graph(image).items()} == dict.fromkeys(wanted, 0)
    assert box_ops.batched_nms is batched_nms, "torchvision is as it was"
    assert all(part.score_thresh == least for part in pair.heads), "so is the detector"


@torch.no_grad()
def test_a_graph_is_asked_where_it_finds_something():
    pair = Graph("faster_rcnn")
    images = [torch.rand(1, 3, 65, 90), torch.rand(1, 3, 40, 33)]
    pair.graph.least = 1.0
    pair.graph.least = pair.graph.telling(images)
    assert all(0 < len(pair.graph(image)["scores"]) <= 30 for image in images)


def test_the_error_of_objects_is_that_of_the_nearest():
    graph = Graph("retinanet").graph
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 100], [5, 5, 9, 9]])
    wanted = {"boxes": boxes, "labels": torch.tensor([0, 1, 0]), "scores": torch.tensor([0.9, 0.8, 0.7])}

    def error(**changes):
        return graph.error_of({**wanted, **changes}, wanted)

    assert error() == 0
    turned = {name: values[[2, 0, 1]] for name, values in wanted.items()}
    assert error(**turned) == 0, "their order is that of their scores, which may be as good as the same"
    assert error(boxes=boxes + torch.tensor([0.0, 0, 0, 2])) == pytest.approx(2 / 102)
    assert error(scores=wanted["scores"] - 0.09) == pytest.approx(0.1)
    assert error(labels=torch.tensor([0, 2, 0])) == float("inf")
    assert error(**{name: values[:2] for name, values in wanted.items()}) > 0.1, "one is missed"
    none = {name: values[:0] for name, values in wanted.items()}
    assert error(**none) == float("inf") and graph.error_of(none, none) == 0
    many = {name: torch.cat([values] * 20) for name, values in wanted.items()}
    lost = {**many, "labels": many["labels"].clone()}
    lost["labels"][:3] = 7
    assert graph.error_of(lost, many) == 0, "one in twenty may be decided by a last digit"


def edited(path, target, **given):
    model = onnx.load(path)
    (entry,) = [entry for entry in model.metadata_props if entry.key == "linsight"]
    entry.value = json.dumps({**json.loads(entry.value), **given})
    target.write_bytes(model.SerializeToString())
    return target


def test_files_that_are_not_of_their_task_are_one_line(tmp_path):
    facts = Facts(model="small", classes=CLASSES, input_size=(3, 16, 16))
    path = tmp_path / "m.onnx"
    export_onnx(torch.nn.Conv2d(3, 3, 1).eval(), path, facts=facts)
    for given, told in (
        ({}, "gives maps (1, 3, 16, 16) and no classes"),
        ({"task": "detect"}, "gives no boxes, labels and scores, but output"),
        ({"task": "segment", "classes": ["a"]}, "names 1 classes and answers 3"),
        ({"task": "segment", "pixels": True}, "cannot be read|this file takes"),
        ({"task": "budget"}, "is of the task 'budget': classify, segment, detect are known"),
        ({"task": "segment", "recipe": {"eval_stride": 0}}, "eval_stride=0 never ends"),
    ):
        with pytest.raises((CheckpointError, LinsightError)) as error:
            load_exported(edited(path, tmp_path / "other.onnx", **given))
        assert any(part in str(error.value) for part in told.split("|")) and "\n" not in str(error.value)
