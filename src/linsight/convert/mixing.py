"""A mechanism between the projections of somebody else's attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import PROJECTIONS as LAYOUTS
from linsight.attention import (
    Additive,
    Rename,
    Tokens,
    check_asked,
    check_beside,
    create_core,
    mechanism,
    merge_heads,
    require,
)
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, mask_tokens

from ._place import check_prefix


class Mixing(nn.Module):
    """A mechanism that is given q, k and v: its core, and maps for what else its layer projects, or projects from.

    It starts as near to the bare formula as it can, see `Core.start_neutral`: what is added locally is zero, a gate is
    open. So the first outputs show what the mechanism makes of the weights that were inherited.

    Args:
        attention: the mechanism.
        dim: width of q, k and v, heads merged.
        width: of the layer's input, which a gate is made of.
        scale: the factor on q . k that the weights were trained with; d^(-1/2) if None.
        neutral: see above. False: parameters start as the mechanism's own.
        centred: the mean of all keys is taken off each before they are mixed. Softmax does not see it; most feature
            maps do, and the keys of trained models lie off-centre.
        options: of the mechanism.

    Raises:
        UnknownNameError: no such mechanism or option.
        LinsightError: it is no attention between projections, or gives another number of channels than the old one.
    """

    def __init__(
        self,
        attention: str,
        dim: int,
        num_heads: int,
        *,
        width: int | None = None,
        scale: float | None = None,
        neutral: bool = True,
        centred: bool = False,
        place: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if mechanism(attention).kind != "core":
            raise LinsightError(
                f"'{attention}' is a whole {mechanism(attention).kind} with maps of its own, so it has no use for the "
                f"queries, keys and values of a trained attention: 'linsight list' shows those that are a core"
            )
        core = create_core(attention, dim, num_heads, **(place or {}), **factory, **options)
        if core.out_dim not in (None, dim):
            raise CapabilityError(
                f"'{attention}' gives {core.out_dim} channels where the trained projection takes {dim}: choose options "
                f"without the part that adds some ('linsight info {attention}')"
            )
        self.attention, self.num_heads = attention, num_heads
        self.centred = centred
        self.row: Any = None  # how it came about, see `ConvertedLayer`
        usual = (dim // num_heads) ** -0.5
        self.factor = 1.0 if scale is None or abs(scale - usual) < 1e-6 * usual else scale / usual
        self.core = core
        self.extra = nn.Linear(width or dim, core.extra_dim, **factory) if core.extra_dim else None
        maps = core.maps(width or dim, **factory)
        self.map_q, self.map_k = maps.get("q"), maps.get("k")
        if neutral:
            core.start_neutral()
            for part in maps.values():
                if isinstance(part, Additive):
                    part.add_nothing()
            if self.extra is not None and core.open_gate is not None:
                nn.init.zeros_(self.extra.weight)
                nn.init.constant_(self.extra.bias, core.open_gate)
        layout = LAYOUTS[core.projections]
        self.query_is_key = not layout  # keys read
        self.key_is_query = any("k" in projection.also for projection in layout)

    @property
    def maps_first(self) -> bool:
        """True where queries and keys are to be projected from `given`, not from the tokens themselves."""
        return self.map_q is not None or self.map_k is not None

    def given(self, part: str, x: Tensor) -> Tensor:
        """The tokens `(B, N, C)` that "q", "k" or "v" is to be projected from, of those of the layer."""
        mapping = {"q": self.map_q, "k": self.map_k}.get(part)
        return x if mapping is None else x + mapping(x)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        grid: Grid,
        *,
        keep: Tensor | None = None,
        score_bias: Tensor | None = None,
        key_grid: Grid | None = None,
    ) -> Tensor:
        """Outputs `(B, M, C)`, heads merged, in the dtype of v.

        Args:
            q, k, v: `(B, M, H, D)`, `(B, N, H, D)` and `(B, N, H, D)`, after all that the model does to them.
            x: `(B, M, C)`, the layer's input.
            grid: where queries lie; keys, too, unless they are of a coarser one, `key_grid`.
            keep: `(B, N)`, False for keys that are not to be seen.
            score_bias: `(B or 1, H or 1, M, N)`, added to the scores.

        Raises:
            CapabilityError: the formula does not define what is asked.
        """
        core, layout = self.core, Layout(grid)
        check_prefix(type(core), grid.prefix)
        check_asked(core, layout, keep=keep, score_bias=score_bias)
        if key_grid is not None:
            require(core, "reduced", "keys of a reduced grid")
        check_beside(x, layout, keep=keep, score_bias=score_bias, heads=self.num_heads)
        if keep is not None:  # 0 * NaN in a gradient is NaN
            k, v = mask_tokens(k, keep), mask_tokens(v, keep)
        q, k = self.queries_and_keys(q, k, keep)
        extra = None if self.extra is None else self.extra(x)
        beside: dict[str, Any] = {} if key_grid is None else {"context_layout": Layout(key_grid)}
        if score_bias is not None:
            beside["score_bias"] = score_bias
        return merge_heads(core(Tokens(q, k, v, x, keep, extra), layout, **beside)).to(v.dtype)

    def queries_and_keys(self, q: Tensor, k: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """q and k `(B, N, H, D)` as the mechanism is to see them: scaled, centred, and one where it knows but one."""
        if self.key_is_query:
            k = q
        elif self.query_is_key:
            q = k
        if self.factor != 1:
            q = q * self.factor
        if self.centred:
            count = k.shape[1] if keep is None else keep.sum(1).clamp(min=1)[:, None, None, None]
            k = k - mask_tokens(k, keep).sum(1, keepdim=True) / count
        return q, k

    def published_keys(self) -> tuple[Rename, ...]:
        """The key map of the mechanism for the module that holds this one as `mixing`; the rest is the core's own."""
        own = ("core.", "map_q.", "map_k.")
        rules = (rule.published for rule in self.core.published if rule.ours.startswith(own))
        return tuple(Rename(key, f"mixing.{key}") for key in rules)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"'{self.attention}', num_heads={self.num_heads}"


def mixings(model: nn.Module) -> dict[str, Mixing]:
    """The mechanisms of a converted model, by the name of the attention that each is in."""
    return {
        name.removesuffix("mixing").removesuffix(".").removesuffix(".processor"): module
        for name, module in model.named_modules()
        if isinstance(module, Mixing)
    }
