"""Token merging and AgentSD on diffusion models that somebody else trained: no weight changes, nothing is trained.

In each transformer block that sees the whole latent, self-attention runs on merged tokens (`merging.py`), and where
agents pay, by way of agents; its outputs are unmerged before they are added. Cross-attention and feed-forward layers
are left as they are. A block is known by the name of its class, `BasicTransformerBlock`, as of diffusers and of latent
diffusion; its `attn1` has `to_q`, `to_k`, `to_v`, `to_out` and `heads`.

>>> merging = merge_tokens(pipe.unet, 0.5)  # ToMeSD; or agent_sd(pipe.unet, 0.4, steps=50)
>>> pipe(prompt, num_inference_steps=50); merging.remove()

ToMeSD: Bolya and Hoffman, arXiv 2303.17604. AgentSD: Han et al., arXiv 2312.08874, ECCV 2024.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from linsight.errors import LinsightError

from ._diffusion import blocks
from ._merged import Counts, Setting, TokenMerging, take_off
from .merging import Size

__all__ = ["Counts", "Setting", "TokenMerging", "agent_sd", "merge_tokens", "remove_merging"]


def merge_tokens(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    cell: Size = (2, 2),
    agents: float = 0.0,
    later: Mapping[int, Setting] | None = None,
    max_downsample: int = 1,
    generator: torch.Generator | None = None,
    zero_control: bool = False,
) -> TokenMerging:
    """Let self-attention in `model` run on merged tokens, in place; what was put on it before is removed.

    Args:
        model: the network that is called with latents `(B, C, ..., H, W)`: `pipe.unet` of diffusers,
            `model.model.diffusion_model` of latent diffusion.
        ratio, cell, agents: see `Setting`; from the first step on.
        later: settings from other steps of the sampler on.
        max_downsample: the coarsest level where tokens are merged, in latent pixels a token; 1 is the full latent.
        generator: draws the destination of each cell, anew at every step; without one it is the top left token.
        zero_control: the mean of all values in place of attention, by which the worth of attention is judged.

    Raises:
        LinsightError: a setting is out of range, or no such block is in the model.
    """
    schedule = {0: Setting(ratio, cell, agents), **(later or {})}
    if any(step < 1 for step in later or {}):
        raise LinsightError(
            f"later={sorted(later or {})}: it begins at step 1; step 0 is what ratio, cell and agents say"
        )
    if max_downsample < 1:
        raise LinsightError(
            f"max_downsample={max_downsample}: it is 1 for the full latent, 2 for half of its sides, ..."
        )
    return TokenMerging(model, schedule, max_downsample, generator, zero_control)


def agent_sd(
    model: nn.Module,
    ratio: float = 0.4,
    *,
    steps: int = 50,
    max_downsample: int = 1,
    generator: torch.Generator | None = None,
) -> TokenMerging:
    """Put AgentSD on a model, with its published settings for a sampler of `steps` steps; see `merge_tokens`.

    In the first two fifths of the steps cells are 4x4 and agents are made of 0.95 of the tokens; then cells are 2x2 and
    attention is softmax, since 0.5 is too few for agents to pay.
    """
    later = {max(1, 2 * steps // 5): Setting(ratio, (2, 2), agents=0.5)}
    shared: dict[str, Any] = {"max_downsample": max_downsample, "generator": generator}
    return merge_tokens(model, ratio, cell=(4, 4), agents=0.95, later=later, **shared)


def remove_merging(model: nn.Module) -> None:
    """Take off what `merge_tokens` has put on `model`; it is then as it was, bit for bit."""
    take_off(blocks(model))
