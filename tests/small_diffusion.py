"""Models of diffusers that are small and random, one of each class that is converted, and batches for them."""

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LATENTS = {"sample_size": 8, "in_channels": 4, "patch_size": 2}
LEVELS = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TEXT = 3  # tokens


def dit():
    return diffusers.DiTTransformer2DModel(num_layers=2, num_embeds_ada_norm=10, **HEADS, **LATENTS)


def pixart():
    text = {"cross_attention_dim": 16, "caption_channels": 12}
    return diffusers.PixArtTransformer2DModel(num_layers=2, **text, **HEADS, **LATENTS)


def sd15():
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(cross_attention_dim=12, attention_head_dim=2, **blocks, **LEVELS)


def sdxl():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
    }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 4 * 6 + 5,
    }
    sizes = {"cross_attention_dim": 12, "attention_head_dim": (2, 4), "use_linear_projection": True}
    return diffusers.UNet2DConditionModel(**sizes, **added, **blocks, **LEVELS)


def ddpm():
    """A U-Net whose attention is of feature maps, with a norm before and a sum behind."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(in_channels=4, out_channels=4, attention_head_dim=4, **blocks, **LEVELS)


def sd3(**options):
    text = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sizes = {"num_layers": 3, "out_channels": 4, "pos_embed_max_size": 12, "dual_attention_layers": (0,)}
    return diffusers.SD3Transformer2DModel(qk_norm="rms_norm", **sizes, **text, **HEADS, **LATENTS)


def flux():
    text = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=2, **text, **HEADS)


MODELS = {make.__name__: make for make in (dit, pixart, sd15, sdxl, ddpm, sd3, flux)}


def made(name):
    """A model whose attention matters: weights are larger than at the start."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def places(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros(height * width), rows.flatten(), columns.flatten()], dim=1)


def batch(name, height=8, width=8):
    image, text, pooled = torch.randn(2, 4, height, width), torch.randn(2, TEXT, 12), torch.randn(2, 10)
    steps = torch.tensor([5, 7])
    if name == "flux":
        ids = {"img_ids": places(height, width), "txt_ids": torch.zeros(TEXT, 3)}
        packed = image.flatten(2).transpose(1, 2)
        shared = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return {"hidden_states": packed, "timestep": steps / 10, **shared, **ids}
    if name == "sd3":
        given = {"hidden_states": image, "encoder_hidden_states": text, "pooled_projections": pooled}
        return {**given, "timestep": steps}
    if name == "dit":
        return {"hidden_states": image, "timestep": steps, "class_labels": torch.tensor([1, 2])}
    if name == "pixart":
        seen = torch.tensor([[1, 1, 1], [1, 1, 0]])
        given = {"hidden_states": image, "encoder_hidden_states": text, "encoder_attention_mask": seen}
        return {**given, "timestep": steps, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    if name == "ddpm":
        return {"sample": image, "timestep": steps}
    added = {"text_embeds": torch.randn(2, 5), "time_ids": torch.randn(2, 6)} if name == "sdxl" else None
    return {"sample": image, "timestep": steps, "encoder_hidden_states": text, "added_cond_kwargs": added}


def answer(model, given):
    with torch.no_grad():
        return model(**given).sample


def close(ours, expected, tolerance=1e-5):
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
