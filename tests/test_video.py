"""Models of videos: scans against their recurrence, causality, any size and length, tables, keys of image models."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from timm.models import group_parameters

import linsight
from linsight.attention import list_attentions
from linsight.errors import CheckpointError, LinsightError
from linsight.models import create_video_model
from linsight.models.parts.positions import with_positions
from linsight.models.video import RGLRU, TemporalBlock, from_flax
from linsight.models.video.clips import MODE, cut
from linsight.models.video.videomamba import inflated
from linsight.ops import Tile, linear_scan, selective_scan
from linsight.ops.scan import selective_scan_op
from matrix.subject import close

F64 = torch.float64
SMALL = {
    "trecvit_tiny": {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24},
    "videomamba_video_tiny": {"embed_dim": 16, "depth": 2, "num_heads": 2, "frames": 3, "tubelet": 2},
}
ENDS = ("tokenizer", "embed", "cls_token", "norm", "decoder", "head")  # in the names of parameters
models = pytest.mark.parametrize("name", SMALL)


def small(name, **arguments):
    torch.manual_seed(0)
    model = create_video_model(name, **{**SMALL[name], "num_classes": 5, "img_size": 32, **arguments})
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def walked(decay, value):
    states, state = [], torch.zeros_like(value[:, 0])
    for t in range(value.shape[1]):
        state = decay[:, t] * state + value[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("wide", [1, 2**12])  # token by token, and in stretches
@pytest.mark.parametrize("count", [1, 2, 7])
def test_linear_scan(monkeypatch, count, wide):
    monkeypatch.setattr("linsight.ops.scan.WIDE", wide)
    decay, value = torch.rand(2, count, 3, dtype=F64), torch.randn(2, count, 3, dtype=F64)
    close(linear_scan(decay, value), walked(decay, value))
    back = linear_scan(decay, value, reverse=True)
    close(back, walked(decay.flip(1), value.flip(1)).flip(1))
    ends = decay.requires_grad_(), value.requires_grad_()
    assert torch.autograd.gradcheck(linear_scan, ends)
    assert linear_scan(decay.half(), value.half()).dtype == torch.float32


@pytest.mark.parametrize("wide", [1, 2**12])
def test_selective_scan_over_blocks(monkeypatch, wide):
    monkeypatch.setattr("linsight.ops.scan.WIDE", wide)
    monkeypatch.setattr("linsight.ops.scan.NUMBERS", 24)
    monkeypatch.setattr("linsight.ops.scan.LEAST", 4)
    x, write, read = (torch.randn(2, 11, size, dtype=F64) for size in (3, 2, 2))
    step, rate = torch.rand(2, 11, 3, dtype=F64), -torch.rand(3, 2, dtype=F64)
    states = walked(torch.exp(step[..., None] * rate), (step * x)[..., None] * write[:, :, None])
    given = [t.requires_grad_() for t in (x, step, rate, write, read)]
    close(selective_scan(*given), (states * read[:, :, None]).sum(-1))
    assert torch.autograd.gradcheck(selective_scan, given, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_by_torch_func(reverse):
    """Gradients of each sample, and those in forward mode, which an operator without a rule would give as zero."""

    def linear(decay, value):
        return linear_scan(decay.sigmoid(), value, reverse=reverse)

    def selective(x, step, rate, write, read):
        return selective_scan(x, step.exp(), -rate.exp(), write, read)

    shapes = (2, 5, 3), (2, 5, 3), (3, 2), (2, 5, 2), (2, 5, 2)
    for call, count in ((linear, 2), (selective, 5)):
        given = tuple(torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes[:count])
        weights = torch.randn_like(call(*given))
        right = torch.autograd.grad((call(*given) * weights).sum(), given)
        inside = tuple(tensor.detach() for tensor in given)
        found = torch.func.grad(lambda *x, f=call, w=weights: (f(*x) * w).sum(), tuple(range(count)))(*inside)
        ways = tuple(torch.randn_like(tensor) for tensor in inside)
        _, moved = torch.func.jvp(call, inside, ways)
        along = sum((a * b).sum() for a, b in zip(right, ways, strict=True))
        close((moved * weights).sum(), along)
        for ours, theirs in zip(found, right, strict=True):
            close(ours, theirs)
    every = torch.func.vmap(lambda x: linear(x[None], x[None])[0])(given[0])
    close(every, linear(given[0], given[0]))


def test_the_scan_is_not_rounded_where_others_are():
    x, write, read = (torch.randn(2, 11, size) for size in (3, 2, 2))
    given = [t.requires_grad_() for t in (x, torch.rand(2, 11, 3), -torch.rand(3, 2), write, read)]
    found = []
    for rounding in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounding):
            out = selective_scan(*given)
            found.append([out, *torch.autograd.grad(out.sum(), given)])
    for exact, own in zip(*found, strict=True):
        assert torch.equal(exact, own)


def test_blocks_of_the_scan_count_all_sequences(monkeypatch):
    monkeypatch.setattr("linsight.ops.scan.NUMBERS", 24)
    monkeypatch.setattr("linsight.ops.scan.LEAST", 1)
    for count, blocks in ((1, 3), (2, 6), (30, 11)):  # of 4, 2 and 1 of 11 tokens
        x, write = torch.randn(count, 11, 3), torch.randn(count, 11, 2)
        assert selective_scan_op(x, x.abs(), -torch.rand(3, 2), write, write)[1].shape == (count, blocks, 2, 3)


def test_the_recurrence_is_gated_and_its_first_frame_is_not_scaled():
    unit = RGLRU(4, 2).double()
    v = torch.randn(1, 3, 4, dtype=F64)
    gates = [getattr(unit, name)(v).sigmoid() for name in ("input_gate", "a_gate")]
    decay = torch.exp(-8 * gates[1] * torch.nn.functional.softplus(unit.a_param))
    state, expected = gates[0][:, 0] * v[:, 0], []
    for t in range(3):
        if t:
            state = decay[:, t] * state + (1 - decay[:, t] ** 2).sqrt() * gates[0][:, t] * v[:, t]
        expected.append(state)
    close(unit(v), torch.stack(expected, dim=1))
    unit.a_param.data.fill_(-60.0)  # decays of 1, whose root has no slope of its own
    unit(v.requires_grad_()).sum().backward()
    assert all(p.grad.isfinite().all() for p in (v, *unit.parameters()))


def test_frames_see_no_later_ones():
    block, x = TemporalBlock(8, 2), torch.randn(2, 6, 3, 8)
    other = x.clone()
    other[:, 4:] = torch.randn(2, 2, 3, 8)
    close(block(other)[:, :4], block(x)[:, :4])
    model, clips = small("trecvit_tiny"), torch.randn(1, 3, 5, 32, 32)
    close(model.forward_features(clips[:, :, :3]), model.forward_features(clips)[:, :3], 1e-5)


@models
@pytest.mark.parametrize("attention", [None, "inline"])
def test_clips_of_any_size_and_length(name, attention):
    model = small(name, attention=attention)
    for frames, height, width in ((3, 32, 32), (1, 32, 48), (5, 17, 33)):
        clips = torch.randn(2, 3, frames, height, width)
        out = model(clips)
        assert out.shape == (2, 5) and out.isfinite().all()
        filled = torch.zeros(2, 3, -(-frames // 2) * 2 if "mamba" in name else frames, 32, math.ceil(width / 16) * 16)
        filled[:, :, :frames, :height, :width] = clips
        close(model(filled), out, 1e-5)
        close(model(clips[1:]), out[1:], 1e-5)


@models
def test_training_and_protocol(name):
    model, clips = small(name, drop_path_rate=0.5).train(), torch.randn(2, 3, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(clips).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(clips), model(clips))
    half = copy.deepcopy(model).bfloat16()(clips.bfloat16())
    close(half.float(), model(clips), 0.1)
    model.reset_classifier(0)
    assert torch.equal(model(clips), model.forward_head(model.forward_features(clips), pre_logits=True))
    meta = small(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}


@models
def test_published_keys_and_tables_of_other_sizes(name):
    model = small(name)
    state = linsight.export_published(model)
    other = small(name, img_size=48, **({"frames": 6} if "mamba" in name else {}))
    report = linsight.load_published(other, state)
    assert len(report.resized) == (2 if "mamba" in name else 1)
    other.set_grid((2, 2))
    clips = torch.randn(1, 3, 3, 32, 32)
    assert other(clips).isfinite().all()
    same = small(name, num_classes=5)
    linsight.load_published(same, state)
    assert torch.equal(same(clips), model(clips))


def test_a_model_of_images_is_inflated():
    images = linsight.create_model("videomamba_tiny", embed_dim=16, depth=2, num_heads=2, img_size=32, num_classes=5)
    videos = small("videomamba_video_tiny", tubelet=3)
    state = linsight.export_published(images)
    report = linsight.load_published(videos, inflated(state, 3), strict=False)
    assert not report.mismatched or {row.key for row in report.mismatched} == {"temporal_pos_embedding"}
    videos.temporal_pos_embedding.data.zero_()
    image = torch.randn(2, 3, 32, 32)
    clip = torch.zeros(2, 3, 3, 32, 32)
    clip[:, :, 1] = image
    close(videos(clip), images.eval()(image), 1e-5)


def test_released_weights_are_arrays_of_flax(tmp_path):
    model, heads, arrays = small("trecvit_tiny"), 2, {}
    for key, tensor in linsight.export_published(model).items():
        array, (*_, owner, name) = tensor.numpy(), ("", *key.split("."))
        if owner in ("query", "key", "value"):
            array = array.T.reshape(-1, heads, 8) if name == "weight" else array.reshape(heads, 8)
        elif owner == "out" and name == "weight":
            array = array.T.reshape(heads, 8, -1)
        elif name == "weight" and array.ndim == 5:
            array = array.transpose(2, 3, 4, 1, 0)
        elif name == "weight" and array.ndim == 2:
            array = array.T
        if name == "weight":
            name = "kernel" if array.ndim > 1 else "scale"
        arrays["/".join([*key.split(".")[:-1], name])] = array
    np.savez(tmp_path / "a.npz", **arrays)
    other, clips = small("trecvit_tiny", img_size=32), torch.randn(1, 3, 2, 32, 32)
    other.encoder.encoder_norm.reset_parameters()
    linsight.load_published(other, from_flax(tmp_path / "a.npz"))
    assert torch.equal(other(clips), model(clips))
    with pytest.raises(CheckpointError, match="of no layer"):
        from_flax({"a/kernel": np.zeros(3)})


def test_mistakes_are_told():
    model = small("trecvit_tiny")
    for mistake, word in (
        (lambda: create_video_model("trecvit_tinny"), "trecvit_tiny"),
        (lambda: model(torch.zeros(1, 3, 32, 32)), "frames, height, width"),
        (lambda: model(torch.zeros(1, 3, 0, 32, 32)), "frames, height, width"),
        (lambda: small("trecvit_tiny", attention="agent", attention_options={"no": 1}), "no"),
        (lambda: small("videomamba_video_tiny", tubelet=0), "tubelet"),
        (lambda: small("trecvit_tiny", patch=8), "trecvit_tiny"),
    ):
        with pytest.raises(LinsightError, match=word):
            mistake()
    assert create_video_model("trecvit_mu", device="meta").num_features == 32


@models
def test_what_timm_asks_of_models(name):
    """Layers for layer-wise decay, the classifier, another size; torch.fx is told what to use in its place."""
    model = small(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    first, last = min(layers.values()), max(layers.values())
    ends = [key for key, layer in layers.items() if layer in (first, last)]
    assert last - first == 3 and all(any(word in key for word in ENDS) for key in ends)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    model.set_input_size((48, 16))
    other = small(name, img_size=(48, 16))
    assert {key: t.shape for key, t in model.state_dict().items()}.items() <= {
        key: t.shape for key, t in other.state_dict().items()
    }.items()
    with pytest.raises(LinsightError, match="img_size=0"):
        model.set_input_size(0)
    with pytest.raises(LinsightError, match=r"torch\.export") as caught:
        torch.fx.symbolic_trace(model)
    assert "\n" not in str(caught.value)


class Placed(torch.nn.Module):
    """Patches of clips, and their places."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv3d(2, 4, (2, 3, 3), (2, 3, 3))
        self.table = torch.nn.Parameter(torch.randn(1, 4, 4))

    def forward(self, x):
        x, grid = cut(x, self.embed)
        return with_positions(x.flatten(0, 1), self.table, (2, 2), Tile.whole(grid), MODE)


def test_compiled_training_at_a_second_size():
    """Sizes are padded in a form that a compiler takes the gradient of."""
    torch._dynamo.reset()
    model = Placed()
    compiled = torch.compile(model, backend="aot_eager")
    for size in ((4, 6, 6), (3, 7, 8), (5, 3, 10)):
        x, gradients = torch.randn(1, 2, *size), []
        for call in (model, compiled):
            model.zero_grad()
            call(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


ON_GRIDS = [entry.name for entry in list_attentions() if not entry.capabilities.prefix]


@pytest.mark.parametrize("attention", ON_GRIDS)
def test_a_frame_without_a_class_token_is_its_mean(attention):
    model = small("trecvit_tiny", attention=attention, embed_dim=32, mlp_dim=32, img_size=64)
    assert model.tokenizer.cls is None and not any("cls" in key for key in model.tokenizer.state_dict())
    x = torch.randn(2, 3, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 3, 16, 32)
    close(model(x), model.decoder(tokens.mean(2)))
    later = x.clone()
    later[:, :, 2] += 1
    close(model.forward_features(later)[:, :2], tokens[:, :2])  # frames do not see later ones
    assert not torch.allclose(model(later), model(x))


def test_a_video_mamba_names_mechanisms_without_a_class_token():
    with pytest.raises(LinsightError, match="'nat' works on a grid"):
        small("videomamba_video_tiny", attention="nat")
