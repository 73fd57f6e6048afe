"""Initial weights that a mechanism has of its own are there in every host, which draws those of all linear layers."""

import math

import pytest
import torch

from linsight.models import create_model, create_video_model

HOSTS = {
    "vit_tiny": {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "class_token": False},
    "swin_tiny": {"patch_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2},
    "compact_nano": {},
    "pvt_v2_b0": {},
    "van_pyramid_b0": {},
    "litv2_pyramid_small": {},
}
HOSTS["vit_tiny"]["global_pool"] = "avg"


def parameters(mechanism, host, suffix):
    torch.manual_seed(0)
    model = create_model(host, attention=mechanism, img_size=64, **HOSTS[host])
    found = [parameter.detach() for name, parameter in model.named_parameters() if name.endswith(suffix)]
    assert found
    return found


@pytest.mark.parametrize("host", HOSTS)
def test_hedgehog_starts_as_the_identity(host):
    for name in "qk":
        for weight in parameters("hedgehog", host, f"map_{name}.layer.weight"):
            assert torch.equal(weight, torch.eye(len(weight)))
        assert not any(bias.any() for bias in parameters("hedgehog", host, f"map_{name}.layer.bias"))


@pytest.mark.parametrize("host", ["vit_tiny", "swin_tiny", "compact_nano"])
def test_values_of_convit_start_as_its_input(host):
    for weight in parameters("gpsa", host, ".v.weight"):
        assert torch.equal(weight, torch.eye(len(weight)))


@pytest.mark.parametrize("host", HOSTS)
def test_windows_of_vsa_start_moved_and_scaled(host):
    for name in ("offsets", "scales"):
        for weight in parameters("vsa", host, f"sampling_{name}.weight"):
            most = weight.shape[1] ** -0.5  # a convolution's, uniform
            assert weight.abs().max() <= most and weight.std() > 0.4 * most
        assert all(bias.any() for bias in parameters("vsa", host, f"sampling_{name}.bias"))


@pytest.mark.parametrize("host", HOSTS)
def test_gates_of_polarized_start_as_published(host):
    for name, numbers in (("place_value", 2.0), ("channel_value", 2.0), ("up", 1 / 3)):
        for weight in parameters("polarized", host, f"core.{name}.weight"):
            assert weight.std().item() == pytest.approx(math.sqrt(numbers / weight.shape[1]), rel=0.2)


def test_convolutions_of_l2vit_start_as_its_linear_layers():
    torch.manual_seed(0)
    model = create_model("l2vit_tiny")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            spread = module.weight.abs().median().item() / 0.6745  # timm draws one in some ten million at its bound, 2
            assert spread == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any()


def assert_starts_as_a_convolution(weights):
    for weight in weights:
        assert weight.std().item() == pytest.approx(math.sqrt(2 / weight.shape[0]), rel=0.2)


def test_linear_layers_that_are_published_as_convolutions_start_as_such():
    for host in ("pvt_v2_b0", "compact_nano"):
        assert_starts_as_a_convolution(parameters("favit", host, "kv_l.point_conv.weight"))
    model = create_model("compact_nano", attention="transnext", attention_options={"sr_ratio": 2}, img_size=64)
    found = [weight.detach() for name, weight in model.named_parameters() if name.endswith("sr.weight")]
    assert found
    assert_starts_as_a_convolution(found)


def test_linear_layers_of_videos_start_as_those_of_images():
    torch.manual_seed(0)
    model = create_video_model("videomamba_video_tiny", depth=1, num_classes=10)
    weights = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {"head", "layers.0.attn.in_proj"} <= weights.keys()
    for module in weights.values():
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert module.bias is None or not module.bias.any()
