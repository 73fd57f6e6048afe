"""The attention function "linsight" of transformers, and the mask that it is given.

It is registered when this file is imported, which pickled models do by themselves: nothing else imports transformers.
"""

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from linsight.errors import CapabilityError, LinsightError

from ..mixing import Mixing
from ..place import Place
from .seam import check_causal, keys_and_pairs

NAME = "linsight"
_SOURCES = ("key_value_states", "encoder_hidden_states")  # of keys that are not the queries' own
_SCORED = {  # what is done to the scores, of which only the softmax of the library knows
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """The call of an attention: the attention itself, its input `(B, N, C)`, and where its tokens lie."""

    module: nn.Module
    x: Tensor
    place: Place


class Running(threading.local):
    """The attention that runs in each thread."""

    seen: Seen | None = None


_running = Running()


@dataclasses.dataclass(eq=False)
class Listener:
    """A forward pre-hook of a converted attention: the function is told of queries, keys and values alone."""

    place: Place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the input.

        Raises:
            CapabilityError: keys come from another sequence.
        """
        if any(kwargs.get(name) is not None for name in _SOURCES):
            raise CapabilityError("cross-attention: a mechanism takes the place of self-attention alone")
        _running.seen = Seen(module, args[0] if args else kwargs["hidden_states"], self.place)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Outputs `(B, N, H, D)`, and no weights, by the mechanism of `module`; one that has none keeps its softmax.

    Args:
        query, key, value: `(B, H, N, D)`.
        attention_mask: `(B or 1, 1 or H, N or 1, N)`, True for what is seen, or numbers to add to the scores.
        scaling: the factor on the scores; D^(-1/2) if None.
        position_bias: `(1, H, N, N)`, added to the scores.

    Raises:
        CapabilityError: the mechanism's formula does not define what is asked.
        LinsightError: there is a cache, or `forward` was called without the module's hooks.
    """
    mixing: Any = getattr(module, "mixing", None)
    if not isinstance(mixing, Mixing):
        asked = {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **asked)
    seen = _running.seen
    _running.seen = None
    if seen is None or seen.module is not module:
        raise LinsightError(f"call the {type(module).__name__} itself: its hooks are not run by `forward` alone")
    for name, told in _SCORED.items():
        if others.get(name) is not None:
            raise CapabilityError(f"{told}: '{mixing.attention}' has no place for them")
    queries, keys = query.shape[2], key.shape[2]
    if queries != keys:
        raise LinsightError(
            f"{queries} queries and {keys} keys came: with a cache there is no linear form, pass use_cache=False"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and queries > 1:
        check_causal(bool(causal), mixing)
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask)
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))  # (B, N, H, D)
    usual = q.shape[-1] ** -0.5
    if scaling is not None and abs(scaling - mixing.factor * usual) > 1e-6 * usual:
        q = q * (scaling / (mixing.factor * usual))
    keep, bias = keys_and_pairs(mixing, attention_mask, q)
    out = mixing(q, k, v, seen.x, seen.place.of(seen.x), keep=keep, score_bias=bias)
    return out.unflatten(-1, (q.shape[2], -1)), None


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Numbers to add to the scores, and a mask, in one."""
    if mask is None:
        return bias
    return bias.where(mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def mask(**given: Any) -> Tensor | None:
    """The mask of the library's "sdpa"; where it drops the same keys for all queries, `(B, 1, 1, N)`."""
    if given.get("allow_is_bidirectional_skip") and given.get("mask_function") is bidirectional_mask_function:
        given["q_length"] = 1
    return sdpa_mask(**given)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
