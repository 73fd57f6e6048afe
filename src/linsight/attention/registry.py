"""The registry of mechanisms: everything that tests, documentation and the command line know of them.

A module of this package registers one mechanism with `@register(...)`; its options are read off the
constructor. Nothing else is edited to add one.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from torch import nn

from linsight.errors import CapabilityError, LinsightError, UnknownNameError

from .capabilities import FLAGS, Capabilities, Cost, Structure
from .core import Core
from .packed import takes_packed
from .ways import WAYS

Kind = Literal["core", "layer", "block"]

# Kinds of formulas, and what makes one.
FAMILIES = {
    "scores": "a weight for each pair of tokens, made of their query and key",
    "feature map": "weights that are products of features of queries and of keys, so sums over keys are states",
    "low rank": "a few tokens, or agents, between queries and keys",
    "inner weights": "a small network whose weights are made of the tokens",
    "window": "each token sees a part of the grid, as a neighbourhood or a window",
    "convolution": "kernels that slide over the grid, fixed or made of the tokens",
    "scan": "a recurrence along the tokens, one way or both",
    "spectrum": "products in the frequencies of a Fourier transform",
    "pooling": "one summary, or a few, that all tokens receive",
    "alone": "each token by itself, as by a gate: what mixes tokens stands elsewhere",
    "hashing": "tokens that fall into the same buckets",
    "other": "none of these",
}


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from."""

    title: str
    arxiv: str = ""
    venue: str = ""

    @property
    def year(self) -> int | None:
        """The year of the venue, or else of the preprint."""
        found = re.search(r"\b(19|20)\d\d\b", self.venue)
        return int(found[0]) if found else 2000 + int(self.arxiv[:2]) if self.arxiv else None

    def __str__(self) -> str:
        parts = [self.title, f"arXiv {self.arxiv}" if self.arxiv else "", self.venue]
        return ", ".join(p for p in parts if p)


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword argument of a mechanism's constructor. `choices` is empty where any value goes."""

    name: str
    default: Any
    choices: tuple[Any, ...] = ()
    help: str = ""


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One row of the registry."""

    name: str
    factory: type[nn.Module]
    kind: Kind
    formula: str
    complexity: str
    paper: Paper
    capabilities: Capabilities
    structure: Structure
    options: tuple[Option, ...]
    latex: str = ""  # the formula again, for the documentation; backslashes only before letters
    family: str = "other"  # of `FAMILIES`
    also: tuple[str, ...] = ()  # what else it, or the model that it came in, is called

    @property
    def quadratic(self) -> bool:
        """True where the cost is that of a score matrix; hosts give such mechanisms their windows and reductions."""
        return self.structure.cost is Cost.QUADRATIC

    @property
    def unmet(self) -> Mapping[str, str]:
        """Ways out (see `WAYS`) in which it does not leave, and why; a Core, a Layer and a Block have none."""
        return getattr(self.factory, "unmet", {})

    def can(self, flag: str) -> bool:
        """True where the mechanism has the `flag`, of `FLAGS`, in whichever record it stands."""
        return _flag(self.factory, flag)

    def placed(
        self, grid: tuple[int, int] | None, index: int | None, query_grid: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """`grid=`, `index=` and `query_grid=` for the constructor, of a mechanism that takes them."""
        takes = inspect.signature(self.factory.__init__).parameters
        given = {"grid": grid, "index": index, "query_grid": query_grid}
        return {key: value for key, value in given.items() if key in takes and value is not None}

    def takes(self, name: str, value: list[Any]) -> bool:
        """True where a list is one value of the option `name`: a tuple, as JSON gives it."""
        hint = _hints(self.factory).get(name)
        kinds = (hint, *typing.get_args(hint))
        return any(typing.get_origin(kind) is tuple and _fits(value, kind) for kind in kinds)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise unless every option is one of ours and has one of its values."""
        known = {option.name: option for option in self.options}
        hints = _hints(self.factory) if options else {}
        for name, value in options.items():
            if name not in known:
                if name in FLAGS:
                    require(self.factory, name, f"{name}={value}")
                raise UnknownNameError(f"option of '{self.name}'", name, known)
            if known[name].choices and value not in known[name].choices:
                raise UnknownNameError(f"{name} of '{self.name}'", str(value), map(str, known[name].choices))
            if not known[name].choices and not _fits(value, hints.get(name, Any)):
                raise LinsightError(f"{name}={value!r} of '{self.name}' must be {_words(hints[name])}")


_REGISTRY: dict[str, Mechanism] = {}
# What hosts give; the other keyword arguments of a constructor are options.
_RESERVED = {"self", "dim", "num_heads", "grid", "query_grid", "index", "mlp_ratio", "drop_path", "device", "dtype"}
M = TypeVar("M", bound=type[nn.Module])


def register(
    name: str,
    *,
    formula: str,
    complexity: str,
    paper: Paper,
    kind: Kind = "core",
    latex: str = "",
    family: str = "other",
    also: tuple[str, ...] = (),
) -> Callable[[M], M]:
    """Register a mechanism under `name`. For use on its class, in its own file.

    Nobody declares `packed`: the layer around a core takes packed batches, and so does any `forward` with
    `@each_image`. Here this is written into the capabilities of the class, and into its structure whether it has a
    rotary option: one of its constructor, or the one that `Core.turns` gives.

    family, also: of `FAMILIES`, and what else it is called, by which people search.
    """
    if family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES)

    def add(cls: M) -> M:
        if name in _REGISTRY and _REGISTRY[name].factory.__qualname__ != cls.__qualname__:
            raise LinsightError(f"mechanism '{name}' is already registered by {_REGISTRY[name].factory}")
        if kind == "core" and not issubclass(cls, Core):
            raise LinsightError(f"mechanism '{name}' has kind 'core', but {cls.__name__} is not a Core")
        for way in getattr(cls, "unmet", {}):
            if way not in WAYS:
                raise UnknownNameError("way out", way, WAYS)
        own_layer = getattr(cls, "layer", None)
        packed = own_layer is None or takes_packed(own_layer) if kind == "core" else takes_packed(cls)
        can = getattr(cls, "capabilities", Capabilities())._replace(packed=packed)
        cls.capabilities = can  # type: ignore[attr-defined]
        options = _options(cls)
        rotary = any(option.name == "rotary" for option in options)
        structure = getattr(cls, "structure", Structure())._replace(rotary=rotary)
        cls.structure = structure  # type: ignore[attr-defined]
        words = (latex, family, also)
        _REGISTRY[name] = Mechanism(name, cls, kind, formula, complexity, paper, can, structure, options, *words)
        return cls

    return add


def unregister(name: str) -> None:
    """Forget a mechanism, one that a test registered."""
    _REGISTRY.pop(name, None)


def mechanism(name: str) -> Mechanism:
    """The registry's row for `name`; raises with the nearest name."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise UnknownNameError("attention", name, _REGISTRY, "'linsight list' shows all", here=called(name))
    return _REGISTRY[name]


def called(name: object) -> str:
    """The name here of the mechanism that others call `name`, in whatever case; "" where there is none."""
    asked = str(name).casefold()
    return next((entry.name for entry in _REGISTRY.values() if asked in map(str.casefold, entry.also)), "")


def list_attentions(*, family: str | None = None, **flags: bool) -> list[Mechanism]:
    """All mechanisms, by name; those that can do what is asked, as in `list_attentions(stream=True)`.

    family: of `FAMILIES`; None for all.
    """
    if family is not None and family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES)
    for flag in flags:
        if flag not in FLAGS:
            raise UnknownNameError("capability", flag, FLAGS)
    return [
        entry
        for _, entry in sorted(_REGISTRY.items())
        if family in (None, entry.family) and all(entry.can(flag) == value for flag, value in flags.items())
    ]


def require(owner: nn.Module | type[nn.Module], flag: str, asked: str) -> None:
    """Raise a CapabilityError naming those that can, unless `owner`, a mechanism or its class, has the `flag`."""
    if _flag(owner, flag):
        return
    cls = owner if isinstance(owner, type) else type(owner)
    able = [entry.name for entry in list_attentions() if entry.can(flag)]
    name = next((n for n, entry in _REGISTRY.items() if entry.factory is cls), cls.__name__)
    raise CapabilityError(f"'{name}' does not support {asked} ({flag}); these do: {', '.join(able) or 'none yet'}")


def _flag(owner: Any, flag: str) -> bool:
    asked = getattr(owner, "capabilities", Capabilities())
    return getattr(asked, flag) if flag in asked._fields else getattr(getattr(owner, "structure", Structure()), flag)


# The option that `Core.turns` gives, by what it turns.
_ROTARY = {
    "tokens": "turn each head of queries and keys by the place of its token on the grid.",
    "features": "turn the features of each head by the place of their token on the grid, but not in what normalises.",
}


def _hints(cls: type[nn.Module]) -> dict[str, Any]:
    """The types of a constructor's arguments, and of the option that it does not know."""
    own = typing.get_type_hints(cls.__init__)
    return {"rotary": bool, **own} if getattr(cls, "turns", "") else own


def _options(cls: type[nn.Module]) -> tuple[Option, ...]:
    hints = _hints(cls)
    helps = _arguments(inspect.getdoc(cls) or "")
    found = []
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in _RESERVED or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(name)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        found.append(Option(name, parameter.default, choices, helps.get(name, "")))
    if turns := getattr(cls, "turns", ""):
        found.append(Option("rotary", False, (), _ROTARY[turns]))
    return tuple(found)


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def _fits(value: Any, hint: Any) -> bool:
    """True where an option may have this value, as far as its type tells; a list is as good as a tuple."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else True


def _words(hint: Any) -> str:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"({', '.join(map(_words, parts))})"
    return " or ".join(map(_words, parts)) if parts else _WORDS.get(hint, str(hint))


def _arguments(doc: str) -> dict[str, str]:
    """The `Args:` section of a docstring, by argument."""
    lines: Iterable[str] = doc.partition("Args:\n")[2].splitlines()
    helps: dict[str, str] = {}
    name = ""
    for line in lines:
        if not line.strip():
            break
        head, colon, rest = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon and head.isidentifier():
            name = head
            helps[name] = rest
        elif name:
            helps[name] += " " + line.strip()
    return helps
