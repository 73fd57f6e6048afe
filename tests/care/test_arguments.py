"""Each argument of a host is honoured or refused: state, modules or outputs change, or one line says why not."""

import functools
import inspect
import re
import zlib

import pytest
import torch
from timm.layers import AttentionRope, PatchEmbed
from timm.models import pvt_v2, resnet, swin_transformer, vision_transformer
from torch import nn

import linsight
from linsight.attention import Block, Capabilities, Layer, Paper, register, unregister
from linsight.errors import LinsightError
from linsight.models import HOSTS
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver, Latents, Network
from linsight.models.hosts.steps_resnet import StepsResNet
from linsight.models.parts.pyramid import PlainPyramid
from test_hosts import NO_TOKEN, SMALL


class Embed(PatchEmbed):
    """An embedding of a caller's own."""


class Norm(nn.LayerNorm):
    """A norm of a caller's own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, eps=0.1)


class OtherMlp(vision_transformer.Mlp):
    """An MLP of a caller's own."""


TRIED = {
    "img_size": None,  # of tables; any size works
    "device": "meta",
    "dtype": torch.float64,
    "patch_size": 4,
    "in_chans": 4,
    "num_classes": 5,
    "global_pool": "max",
    "embed_dim": 64,
    "embed_dims": (16, 16, 16, 16),
    "depth": 2,
    "depths": (1, 1, 1, 1),
    "num_heads": 1,
    "mlp_ratio": 3.0,
    "mlp_ratios": (2, 2, 2, 2),
    "qkv_bias": False,
    "qk_norm": True,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "proj_bias": False,
    "init_values": 1e-5,
    "class_token": False,
    "pos_embed": "none",
    "no_embed_class": True,
    "reg_tokens": 2,
    "pre_norm": True,
    "final_norm": False,
    "fc_norm": True,
    "pool_include_prefix": True,
    "dynamic_img_size": False,
    "dynamic_img_pad": False,
    "drop_rate": 0.3,
    "pos_drop_rate": 0.3,
    "patch_drop_rate": 0.3,
    "proj_drop_rate": 0.3,
    "attn_drop_rate": 0.3,
    "drop_path_rate": 0.3,
    "weight_init": "moco",
    "fix_init": True,
    "embed_layer": Embed,
    "embed_norm_layer": Norm,
    "norm_layer": Norm,
    "act_layer": nn.ReLU,
    "mlp_layer": OtherMlp,
    "block_fn": vision_transformer.ParallelScalingBlock,
    "attn_layer": AttentionRope,
    "head_dim": 4,
    "window_size": 2,
    "always_partition": True,
    "strict_img_size": True,
    "sr_ratios": (4, 2, 2, 1),
    "linear": True,
    "cpe": True,
    "border": 1,
    "norm": "siamese",
    "steps": None,
    "attention_window": 2,
    "dense_windows": True,
    "projection": 16,
    "mlp_norm": True,
    "joined": True,
    "stages": None,
    "stem": None,
    "attention": None,
    "attention_options": None,
}
TOGETHER = {"pool_include_prefix": {"global_pool": "avg"}, "class_token": {"global_pool": "avg"}}
TOGETHER["fc_norm"] = {"global_pool": "token"}
# Of mechanisms that see the whole grid, or know no heads: what the host gives to others, so that all may be compared.
IDLE = {"inline": {"window_size"}, "weightformer": {"window_size", "num_heads"}}
DRAWN = {"weight_init", "fix_init", "init_values"}  # of these, the initial weights tell
OF_TOKENS = {"class_token", "fc_norm", "no_embed_class", "pool_include_prefix", "reg_tokens"}
# Where one value is not enough: of a host.
INSTEAD = {
    ("swin_tiny", "patch_size"): 2,
    ("swin_tiny", "num_heads"): (1, 1, 1, 1),
    ("pvt_v2_b0", "num_heads"): (1, 1, 1, 1),
    ("pvt_tiny", "final_norm"): "absent",
    ("pvt_tiny", "global_pool"): "max",
    ("soft_pyramid_tiny", "final_norm"): "absent",
    ("soft_pyramid_tiny", "global_pool"): "max",
}
HOSTS_OF = {
    "vit_tiny": ("inline", "softmax", "circulant", "weightformer"),
    "swin_tiny": ("inline", "softmax", "weightformer"),
    "pvt_v2_b0": ("inline", "softmax", "circulant", "weightformer"),
    "pvt_tiny": ("inline", "weightformer"),
    "cswin_tiny": ("softmax", "weightformer"),
    "mlla_pyramid_tiny": ("mlla", "weightformer"),
    "h_vit_tiny": ("ttt", "weightformer"),
    "soft_pyramid_tiny": ("inline", "weightformer"),
    "l2vit_pyramid_tiny": ("softmax", "weightformer"),
    "flow_pyramid": ("inline", "weightformer"),
    "transnext_small": ("inline", "weightformer"),
    "van_pyramid_b0": ("inline", "weightformer"),
    "attnet_pyramid_xxs": ("inline", "weightformer"),
    "ravlt_t": ("rala", "weightformer"),
    "nala_xt": ("nalaformer", "weightformer"),
    "ravlt_linear_b0": ("polaformerpp", "weightformer"),
    "compact_pico": ("inline", "weightformer"),
}
ALL_QUICK = ("vit_tiny", "pvt_tiny")  # hosts whose other mechanisms aren't left to `pytest -m full`
THEIRS = {
    "vit_tiny": vision_transformer.VisionTransformer,
    "swin_tiny": swin_transformer.SwinTransformer,
    "pvt_v2_b0": pvt_v2.PyramidVisionTransformerV2,
    "van_pyramid_b0": PlainPyramid,
    "attnet_pyramid_xxs": PlainPyramid,
    "ravlt_t": PlainPyramid,
    "transnext_small": PlainPyramid,
    "nala_xt": PlainPyramid,
    "ravlt_linear_b0": PlainPyramid,
}


def build(host, attention, **arguments):
    first = re.split("[,:]", attention)[0]
    own = {} if linsight.attention.mechanism(first).capabilities.prefix else NO_TOKEN.get(host, {})
    torch.manual_seed(0)
    return linsight.create_model(host, attention=attention, **{**SMALL[host], **own, **arguments})


def seen(model):
    """All that can be told of a model from outside: state, its values, modules, logits, what is dropped."""
    state = {key: (tensor.shape, tensor.dtype, tensor.device) for key, tensor in model.state_dict().items()}
    drops = {name: vars(module).get("drop_prob", 0) for name, module in model.named_modules()}
    if any(p.is_meta for p in model.parameters()):
        return state, drops, repr(model), None
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # by name, or what is drawn before it would show
            torch.manual_seed(zlib.crc32(key.encode()))
            parameter.normal_(std=0.3)
        torch.manual_seed(1)
        return state, drops, repr(model), model.eval()(torch.randn(2, model.in_chans, 64, 64, dtype=dtype)).tolist()


def values(model):
    """What the initial weights add up to."""
    return [parameter.sum().item() for parameter in model.parameters()]


@functools.cache
def plain(host, attention, together):
    return seen(build(host, attention, **dict(together)))


def cases():
    for host, attentions in HOSTS_OF.items():
        names = dict.fromkeys(inspect.signature(HOSTS[host].model_cls.__init__).parameters)
        names |= dict.fromkeys(inspect.signature(THEIRS.get(host, nn.Module).__init__).parameters)
        names |= dict.fromkeys(("device", "dtype"))
        for name in names:
            value = INSTEAD.get((host, name), TRIED.get(name, TRIED))
            if name in ("self", "args", "kwargs", "timm_args", "timm_kwargs", "factory") or value is None:
                continue
            for attention in attentions:
                if attention == "circulant" and name in OF_TOKENS:
                    continue
                quick = attention == attentions[0] or host in ALL_QUICK or name in IDLE.get(attentions[0], ())
                marks = [] if quick else pytest.mark.full
                yield pytest.param(host, attention, name, value, id=f"{host}-{attention}-{name}", marks=marks)


@pytest.mark.parametrize(("host", "attention", "name", "value"), [*cases()])
def test_honoured_or_refused(host, attention, name, value):
    assert value is not TRIED, f"no value is tried of {name}"
    together = TOGETHER.get(name, {}) if host == "vit_tiny" else {}
    try:
        model = build(host, attention, **{**together, name: value})
    except LinsightError as error:
        assert "\n" not in str(error) and name in str(error).replace("class token", "class_token")
        return
    changed = seen(model) != plain(host, attention, tuple(together.items()))
    changed |= name in DRAWN and values(model) != values(build(host, attention))
    assert changed or name in IDLE.get(attention, ()), f"{name}={value} has no effect"


def test_what_is_so_in_any_case_may_be_said():
    build("vit_tiny", "inline", dynamic_img_size=True, dynamic_img_pad=True)
    build("swin_tiny", "inline", strict_img_size=False, dynamic_img_size=True)
    build("vit_tiny", "weightformer", qkv_bias=True, proj_drop_rate=0.0, cpe=False)
    build("vit_tiny", "circulant:1/softmax", qkv_bias=False)


def refused(call, *words):
    with pytest.raises(LinsightError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_unknown_arguments_offer_the_nearest():
    refused(lambda: linsight.create_model("vit_tiny", proj_drop=0.1), "proj_drop_rate")
    refused(lambda: linsight.create_model("pvt_tiny", drop_rates=0.1), "drop_rate")
    refused(lambda: linsight.create_model("steps_resnet18", layers=(1, 1, 1, 1)), "stages")
    refused(lambda: linsight.create_model("vit_tiny", out_indices=(1,)), "features_only")
    refused(lambda: linsight.create_model("swin_tiny_patch4_window7_224", out_indices=(1,)), "features_only")


def test_sizes_of_stages_that_a_host_does_not_read():
    refused(lambda: build("compact_pico", "inline", stages=[(16, 1, 2, 3.0)]), "mlp_ratio")
    refused(lambda: build("mlla_pyramid_tiny", "mlla", stages=[(16, 1, 2, 2.0, 2)]), "reduction=2")


def test_windows_of_the_mechanism():
    refused(lambda: build("swin_tiny", "softmax", attention_window=4), "attention_window=4", "softmax")
    refused(lambda: build("swin_tiny", "inline", dense_windows=True), "dense_windows")
    build("swin_tiny", "inline,softmax,softmax,softmax", attention_window=4)


def test_what_is_no_device_and_no_dtype():
    refused(lambda: linsight.create_attention("inline", 16, 2, dtype="float32"), "torch.dtype")
    refused(lambda: linsight.create_attention("inline", 16, 2, device="nowhere"), "nowhere", "'cpu'")


def test_what_two_arguments_say():
    refused(lambda: linsight.create_attention("agent", 16, 2, reduction=2, pool=2), "reduction=2", "pool=2")


def test_networks_of_dynamic_perceiver():
    small = {"latents": Latents(8, (0.3,) * 4), "num_classes": 5}
    refused(lambda: DynamicPerceiver(Network("regnet_y_400mf", 0.5), **small), "width=0.5")
    model = DynamicPerceiver(Network("resnet18", 0.125), **small)
    refused(lambda: model.reset_classifier(3, "max"), "global_pool")
    assert DynamicPerceiver(Network("resnet18", 0.125), **small, drop_rate=0.4).drop_rate == 0.4


@pytest.mark.parametrize("name", list(inspect.signature(resnet.ResNet.__init__).parameters)[4:])
def test_arguments_of_timm_in_steps_resnet(name):
    """All of them are timm's own business; here, that they arrive."""
    value = {"channels": (8,) * 4, "device": "meta", "dtype": torch.float64, "block_args": {}}.get(name)
    if value is None:
        return
    stages = [[(8, 1), (16, 1)]] * 4
    if name == "channels":
        return refused(lambda: StepsResNet("basic", stages, channels=value), name)
    assert StepsResNet("basic", stages, num_classes=3, **{name: value})


def test_layers_with_projections_of_their_own():
    """Options of `Attention` are refused by a layer whose constructor does not take them, and hosts ask for none."""

    class Bare(Layer):
        capabilities = Capabilities(prefix=True)

        def __init__(self, dim, num_heads, *, device=None, dtype=None):
            super().__init__()
            self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

        def forward(self, x, layout, **others):
            return self.proj(x)

    register("bare", kind="layer", formula="W x", complexity="O(N)", paper=Paper("None"))(Bare)
    try:
        for name, value in (
            ("qkv_bias", False),
            ("proj_drop", 0.1),
            ("reduction", 2),
            ("pool", 2),
            ("projections", "qkv"),
        ):
            refused(lambda name=name, value=value: linsight.create_attention("bare", 16, 2, **{name: value}), name)
        for host in SMALL:
            linsight.create_model(host, attention="bare", **SMALL[host])
        refused(lambda: build("vit_tiny", "bare", proj_drop_rate=0.1), "proj_drop")
    finally:
        unregister("bare")


def test_projections_without_a_bias():
    refused(lambda: linsight.create_attention("circulant", 16, 2, qkv_bias=True), "qkv_bias", "circulant")
    linsight.create_attention("circulant", 16, 2, qkv_bias=False)
    assert Block.takes == ("mlp_ratio", "drop_path_rate")
