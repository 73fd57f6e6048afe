"""Records that people write: pydantic models whose values may be text, and whose errors are one line.

    class Run(Record):
        epochs: Whole = Field(default=10, description="...")

    Run(epochs="30"); Run(epoch=3)  # unknown field 'epoch': did you mean 'epochs'?

A record may be grouped: a field belongs to the class that declares it, and that class names the group.
"""

import ast
import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from linsight.errors import LinsightError, UnknownNameError
from linsight.runtime.text import shorten

_LONGEST = 80  # of a value that an error repeats


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("none", "") else value


def _unflagged(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 9 else value


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parts(value: Any) -> Any:
    """Text as the numbers in it: "224", "224x192", "0.5, 0.5"."""
    if not isinstance(value, str):
        return value if isinstance(value, list | tuple) else (value,)
    text = value.strip("()[] ").rstrip(", ")
    return tuple(re.split(r"[,\sx]+", text)) if text else ()


def _options(value: Any) -> Any:
    """Text as the options in it: "name=value,name=(1, 2)"."""
    if isinstance(value, Mapping):
        return {str(name): _tuples(item) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", value) if value.strip() else []:
        name, equals, text = part.partition("=")
        if not equals:
            raise ValueError(part)
        text = text.strip()
        try:
            options[name.strip()] = _tuples(ast.literal_eval(text))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            options[name.strip()] = {"true": True, "false": False}.get(text.lower(), text)
    return options


def _tuples(value: Any, depth: int = 0) -> Any:
    """Lists as tuples, all the way down: what JSON made of them. A RecursionError where that is far."""
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, Mapping):
        return {name: _tuples(item, depth + 1) for name, item in value.items()}
    return tuple(_tuples(item, depth + 1) for item in value) if isinstance(value, list | tuple) else value


_DEEPEST = 20  # nests of an option; what uses it may copy it, which Python does by calls in calls
_MOST = 1e9  # no number of a record is larger, unless its type says so
whole = BeforeValidator(_whole)  # for whole numbers that are choices
NONE = BeforeValidator(_none)  # for what may be none: "none" and "" are
_NUMBER, _NUMBERS, _WORDS = BeforeValidator(_unflagged), BeforeValidator(_parts), BeforeValidator(_text)

Text = Annotated[str, _WORDS]
Count = Annotated[int, Field(ge=0, le=_MOST), _NUMBER]
Whole = Annotated[int, Field(ge=1, le=_MOST), _NUMBER]
Classes = Annotated[int, Field(ge=1, le=10**7), _NUMBER]
Threads = Annotated[int, Field(ge=1, le=4096), _NUMBER]
Workers = Annotated[int, Field(ge=0, le=4096), _NUMBER]
Padding = Annotated[int, Field(ge=0, le=65536), _NUMBER]
Images = Annotated[int, Field(ge=1, le=10**12), _NUMBER]
Pixel = Annotated[int, Field(ge=0, le=65535), _NUMBER]
Side = Annotated[int, Field(ge=1, le=65536), _NUMBER]
Positive = Annotated[float, Field(ge=1e-9, le=_MOST), _NUMBER]
NotNegative = Annotated[float, Field(ge=0, le=_MOST), _NUMBER]
Number = Annotated[float, Field(ge=-_MOST, le=_MOST), _NUMBER]
Share = Annotated[float, Field(ge=0, le=1), _NUMBER]
Area = Annotated[float, Field(ge=1e-9, le=1), _NUMBER]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1), _NUMBER]
PositiveRate = Annotated[float, Field(ge=1e-38, le=1e38), _NUMBER]
Crop = Annotated[float, Field(ge=0.01, le=1), _NUMBER]
Rate = Annotated[float, Field(ge=0, le=1e38), _NUMBER]
Sides = Annotated[tuple[Side, ...], Field(max_length=2), _NUMBERS]
ShorterSides = Annotated[tuple[Side, ...], Field(min_length=1), _NUMBERS]
Areas = Annotated[tuple[Area, Area], _NUMBERS]
Ratios = Annotated[tuple[Positive, Positive], _NUMBERS]
Levels = Annotated[tuple[Number, ...], _NUMBERS]
Spreads = Annotated[tuple[Positive, ...], _NUMBERS]
Options = Annotated[dict[str, Any], BeforeValidator(_options)]


class Record(BaseModel):
    """A record, frozen, with one-line errors in place of pydantic's.

    Raises:
        UnknownNameError: no such field or choice; the nearest is offered.
        LinsightError: a value of the wrong kind or out of range, or values that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    kind: ClassVar[str] = "record"  # what errors call it
    group: ClassVar[str] = ""  # the heading of the fields that a class declares

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error, values) from None
        except (RecursionError, UnicodeError):
            raise _unreadable(type(self), values) from None

    def changed(self, **values: Any) -> Self:
        """The record with other values, checked as a new one is."""
        return type(self)(**{**self.values(), **values})

    def values(self) -> dict[str, Any]:
        """All values, by the names of their fields."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def differences(self) -> dict[str, Any]:
        """The values that are not the defaults."""
        plain = type(self)()
        return {name: value for name, value in self.values().items() if value != getattr(plain, name)}

    @classmethod
    def groups(cls) -> dict[str, str]:
        """The group of each field."""
        return _groups(cls)

    @classmethod
    def field(cls, name: str) -> FieldInfo:
        """The field `name`; an UnknownNameError offers the nearest."""
        if name not in cls.model_fields:
            raise UnknownNameError(f"{cls.kind} field", shown(name, str), cls.model_fields)
        return cls.model_fields[name]

    @classmethod
    def help(cls, name: str) -> str:
        """The purpose of the field, in a line."""
        return cls.field(name).description or ""

    @classmethod
    def choices(cls, name: str) -> tuple[Any, ...]:
        """The values that the field may have, where they are a list; else ()."""
        return tuple(_found(_schema(cls)["properties"][name], "enum") or ())

    @classmethod
    def type_of(cls, name: str) -> str:
        """The type of the field in JSON, but none: "integer", "number", "boolean", "string", "array" or "object"."""
        return next(kind for kind in _types(_schema(cls)["properties"][name]) if kind not in (None, "null"))

    @classmethod
    def parse(cls, name: str, value: Any) -> Any:
        """`value`, perhaps text, as the field `name` holds it; errors as of the record."""
        cls.field(name)
        try:
            return _adapter(cls, name).validate_python(value)
        except ValidationError as error:
            raise explain(cls, error, {name: value}, name) from None
        except (RecursionError, UnicodeError):
            raise _unreadable(cls, {name: value}) from None

    @classmethod
    def parse_all(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """`parse` of several."""
        return {name: cls.parse(name, value) for name, value in given.items()}


@functools.cache
def _groups(cls: type[Record]) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # the class that declared a field first names its group
        if issubclass(base, Record):
            for name in inspect.get_annotations(base):
                if name in cls.model_fields:
                    found.setdefault(name, base.group)
    return found


@functools.cache
def _schema(cls: type[Record]) -> dict[str, Any]:
    return cls.model_json_schema()


@functools.cache
def _adapter(cls: type[Record], name: str) -> TypeAdapter[Any]:
    field = cls.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _found(schema: Any, key: str) -> Any:
    """The first value of `key` in a JSON schema of a field, at any depth."""
    if isinstance(schema, list):
        return next((found for part in schema if (found := _found(part, key)) is not None), None)
    if not isinstance(schema, dict):
        return None
    return schema.get(key, _found(list(schema.values()), key))


_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_BOUNDS = {"greater_than_equal", "less_than_equal", "finite_number", "int_parsing_size"}


def explain(cls: type[Record], error: ValidationError, values: Mapping[str, Any], name: str = "") -> LinsightError:
    """The first thing that is wrong with `values`, in a line. name: of the field, where only one was looked at."""
    first = error.errors(include_url=False)[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, LinsightError):
        return inner
    place = first["loc"] if name else first["loc"][1:]
    name = name or str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return UnknownNameError(f"{cls.kind} field", shown(name, str), cls.model_fields)
    schema = _schema(cls)["properties"][name]
    given = first["input"]
    if first["type"] == "literal_error":
        return UnknownNameError(name, shown(given, str), map(str, cls.choices(name)))
    if first["type"] in _BOUNDS:
        low, high = _found(schema, "minimum"), _found(schema, "maximum")
        if low is None or high is None:  # of a choice, or text
            return LinsightError(f"{name}={shown(given, str)} is out of range")
        limit = _limit(low, high)
        return LinsightError(f"{name}={shown(given, str)} is out of range: it must be {limit}")
    if first["type"] in ("too_long", "missing"):  # of a tuple
        least = _found(schema, "minItems")
        wanted = f"{least}" if least else "1 or 2"
        count = len(given) if first["type"] == "too_long" else place[0]
        return LinsightError(f"{name} takes {wanted} numbers, not {count}")
    given = values.get(name, given)  # all of it, where it has parts
    if _found(schema, "items") or _found(schema, "prefixItems"):
        return LinsightError(f"{name}={shown(given)} is not understood: write numbers, as in 224 or 0.5,0.5")
    if _found(schema, "additionalProperties") is not None:
        return LinsightError(f"{name}={shown(given)} is not understood: write name=value,name=value")
    return LinsightError(f"{name}={shown(given)} is not {_kind(schema)}")


def _unreadable(cls: type[Record], values: Mapping[str, Any]) -> LinsightError:
    """The first value that is nested too deeply, or has letters that are none."""
    for name, value in values.items():
        try:
            repr(value).encode()
            _adapter(cls, name).validate_python(value)
        except (RecursionError, UnicodeError, ValidationError):
            return LinsightError(f"{name}={shown(value)} is nested too deeply, or no text of Unicode")
        except KeyError:  # no field
            continue
    return LinsightError(f"a value of the {cls.kind} is nested too deeply, or no text of Unicode")


def shown(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value that somebody gave, on one line and not too long."""
    try:
        return shorten(write(value), _LONGEST)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"({type(value).__name__})"


def _types(schema: Mapping[str, Any]) -> list[Any]:
    return [schema.get("type"), *(part.get("type") for part in schema.get("anyOf", ()))]


def _kind(schema: Mapping[str, Any]) -> str:
    return next((text for kind, text in _KINDS.items() if kind in _types(schema)), "understood")


def _limit(low: float, high: float) -> str:
    if high >= _MOST and low > -1:
        return "0 or more" if low == 0 else "positive" if 0 < low < 1 else f"{low:,.0f} or more"
    return f"between {low if abs(low) > 1e-6 else 0:g} and {high:g}"
