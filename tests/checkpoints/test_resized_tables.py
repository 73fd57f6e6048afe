"""Checkpoints of a smaller build in a larger one: every position table is resampled, and nothing else changes."""

import math
import re

import pytest
import torch
from test_families import WINDOW, attentions, distinct, hosts, of_timm
from test_load_published import refused
from torch.nn import functional as F

from linsight import export_published, load_published
from linsight.checkpoints.report import ROWS
from linsight.errors import CheckpointError
from test_hosts import build

# What the same model is built with for larger images.
LARGER = {
    "vit_tiny": {"img_size": 48},
    "compact_pico": {"img_size": 16},
    "pvt_tiny": {"img_size": 96},
    "pvt_v2_b0": {"img_size": 320},
    "swin_tiny": {"img_size": 96, "window_size": 4},
    "cswin_tiny": {"img_size": 96},
    "mlla_pyramid_tiny": {"img_size": 96},
    "h_vit_tiny": {"img_size": 96},
    "soft_pyramid_tiny": {"img_size": 96},
    "l2vit_pyramid_tiny": {"img_size": 96},
    "flow_pyramid": {"img_size": 96},
    "transnext_small": {"img_size": 96},
    "nat_pyramid_small": {"img_size": 96},
    "van_pyramid_b0": {"img_size": 96},
    "attnet_pyramid_xxs": {"img_size": 96},
    "litv2_pyramid_small": {"img_size": 96},
    "ravlt_t": {"img_size": 96},
    "nala_xt": {"img_size": 96},
    "ravlt_linear_b0": {"img_size": 96},
}
TABLES = re.compile(r"(.*\.)?(positional_encoding|relative_position_bias_table|pos_embed[1-4]?)")


def resampled(table, target, **options):
    """A square table at the size of another one, straight from the definition. The first rows stay."""
    if table.ndim == 2:  # (places, heads)
        return resampled(table[None], target[None])[0]
    prefix = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    old, new = (math.isqrt(t.shape[1]) for t in (table, target))
    canvas = table[:, prefix:].transpose(1, 2).unflatten(2, (old, old))
    canvas = F.interpolate(canvas, (new, new), mode="bicubic", align_corners=False, **options)
    return torch.cat([table[:, :prefix], canvas.flatten(2).transpose(1, 2)], dim=1)


@attentions
@hosts
def test_tables_of_a_smaller_build_are_resized(host, attention):
    source, model = distinct(build(host, attention)), build(host, attention, **LARGER[host])
    state, before = export_published(source), export_published(model)
    tables = [key for key in state if TABLES.fullmatch(key)]
    if tables:
        summary, *rows = refused(model, state, resize=False).splitlines()
        assert f"{len(tables)} of {len(state)} tensors differ" in summary
        assert all("pass resize=True" in row for row in rows[1 : 1 + len(tables)][:ROWS])
        assert {row.split()[0] for row in rows[1:][:ROWS]} <= set(tables) and len(rows) <= ROWS + 2
    report = load_published(model, state)
    assert [line.split()[0] for line in report.resized] == tables
    for key, tensor in export_published(model).items():
        if key not in tables:
            assert torch.equal(tensor, state[key]), key
            continue
        # The ViT host resamples its table as timm does, in its forward too.
        options = {"antialias": True} if key == "pos_embed" and host == "vit_tiny" else {}
        assert state[key].shape != before[key].shape == tensor.shape
        torch.testing.assert_close(tensor, resampled(state[key], before[key], **options), msg=key)


def test_every_table_is_named():
    report = load_published(build("pvt_tiny", "focused", img_size=96), export_published(build("pvt_tiny", "focused")))
    assert report.resized[:4] == (
        "pos_embed1 from 16x16 to 24x24",
        "block1.0.attn.positional_encoding from 16x16 to 24x24",
        "pos_embed2 from 8x8 to 12x12",
        "block2.0.attn.positional_encoding from 8x8 to 12x12",
    )
    assert "pos_embed4 from 2x2 to 3x3" in report.resized


def test_windows_of_7_to_12():
    """In the last stages a window is the whole grid, so theirs are others."""
    source = distinct(build("swin_tiny", "softmax", window_size=7))
    model = build("swin_tiny", "softmax", img_size=96, window_size=12)
    sizes = [line.split(" from ")[1] for line in load_published(model, export_published(source)).resized]
    assert sizes == ["7x7 to 12x12"] * 4 + ["4x4 to 6x6", "2x2 to 3x3"]
    old, new = (m.layers[0].blocks[1].attn.relative_position_bias_table.detach() for m in (source, model))
    assert new.shape == (23**2, 1)
    torch.testing.assert_close(new, resampled(old, new))


def test_rows_of_class_tokens_stay():
    source, model = distinct(build("pvt_tiny", "softmax")), build("pvt_tiny", "softmax", img_size=(64, 160))
    state = export_published(source)
    report = load_published(model, state)
    assert "pos_embed4 from 2x2 to 2x5" in report.resized
    table = model.stages[3].pos_embed
    assert table.shape == (1, 11, 16) and torch.equal(table[:, 0], state["pos_embed4"][:, 0])
    canvas = state["pos_embed4"][:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    wanted = F.interpolate(canvas, (2, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(table[:, 1:].transpose(1, 2).unflatten(2, (2, 5)), wanted)


def test_windows_of_timm_are_resized():
    state = export_published(distinct(build("swin_tiny", "softmax")))
    for model in (of_timm("swin_tiny"), build("swin_tiny", "softmax", **WINDOW["swin_tiny"])):
        report = load_published(model, state)
        assert len(report.resized) == 5 and all(line.endswith("3x3 to 4x4") for line in report.resized)
        key = "layers.1.blocks.1.attn.relative_position_bias_table"
        torch.testing.assert_close(model.state_dict()[key], resampled(state[key], model.state_dict()[key]))
    with pytest.raises(CheckpointError, match="pass resize=True"):
        load_published(of_timm("swin_tiny"), state, resize=False)


def test_a_stage_that_falls_within_a_stripe():
    """2x4 tokens are cut into stripes of both kinds, 2x2 are seen whole: a convolution lies in two parts, or in one."""
    wide = distinct(build("cswin_tiny", "softmax", img_size=(32, 64)))
    square = build("cswin_tiny", "softmax", img_size=32)
    state = export_published(wide)
    load_published(square, state)
    found = export_published(square)
    for leaf in ("weight", "bias"):
        stem = "stage3.0.attns.{}.get_v." + leaf
        halves = [state[stem.format(i)] for i in range(2)]
        assert torch.equal(found[stem.format(0)], torch.cat(halves)) and stem.format(1) not in found
    back = build("cswin_tiny", "softmax", img_size=(32, 64))
    load_published(back, found)
    assert all(torch.equal(tensor, state[key]) for key, tensor in export_published(back).items())
