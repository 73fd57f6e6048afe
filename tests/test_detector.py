"""Detectors: sizes that were published, labels, levels and losses against their definitions, any backbone."""

import math

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from linsight import create_detector
from linsight.errors import LinsightError
from linsight.models.dense import METHODS, pyramid
from linsight.models.dense.cascade import refined
from linsight.models.dense.levels import Anchors, LevelOf

SMALL = {"num_classes": 3, "channels": 8, "hidden": 16, "samples": 32}
# Two levels, the usual four, and one.
PYRAMIDS = [*((method, (4, 8)) for method in METHODS), *((name, (4, 8, 16, 32)) for name in ("mask_rcnn", "retinanet"))]
PYRAMIDS += [(name, (16,)) for name in ("cascade_rcnn", "retinanet")]


class Body(nn.Module):
    """A backbone of one convolution a stage, which keeps what it was given."""

    def __init__(self, strides=(4, 8)):
        super().__init__()
        self.strides, self.channels = strides, tuple(4 + place for place in range(len(strides)))
        widths = (3, *self.channels)
        ends = zip(widths, self.channels, (1, *strides), strides, strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(old, new, to // by, to // by) for old, new, by, to in ends)

    def forward(self, x):
        self.seen, maps = x, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def small(method, strides=(4, 8), **changes):
    return create_detector(Body(strides), method, **{**SMALL, **changes})


def pictures():
    """Two images of different sizes, of which the second has no object."""
    images = [torch.rand(3, 70, 61), torch.rand(3, 64, 96)]
    one = {"boxes": torch.tensor([[3.0, 4.0, 30.0, 50.0]]), "labels": torch.tensor([2])}
    one["masks"] = torch.zeros(1, 70, 61, dtype=torch.uint8)
    one["masks"][0, 4:50, 3:30] = 1
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    return images, [one, {**none, "masks": torch.zeros(0, 64, 96, dtype=torch.uint8)}]


@pytest.mark.parametrize(
    "name, method, millions",
    [
        ("agent_swin_tiny", "mask_rcnn", 48),
        ("agent_swin_tiny", "cascade_mask_rcnn", 86),
        ("agent_pvt_tiny", "retinanet", 21),
        ("mlla_tiny", "mask_rcnn", 44),
    ],
)
def test_detectors_have_the_parameters_that_were_published(name, method, millions):
    with torch.device("meta"):
        model = create_detector(pyramid(name, device="meta"), method, num_classes=80)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("method, strides", PYRAMIDS)
def test_every_method_learns_and_finds_on_any_pyramid(method, strides):
    model, (images, targets) = small(method, strides, detections=9, score_thresh=0.0), pictures()
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        found = model.eval()(images)
    for image, own in zip(images, found, strict=True):
        height, width = image.shape[1:]
        count = len(own["scores"])
        assert 0 < count <= 9 and own["boxes"].shape == (count, 4)
        assert ((own["boxes"] >= 0) & (own["boxes"] <= torch.tensor([width, height] * 2))).all()
        assert set(own["labels"].tolist()) <= {0, 1, 2}
        assert ("masks" in own) == ("mask" in method)
        if "masks" in own:
            assert own["masks"].shape == (count, 1, height, width)
            assert ((own["masks"] >= 0) & (own["masks"] <= 1)).all()


def heads(model):
    return getattr(model.roi_heads, "stages", [model.roi_heads])


@torch.no_grad()
def answer_always(model, *biases):
    """Let the heads give the same logits and the boxes that they are given, whatever they see."""
    for head, bias in zip(heads(model), biases, strict=True):
        head.box_predictor.cls_score.weight.zero_()
        head.box_predictor.cls_score.bias.copy_(torch.tensor(bias))
        head.box_predictor.bbox_pred.weight.zero_()
        head.box_predictor.bbox_pred.bias.zero_()
    return model


@pytest.mark.parametrize("method", ["faster_rcnn", "cascade_rcnn"])
def test_labels_are_those_of_the_caller(method):
    images, targets = pictures()  # whose object is of class 2
    even = (0.0, -30.0, -30.0, 0.0)  # as likely nothing as class 2, and nothing else
    model = small(method)
    answer_always(model, *[even] * len(heads(model)))
    losses = model.train()(images, targets)
    said = [float(loss.detach()) for name, loss in losses.items() if name.startswith("loss_classifier")]
    weights = [1.0, 0.5, 0.25] if "cascade" in method else [1.0]
    assert said == pytest.approx([weight * math.log(2) for weight in weights], rel=1e-5)
    found = model.eval()(images)
    assert {label for own in found for label in own["labels"].tolist()} == {2}


def test_a_cascade_gives_the_mean_of_its_logits():
    biases = [(0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (3.0, 0.0, 4.0, 0.0)]
    model = answer_always(small("cascade_rcnn", score_thresh=0.3), *biases)
    found = model.eval()(pictures()[0])
    expected = torch.tensor(biases).mean(0).softmax(0)[2]
    assert len(found[0]["scores"]) and torch.allclose(found[0]["scores"], expected)


def test_the_loss_of_boxes_in_a_cascade_is_giou():
    stage = small("cascade_rcnn").roi_heads.stages[1]
    boxes = torch.zeros(3, 4, 4)
    boxes[0, 2], boxes[1, 3] = torch.tensor([0.0, 0, 1, 1]), torch.tensor([0.0, 0, 2, 2])
    objects = torch.tensor([[2.0, 0, 3, 1], [0, 0, 2, 2], [0, 0, 9, 9]])
    labels = [torch.tensor([2, 3]), torch.tensor([0])]
    # Apart, with a union of 2 in a hull of 3: 1 + 1/3. The same: 0. No object: not counted. All over three regions.
    losses = stage.losses(torch.zeros(3, 4), boxes, labels, objects)
    assert float(losses["loss_box_reg"]) == pytest.approx(0.5 * 10 * (4 / 3) / 3)
    assert float(losses["loss_classifier"]) == pytest.approx(0.5 * math.log(4))


def test_a_stage_goes_on_from_the_box_of_the_class():
    logits = torch.tensor([[9.0, 1, 2], [9, 2, 1]])
    boxes = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(refined(logits, boxes), torch.stack([boxes[0, 2], boxes[1, 1]]))
    assert torch.equal(refined(logits, boxes, torch.tensor([1, 0])), torch.stack([boxes[0, 1], boxes[1, 1]]))


def test_anchors_lie_at_known_strides():
    anchors = Anchors((32, 64), base=8)
    maps = [torch.zeros(1, 1, 25, 25), torch.zeros(1, 1, 13, 13)]  # of 800 pixels, which 13 does not divide
    images = type("Images", (), {"image_sizes": [(800, 800)], "tensors": torch.zeros(1, 3, 800, 800)})
    (found,) = anchors(images, maps)
    centres = (found[:, :2] + found[:, 2:]) / 2
    assert centres[: 25 * 25 * 3].max() == 24 * 32 and centres[25 * 25 * 3 :].max() == 12 * 64
    areas = (found[:, 2:] - found[:, :2]).prod(1).sqrt()
    assert torch.allclose(areas[:3], torch.tensor(256.0), rtol=5e-3)
    assert torch.allclose(areas[-3:], torch.tensor(512.0), rtol=5e-3)


def test_levels_are_those_of_the_paper():
    sides = torch.tensor([5.0, 55, 111, 113, 223, 225, 447, 449, 5000])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)
    by_formula = [min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2 for side in sides.tolist()]
    assert LevelOf((4, 8, 16, 32))([boxes[:4], boxes[4:]]).tolist() == by_formula


def test_places_are_float32_under_autocast():
    images, targets = pictures()
    images = [torch.nn.functional.interpolate(image[None], scale_factor=5)[0] for image in images]
    model, found = small("faster_rcnn", score_thresh=0.0), []
    model.roi_heads.register_forward_pre_hook(lambda _, given: found.extend(given[1]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.eval()(images)
        losses = model.train()(images, [{**own, "boxes": own["boxes"] * 5} for own in targets])
    places = torch.cat(found)
    assert places.dtype == torch.float32 and (places != places.bfloat16()).any()
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_images_are_left_as_the_pipeline_made_them():
    model, (images, _) = small("retinanet"), pictures()
    model.eval()(images)
    seen = model.backbone.body.seen
    assert seen.shape == (2, 3, 96, 96)  # the largest sides, to a multiple of 32
    assert torch.equal(seen[0, :, :70, :61], images[0]) and not seen[0, :, 70:].any()


def test_images_are_resized_where_that_is_asked_for():
    model = small("faster_rcnn", min_size=128, max_size=150, score_thresh=0.0)
    (found,) = model.eval()([torch.rand(3, 32, 48)])
    assert model.backbone.body.seen.shape[2:] == (128, 160)  # 100 x 150, padded
    assert found["boxes"][:, 2].max() <= 48 and found["boxes"][:, 2].max() > 24  # in the pixels of what was given


def broken(**changes):
    images, targets = pictures()
    return images, [{**targets[0], **changes}, targets[1]]


@pytest.mark.parametrize(
    "given, line",
    [
        (lambda: (pictures()[0], None), "2 images, none given"),
        (lambda: (pictures()[0], pictures()[1][:1]), "2 images, 1 given"),
        (lambda: broken(labels=torch.tensor([3])), "labels outside of 0 .. 2"),
        (lambda: broken(labels=torch.tensor([0, 1])), r"'labels' of shape \(2,\)"),
        (lambda: broken(masks=torch.zeros(1, 5, 5)), r"'masks' of shape \(1, 5, 5\): mask_rcnn wants"),
        (lambda: broken(boxes=torch.tensor([[30.0, 4, 3, 50]])), "without height or width"),
        (lambda: broken(boxes=torch.tensor([[3, 4, math.nan, 50]])), "with NaN"),
        (lambda: broken(boxes=torch.tensor([[3, 4, math.inf, 50]])), "with NaN"),
        (lambda: broken(boxes=torch.tensor([[3, 4, 30, 50]])), "boxes of torch.int64"),
        (lambda: broken(labels=torch.tensor([2.0])), "labels of torch.float32"),
        (lambda: (pictures()[0], [["boxes"], "labels"]), "target 0 is a list"),
        (lambda: ([], []), "one image or more"),
    ],
)
def test_targets_of_another_form_are_refused(given, line):
    with pytest.raises(LinsightError, match=line):
        small("mask_rcnn").train()(*given())


@pytest.mark.parametrize("method", METHODS)
def test_labels_may_be_of_any_whole_numbers(method):
    images, targets = pictures()
    model, losses = small(method).train(), []
    for dtype in (torch.long, torch.int32, torch.uint8):
        torch.manual_seed(0)
        found = model(images, [{**target, "labels": target["labels"].to(dtype)} for target in targets])
        losses.append(sum(found.values()))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    "images, line",
    [
        (torch.rand(3, 64, 64), r"of shape \(1, 64, 64\)"),
        (torch.rand(1, 4, 64, 64), r"takes \(batch, 3, height, width\)"),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)], "torch.uint8, not floating point"),
        (["photo.jpg"], "images are a str"),
    ],
)
def test_images_of_another_form_are_refused(images, line):
    model = create_detector("inline_compact_pico", "retinanet", **SMALL).eval()
    with pytest.raises(LinsightError, match=line):
        model(images)
    assert model([]) == model(torch.empty(0, 3, 64, 64)) == []


@pytest.mark.parametrize(
    "arguments, line",
    [
        ({"method": "mask_rnn"}, "did you mean 'mask_rcnn'"),
        ({"method": "retinanet", "num_classes": 0}, "num_classes=0 must be 1 or more"),
        ({"method": "retinanet", "in_chans": 4}, "in_chans= is for a backbone by name"),
    ],
)
def test_what_is_no_detector_is_refused(arguments, line):
    with pytest.raises(LinsightError, match=line):
        small(**arguments)


def test_it_tells_what_its_backbone_tells():
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
    model = create_detector("vit_tiny", "faster_rcnn", attention="inline", **SMALL, **sizes)
    names = [name for name, _ in model.named_parameters()]
    groups = group_parameters(model, model.group_matcher())
    first, last = groups[0], groups[max(groups)]
    assert any(name.endswith("pos_embed") for name in first) and any("patch_embed" in name for name in first)
    assert set(last) >= {name for name in names if not name.startswith("backbone.body.model.")}
    assert any(name.endswith("pos_embed") and name in names for name in model.no_weight_decay())
    assert model.pretrained_cfg["input_size"][0] == model.in_chans == 3
    assert {"rpn", "roi_heads", "backbone.fpn"} <= set(model.pretrained_cfg["classifier"])
