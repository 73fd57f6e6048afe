"""The profile of a trained model against its attention written out: pictures, sequences, padding, causal masks."""

import dataclasses
import math

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import linsight
from linsight.convert.conversion import linearize
from linsight.convert.hybrid import Hybrid
from linsight.convert.profiles import LayerProfile, advice, profile, table, worst
from linsight.convert.transfer import layer_errors
from linsight.errors import LinsightError, UnknownNameError

SIZES = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
HEADS, WIDTH = 2, 8


def teacher(**sizes):
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **sizes}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7)
    return model


def layers(model, images, **beside):
    """q and k, (B, N, H, D), of each block, and the scale."""
    found = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: found.append(module.qkv(args[0])))
        for module in model.modules()
        if isinstance(module, Attention)
    ]
    with torch.no_grad():
        model(images, **beside)
    for hook in hooks:
        hook.remove()
    return [x.unflatten(-1, (3, HEADS, WIDTH)).unbind(2)[:2] for x in found]


def apart(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def by_hand(q, k, seen, prefix, width):
    """The profile of one layer, key by key: seen(b, i, j)."""
    found = {name: [] for name in ("entropy", "relative", "peak", "tokens", "below", "below_centred", "scores")}
    local = {reach: [] for reach in (1, 2, 3)}
    shift = []
    for b in range(len(q)):
        for h in range(HEADS):
            keys = [j for j in range(k.shape[1]) if any(seen(b, i, j) for i in range(q.shape[1]))]
            mine = k[b, keys, h]
            shift.append(float(mine.mean(0).norm() / mine.norm(dim=-1).mean()))
            for i in range(q.shape[1]):
                own = [j for j in range(k.shape[1]) if seen(b, i, j)]
                if not own:
                    continue
                z = (k[b, own, h] @ q[b, i, h] / math.sqrt(WIDTH)).double()
                p = z.softmax(0)
                entropy = float(-(p * p.log()).sum())
                found["entropy"].append(entropy)
                found["relative"].append(entropy / math.log(max(2, len(own))))
                found["peak"].append(float(p.max()))
                found["tokens"].append(len(own))
                found["scores"] += z.tolist()
                found["below"] += (z < -1).double().tolist()
                found["below_centred"] += (z - z.mean() < -1).double().tolist()
                if i >= prefix:
                    places = {j: divmod(j - prefix, width) for j in [i, *own] if j >= prefix}
                    for reach, shares in local.items():
                        inside = [
                            float(p[own.index(j)])
                            for j in own
                            if j >= prefix
                            and all(abs(a - b) <= reach for a, b in zip(places[i], places[j], strict=True))
                        ]
                        shares.append(sum(inside))
    scores = torch.tensor(found.pop("scores"), dtype=torch.float64)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    means["locality"] = tuple(sum(shares) / len(shares) for shares in local.values())
    means["low"], means["high"] = (float(scores.quantile(p)) for p in (0.05, 0.95))
    return {**means, "key_shift": sum(shift) / len(shift)}


def agree(found, wanted):
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_each_figure_is_its_definition():
    model = teacher()
    images = torch.randn(2, 3, 24, 40)
    found = profile(model, [images])
    assert [one.name for one in found] == [f"blocks.{i}.attn" for i in range(3)]
    for one, (q, k) in zip(found, layers(model, images), strict=True):
        assert one.heads == HEADS and one.tokens == 16 and one.error is None
        agree(one, by_hand(q, k, lambda b, i, j: True, 1, 5))


def test_batches_are_pooled():
    model = teacher(depth=1)
    images = torch.randn(3, 3, 24, 40)
    together = profile(model, [images])[0]
    parted = profile(model, [images[:2], images[2:]])[0]
    numbers = {key: value for key, value in dataclasses.asdict(together).items() if key not in ("name", "error")}
    agree(parted, numbers)


def test_padding_is_not_seen_and_does_not_look():
    model = teacher(depth=1, num_classes=0)
    images = torch.randn(2, 3, 24, 40)
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 9:] = False

    for mask in (keep[:, None, None], torch.zeros(2, 1, 1, 16).masked_fill(~keep[:, None, None], -3e38)):
        (one,) = profile(model, [images], call=lambda model, batch, mask=mask: model(batch, attn_mask=mask))
        ((q, k),) = layers(model, images)
        agree(one, by_hand(q, k, lambda b, i, j: bool(keep[b, i] and keep[b, j]), 1, 5))


def test_masks_of_pairs():
    model = teacher(depth=1)
    images = torch.randn(2, 3, 24, 40)
    pairs = torch.ones(16, 16, dtype=torch.bool).tril()
    (one,) = profile(model, [images], call=lambda model, batch: model(batch, attn_mask=pairs[None, None]))
    ((q, k),) = layers(model, images)
    agree(one, by_hand(q, k, lambda b, i, j: j <= i, 1, 5))


def test_sequences_have_places_in_one_row():
    model = nn.Sequential(Attention(HEADS * WIDTH, HEADS))
    nn.init.normal_(model[0].qkv.weight, std=0.7)
    x = torch.randn(2, 9, HEADS * WIDTH)
    (one,) = profile(model, [x])
    q, k = model[0].qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)[:2]
    agree(one, by_hand(q.detach(), k.detach(), lambda b, i, j: True, 0, 9))
    (gridded,) = profile(model, [x], grid=(2, 4), prefix=1)
    agree(gridded, by_hand(q.detach(), k.detach(), lambda b, i, j: True, 1, 4))


def test_the_error_is_that_of_each_layer_alone():
    model = teacher()
    batches = [torch.randn(2, 3, 24, 40) for _ in range(2)]
    found = profile(model, iter(batches), attention="linear", centred=True)
    wanted = layer_errors(model, linearize(model, "linear", centred=True), batches)
    assert {one.name: one.error for one in found} == pytest.approx(wanted)
    assert all(one.error < 1e-4 for one in profile(model, batches, attention="softmax"))
    some = profile(model, batches, attention="hedgehog", layers=[1], hybrid=Hybrid(window=3, alpha=1.0))
    assert [one.name for one in some] == ["blocks.1.attn"]


def test_the_model_stays_as_it_is():
    model = teacher().train()
    names = set(model.state_dict())
    modules = [type(module) for module in model.modules()]
    profile(model, [torch.randn(1, 3, 24, 40)], attention="linear")
    assert model.training and set(model.state_dict()) == names and [type(m) for m in model.modules()] == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


def test_of_many_tokens_some_queries_are_measured_in_parts():
    model = teacher(img_size=256, patch_size=4, depth=1)
    images = torch.randn(1, 3, 256, 256)
    with Largest() as largest:
        (one,) = profile(model, [images])
    assert largest.numbers <= 2**22 < 4097**2 and one.tokens == 4097
    assert one == profile(model, [images])[0]  # the same queries are drawn
    (few,) = profile(model, [images], queries=8)
    assert few.peak != one.peak and few.key_shift == one.key_shift


def test_a_sample_is_near_the_whole():
    model = teacher(img_size=96, depth=1)
    images = torch.randn(4, 3, 96, 96)
    (whole,), (some,) = profile(model, [images], queries=10**6), profile(model, [images])
    for name in ("entropy", "peak", "low", "high", "below"):
        assert getattr(some, name) == pytest.approx(getattr(whole, name), rel=0.2, abs=0.02), name


BASE = LayerProfile("a", 2, 100.0, -0.5, 0.5, 0.0, 0.0, 0.05, 3.9, 0.9, 0.05, (0.1, 0.2, 0.3))


def but(name, **changes):
    return dataclasses.replace(BASE, name=name, **changes)


def test_the_worst_layers():
    some = [but("a", relative=0.5), but("b", relative=0.9), but("c", relative=0.3)]
    assert worst(some, keep=1) == ["c"] and worst(some, keep=2) == ["a", "c"] and worst(some, keep=0) == []
    tried = [dataclasses.replace(one, error=error) for one, error in zip(some, (0.1, 0.7, 0.4), strict=True)]
    assert worst(tried, keep=2) == ["b", "c"]
    with pytest.raises(LinsightError, match="0 to 3 can be kept"):
        worst(some, keep=4)


def test_kept_layers_stay_softmax():
    model = teacher()
    found = profile(model, [torch.randn(2, 3, 24, 40)], attention="linear")
    kept = worst(found, keep=1)
    student = linearize(model, "linear", layers=lambda name: name not in kept)
    assert [isinstance(student.get_submodule(one.name), Attention) for one in found] == [
        one.name in kept for one in found
    ]


@pytest.mark.parametrize(
    "some, said",
    [
        ([BASE], "Taylor maps are valid: hardly any"),
        (
            [BASE, but("b", below=0.2)],
            "valid with centred=True; without, s q.k lies below -1 for up to 20% of pairs (b)",
        ),
        ([but("b", below=0.2, below_centred=0.1)], "Taylor maps are not valid"),
        ([BASE], "keys lie around 0"),
        ([BASE, but("b", key_shift=0.55)], "off-centre in 1 of 2 layers, by 0.55 of their length in b"),
        ([but("b", relative=0.4)], "spiky rows in b, down to 0.40 of ln N"),
        ([but("b", relative=0.99)], "nearly uniform rows in b"),
        ([but("b", locality=(0.3, 0.7, 0.8))], "hybrid=Hybrid(window=5)"),
        ([but("b", error=0.1), but("c", error=0.9), but("d", error=0.2)], "by output error: c;"),
    ],
)
def test_advice(some, said):
    assert any(said in line for line in advice(some))
    assert all("\n" not in line for line in advice(some))


def test_advice_is_silent_on_what_is_usual():
    told = " ".join(advice([BASE, but("b", locality=None), but("c", locality=(0.5, 0.6, 0.7), tokens=12.0)]))
    for word in ("spiky", "uniform", "local", "not valid"):
        assert word not in told


def test_the_table_has_a_line_for_each_layer():
    text = table([BASE, but("blocks.10.attn", error=0.25, locality=None)])
    lines = text.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert (
        lines[0].split()[0] == "layer" and lines[2].split()[0] == "blocks.10.attn" and lines[2].split()[-1] == "0.250"
    )
    assert lines[1].split()[-1] == "-" and "0.30" in lines[1]


def test_bad_input():
    model = teacher()
    with pytest.raises(LinsightError, match="there are no batches"):
        profile(model, [])
    with pytest.raises(LinsightError, match="ran"):
        profile(model, [torch.randn(1, 3, 24, 40)], call=lambda model, batch: None)
    with pytest.raises(UnknownNameError, match="unknown attention layer"):
        profile(model, [torch.randn(1, 3, 24, 40)], layers="blocks.9.attn")
    with pytest.raises(UnknownNameError, match="hedgehog"):
        profile(model, [torch.randn(1, 3, 24, 40)], attention="hedghog")
    with pytest.raises(LinsightError, match="no softmax attention"):
        profile(nn.Linear(2, 2), [])


def test_hosts_of_linsight_are_measured_as_those_of_timm():
    theirs, images = teacher(), torch.randn(2, 3, 24, 40)
    sizes = {key: value for key, value in SIZES.items() if key not in ("img_size", "num_classes")}
    ours = linsight.create_model("vit_tiny", attention="softmax", img_size=(24, 40), num_classes=5, **sizes).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))
    one, other = (profile(model, [images], attention="linear", queries=64) for model in (ours, theirs))
    for mine, wanted in zip(one, other, strict=True):
        mine, wanted = (dataclasses.asdict(layer) for layer in (mine, wanted))
        assert mine.pop("name") == wanted.pop("name")
        assert mine.pop("locality") == pytest.approx(wanted.pop("locality"), rel=1e-4)
        assert mine == pytest.approx(wanted, rel=1e-4)
