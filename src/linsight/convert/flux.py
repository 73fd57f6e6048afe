"""Mechanisms in the attention of FLUX, as an attention processor of diffusers: it needs nothing of diffusers itself."""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Core, Tokens, create_core, merge_heads, split_heads
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, accumulator

from ._place import check_prefix, locate


class FluxProcessor(nn.Module):
    """A processor for `FluxAttention` of diffusers: its projections, norms and rotary embedding, a mechanism of ours.

    Text tokens are in front, as prefix tokens of the mechanism, and the image behind them on its grid: in double blocks
    they come apart, in single blocks together, and what the grid does not hold is text. With `attention="softmax"` it
    computes what diffusers does. The mechanism is `core`; for `load_published` and `export_published` its parameters
    have their published names, CLEAR's `processor.spatial_weight`.

    >>> for name, module in transformer.named_modules():
    ...     if type(module).__name__ == "FluxAttention":
    ...         module.set_processor(FluxProcessor("clear", module.inner_dim, module.heads, grid=(64, 64), radius=8))

    Args:
        attention: the mechanism, one that takes prefix tokens and is no layer of its own.
        dim, num_heads: those of the attention.
        grid: height and width of the image in tokens, 1/16 of its pixels. May be set later, as `processor.grid`, or
            given with a call of the model: `joint_attention_kwargs={"grid": (64, 96)}`.
        options: of the mechanism.

    Raises:
        CapabilityError: the mechanism takes no prefix tokens, or has projections of its own.
    """

    def __init__(
        self,
        attention: str,
        dim: int,
        num_heads: int,
        *,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        core = create_core(attention, dim, num_heads, device=device, dtype=dtype, **options)
        if core.layer is not None or core.extra_dim or core.out_dim not in (None, dim):
            raise CapabilityError(
                f"'{attention}' is more than its core on queries, keys and values, which FLUX projects itself: take "
                f"another mechanism"
            )
        check_prefix(type(core), 1)
        self.core: Core = core
        self.attention = attention
        self.grid = grid

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Any:
        """See `forward`; diffusers asks this signature which arguments are taken."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, grid)

    def forward(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The tokens of the image `(B, N, C)` and of the text `(B, T, C)` after attention, in a single block as one.

        Args:
            attn: the attention that this is the processor of.
            image: its tokens; in a single block those of the text are in front.
            text: in a double block.
            mask: must be None, as FLUX has it.
            rotary: cosines and sines `(T + N, D)`, each for a pair of channels twice.
            grid: that of this image, if not as the processor says.

        Raises:
            LinsightError: there is no grid, tokens do not fit it, or there is a mask.
        """
        if mask is not None:
            raise LinsightError("attention_mask: FLUX has none, so its processor takes none, pass attention_mask=None")
        parts = [projected(attn, image, ("to_q", "to_k", "to_v"), "to_qkv", "norm")]
        if text is not None:
            added = ("add_q_proj", "add_k_proj", "add_v_proj")
            parts.insert(0, projected(attn, text, added, "to_added_qkv", "norm_added"))
        q, k, v = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        if rotary is not None:
            q, k = (turned(x, *rotary) for x in (q, k))
        x = image if text is None else torch.cat([text, image], dim=1)
        out = merge_heads(self.core(Tokens(q, k, v, x), Layout(self._locate(x, text, grid))).to(v.dtype))
        if text is None:
            return out
        text, image = out.split([text.shape[1], image.shape[1]], dim=1)
        for module in attn.to_out:
            image = module(image)
        return image, attn.to_add_out(text)

    def _locate(self, x: Tensor, text: Tensor | None, given: tuple[int, int] | None) -> Grid:
        grid = self.grid if given is None else given
        if grid is None:
            raise LinsightError(
                f"'{self.attention}' needs to know where the tokens of an image lie: pass grid=(height, width) to "
                f"FluxProcessor, set processor.grid, or call the model with joint_attention_kwargs={{'grid': ...}}"
            )
        rest = x.shape[1] - grid[0] * grid[1]
        return locate(tuple(grid), max(0, rest) if text is None else text.shape[1], x)


def projected(attn: Any, x: Tensor, names: tuple[str, ...], fused: str, norm: str) -> tuple[Tensor, ...]:
    """q, k and v `(B, n, H, D)` of tokens, by the linear maps of these names, q and k normed over a head."""
    if getattr(attn, "fused_projections", False):
        q, k, v = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        q, k, v = (getattr(attn, name)(x) for name in names)
    q, k, v = (split_heads(part, attn.heads) for part in (q, k, v))
    return getattr(attn, f"{norm}_q")(q), getattr(attn, f"{norm}_k")(k), v


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `(B, N, H, D)`, whose channels (2i, 2i + 1) turn as a pair, by cosines and sines `(N, D)`; in its dtype."""
    wide = x.to(accumulator(x.dtype))
    a, b = wide[..., ::2], wide[..., 1::2]
    across = torch.stack([-b, a], dim=-1).flatten(-2)
    return (wide * cos[:, None].to(wide) + across * sin[:, None].to(wide)).to(x.dtype)
