"""What every host does with every mechanism: train, checkpoint, compile, export, travel."""

import copy
import itertools
import pickle

import pytest
import safetensors.torch
import torch
from timm.layers import Mlp
from timm.models._manipulate import group_parameters
from torch._dynamo.testing import CompileCounterWithBackend

import linsight
from linsight.attention import Core, list_attentions, mechanism
from linsight.models import HOSTS

# Small forms of one host of each class: new hosts are added here with arguments that keep them small.
SMALL = {
    "vit_tiny": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7},
    "compact_pico": {"stem": [(8, 1)], "stages": [(16, 2, 2), (24, 1, 2)], "num_classes": 7},
    "pvt_tiny": {
        "stages": [(8, 1, 1, 2.0, 4), (16, 2, 2, 2.0, 2), (16, 1, 2, 2.0, 2), (16, 2, 2, 2.0, 1)],
        "img_size": 64,
        "num_classes": 7,
    },
    "pvt_v2_b0": {"embed_dims": (8, 16, 16, 16), "depths": (1, 2, 1, 2), "num_heads": (1, 2, 2, 2), "num_classes": 7},
    "swin_tiny": {
        "embed_dim": 8,
        "depths": (2, 2, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "window_size": 3,
        "img_size": 64,
        "drop_path_rate": 0.0,
        "num_classes": 7,
    },
    "mlla_pyramid_tiny": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "h_vit_tiny": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "soft_pyramid_tiny": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "l2vit_pyramid_tiny": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "window_size": 3,
        "num_classes": 7,
    },
    "nat_pyramid_small": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "init_values": 0.5,
        "num_classes": 7,
    },
    "transnext_small": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "flow_pyramid": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "ravlt_t": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "projection": 24,
        "img_size": 64,
        "num_classes": 7,
    },
    "nala_xt": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "projection": 24,
        "img_size": 64,
        "num_classes": 7,
    },
    "ravlt_linear_b0": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "projection": 24,
        "img_size": 64,
        "num_classes": 7,
    },
    "van_pyramid_b0": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "attnet_pyramid_xxs": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "litv2_pyramid_small": {
        "stages": [(8, 1, 2, 2.0), (16, 2, 0, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)],
        "img_size": 64,
        "num_classes": 7,
    },
    "cswin_tiny": {
        "stages": [(8, 1, 2, 2.0, 1), (16, 2, 2, 2.0, 2), (16, 2, 2, 2.0, 2), (16, 1, 2, 2.0, 2)],
        "img_size": 64,
        "num_classes": 7,
    },
}
MECHANISMS = [entry.name for entry in list_attentions()]
# The first size is the one that the model is built for. Those of a pyramid leave its last stage several tokens, and
# the windows of Swin more than one: a single one is a graph of its own.
SIZES = ((32, 32), (40, 24), (33, 17), (16, 56), (24, 24))
PYRAMID_SIZES = ((64, 64), (160, 96), (131, 97), (67, 149), (96, 96))


def sizes(host):
    return SIZES if host in ("vit_tiny", "compact_pico") else PYRAMID_SIZES


hosts = pytest.mark.parametrize("host", SMALL)


def by_turns():
    """Pairs of hosts and mechanisms, which know nothing of each other.

    All hosts with InLine, and each mechanism in a column or in a pyramid, by turns. In both, and softmax in all hosts,
    by `pytest -m full`.
    """
    both = ("vit_tiny", "pvt_tiny")
    for host, attention in itertools.product(SMALL, MECHANISMS):
        quick = attention == "inline" or (host in both and MECHANISMS.index(attention) % 2 == both.index(host))
        if quick or host in both or attention == "softmax":
            yield pytest.param(host, attention, marks=[] if quick else pytest.mark.full)


pairs = pytest.mark.parametrize(("host", "attention"), [*by_turns()])


# Without a class token, for mechanisms that have no place for it.
NO_TOKEN = {"vit_tiny": {"class_token": False, "global_pool": "avg"}, "pvt_tiny": {"global_pool": "avg"}}
NO_TOKEN["soft_pyramid_tiny"] = NO_TOKEN["pvt_tiny"]


def build(host, attention="inline", **arguments):
    first = attention.partition(":")[0].partition(",")[0]
    if not mechanism(first).capabilities.prefix:
        arguments = {**NO_TOKEN.get(host, {}), **arguments}
    idle = {"init_values"} if mechanism(first).kind == "block" else ()  # scales of blocks of the host
    small = {key: value for key, value in SMALL[host].items() if key not in idle}
    return linsight.create_model(host, attention=attention, **{**small, **arguments})


def shallow(host):
    """The fewest blocks that have all there is to trace, which is slow: two stages of one, two with shifted windows."""
    small = SMALL[host]
    if "stages" in small:
        (first, *_, last) = small["stages"]
        return build(host, stages=[(dim, 1, *rest) for dim, _, *rest in (first, last)])
    if "depths" in small:
        dims = {key: small[key][:2] for key in ("num_heads", "embed_dims") if key in small}
        return build(host, depths=(2 if host.startswith("swin") else 1, 1), **dims)
    return build(host, **({"depth": 2} if "depth" in small else {}))


def test_every_class_of_host_is_here():
    assert {HOSTS[name].model_cls for name in SMALL} == {host.model_cls for host in HOSTS.values()}


@pairs
def test_a_training_step(host, attention):
    """Every parameter gets a finite gradient and the loss falls on the batch it was taken on."""
    model = build(host, attention, drop_path_rate=0.0)
    x, y = torch.randn(4, 3, 24, 40), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]


@hosts
def test_one_mechanism_a_block(host):
    model = build(host, "inline:1/softmax")
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, Core)}
    assert kinds <= {"InLine", "Softmax"} and "InLine" in kinds


@pairs
def test_copies_are_equal(host, attention):
    model = build(host, attention).eval()
    x = torch.randn(2, 3, 32, 24)
    out = model(x)
    other = build(host, attention).eval()
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin(x), out)


@hosts
def test_gradient_checkpointing_with_two_sizes_in_one_step(host):
    """Each call recomputes on its own grid."""
    model = build(host).eval()
    images = [torch.randn(2, 3, *size) for size in sizes(host)[:2]]
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(model(x).square().sum() for x in images).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


# Tracing is slow: the others are exported or traced, as every host is.
COMPILED = ("compact_pico", "mlla_pyramid_tiny", "pvt_tiny", "swin_tiny", "vit_tiny")
QUICK = ("mlla_pyramid_tiny", "vit_tiny")


@pytest.mark.timeout(300)  # where cores are shared
@pytest.mark.parametrize(
    "host",
    [pytest.param(h, marks=[] if h == "vit_tiny" else [pytest.mark.full]) for h in COMPILED],
)
def test_two_graphs_for_five_sizes(host):
    torch._dynamo.reset()
    model = shallow(host).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in sizes(host):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@hosts
def test_optimiser_groups(host):
    """Layer-wise decay finds every parameter; names that are not decayed exist."""
    model = build(host)
    named = dict(model.named_parameters())
    grouped = group_parameters(model, model.group_matcher())
    assert sorted(name for names in grouped.values() for name in names) == sorted(named)
    assert len(grouped) > 2
    assert set(model.no_weight_decay()) <= set(named) | {"dist_token", "reg_token"}


@hosts
def test_mechanisms_may_ask_for_no_decay(host, monkeypatch):
    monkeypatch.setattr(
        "linsight.attention.mechanisms.inline.InLine.no_weight_decay", lambda self: {"generator.0.weight"}
    )
    asked = {name for name in build(host).no_weight_decay() if "generator" in name}
    assert len(asked) == sum(isinstance(module, Core) for module in build(host).modules())


@hosts
def test_features_at_their_strides(host):
    model = build(host, features_only=True).eval()
    maps = model(torch.randn(1, 3, 64, 96))
    for map_, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert map_.shape == (1, channels, 64 // reduction, 96 // reduction)


@hosts
def test_intermediates_and_final_features(host):
    """The final features are those of `forward_features`, and the head takes them; `norm` is the final norm."""
    model, x = build(host).eval(), torch.randn(2, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True, stop_early=True)
    assert torch.equal(last, maps[-1])
    if isinstance(getattr(model, "norm", None), torch.nn.LayerNorm):
        (normed,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, model.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    model.prune_intermediate_layers([0])
    assert torch.equal(model.forward_intermediates(x, indices=[0], intermediates_only=True)[0], maps[0])


def test_pvt_pools_its_class_token_or_its_map():
    model, x = build("pvt_tiny").eval(), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 2 * 2, 16)
    assert model.no_weight_decay() == {"stages.3.cls_token"}
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(7, "avg")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    model = build("pvt_tiny", global_pool="avg", final_norm="absent").eval()
    assert torch.equal(model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)[-1])
    with pytest.raises(linsight.errors.LinsightError, match="global_pool"):
        model.reset_classifier(7, "token")


@pytest.mark.parametrize("host", ["swin_tiny", "pvt_v2_b0"])
def test_dropped_projections_go_on(host):
    """timm's `proj_drop_rate` reaches the layers."""
    model = build(host, proj_drop_rate=0.25)
    assert {m.proj_drop.p for m in model.modules() if isinstance(m, linsight.attention.Attention)} == {0.25}


@hosts
def test_dtype_and_device_arguments(host):
    model = build(host, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


# Those whose MLPs are timm's, without a convolution.
@pytest.mark.parametrize("host", ["vit_tiny", "pvt_tiny", "swin_tiny", "mlla_pyramid_tiny", "cswin_tiny"])
def test_gelu_is_written_over_its_input_where_that_is_asked_for(host, monkeypatch):
    """In each MLP of a fused model; nowhere in a plain one."""
    model, x, places = build(host).eval(), torch.randn(1, 3, *sizes(host)[0]), []
    gelu_ = torch.ops.aten.gelu_
    monkeypatch.setattr(torch.ops.aten, "gelu_", lambda x, **how: places.append(x.data_ptr()) or gelu_(x, **how))
    with torch.no_grad():
        plain = model(x)
        assert not places
        torch.testing.assert_close(linsight.fuse(model)(x), plain, rtol=1e-4, atol=1e-5)
    assert len(places) == sum(type(module) is Mlp for module in model.modules()) > 0


@hosts
def test_stochastic_depth_without_gradients(host):
    """As with them: the forward of a reentrant checkpoint runs without, and its recomputation with gradients."""
    model, x = build(host, drop_path_rate=0.8).train(), torch.randn(4, 3, *sizes(host)[0])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    outs = []
    for grad in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            outs.append(model(x))
    torch.testing.assert_close(outs[1], outs[0].detach(), rtol=1e-4, atol=1e-4)
