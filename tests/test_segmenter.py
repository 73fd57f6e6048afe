"""Segmentation: maps of any backbone and image, decoders against their definitions, what training and export ask."""

import copy
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import linsight
from linsight.models import HOSTS, VARIANTS
from linsight.models.dense import DECODERS, Segmented, Segmenter, create_decoder, pyramid
from test_hosts import NO_TOKEN, SMALL

ODD = ((97, 161), (33, 57), (5, 3), (1, 1))  # the last two smaller than a patch
TINY = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
decoders = pytest.mark.parametrize("decoder", DECODERS)
# Those whose maps are of a kind of their own, the others in the full run.
_OWN = ("vit_tiny", "compact_pico", "pvt_tiny", "cswin_tiny")
hosts = pytest.mark.parametrize(
    "host", [host if host in _OWN else pytest.param(host, marks=pytest.mark.full) for host in SMALL]
)
# At their own sizes: in the normal run one of each class, a fifth of all.
FIRST = {host.model_cls: name for name, host in reversed(HOSTS.items())}.values()
ALL = [*HOSTS, *(name for name, variant in VARIANTS.items() if variant.dense)]
every = pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.full) for name in ALL]
)


def small(host, attention="inline", **more):
    arguments = {key: value for key, value in SMALL[host].items() if key != "num_classes"}
    return pyramid(host, attention=attention, **{**arguments, **NO_TOKEN.get(host, {}), **more})


def segmenter(decoder="mlp", classes=5, **more):
    options = dict(OPTIONS.get(decoder, {}))
    more = {"width": options.pop("width", 8), "decoder_options": options, "attention": "inline", **TINY, **more}
    return linsight.create_segmenter("pvt_v2_b0", decoder, classes, **more)


def ceilings(size, strides):
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]


@hosts
def test_maps_of_any_image(host):
    backbone = small(host).eval()
    assert backbone.strides == ((2, 4) if host == "compact_pico" else (4, 8, 16, 32))
    for size in ODD:
        maps = backbone(torch.randn(1, 3, *size))
        assert [tuple(m.shape[2:]) for m in maps] == ceilings(size, backbone.strides)
        assert tuple(m.shape[1] for m in maps) == backbone.channels


@every
def test_maps_of_every_host(name):
    """Their shapes alone: nothing is computed."""
    backbone = pyramid(name, device="meta").eval()
    with torch.no_grad():
        maps = backbone(torch.empty(1, 3, *ODD[0], device="meta"))
    found = [(m.shape[1], *m.shape[2:]) for m in maps]
    assert found == [(c, *size) for c, size in zip(backbone.channels, ceilings(ODD[0], backbone.strides), strict=True)]
    assert name.startswith("compact") or backbone.strides == (4, 8, 16, 32)


@pytest.mark.parametrize("host", ["pvt_tiny", "flow_pyramid", "cswin_tiny", "l2vit_pyramid_tiny"])
def test_the_last_pixels_are_seen(host):
    """By hosts whose convolutions floor, too; of whole strides the maps are those of the model itself."""
    backbone = small(host, "softmax").eval()
    whole = torch.randn(1, 3, 64, 96)
    maps = backbone(whole)
    plain = linsight.create_model(host, **{**SMALL[host], **NO_TOKEN.get(host, {})}).eval()
    plain.load_state_dict({**plain.state_dict(), **backbone.model.model.state_dict()})
    for ours, theirs in zip(maps, plain.forward_intermediates(whole, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    x = torch.randn(1, 3, 33, 35)
    before = backbone(x)[-1]
    x[..., -1, -1] += 1
    assert not torch.allclose(backbone(x)[-1], before)


@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto"])
def test_models_of_timm(name):
    """As timm gives them of an image of whole strides, padded to one where it is not."""
    backbone = pyramid(name).eval()
    x = torch.randn(1, 3, 64, 96)
    wanted = backbone.model.model.forward_intermediates(x, intermediates_only=True)[-4:]
    for ours, theirs in zip(backbone(x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    for size in ODD[1:]:
        part = torch.zeros(1, 3, 64, 64)
        image = part[..., : size[0], : size[1]] = torch.randn(1, 3, *size)
        wanted = backbone(part if max(size) > 32 else part[..., :32, :32])
        for ours, whole, sides in zip(backbone(image), wanted, ceilings(size, backbone.strides), strict=True):
            torch.testing.assert_close(ours, whole[..., : sides[0], : sides[1]], rtol=1e-4, atol=1e-5)


def test_a_plain_vit_has_a_simple_pyramid():
    """ViTDet's scales, of patches of 8: by hand from the last map."""
    backbone = small("vit_tiny").eval()
    x = torch.randn(2, 3, 40, 56)
    (last,) = backbone.model(x)
    finest, second, third, coarsest = backbone(x)
    (up,) = backbone.up[0]
    torch.testing.assert_close(finest, F.conv_transpose2d(last, up.weight, up.bias, stride=2))
    torch.testing.assert_close(second, last)
    padded = F.pad(last, (0, 1, 0, 1), value=-1e9)  # 5x7 tokens
    torch.testing.assert_close(third, padded.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1)))
    assert coarsest.shape[2:] == (2, 2) and torch.equal(coarsest[..., 0, 0], last[..., :4, :4].amax((2, 3)))
    fine = small("vit_tiny", patch_size=16).up[0]
    assert [type(part).__name__ for part in fine] == ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "vit_tiny", "patch_size": 14}, "patch_size=16"),
        ({"name": "dynp_resnet18_t128"}, "gives no maps"),
        ({"name": "timm/resnet18", "attention": "inline"}, "without a linsight host"),
        ({"name": "swin_tiny", "num_classes": 3}, "leave it out"),
        ({"name": "timm/swim_tiny"}, "did you mean"),
    ],
)
def test_what_is_no_backbone(arguments, told):
    with pytest.raises(linsight.LinsightError, match=told):
        pyramid(**arguments)


def conv(block, x):
    """Convolution, batch norm by its statistics, ReLU."""
    weight, norm = block[0].weight, block[1]
    return F.relu(normed(norm, F.conv2d(x, weight, padding=weight.shape[-1] // 2)))


def normed(norm, x):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def enlarged(x, size):
    """Each token is the middle of a square of whole pixels, whatever the size of the image."""
    fits = (t for t in (1, 2, 4, 8, 16, 32) if all(-(-s // t) == n for s, n in zip(size, x.shape[2:], strict=True)))
    times = next(fits)
    return bilinear(x, [times * side for side in x.shape[2:]])[:, :, : size[0], : size[1]]


def bilinear(x, size):
    """As a sum over the two nearest rows and columns, whose centres are half pixels."""
    for axis, new in zip((2, 3), size, strict=True):
        old = x.shape[axis]
        place = ((torch.arange(new) + 0.5) * old / new - 0.5).clamp(0)
        low = place.floor().long().clamp(max=old - 1)
        part = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        high = (low + 1).clamp(max=old - 1)
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part
    return x


def linear(layer, x):
    """A 1x1 convolution as a matrix for each pixel."""
    return torch.einsum("bchw,kc->bkhw", x, layer.weight[..., 0, 0]) + layer.bias[:, None, None]


def mixed(part, maps):
    found = [enlarged(linear(layer, x), maps[0].shape[2:]) for layer, x in zip(part.linear, maps, strict=True)]
    return conv(part.fuse, torch.cat(found, 1))


def mlp(decoder, maps):
    return mixed(decoder.mix, maps)


def semantic_fpn(decoder, maps):
    """Lateral 1x1 and smoothing 3x3 convolutions, nearest from above; then i convolutions and steps upwards."""
    fpn, x, levels = decoder.pyramid, None, []
    for i in reversed(range(len(maps))):
        inner, outer = fpn.inner_blocks[i][0], fpn.layer_blocks[i][0]
        here = linear(inner, maps[i])
        if x is not None:
            rows, columns = (
                torch.arange(new) * old // new for new, old in zip(here.shape[2:], x.shape[2:], strict=True)
            )
            here = here + x[:, :, rows][..., columns]
        x = here
        levels.insert(0, F.conv2d(x, outer.weight, outer.bias, padding=1))
    total = conv(decoder.steps[0][0], levels[0])
    for i, x in enumerate(levels[1:], 1):
        for j in reversed(range(i)):
            x = enlarged(conv(decoder.steps[i][i - 1 - j], x), maps[j].shape[2:])
        total = total + x
    return total


def pooled(part, x, size):
    """The mean of each of size x size overlapping bins."""
    high, wide = x.shape[2:]
    rows, columns = ([(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in (high, wide))
    bins = [x[:, :, a:b, c:d].mean((2, 3)) for a, b in rows for c, d in columns]
    return bilinear(conv(part, torch.stack(bins, -1).unflatten(-1, (size, size))), (high, wide))


def upernet(decoder, maps):
    scales = [pooled(part, maps[-1], size) for part, size in zip(decoder.pools, (1, 2, 3, 6), strict=True)]
    x = conv(decoder.context, torch.cat([maps[-1], *scales], 1))
    found = [x]
    for i in reversed(range(len(maps) - 1)):
        x = conv(decoder.laterals[i], maps[i]) + enlarged(x, maps[i].shape[2:])
        found.insert(0, conv(decoder.smooth[i], x))
    return conv(decoder.fuse, torch.cat([enlarged(x, maps[0].shape[2:]) for x in found], 1))


def varied(scale, x):
    """Varying windows step by step: pieces copied beside the map, then one window after the other, of 8 x 8."""
    ratio, heads = scale.ratio, scale.num_heads
    batch, dim, *sides = x.shape
    wider = reduced(scale.reduce, x, ratio)
    for axis, side in ((2, sides[0]), (3, sides[1])):
        length = ratio * side // 8
        left = (length - side // 8) // 2
        right = length - side // 8 - left
        wider = torch.cat(
            [wider.narrow(axis, length - left, left), wider, wider.narrow(axis, side - length, right)], axis
        )
    p, r = sides[0] // 8, sides[1] // 8
    out = torch.zeros_like(x)
    for i, j in itertools.product(range(8), range(8)):
        window = x[:, :, i * p : (i + 1) * p, j * r : (j + 1) * r]
        context = wider[:, :, i * p : (i + ratio) * p, j * r : (j + ratio) * r]
        tokens = torch.zeros(batch, dim, p, r)
        for down, along in itertools.product(range(ratio), range(ratio)):
            tokens[:, down * ratio + along :: ratio**2] = context[:, :, down::ratio, along::ratio]
        pairs = ((scale.q, window), (scale.k, tokens), (scale.v, tokens))
        q, k, v = (linear(layer, t).flatten(2).unflatten(1, (heads, -1)) for layer, t in pairs)
        scores = torch.einsum("bhdn,bhdm->bhnm", q, k) / q.shape[2] ** 0.5
        read = torch.einsum("bhnm,bhdm->bhdn", scores.softmax(-1), v)
        out[:, :, i * p : (i + 1) * p, j * r : (j + 1) * r] = read.flatten(1, 2).unflatten(2, (p, r))
    return normed(scale.proj[1], F.conv2d(out, scale.proj[0].weight))


def reduced(block, x, ratio):
    """A sum over the places of an even kernel, whose middle is left of the pixel."""
    before = ratio // 2 - 1
    x = F.pad(x, (before, ratio // 2, before, ratio // 2))
    places = x.unfold(2, ratio, 1).unfold(3, ratio, 1)
    return F.relu(normed(block[1], torch.einsum("bchwij,kcij->bkhw", places, block[0].weight)))


def vwformer(decoder, maps):
    x = mixed(decoder.mix, maps[1:] or maps)
    high, wide = x.shape[2:]
    whole = F.pad(x, (0, -wide % 8, 0, -high % 8))
    scales = [varied(scale, whole)[:, :, :high, :wide] for scale in decoder.scales]
    x = conv(decoder.join, torch.cat([conv(decoder.short, x), pooled(decoder.pool, x, 1), *scales], 1))
    if not maps[1:]:
        return x
    return conv(decoder.fuse, torch.cat([enlarged(x, maps[0].shape[2:]), conv(decoder.low, maps[0])], 1))


DEFINITIONS = {"mlp": mlp, "semantic_fpn": semantic_fpn, "upernet": upernet, "vwformer": vwformer}
# Small forms: a context of 8 windows has 1/64 of the channels.
OPTIONS = {"semantic_fpn": {"fpn_width": 12}, "vwformer": {"width": 64, "num_heads": 2}}
SHAPES = ((25, 41), (13, 21), (7, 11), (4, 6))


def shaken(module):
    """With norms that are no identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module.eval()


@decoders
@pytest.mark.parametrize("count", [1, 2, 4])
def test_decoders_are_their_definitions(decoder, count):
    torch.manual_seed(count)
    channels = (6, 8, 10, 12)[-count:]
    head = shaken(create_decoder(decoder, channels, 5, **{"width": 8, **OPTIONS.get(decoder, {})}))
    maps = [torch.randn(2, dim, *size) for dim, size in zip(channels, SHAPES, strict=False)]
    with torch.no_grad():
        wanted = linear(head.classifier, DEFINITIONS[decoder](head, maps))
        torch.testing.assert_close(head(maps), wanted, rtol=1e-4, atol=1e-5)


@decoders
def test_every_pixel_has_classes(decoder):
    model = segmenter(decoder).eval()
    for size in ODD:
        with torch.no_grad():
            assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@decoders
def test_training(decoder):
    """The auxiliary head speaks in training alone; every parameter learns; norms become those of all processes."""
    model = segmenter(decoder, auxiliary=True, dropout=0.0)
    x = torch.randn(2, 3, 49, 67)
    found = model(x)
    assert isinstance(found, Segmented) and model.auxiliary_weight == 0.4
    wanted = model.auxiliary.classifier(model.auxiliary.conv(model.backbone(x)[2]))
    torch.testing.assert_close(found.auxiliary, enlarged(wanted, x.shape[2:]))
    (found.main.square().mean() + found.auxiliary.square().mean()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    model.eval()
    torch.testing.assert_close(model(x), enlarged(model.decoder(model.backbone(x)), x.shape[2:]))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in synced.decoder.modules())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"decoder": "upernett"}, "did you mean 'upernet'"),
        ({"classes": 0}, "num_classes=0"),
        ({"width": 0}, "width=0"),
        ({"dropout": 2}, "dropout=2"),
        ({"decoder_options": {"depth": 3}}, "depth"),
        ({"decoder": "vwformer", "width": 100}, "a multiple of 64"),
        ({"decoder": "vwformer", "decoder_options": {"ratios": (3,)}}, "2, 4, 6 or 8 windows"),
    ],
)
def test_what_is_no_segmenter(arguments, told):
    with pytest.raises(linsight.LinsightError, match=told):
        segmenter(**arguments)


@pytest.mark.parametrize("decoder", ["upernet", "vwformer"])
def test_one_image_alone_gives_no_statistics(decoder):
    with pytest.raises(linsight.LinsightError, match="2 images or more"):
        segmenter(decoder)(torch.randn(1, 3, 64, 64))


def test_images_that_it_cannot_take():
    model, x = segmenter().eval(), torch.randn(1, 3, 64, 64)
    for wrong in (x[0], x[:, :1], x.half(), x.long(), [x[0]], None):
        with pytest.raises(linsight.LinsightError, match="images") as caught:
            model(wrong)
        assert "\n" not in str(caught.value)
    for part in (model, model.backbone):
        with pytest.raises(linsight.LinsightError, match=r"torch\.export") as caught:
            torch.fx.symbolic_trace(part)
        assert "\n" not in str(caught.value)


def test_without_an_auxiliary_head():
    model = segmenter()
    assert model(torch.randn(2, 3, 32, 32)).auxiliary is None and model.auxiliary_weight == 0


def test_what_training_asks_of_it():
    model = segmenter(auxiliary=True, drop_path_rate=0.1)
    named = dict(model.named_parameters())
    groups = group_parameters(model, model.group_matcher())
    assert sorted(name for names in groups.values() for name in names) == sorted(named)
    last = set(groups[max(groups)])
    assert {name for name in named if not name.startswith("backbone.")} <= last and len(groups) > 4
    assert any(name.startswith("backbone.") for name in groups[min(groups)])
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.backbone.model.model.stages)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and model.default_cfg["num_classes"] == 5
    model.reset_classifier(3)
    assert [m.shape[1] for m in model(torch.randn(2, 3, 40, 40))] == [3, 3] == [model.num_classes] * 2
    with pytest.raises(linsight.LinsightError, match="does not go with"):
        Segmenter(model.backbone, create_decoder("mlp", (4, 4), 3))


@decoders
def test_it_travels(decoder):
    model = segmenter(decoder).eval()
    x = torch.randn(1, 3, 45, 61)
    with torch.no_grad():
        wanted = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), wanted)
    empty = segmenter(decoder, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in empty.parameters())
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


STAGES = [(8, 1, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)]


def dense(**more):
    return linsight.create_segmenter("mlla_tiny_dense", "mlp", 5, width=8, stages=STAGES, **more)


def values(model):
    """Its state without the counters of batch norms, which no checkpoint fills."""
    return {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}


def of_another_library(backbone):
    """A checkpoint as segmenters are published: the backbone by its own keys beside heads that linsight lacks."""
    state = {f"backbone.{key}": tensor + 1 for key, tensor in linsight.export_published(backbone).items()}
    assert "backbone.norm2.weight" in state and "backbone.patch_embed.conv1.conv.weight" in state
    heads = {"decode_head.conv_seg.weight": torch.ones(5, 8, 1, 1), "auxiliary_head.convs.0.bn.bias": torch.ones(8)}
    return {"meta": {"epoch": 1}, "state_dict": {**state, **heads}, "optimizer": {}}


def test_published_checkpoints_fill_the_backbone():
    source, model = dense(), dense()
    before, wanted = copy.deepcopy(model.state_dict()), source.backbone.state_dict()
    file = of_another_library(source.backbone)
    report = linsight.load_published(model, file)
    for key, tensor in values(model).items():
        inside = key.startswith("backbone.")
        assert torch.equal(tensor, wanted[key.removeprefix("backbone.")] + 1 if inside else before[key]), key
        assert key in (report.loaded if inside else report.kept)
    backbone = pyramid("mlla_tiny_dense", stages=STAGES)
    report = linsight.load_published(backbone, file)
    assert any("decode_head" in line for line in report.dropped)
    assert all(torch.equal(tensor, wanted[key] + 1) for key, tensor in values(backbone).items())
    del file["state_dict"]["backbone.norm1.bias"]
    with pytest.raises(linsight.LinsightError, match=r"1 of \d+ tensors differ"):
        linsight.load_published(model, file)


def test_our_checkpoints_fill_all():
    source = dense(auxiliary=True)
    for state in (source.state_dict(), linsight.export_published(source)):
        model = dense(auxiliary=True)
        report = linsight.load_published(model, {"model": state})
        assert set(report.loaded) >= dict(model.named_parameters()).keys()
        assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in model.state_dict().items())
    other = linsight.create_segmenter("mlla_tiny_dense", "mlp", 7, width=8, stages=STAGES)
    report = linsight.load_published(other, dense().state_dict(), head=False)
    assert {key for key in report.kept if key.startswith("decoder.classifier")}


@pytest.mark.parametrize("host", ["vit_tiny", "swin_tiny"])
def test_weights_of_a_classifier(host):
    """What makes maps of other strides of a ViT is new."""
    model = linsight.create_model(host, attention="inline", **{**SMALL[host], **NO_TOKEN.get(host, {})})
    backbone = small(host)
    report = linsight.load_published(backbone, linsight.export_published(model), head=False)
    assert all(key.startswith("up.") for key in report.kept)
    state = model.state_dict()
    for key, tensor in backbone.model.model.state_dict().items():
        torch.testing.assert_close(tensor, state[key])


def test_the_page_lists_every_decoder():
    page = (Path(__file__).parents[1] / "docs" / "dense.md").read_text(encoding="utf-8")
    for name, row in DECODERS.items():
        found = re.search(rf"^\| `{name}` \| .* \| (\d+) \| (yes|-) \| .*, arXiv (\S+) \|$", page, re.MULTILINE)
        assert found and found.groups() == (str(row.width), "yes" if row.auxiliary else "-", row.paper.arxiv)


SIZES = ((64, 64), (160, 96), (131, 97), (67, 149), (96, 96))


def traceable(decoder):
    """With the fewest layers that have all there is to trace, which is slow.

    Windows have several pixels a side at all sizes: a side of one is a graph of its own.
    """
    options, stem = {"width": 8, **OPTIONS.get(decoder, {})}, [(8, 4)]
    if decoder == "vwformer":
        options, stem = {"width": 8, "num_heads": 2, "ratios": (2,)}, [(8, 1)]
    backbone = pyramid("compact_pico", attention="efficient", stem=stem, stages=[(8, 1, 2), (16, 1, 2)])
    return Segmenter(
        backbone, create_decoder(decoder, backbone.channels, 5, strides=backbone.strides, **options)
    ).eval()


def some_in_full(*normal):
    return [name if name in normal else pytest.param(name, marks=pytest.mark.full) for name in DECODERS]


@pytest.mark.full
@pytest.mark.parametrize("decoder", DECODERS)
def test_two_graphs_for_five_sizes(decoder):
    torch._dynamo.reset()
    model = traceable(decoder)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("decoder", some_in_full("mlp"))
def test_export_with_any_height_and_width(decoder):
    model = traceable(decoder)
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(1, 3, 64, 96),), dynamic_shapes=(sides,)).module()
    for size in SIZES[1:4]:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
