"""Recipes as files: YAML, TOML or JSON, with fields in their groups or without.

    recipe: cifar10            # what it starts from; none: the defaults of the task
    model: {attention: agent}
    optimisation: {epochs: 30, lr: 1e-3}

Values are those of the recipe, or text as on the command line. YAML is read as version 1.2 has it, in which `off` and
`no` are text, and 1e-3 is a number; nothing but plain values is made of it.
"""

import json
import pathlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from linsight.errors import LinsightError, UnknownNameError
from linsight.recipe import GROUPS, Recipe
from linsight.records import shown
from linsight.runtime.places import located

from .records import field_of, record_of

SUFFIXES = (".yaml", ".yml", ".toml", ".json")
BASE = "recipe"  # the key that names what a file starts from
_LARGEST = 2**20  # bytes
_HEADINGS = {group.lower(): group for group in GROUPS if group}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 of plain values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - of the class above

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; one that is told elsewhere would let a short file grow without bound."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not read: write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node, in which a name may come once."""
        _require_once(key.value for key, _ in node.value)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", r"null|Null|NULL|~|", [*"nN~", ""]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", _FLOAT, [*"-+.0123456789"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def is_recipe_file(name: str) -> bool:
    """True for the name of a file that `read_values` reads."""
    return pathlib.Path(name).suffix.lower() in SUFFIXES


def read_values(path: str | pathlib.Path) -> tuple[str | None, dict[str, Any]]:
    """The recipe that a file starts from, None where it names none, and the fields that it changes.

    Raises:
        LinsightError: it cannot be read, or is not such a file.
        UnknownNameError: a field or a group that there is not, with the nearest.
    """
    path = pathlib.Path(path)
    found = _read(path)
    if not isinstance(found, Mapping):
        raise LinsightError(f"'{path}' is no recipe: write fields in it, as in epochs: 10")
    base = found.get(BASE)
    if base is not None and not isinstance(base, str):
        raise LinsightError(f"'{path}': recipe={shown(base)} must be the name of a recipe")
    values: dict[str, Any] = {}
    for name, value in _flat(found):
        if name in values:
            raise LinsightError(f"'{path}' has {name} twice")
        values[name] = value
    return base, values


def _read(path: pathlib.Path) -> Any:
    path = located(path)
    if not path.is_file():
        raise LinsightError(f"no such recipe file: '{path}'")
    if path.stat().st_size > _LARGEST:
        raise LinsightError(f"'{path}' is no recipe: it is larger than 1 MiB")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_mapped)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        said = re.sub(r"\s+", " ", str(error))
        raise LinsightError(f"'{path}' cannot be read: {shown(said, str)}") from None


def _mapped(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_once(name for name, _ in pairs)
    return dict(pairs)


def _require_once(names: Iterable[Any]) -> None:
    """Raise where a name comes twice, of which libraries take the last without a word."""
    seen = set[str]()
    for name in map(str, names):
        if name in seen:
            raise ValueError(f"{name} is there twice")
        seen.add(name)


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        heading = _HEADINGS.get(str(name).lower())
        if heading and isinstance(value, Mapping):
            for field, inner in value.items():
                own = field_of(str(field)).groups()[str(field)]
                if own != heading:
                    raise LinsightError(f"{field} is a field of {own.lower() or 'no group'}, not of {name}")
                yield str(field), inner
        elif heading and value is None and str(name) not in Recipe.model_fields:
            continue  # a heading with nothing below it
        elif name != BASE:
            _require_known(str(name))
            yield str(name), value


def _require_known(name: str) -> None:
    try:
        field_of(name)
    except UnknownNameError:
        known = {*Recipe.model_fields, *_HEADINGS, BASE}
        raise UnknownNameError("recipe field or group", shown(name, str), known) from None


def written(recipe: Recipe, *, about: str = "", all_fields: bool = True) -> str:
    """A recipe as YAML, in its groups, each field with what it is for. all_fields: False: those that are no default."""
    values = recipe.values() if all_fields else {"task": recipe.task, **recipe.differences()}
    groups = recipe.groups()
    own = [name for name in values if name not in Recipe.model_fields]
    order = [*(name for name in Recipe.model_fields if name in values), *own]  # what every task has comes first
    lines = [f"# {line}" for line in about.splitlines()]
    for group in GROUPS:
        names = [name for name in order if groups[name] == group]
        if group and names:
            lines += ["", f"{group.lower()}:"]
        room = max((len(_line(name, values[name])) for name in names), default=0)
        for name in names:
            text = _line(name, values[name])
            indent = "  " if group else ""
            lines.append(f"{indent}{text:{min(room, 44)}}  # {recipe.help(name)}")
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**9, allow_unicode=True)
    return f"{name}: {text.strip().removesuffix('...').strip()}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def schema(task: str = "classify") -> dict[str, Any]:
    """The JSON schema of a recipe file of a task, for editors; fields may stand in their groups or without."""
    record = record_of(task)
    fields = record.model_json_schema()["properties"]
    groups = record.groups()
    found: dict[str, Any] = {BASE: {"type": "string", "description": "the recipe that this one starts from"}, **fields}
    for heading, group in _HEADINGS.items():
        inner = {name: value for name, value in fields.items() if groups[name] == group}
        one = {"type": "object", "properties": inner, "additionalProperties": False}
        field = found.get(heading)
        found[heading] = {"description": field["description"], "anyOf": [field, one]} if field else one
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A recipe of linsight, task {task}",
        "type": "object",
        "properties": found,
        "additionalProperties": False,
    }
