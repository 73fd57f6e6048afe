"""Small models to stream, and what they give of the whole image at once."""

import torch

import linsight
from linsight.attention import list_attentions, mechanism

STREAMING = [entry.name for entry in list_attentions(stream=True)]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # images that are normalised already
_STAGES = [(8, 1, 2, 2.0), (16, 2, 2, 2.0), (16, 1, 2, 2.0), (16, 1, 2, 2.0)]
SMALL = {
    "vit_tiny": {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "compact_pico": {"stem": [(8, 1), (8, 2)], "stages": [(8, 1, 2), (16, 2, 2)], "img_size": 32},
    "pvt_tiny": {"stages": [(*stage, 1) for stage in _STAGES], "img_size": 64},
    "pvt_v2_b0": {"embed_dims": (8, 16, 16, 16), "depths": (1, 2, 1, 1), "num_heads": (2, 2, 2, 2)},
    "swin_tiny": {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 3, "img_size": 64},
    "cswin_tiny": {"stages": [(*stage, 2) for stage in _STAGES], "img_size": 64},
    "mlla_pyramid_tiny": {"stages": _STAGES, "img_size": 64},
    "h_vit_tiny": {"stages": _STAGES, "img_size": 64},
    "soft_pyramid_tiny": {"stages": _STAGES, "img_size": 64},
    "l2vit_pyramid_tiny": {"stages": _STAGES, "img_size": 64},
    "flow_pyramid": {"stages": _STAGES, "img_size": 64},
    "van_pyramid_b0": {"stages": _STAGES, "img_size": 64},
    "attnet_pyramid_xxs": {"stages": _STAGES, "img_size": 64},
    "ravlt_t": {"stages": _STAGES, "projection": 24, "img_size": 64},
    "nala_xt": {"stages": _STAGES, "projection": 24, "img_size": 64},
    "ravlt_linear_b0": {"stages": _STAGES, "projection": 24, "img_size": 64},
    "transnext_small": {"stages": _STAGES, "img_size": 64},
}
_NO_TOKEN = {"vit_tiny": {"class_token": False, "global_pool": "avg"}, "pvt_tiny": {"global_pool": "avg"}}
_NO_TOKEN["soft_pyramid_tiny"] = _NO_TOKEN["pvt_tiny"]


def small(host, attention, **arguments):
    """A model in evaluation mode, with no parameter or statistic at a value that hides a mistake."""
    if not mechanism(attention).capabilities.prefix:
        arguments |= _NO_TOKEN.get(host, {})
    torch.manual_seed(0)
    model = linsight.create_model(host, attention=attention, num_classes=5, **SMALL[host] | arguments)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data.add_(0.2 * noise.abs() if name.endswith("running_var") else 0.2 * noise)
    return model.eval()


def image(height, width, seed=0):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def whole(model, picture):
    """The last map `(h * w, C)`, features and logits that the whole image gives at once."""
    x = model.forward_features(picture[None])
    tokens = x if x.ndim == 3 else x.flatten(1, 2) if type(model).__name__ == "SwinTransformer" else x.flatten(2).mT
    spatial = tokens[0, getattr(model, "num_prefix_tokens", int(getattr(model, "class_token", False))) :]
    return spatial, model.forward_head(x, pre_logits=True), model.forward_head(x)


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
