"""Attention processors of diffusers with a mechanism in the place of softmax.

Around it they do what diffusers' own do: norms, rotary embedding, projections, residual connection.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Rename, split_heads
from linsight.errors import LinsightError
from linsight.ops import Grid, accumulator

from .._place import locate, table_grid
from ..mixing import Mixing
from ..place import Place
from .seam import keys_and_pairs

# How the projections of tokens, and the norms of their queries and keys, are named.
_OWN, _OF_TEXT = ("to_{}", "norm_{}"), ("add_{}_proj", "norm_added_{}")


class Processor(nn.Module):
    """An attention processor of diffusers with a mechanism in the place of its softmax."""

    def __init__(self, mixing: Mixing | None = None, place: Place | None = None) -> None:
        super().__init__()
        if mixing is None or place is None:  # as an IP-adapter makes processors again, by their class alone
            raise LinsightError(
                "processors of a converted model are not made anew: load an adapter first, and then convert"
            )
        self.mixing = mixing
        self.place = place

    @property
    def published(self) -> tuple[Rename, ...]:
        """Key map: what the mechanism learns has published names here, as CLEAR's `processor.spatial_weight`."""
        return self.mixing.published_keys()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Means of values `(B, N, C)`; `mask` is one of keys, or added to the scores, see `keys_and_pairs`."""
        keep, bias = keys_and_pairs(self.mixing, mask, q)
        return self.mixing(q, k, v, x, grid, keep=keep, score_bias=bias)


def joined(attn: Any, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v `(B, T + N, H, D)` of tokens `x` `(B, N, C)` behind those of a text, and both `(B, T + N, C)`."""
    own = projected(attn, _OWN, x, x, x)
    if text is None:
        return *own, x
    both = zip(projected(attn, _OF_TEXT, text, text, text), own, strict=True)
    q, k, v = (torch.cat(parts, dim=1) for parts in both)
    return q, k, v, torch.cat([text, x], dim=1)


def projected(attn: Any, names: tuple[str, str], *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `(B, n, H, D)`, each of what it is `given`; q and k are normed where the model does so."""
    linear, norm = names
    q, k, v = (
        split_heads(getattr(attn, linear.format(part))(x), attn.heads) for part, x in zip("qkv", given, strict=True)
    )
    norm_q, norm_k = (getattr(attn, norm.format(part)) for part in "qk")
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


class Plain(Processor):
    """Self-attention of tokens or of feature maps: that of DiT, PixArt and U-Nets."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """See `forward`; diffusers asks this signature which arguments are taken."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def forward(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None, temb: Tensor | None) -> Tensor:
        """Mix `x`, tokens `(B, N, C)` or feature maps `(B, C, H, W)`, and do around it what the model did.

        Raises:
            LinsightError: there is a context.
        """
        if context is not None:
            raise LinsightError(
                "encoder_hidden_states: this attention was converted as one of tokens among themselves, it takes none"
            )
        residual = x
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        sides = x.shape[2:] if x.ndim == 4 else None
        if sides is not None:
            x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            mask = _by_heads(attn, mask, x)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        grid = self.place.of(x) if sides is None else Grid(*sides)
        q, k, v = projected(attn, _OWN, *(self.mixing.given(part, x) for part in "qkv"))
        out = _out(attn, self.mix(q, k, v, x, grid, mask))
        if sides is not None:
            out = out.transpose(1, 2).unflatten(2, sides)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class Joint(Processor):
    """SD3's attention of an image with a text, or of the image alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """See `forward`; diffusers asks this signature which arguments are taken."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    def forward(
        self, attn: Any, image: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix tokens of an image `(B, N, C)`, and with them those of a text `(B, T, C)`.

        Raises:
            LinsightError: there is a mask, which SD3 does not see.
        """
        if mask is not None:
            raise LinsightError("attention_mask: the attention of SD3 sees none, so pass None")
        grid = self.place.of(image)
        if text is None:
            return _out(attn, self.mix(*joined(attn, image), grid))
        grid = grid._replace(prefix=grid.prefix + text.shape[1])
        out = self.mix(*joined(attn, image, text), grid)
        text, image = out.split([text.shape[1], image.shape[1]], dim=1)
        return _out(attn, image), text if attn.context_pre_only else attn.to_add_out(text)


class Flux(Processor):
    """FLUX's attention of a text and an image, which come apart, or as one sequence in single blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """See `forward`; diffusers asks this signature which arguments are taken."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def forward(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix tokens of an image `(B, N, C)` with those of a text `(B, T, C)`, or of both in one, the text in front.

        rotary: cosines and sines `(T + N, D)`, each for a pair of channels twice.

        Raises:
            LinsightError: projections were fused after the model was converted.
        """
        if getattr(attn, "fused_projections", False):
            raise LinsightError("fused_projections: a converted FLUX has them apart, so call unfuse_qkv_projections()")
        q, k, v, x = joined(attn, image, text)
        if rotary is not None:
            q, k = (turned(part, *rotary) for part in (q, k))
        out = self.mix(q, k, v, x, self._locate(x, text), mask)
        if text is None:
            return out
        text, image = out.split([text.shape[1], image.shape[1]], dim=1)
        return _out(attn, image), attn.to_add_out(text)

    def _locate(self, x: Tensor, text: Tensor | None) -> Grid:
        sides = table_grid(self.place.grid)
        if text is not None:
            ahead = text.shape[1]
        else:  # what the grid does not hold
            ahead = self.place.prefix if sides is None else max(0, x.shape[1] - sides[0] * sides[1])
        return locate(sides or "1d", ahead, x)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `(B, N, H, D)`, whose channels (2i, 2i + 1) turn as a pair, by cosines and sines `(N, D)`; in its dtype."""
    wide = x.to(accumulator(x.dtype))
    a, b = wide[..., ::2], wide[..., 1::2]
    across = torch.stack([-b, a], dim=-1).flatten(-2)
    return (wide * cos[:, None].to(wide) + across * sin[:, None].to(wide)).to(x.dtype)


def _out(attn: Any, x: Tensor) -> Tensor:
    for layer in attn.to_out:
        x = layer(x)
    return x


def _by_heads(attn: Any, mask: Tensor, x: Tensor) -> Tensor:
    """A mask of diffusers, `(B or B H, M or 1, N)`, as `(B, H, M or 1, N)`."""
    if mask.shape[-1] != x.shape[1]:
        raise LinsightError(f"attention_mask has {mask.shape[-1]} keys, but there are {x.shape[1]} tokens")
    mask = attn.prepare_attention_mask(mask, x.shape[1], x.shape[0])
    return mask.view(x.shape[0], attn.heads, -1, mask.shape[-1])
