"""Token merging and AgentSD: merging alone, attention by agents alone, and a block of latent diffusion with both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden.spec import Run, tensor
from linsight.attention import merge_heads, split_heads
from linsight.convert.merging import agent_attention, count_merged, match_tokens, merge_sources, unmerge_sources
from linsight.convert.training_free import merge_tokens


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those of `merge_tokens`."""
    return {"ratio": config["ratio"], "cell": (config["sy"], config["sx"]), "agents": config["agent_ratio"]}


def merging(spec: dict[str, Any]) -> Run:
    """Merged and unmerged tokens; sums over merged tokens and over agents."""
    config, x = spec["config"], tensor(spec["input_shape"])
    grid, cell = tuple(config["grid"]), (config["sy"], config["sx"])

    def call() -> dict[str, Tensor]:
        merged, agents = count_merged(grid, cell, config["ratio"], config["agent_ratio"])
        match = match_tokens(x, grid, cell)
        tokens = merge_sources(x, match, merged)
        assert tokens.shape[1] == config["merged_tokens"]
        assert agents == (None if config["agent_tokens"] is None else x.shape[1] - config["agent_tokens"])
        found = {"output": unmerge_sources(tokens, match, merged), "output1": sums(tokens)}
        return found if agents is None else found | {"output2": sums(merge_sources(x, match, agents))}

    return Run(nn.Identity(), call)


def sums(x: Tensor) -> Tensor:
    """Over tokens, of values and of squares: `(B, 2, C)`."""
    return torch.stack([x.sum(dim=1), x.square().sum(dim=1)], dim=1)


class CrossAttention(nn.Module):
    """As in latent diffusion."""

    def __init__(self, dim: int, context: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * width, bias=False)
        self.to_k = nn.Linear(context, heads * width, bias=False)
        self.to_v = nn.Linear(context, heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            split_heads(layer(y), self.heads).transpose(1, 2)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)))


class GEGLU(nn.Module):
    """value * gelu(gate)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """As in latent diffusion."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """As in latent diffusion; `disable_self_attn` gives the text to the first attention, too."""

    def __init__(self, dim: int, context: int, heads: int, width: int, disable_self_attn: bool = False) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.attn1 = CrossAttention(dim, context if disable_self_attn else dim, heads, width)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context, heads, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context=context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))


class OneBlock(nn.Module):
    """A block on a latent `(B, C, H, W)`."""

    def __init__(self, dim: int, context: int, heads: int, width: int, disable_self_attn: bool = False) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(dim, context, heads, width, disable_self_attn)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.block(x.flatten(2).transpose(1, 2), context)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def attention(spec: dict[str, Any]) -> Run:
    """Attention of tokens by way of agents."""
    config, inputs = spec["config"], dict(spec["inputs"])
    x, agents = tensor(inputs["input"]), tensor(inputs["agent"], "agent")
    layer = CrossAttention(x.shape[2], x.shape[2], config["heads"], config["head_dim"])

    def call() -> Tensor:
        q, k, v, a = (
            split_heads(projection(y), layer.heads).transpose(1, 2)
            for projection, y in ((layer.to_q, x), (layer.to_k, x), (layer.to_v, x), (layer.to_q, agents))
        )
        out = agent_attention(q, k, v, a, sharpness=config["k_scale2"], shortcut=config["k_shortcut"])
        return layer.to_out(merge_heads(out.transpose(1, 2)))

    return Run(layer, call)


def block(spec: dict[str, Any]) -> Run:
    """The block with the settings of its case on it."""
    config, inputs = spec["config"], dict(spec["inputs"])
    x, context = tensor(inputs["input"]), tensor(inputs["context"], "context")
    host = OneBlock(x.shape[1], config["context_dim"], config["heads"], config["head_dim"])
    merge_tokens(host, **settings(config), max_downsample=config["max_downsample"])
    return Run(host, lambda: host(x, context))


BUILDERS = {"op_agentsd_merge": merging, "op_agentsd_attn": attention, "block_agentsd": block}
