"""Segmentation in tiles: an image of any size has the logits of the whole, whatever the host and the decoder."""

import pytest
import torch
from torch import nn

import linsight
from linsight.errors import CapabilityError, LinsightError

SMALL = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
HOSTS = {
    "compact": ("compact_nano", {"attention": "inline", "stem": ((8, 1), (12, 2)), "stages": ((16, 1, 2), (24, 1, 2))}),
    "swin": ("swin_tiny", {"attention": "inline", "attention_window": None, "embed_dim": 16, **SMALL}),
    "pvt_v2": ("pvt_v2_b0", {"attention": "linear", "depths": (1, 1, 1, 1)}),
    "vit": ("vit_tiny", {"attention": "linear", "depth": 2, "embed_dim": 32, "num_heads": 2}),
}


def segmenter(host, decoder="mlp"):
    torch.manual_seed(0)
    name, given = HOSTS[host]
    model = linsight.create_segmenter(name, decoder, 5, width=8, **given).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.running_mean)
    return model


PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def off(model, size, tile):
    """The largest difference of logits, of the largest."""
    image = torch.rand(*size, 3)
    with torch.no_grad():
        whole = model(image.permute(2, 0, 1)[None])
    parts = linsight.stream(model, image.numpy(), tile=tile, **PLAIN)
    return float((parts - whole).abs().max() / whole.abs().max())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [(128, 96), (101, 171)])
def test_it_is_as_the_whole_image(host, size):
    assert off(segmenter(host), size, tile=32) < 3e-6


def test_a_mask_is_of_the_largest_logits():
    model, image = segmenter("compact"), torch.rand(101, 171, 3)
    with torch.no_grad():
        model.decoder.classifier.bias -= model(image.permute(2, 0, 1)[None])[0].mean((1, 2))  # no class is everywhere
        whole = model(image.permute(2, 0, 1)[None])[0]
    mask = linsight.stream(model, image.numpy(), tile=32, output="mask", **PLAIN)
    assert mask.dtype == torch.uint8 and mask.shape == (101, 171)
    assert (mask == whole.argmax(0)).float().mean() > 0.995 and len(mask.unique()) > 2


@pytest.mark.parametrize("decoder", ["semantic_fpn", "upernet"])
def test_decoders_that_look_further(decoder):
    model = segmenter("compact", decoder)
    assert off(model, (139, 203), tile=48) < 5e-6
    shortened = type(model.decoder).margin
    try:
        type(model.decoder).margin = 0
        assert off(model, (139, 203), tile=48) > 1e-4, "the margin is needed"
    finally:
        type(model.decoder).margin = shortened


def test_maps_of_a_scratch_folder_are_kept_and_gone_on_with(tmp_path):
    model, image = segmenter("compact"), torch.rand(96, 128, 3).numpy()
    plain = {**PLAIN, "tile": 32, "output": "mask", "scratch": tmp_path / "maps"}
    whole = linsight.stream(model, image, **{**plain, "scratch": None})

    def stop(done, total):
        if done == total - 5:  # in the decoder, which reads the maps of both stages
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linsight.stream(model, image, report=stop, **plain)
    names = sorted(path.name for path in (tmp_path / "maps").glob("linsight-*.map"))
    assert len(names) == 2
    (tmp_path / "maps" / names[0]).rename(tmp_path / "away")
    with pytest.raises(LinsightError, match="is missing or damaged: delete the folder and start again"):
        linsight.stream(model, image, resume=True, **plain)
    (tmp_path / "away").rename(tmp_path / "maps" / names[0])
    seen = []
    again = linsight.stream(model, image, resume=True, report=lambda done, total: seen.append(done), **plain)
    assert torch.equal(again, whole) and seen[0] > 12
    assert [path.name for path in (tmp_path / "maps").iterdir() if path.name[0] != "."] == ["mask.npy"]


def test_what_does_not_stream_says_so():
    model = segmenter("compact")
    image = torch.rand(64, 64, 3).numpy()
    with pytest.raises(CapabilityError, match="output='features': a Segmenter gives logits, mask of an image in tiles"):
        linsight.stream(model, image, output="features")
    with pytest.raises(CapabilityError, match="output='mask': a Compact gives logits, features, map"):
        linsight.stream(linsight.create_model("inline_compact_nano").eval(), image, output="mask")
    windows = linsight.create_segmenter("compact_nano", "vwformer", 5, width=64, attention="inline").eval()
    with pytest.raises(CapabilityError, match="these decoders do not: mlp, semantic_fpn, upernet"):
        linsight.stream(windows, image, output="mask")
    pooled = segmenter("vit", "upernet")
    with pytest.raises(CapabilityError, match="sees an image at once"):
        linsight.stream(pooled, image, output="mask")
    with pytest.raises(CapabilityError, match="does not give the maps of an image in parts"):
        linsight.stream(linsight.create_segmenter("timm/resnet18", "mlp", 5, width=8).eval(), image, output="mask")
    detector = linsight.create_detector("compact_nano", num_classes=5, method="faster_rcnn").eval()
    with pytest.raises(CapabilityError, match="a detector does not stream"):
        linsight.stream(detector, image)
