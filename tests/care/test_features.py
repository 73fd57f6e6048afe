"""Features alike everywhere: from both doors, on every host, as timm's own model of the family gives them.

Its doors are `timm.create_model` and `linsight.create_model`; of timm's names, timm's own door gives timm's own model.
"""

import copy

import pytest
import timm
import torch
from test_timm_ways import ON_HOST, SMALL, TINY_PVT_V2, TINY_SWIN, TINY_VIT
from timm.models import group_parameters

import linsight
from linsight.errors import LinsightError

LOADS = True
DOORS = {"timm": timm.create_model, "linsight": linsight.create_model}
HOSTS = [name for name in SMALL if name != ON_HOST and not name.startswith("dynp") and not name.endswith("_dense")]
LISTS = ("steps_resnet18",)  # whose wrapper is timm's of lists
# timm's own models, of windows that divide the grid: what pads one is seen there, and not here.
THEIRS = {
    "vit_tiny_patch16_224": TINY_VIT,
    "deit_tiny_distilled_patch16_224": TINY_VIT,
    "swin_tiny_patch4_window7_224": {**TINY_SWIN, "window_size": 4},
    "pvt_v2_b0": TINY_PVT_V2,
}
SIDE = {"vit": 32, "dei": 32}


def image(name):
    side = SIDE.get(name[:3], 64)
    return torch.randn(2, 3, side, side)


def distinct(model):
    """Every parameter and statistic other than at the start."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.01, 0.2)
    return model.eval()


def same(ours, theirs):
    ours, theirs = ([*found] if isinstance(found, list | tuple) else [found] for found in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        same(one, other) if isinstance(one, list | tuple) else torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-5
        )


def keys(model):
    """Those of timm: ours has what reduces keys in a module of its own."""
    return sorted(key.replace(".attn.reduction.", ".attn.") for key in model.state_dict())


# -- our names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("door", DOORS)
def test_maps(door, name):
    """Those of the model itself, in both formats, at the places that are told."""
    make, arguments = DOORS[door], SMALL[name]
    whole = distinct(linsight.create_model(name, **arguments))
    x = torch.randn(2, *whole.default_cfg["input_size"][:1], 64, 64)
    final, maps = whole.forward_intermediates(x)
    same(final, whole.forward_features(x))
    count = len(whole.feature_info)
    for indices, places in ((None, None), (1, [count - 1]), ((-1, 0), [0, count - 1])):
        model = make(name, **arguments, features_only=True, **({} if indices is None else {"out_indices": indices}))
        assert model.output_fmt == "NCHW"
        report = linsight.load_published(model, whole.state_dict())
        assert not report.kept and not report.mismatched
        places = [*model.feature_info.out_indices] if places is None else places
        assert [*model.feature_info.out_indices] == places
        same(model.eval()(x), [maps[i] for i in places])
    if name in LISTS:
        with pytest.raises(LinsightError, match="output_fmt='NHWC' is not one of NCHW"):
            make(name, **arguments, features_only=True, output_fmt="NHWC")
        return
    model = make(name, **arguments, features_only=True, output_fmt="NHWC", out_indices=(0, 1))
    model.load_state_dict(make(name, **arguments, features_only=True, out_indices=(0, 1)).state_dict())
    linsight.load_published(model, whole.state_dict())
    assert model.output_fmt == "NHWC"
    same(model.eval()(x), [part.permute(0, 2, 3, 1) for part in maps[:2]])


@pytest.mark.parametrize("name", HOSTS)
def test_intermediates(name):
    model = distinct(linsight.create_model(name, **SMALL[name]))
    x = torch.randn(2, *model.default_cfg["input_size"][:1], 64, 64)
    final, maps = model.forward_intermediates(x)
    for indices, wanted in ((2, maps[-2:]), ((0, -1), [maps[0], maps[-1]]), ([-2], maps[-2:-1])):
        same(model.forward_intermediates(x, indices=indices), (final, wanted))
        for more in ({}, {"stop_early": True}):
            same(model.forward_intermediates(x, indices, intermediates_only=True, **more), wanted)
            last = model.forward_intermediates(x, indices, intermediates_only=True, output_fmt="NHWC", **more)
            same(last, [part.permute(0, 2, 3, 1) for part in wanted])
    with pytest.raises(LinsightError, match="output_fmt='NCL' is not one of NCHW, NHWC"):
        model.forward_intermediates(x, output_fmt="NCL")
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers((0, 1)) == [0, 1]
    same(pruned.forward_intermediates(x, (0, 1), intermediates_only=True), maps[:2])
    assert pruned.num_classes == 0 and sum(p.numel() for p in pruned.parameters()) < sum(
        p.numel() for p in model.parameters()
    )


# -- timm's names ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=THEIRS)
def pair(request):
    """A model of timm and ours of its name, with its weights."""
    theirs = distinct(timm.create_model(request.param, num_classes=7, **THEIRS[request.param]))
    ours = linsight.create_model(request.param, num_classes=7, **THEIRS[request.param]).eval()
    ours.load_state_dict(theirs.state_dict())
    return request.param, ours, theirs


def test_methods_of_timm(pair):
    name, *models = pair
    x = image(name)
    calls = [
        lambda m: m(x),
        lambda m: m.forward_features(x),
        lambda m: m.forward_head(m.forward_features(x)),
        lambda m: m.forward_head(m.forward_features(x), pre_logits=True),
        lambda m: m.forward_intermediates(x),
        lambda m: m.forward_intermediates(x, indices=2, norm=True),
        lambda m: m.forward_intermediates(x, indices=(0, -1), stop_early=True, intermediates_only=True),
        lambda m: m.forward_intermediates(x, indices=[0], stop_early=True),
    ]
    if hasattr(models[1], "get_intermediate_layers"):
        more = [{"output_fmt": "NLC"}, {"return_prefix_tokens": True}, {"output_fmt": "NLC", "norm": True}]
        calls += [lambda m, given=given: m.forward_intermediates(x, [0, 2], **given) for given in more]
        calls += [
            lambda m, given=given: m.get_intermediate_layers(x, **given)
            for given in ({}, {"n": 2, "norm": True}, {"n": (0, 2), "reshape": True, "return_prefix_tokens": True})
        ]
        same(*(m.forward_intermediates(x, 2, output_dict=True)["image_features"] for m in models))
    for call in calls:
        same(*map(call, models))


def test_what_timm_tells_of_a_model(pair):
    name, ours, theirs = pair
    assert ours.num_features == theirs.num_features and ours.head_hidden_size == theirs.head_hidden_size
    assert keys(ours) == keys(theirs)
    for coarse in (False, True):
        layers = [group_parameters(m, m.group_matcher(coarse), reverse=True) for m in (ours, theirs)]
        assert {key.replace(".attn.reduction.", ".attn."): layer for key, layer in layers[0].items()} == layers[1]
    assert ours.no_weight_decay() == set(theirs.no_weight_decay())
    heads = [m.get_classifier() for m in (ours, theirs)]
    same(*([part.weight for part in (head if isinstance(head, tuple) else [head])] for head in heads))
    for classes in (3, 0):
        for model in (ours, theirs):
            model.reset_classifier(classes)
            assert model.num_classes == classes
        assert keys(ours) == keys(theirs)
        assert ours(image(name)).shape == theirs(image(name)).shape


@pytest.mark.parametrize("indices", [1, (0,), (0, -2)])
def test_pruning_of_timm(pair, indices):
    name, ours, theirs = pair
    x = image(name)
    assert ours.prune_intermediate_layers(indices) == sorted(theirs.prune_intermediate_layers(indices))
    assert keys(ours) == keys(theirs)
    assert (ours.num_features, ours.head_hidden_size) == (theirs.num_features, theirs.head_hidden_size)
    same(ours.forward_features(x), theirs.forward_features(x))


@pytest.mark.parametrize("indices", [None, 1, (0, 2), [-1]])
def test_maps_of_timm(pair, indices):
    """Also that weights go from wrapper to wrapper, by both ways to load them."""
    name = pair[0]
    arguments = {**THEIRS[name], "features_only": True, **({} if indices is None else {"out_indices": indices})}
    theirs, ours = distinct(timm.create_model(name, **arguments)), linsight.create_model(name, **arguments).eval()
    x = image(name)
    ours.load_state_dict(theirs.state_dict())
    wanted = theirs(x)
    same(ours(x), wanted)
    assert ours.output_fmt == theirs.output_fmt and ours.in_chans == theirs.in_chans
    told, known = ours.feature_info, theirs.feature_info
    assert [*told.out_indices] == [place % len(known) for place in known.out_indices]
    for one, other in ((told.channels, known.channels), (told.reduction, known.reduction)):
        assert one() == other()
    assert told.module_name() == known.module_name()
    assert {key: ours.pretrained_cfg[key] for key in theirs.pretrained_cfg if key != "architecture"} == {
        key: value for key, value in theirs.pretrained_cfg.items() if key != "architecture"
    }
    other = linsight.create_model(name, **arguments).eval()
    assert not linsight.load_published(other, theirs.state_dict()).mismatched
    same(other(x), wanted)
    back = timm.create_model(name, **arguments).eval()
    assert not linsight.load_published(back, ours.state_dict()).mismatched
    same(back(x), wanted)


# -- keys --------------------------------------------------------------------------------------------------------------

WRAPPED = {
    "as they are": "",
    "of timm's getter": "model.",
    "of a backbone of transformers": "_backbone.model.",
    "of an encoder": "encoder.model.model.",
    "of a detector": "model.pixel_level_module.encoder._backbone.model.",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize(
    ("name", "flat"),
    [("inline_swin_tiny", True), ("inline_swin_tiny", False), ("focused_pvt_v2_b0", True), ("inline_deit_tiny", False)],
)
def test_keys_of_wrappers(name, wrapper, flat):
    model = distinct(linsight.create_model(name, **SMALL[name]))
    state = {}
    for key, tensor in model.state_dict().items():
        first, _, rest = key.partition(".")
        key = f"{first}_{rest}" if flat and first in ("layers", "stages") else key
        state[WRAPPED[wrapper] + key] = tensor
    if wrapper == "of a detector":
        state["model.decoder.norm.weight"] = torch.ones(3)
    count = len(model.feature_info)
    for wrapped in (False, True):
        more = {"features_only": True, "out_indices": range(count)} if wrapped else {}
        fresh = linsight.create_model(name, **SMALL[name], **more)
        own = (fresh.model if wrapped else fresh).state_dict()
        needed = {key: tensor for key, tensor in model.state_dict().items() if key in own}
        linsight.load_published(fresh, state)
        assert all(torch.equal(own[key], tensor) for key, tensor in needed.items())
        again = linsight.create_model(name, **SMALL[name], **more)
        found = again.load_state_dict(state, strict=False)
        assert not found.missing_keys
        own = (again.model if wrapped else again).state_dict()
        assert all(torch.equal(own[key], tensor) for key, tensor in needed.items())


def test_grids_go_with_renamed_keys():
    """32 places may be 4x8 or 8x4: what a state dict tells of them is not lost with the wrapper."""
    arguments = {**TINY_VIT, "features_only": True}
    wide = linsight.create_model("vit_tiny", **{**arguments, "img_size": (32, 64)})
    high = linsight.create_model("vit_tiny", **{**TINY_VIT, "img_size": (64, 32)})
    with pytest.raises(RuntimeError, match="pos_embed lies on 4x8, here on 8x4"):
        high.load_state_dict(wide.state_dict(), strict=False)


def test_of_two_models_none_is_taken():
    model = distinct(linsight.create_model("vit_tiny", **TINY_VIT))
    both = {f"{who}.{key}": tensor for who in ("student", "teacher") for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        linsight.create_model("vit_tiny", **TINY_VIT).load_state_dict(both)


def test_state_dicts_are_left_as_they_are():
    model = linsight.create_model("swin_tiny", **TINY_SWIN)
    state = linsight.create_model("swin_tiny", **TINY_SWIN, features_only=True).state_dict()
    before, told = [*state], copy.deepcopy(state._metadata)
    model.load_state_dict(state, strict=False)
    assert [*state] == before and state._metadata == told
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.fc\.weight"):
        model.load_state_dict(state)
