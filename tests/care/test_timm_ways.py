"""Models do what timm's own tests ask of its models: forward, backward, configuration, features, saving.

All of it is generated from the registry. Shapes and gradients are looked at on the meta device, which holds no numbers.
"""

import functools
import json

import pytest
import timm
import torch
from timm.layers import get_channel_dim
from timm.models import FeatureInfo, get_arch_pretrained_cfgs, get_model_input_config, group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay

import linsight
from linsight.errors import LinsightError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, Variant
from linsight.models.registry import ON_HOST, build

OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("linsight")]
DENSE = {name for name, variant in VARIANTS.items() if variant.dense}
EXITS = {name for name in ARCHITECTURES if name.startswith("dynp")}
TINY_OVERLOCK = {"overview": [(8, 1, 7), (8, 1, 7), (16, 1, 7), (16, 1, 5)], "focus": [(2, 1), (1, 1)]}
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TINY_SWIN = {"img_size": 64, "embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
TINY_PVT = {"img_size": 64, "stages": [(8, 1, 1, 2.0, 4), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 1)]}
TINY_PVT_V2 = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
TINY = {"img_size": 64, "stages": [(8, 1, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)]}
TINY_RAVLT = {**TINY, "projection": 24}
TINY_TRANSNEXT = {"img_size": 64, "stages": [(12, 1, 3, 2.0), (24, 1, 6, 2.0), (24, 1, 12, 2.0), (48, 1, 24, 2.0)]}
TINY_CSWIN = {"img_size": 64, "stages": [(8, 1, 2, 2.0, 1), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 2)]}
TINY_RESNET = {"stages": [[[8, 1]], [[16, 1]], [[8, 1], [16, 1]], [[16, 1]]]}
# One of each class of model, and of each form that a class has, made small; pytest -m full takes all as they are.
SMALL = {
    "inline_compact_pico": {},
    "inline_deit_tiny": TINY_VIT,
    "siamese_deit_tiny": TINY_VIT,
    "wfm_tiny": TINY_VIT,
    "pvt_tiny": TINY_PVT,
    "inline_pvt_tiny": TINY_PVT,
    "focused_pvt_v2_b0": TINY_PVT_V2,
    "inline_swin_tiny": TINY_SWIN,
    "steps_swin_tiny": {**TINY_SWIN, "steps": [[(8, 1)], [(8, 1), (16, 1)], [(16, 1), (32, 1)], [(64, 1)]]},
    "agent_cswin_tiny": TINY_CSWIN,
    "mlla_tiny": TINY,
    "h_vittt_tiny": TINY,
    "soft_tiny": TINY,
    "l2vit_tiny": TINY,
    "flowformer_cv": TINY,
    "moh_transnext_small_75": TINY_TRANSNEXT,
    "nat_mini": TINY,
    "van_b0": TINY,
    "attnet_xxs": TINY,
    "litv2_small": TINY,
    "rala_ravlt_t": TINY_RAVLT,
    "nalaformer_xt": TINY_RAVLT,
    "polaformerpp_b0": TINY_RAVLT,
    "steps_resnet18": TINY_RESNET,
    "dynp_resnet18_025_t32_cifar": {},
    "overlock_xt": TINY_OVERLOCK,
    "agent_pvt_tiny_dense": TINY_PVT,
    "mlla_tiny_dense": TINY,
    ON_HOST: {"base": "deit_tiny_patch16_224", "attention": "inline", **TINY_VIT},
}
SMALL["steps_swin_tiny"].pop("depths")


def sweep(without=()):
    """The small ones, and for `pytest -m full` all: a name, and arguments."""
    rows = [pytest.param(name, row, id=f"small-{name}") for name, row in SMALL.items() if name not in without]
    rest = [
        pytest.param(name, {"device": "meta"}, id=name, marks=pytest.mark.full) for name in OURS if name not in without
    ]
    return pytest.mark.parametrize(("name", "arguments"), rows + rest)


every, classifiers, hosts = sweep(), sweep(DENSE), sweep(DENSE | EXITS)


def create(name, **arguments):
    """A model, without numbers where it is none of the small ones."""
    with torch.device(arguments.pop("device", "cpu")):
        return timm.create_model(name, **arguments)


def images(model, count=1, most=224):
    channels, *size = model.default_cfg["input_size"]
    device = next(model.parameters()).device
    return torch.zeros(count, channels, *(min(side, most) for side in size), device=device)


def whole(outputs):
    return torch.cat(list(outputs)) if isinstance(outputs, tuple) else outputs


@every
def test_backward(name, arguments):
    """Every parameter gets a gradient."""
    model = create(name, **arguments, num_classes=42).train()
    outputs = model(images(model, count=2, most=128))
    if name not in DENSE:
        assert whole(outputs).shape[-1] == 42
    sum(part.mean() for part in (outputs if isinstance(outputs, list | tuple) else [outputs])).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@classifiers
def test_default_cfg(name, arguments):
    """The configuration says what the model is, and the head can be taken off."""
    model = create(name, **arguments).eval()
    cfg, state = model.default_cfg, model.state_dict()
    registered = timm.get_pretrained_cfg(name)
    assert registered.architecture == name and (name == ON_HOST or registered.to_dict() == cfg)
    x = images(model, most=512)
    features = model.forward_features(x)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (1, model.head_hidden_size) and model.num_classes == 1000
    if isinstance(features, torch.Tensor):
        axis = 1 if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW" else -1
        assert features.shape[axis] == model.num_features
        sides = [side for i, side in enumerate(features.shape) if i not in (0, axis % features.ndim)]
        assert (tuple(sides) if features.ndim == 4 else None) == cfg["pool_size"]
    for key in ("classifier", "first_conv"):
        names = cfg[key] if isinstance(cfg[key], tuple | list) else [cfg[key]]
        assert all(any(found.startswith(f"{one}.") for found in state) for one in names)
    model.reset_classifier(0)
    assert model(x).shape == before.shape
    bare = create(name, **arguments, num_classes=0).eval()
    assert bare(x).shape == before.shape and bare.num_classes == 0
    if isinstance(features, torch.Tensor):
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
    if cfg["pool_size"]:
        assert create(name, **arguments, num_classes=0, global_pool="").eval()(x).shape == features.shape


@hosts
def test_features(name, arguments):
    """Maps have the channels and strides that are told, and all that is there takes part."""
    model = create(name, **arguments, features_only=True)
    check_maps(model, images(model))
    count = len(create(name, **arguments).feature_info)
    for indices in ((count - 1, 0), (-1,), 1):
        model = create(name, **arguments, features_only=True, out_indices=indices)
        maps = check_maps(model, images(model))
        assert len(maps) == (1 if indices == 1 else len(indices))
        assert [*model.feature_info.out_indices] == sorted(model.feature_info.out_indices)
        sum(part.mean() for part in maps).backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []


def check_maps(model, x):
    maps = model(x)
    told = zip(model.feature_info.channels(), model.feature_info.reduction(), maps, strict=True)
    for channels, reduction, part in told:
        assert part.shape[1] == channels
        for side, of in zip(part.shape[2:], x.shape[2:], strict=True):
            assert of // reduction <= side <= -(-of // reduction) + 1
    return maps


@hosts
def test_forward_intermediates(name, arguments):
    model = create(name, **arguments).eval()
    info, x = FeatureInfo(model.feature_info, len(model.feature_info)), images(model)
    final, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert [part.shape[1] for part in maps] == info.channels()
    assert final.shape == model.forward_features(x).shape
    modules = dict(model.named_modules())
    assert all(module in modules for module in info.module_name())
    (last,) = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
    assert last.shape == maps[-1].shape
    _, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert first.shape == maps[0].shape
    assert model.prune_intermediate_layers([0]) == [0]
    (again,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert again.shape == first.shape


@every
def test_groups_of_layers(name, arguments):
    """Layer decay tells the layers apart, and what should not decay exists."""
    for model in (
        create(name, **arguments),
        *([] if name in DENSE | EXITS else [create(name, **arguments, features_only=True)]),
    ):
        parameters = dict(model.named_parameters())
        if not hasattr(model, "group_matcher"):  # timm's wrapper of a ResNet
            continue
        groups = group_parameters(model, model.group_matcher())
        assert sorted(key for group in groups.values() for key in group) == sorted(parameters)
        assert len(groups) > 2 and 1 < len(group_parameters(model, model.group_matcher(coarse=True))) <= len(groups)
        rates = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.75)}
        assert len(rates) > 2
        if hasattr(model, "no_weight_decay"):  # timm's models name tables that not all of them have
            kept = {key.removeprefix("model.") for key in model.no_weight_decay() - parameters.keys()}
            assert kept <= {"dist_token", "reg_token", "cls_token", "pos_embed"}


@every
def test_checkpointing_and_sizes(name, arguments):
    model = create(name, **arguments)
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    model.set_input_size(64)
    assert get_model_input_config(model)["input_size"][1:] == (64, 64)
    assert callable(timm.data.create_transform(**timm.data.resolve_model_data_config(create(name, **arguments))))


def test_every_class_is_here():
    rows = {**HOSTS, **ARCHITECTURES, **{name: HOSTS[variant.host] for name, variant in VARIANTS.items()}}
    found = {rows[name].model_cls for name in SMALL if name != ON_HOST}
    assert found == {row.model_cls for row in rows.values()}


def test_timm_lists_them_with_facts():
    assert {*VARIANTS, *ARCHITECTURES} <= {*OURS} and {*HOSTS} <= {*timm.list_models()}
    assert [name for name in timm.list_models("inline*") if name in VARIANTS] == timm.list_models("inline*")
    loaded = {name for name in timm.list_models(pretrained=True) if name in OURS}
    known = {**VARIANTS, **ARCHITECTURES}.items()
    assert loaded == {name for name, entry in known if entry.weights.startswith("https://")} != set()
    assert timm.models.is_model_pretrained("wfm_tiny") and not timm.models.is_model_pretrained("inline_swin_tiny")
    for name in OURS:
        assert timm.is_model(name) and timm.get_pretrained_cfg_value(name, "input_size")
        assert [*get_arch_pretrained_cfgs(name)] == [name]
        assert callable(timm.model_entrypoint(name)) and timm.model_entrypoint(name).__name__ == name
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("inline_swin_tiny.in1k")


# -- saving ------------------------------------------------------------------------------------------------------------

AGENTS = {"agents": [9, 4, 9, 4], "agent_grid": (4, 3)}
SAVED = {
    "variant": ("inline_compact_pico", {}),
    "other mechanism": (
        "vit_tiny",
        {"attention": "inline:1/softmax", "attention_options": {"feature_map": "relu"}, **TINY_VIT},
    ),
    "tuple for all stages": ("pvt_tiny", {"attention": "agent", "attention_options": AGENTS, **TINY_PVT}),
    "windows": ("swin_tiny", {"attention": "inline", "attention_window": (4, 2), **TINY_SWIN}),
    "name of timm": ("deit_tiny_patch16_224", {"attention": "inline", **TINY_VIT}),
    "pvt_v2": ("pvt_v2_b0", {"attention": "focused", **TINY_PVT_V2}),
    "steps": ("steps_resnet18", TINY_RESNET),
    "siamese": ("siamese_deit_tiny", TINY_VIT),
    "dense": ("mlla_tiny_dense", {"stages": [(8, 1, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)], "out_indices": (2, 0)}),
    "exits": ("dynp_resnet18_025_t32_cifar", {"in_chans": 1}),
}


def same(model, other, size=64):
    assert type(other) is type(model)
    assert [*other.state_dict()] == [*model.state_dict()]
    assert all(torch.equal(mine, model.state_dict()[key]) for key, mine in other.state_dict().items())
    x = torch.randn(1, model.in_chans, size, size)
    with torch.no_grad():
        ours, theirs = (m.eval()(x) for m in (model, other))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("kind", "safe"), [*((kind, True) for kind in SAVED), ("dense", False), ("pvt_v2", False)])
def test_saved_models_come_back(kind, safe, tmp_path):
    name, arguments = SAVED[kind]
    model = linsight.create_model(name, num_classes=7, **arguments)
    torch.nn.init.normal_(next(model.parameters()))
    save_for_hf(model, tmp_path, safe_serialization=safe)
    same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    if safe:
        fresh = linsight.create_model(f"local-dir:{tmp_path}")
        assert type(fresh) is type(model) and fresh.state_dict().keys() == model.state_dict().keys()
    file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    own = json.loads((tmp_path / "config.json").read_text())
    sources = [] if kind == "exits" else [{"file": str(file)}] if safe else [{"state_dict": model.state_dict()}]
    for source in sources:
        overlay = {**source, "num_classes": own["num_classes"]}
        again = timm.create_model(
            own["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **own["model_args"]
        )
        same(model, again)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OURS)
def test_every_model_comes_back(name, tmp_path):
    model = timm.create_model(name, num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(other) is type(model) and str(other) == str(model)
    assert [*other.state_dict()] == [*model.state_dict()]
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())


def test_changes_after_construction_are_saved(tmp_path):
    model = linsight.create_model("pvt_tiny", **TINY_PVT)
    model.reset_classifier(3, "avg")
    model.set_input_size((96, 64))
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert other.global_pool == "avg" and other.class_token
    same(model, other)


def test_another_head_and_the_published_names_are_taken(tmp_path):
    model = linsight.create_model("vit_tiny", attention="inline", num_classes=7, **TINY_VIT)
    save_for_hf(model, tmp_path, safe_serialization="both")
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert other.head.out_features == 3 and torch.equal(other.pos_embed, model.pos_embed)
    torch.save({"model": linsight.export_published(model)}, tmp_path / "authors.pth")
    again = timm.create_model(
        "vit_tiny",
        attention="inline",
        num_classes=7,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "authors.pth"), "num_classes": 7},
        **TINY_VIT,
    )
    same(model, again)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=48)
    assert larger.pos_embed.shape[1] == 37


def test_maps_of_saved_weights(tmp_path):
    """A backbone takes what it needs of a classifier's weights."""
    model = linsight.create_model("swin_tiny", attention="inline", num_classes=7, **TINY_SWIN).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    backbone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 2))
    x = torch.randn(1, 3, 64, 64)
    wanted = model.forward_intermediates(x, indices=(0, 2), intermediates_only=True)
    for ours, theirs in zip(backbone.eval()(x), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_are_not_there_are_one_line(tmp_path):
    for call in (
        lambda: timm.create_model("compact_pico", pretrained=True, pretrained_cfg_overlay={"file": "none.bin"}),
        lambda: linsight.create_model(f"local-dir:{tmp_path}", pretrained=True),
        lambda: linsight.create_model("hub:somewhere"),
        lambda: linsight.create_model("local-dir:"),
    ):
        with pytest.raises(LinsightError) as caught:
            call()
        assert "\n" not in str(caught.value)


# -- mistakes, and what is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny", TINY_VIT),
        ("deit_tiny_patch16_224", TINY_VIT),
        ("swin_tiny", TINY_SWIN),
        ("swin_tiny_patch4_window7_224", TINY_SWIN),
        ("pvt_tiny", TINY_PVT),
        ("pvt_v2_b0", TINY_PVT_V2),
        ("compact_pico", {}),
        ("steps_resnet18", TINY_RESNET),
        ("mlla_tiny_dense", TINY),
    ],
)
def test_places_of_maps(name, arguments):
    """Sorted, and told so; one line for places that are not there, named twice, or none."""

    def maps(indices):
        model = linsight.create_model(name, features_only=True, out_indices=indices, **arguments)
        return model, model(torch.zeros(1, 3, 64, 64))

    count = len(maps(1)[0].feature_info)
    for asked, places in (((-1, 0), [0, count - 1]), (1, [count - 1]), ([count - 1], [count - 1])):
        model, found = maps(asked)
        assert list(model.feature_info.out_indices) == places
        axis = get_channel_dim(model.output_fmt)  # of Swin's maps under a name of timm, as timm's own
        assert [part.shape[axis] for part in found] == model.feature_info.channels()
    for wrong, said in (
        ((0, 0), "twice"),
        ((0, -count), "twice"),
        ((99,), "there is no map 99"),
        ((-99,), "there is no map -99"),
        ((), "name no map"),
        (99, "the last 99"),
        (0, "the last 0"),
        ("02", "no places"),
        ((0.5,), "no places"),
    ):
        with pytest.raises(LinsightError, match=said) as caught:
            maps(wrong)
        assert "\n" not in str(caught.value)


POOLS = {
    "vit_tiny": (TINY_VIT, ("token", "avg", "max", "avgmax", "map")),
    "swin_tiny": (TINY_SWIN, ("avg", "max", "avgmax", "catavgmax")),
    "pvt_tiny": (TINY_PVT, ("token", "avg", "max", "avgmax", "catavgmax")),
    "inline_pvt_tiny": (TINY_PVT, ("avg", "max", "avgmax", "catavgmax")),
    "pvt_v2_b0": (TINY_PVT_V2, ("avg",)),
    "mlla_tiny": (TINY, ("avg", "max", "avgmax", "catavgmax")),
    "compact_pico": ({}, ("avg", "max", "avgmax")),
    "steps_resnet18": (TINY_RESNET, ("avg", "max", "avgmax", "catavgmax")),
}


@pytest.mark.parametrize("name", POOLS)
def test_ways_to_pool(name):
    arguments, pools = POOLS[name]
    x = torch.zeros(2, 3, 64, 64)
    make = functools.partial(linsight.create_model, name, **arguments)
    for pool in pools:
        model = make(global_pool=pool, num_classes=5)
        assert model(x).shape == (2, 5)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    kept = make(num_classes=5)
    for pool in set(pools) - {"map"}:
        kept.reset_classifier(4, pool)
        assert kept(x).shape == (2, 4)
    kept.reset_classifier(0, "")
    assert kept(x).shape == kept.forward_features(x).shape
    for call in (lambda: make(global_pool="median"), lambda: kept.reset_classifier(3, "median")):
        with pytest.raises(LinsightError, match=r"global_pool='median' is not one of .*'avg'.*''") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_pvt_pools_its_tokens():
    """Of the class token in front, or of the map behind it."""
    model, x = linsight.create_model("pvt_tiny", num_classes=0, **TINY_PVT).eval(), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    rest = tokens[:, 1:]
    wanted = {"token": tokens[:, 0], "avg": rest.mean(1), "max": rest.amax(1), "": tokens}
    wanted["avgmax"] = 0.5 * (wanted["avg"] + wanted["max"])
    wanted["catavgmax"] = torch.cat([wanted["avg"], wanted["max"]], 1)
    for pool, features in wanted.items():
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), features)


def test_dense_backbones_have_layers():
    """Layer decay reaches them: the norms of the maps are as the head, the stem is the least."""
    dense = build(Variant("toy", "swin_tiny", "inline", dense="normed"), device="meta", **TINY_SWIN)
    inner = build(Variant("toy", "swin_tiny", "inline"), device="meta", **TINY_SWIN)
    ours, theirs = (group_parameters(m, m.group_matcher(), reverse=True) for m in (dense, inner))
    shared = {key: layer for key, layer in theirs.items() if f"model.{key}" in ours}
    assert {key: ours[f"model.{key}"] for key in shared} == shared
    assert {layer for key, layer in ours.items() if key.startswith("norm")} == {max(ours.values())}
