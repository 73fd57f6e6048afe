"""A `Seam`: how the attention of one library is found and handed to a mechanism."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from linsight.attention import require
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import traced

from .._place import score_bias
from ..mixing import Mixing
from ..place import Locator, Place

_DROPS = -9e3  # what is added to the score of a key to drop it: -1e4, rounded, or below


class Heads(NamedTuple):
    """The sizes of an attention: its number of heads, the width of all of them, that of its input, and the factor on
    q . k, None for d^(-1/2).
    """

    number: int
    dim: int
    width: int
    scale: float | None = None


class Part(NamedTuple):
    """Rows of one tensor of an attention, by the name of the tensor in it; all of them without `rows`.

    above: by so many levels up in the model the name counts from a module around the attention.
    """

    tensor: str
    rows: slice | None = None
    above: int = 0


class Images(NamedTuple):
    """A module that is given images, and how it cuts them: see `Locator`.

    prefix: of the tokens that it makes.  hook: the kind of locator that reads their size off what it is given.
    """

    owner: nn.Module
    patch: tuple[int, int]
    prefix: int
    padded: bool = False
    hook: type[Locator] = Locator


class Seam(abc.ABC):
    """One library's attention. What is found is a module, by its name; a mechanism is put inside it or in its place."""

    library: ClassVar[str]
    calls: ClassVar[bool] = True  # a converted module calls its `Mixing`, as it is

    @abc.abstractmethod
    def knows(self, module: nn.Module) -> bool:
        """True for a module of self-attention of this library; whether it can be replaced is told by `heads`."""

    @abc.abstractmethod
    def heads(self, module: nn.Module) -> Heads:
        """The sizes of a module.

        Raises:
            LinsightError: it does something that no mechanism can take over, and says what.
        """

    @abc.abstractmethod
    def parts(self, module: nn.Module) -> Mapping[str, tuple[Part, ...]]:
        """Its tensors by what they do: "q", "k", "v", "out", and where there are any "norm"."""

    @abc.abstractmethod
    def images(self, model: nn.Module, name: str) -> Images | None:
        """The module around the one of this name that is given images; None where tokens are a sequence."""

    @abc.abstractmethod
    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """Let the module of this name, which `knows` knows, average its values by `mixing`."""

    def causal(self, model: nn.Module, name: str) -> bool:
        """True where tokens of the module of this name see only those before them."""
        return bool(getattr(model.get_submodule(name), "is_causal", False))

    def dropout(self, module: nn.Module) -> float:
        """The rate at which its scores are dropped in training."""
        return 0.0

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """All that `rebuild` needs, as JSON has it, of a whole model of this library; None where it is of none."""
        return None

    def rebuild(self, described: Mapping[str, Any]) -> nn.Module:
        """The model that `describe` was called with, before it was converted and with fresh weights."""
        raise NotImplementedError

    def check(self, model: nn.Module, name: str, mixing: Mixing) -> None:
        """Raise where a mechanism cannot do what the module of this name is asked for.

        Raises:
            LinsightError: one of them is causal and the other not.
            CapabilityError: its formula does not define something else that calls of the module need.
        """
        check_causal(self.causal(model, name), mixing)
        if mixing.maps_first and not self.maps_first(model, name):
            raise CapabilityError(
                f"'{mixing.attention}' maps tokens before queries and keys are projected, which has no place here"
            )

    def maps_first(self, model: nn.Module, name: str) -> bool:
        """True where `put` lets queries and keys be projected from `Mixing.given`."""
        return False

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 - most need nothing
        """Do once for the whole model what `put` needs."""


def around(model: nn.Module, name: str, fits: Callable[[Any], bool]) -> nn.Module | None:
    """The innermost module around the one of this name that fits, the model itself included."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if fits(module):
            return module
    return None


def keys_and_pairs(mixing: Mixing, mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask of `scaled_dot_product_attention` as `keep` `(B, N)` or `score_bias`; the other is None.

    Args:
        mixing: a mechanism with scores takes numbers to add and masks of pairs; any other only one of keys, the same
            for all queries and heads.
        mask: `(B, N)`, or with axes for heads and queries `(B or 1, H or 1, M or 1, N)`; True, or 0, for what is seen.
        q: `(B, M, H, D)`.

    Raises:
        CapabilityError: it drops pairs, which the formula does not define.
    """
    if mask is None:
        return None, None
    core, causal = type(mixing.core), mixing.core.causal
    if mask.ndim in (2, 3):
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    if core.capabilities.score_bias:
        return None, score_bias(mask, ~mask if mask.dtype == torch.bool else mask, q)
    seen = mask if mask.dtype == torch.bool else mask > _DROPS
    row = seen[:, :1, -1:]  # the last query sees all keys that are not dropped, in causal attention, too
    if not traced():
        if mask.dtype != torch.bool and bool((mask[seen] != 0).any()):
            require(core, "score_bias", "numbers to add to the scores")
        expected = row.expand(-1, -1, mask.shape[-1], -1).tril() if causal else row
        if not bool((seen == expected).all()):
            require(core, "score_bias", "a mask of pairs of tokens")
    return row[:, 0, 0].expand(q.shape[0], -1), None


def check_causal(causal: bool, mixing: Mixing) -> None:
    """Raise a LinsightError where a causal attention is given a mechanism that is not, or the other way round."""
    ours = bool(mixing.core.causal)
    if causal and not ours:
        require(type(mixing.core), "causal", "a causal attention, which layers= can leave out")
        raise CapabilityError(
            f"this attention is causal: leave it out by layers=, or pass causal=True to '{mixing.attention}'"
        )
    if ours and not causal:
        raise LinsightError(
            f"'{mixing.attention}' in its causal form would hide later tokens, which this attention sees: leave it out "
            f"by layers=, or causal=True"
        )


def locate_images(found: Images, places: dict[nn.Module, Place]) -> Place:
    """The place that the tokens of these images share; a hook of its owner keeps it up to date."""
    if found.owner not in places:
        place = places[found.owner] = Place((1, 1), found.prefix)
        found.hook(place, found.patch, padded=found.padded).on(found.owner)
    return places[found.owner]
