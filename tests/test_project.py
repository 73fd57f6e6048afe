"""The house rules that a machine can hold: floors, sizes, public names, versions, what must not be written down.

`python tests/test_project.py` rewrites the list of public names.
"""

import ast
import functools
import graphlib
import importlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "linsight"
MODULES = sorted(SOURCE.rglob("*.py"))
OUTSIDE = sorted(path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))
OUTSIDE.remove(Path(__file__))  # it lists private names
NAMES = Path(__file__).with_name("public_names.txt")
# The floors of the house, from the ground: a room imports only from those below its own.
FLOORS = (
    ("errors",),
    ("runtime",),
    ("records",),
    ("recipe",),
    ("data",),
    ("ops",),
    ("attention",),
    ("models",),
    ("fuse",),
    ("checkpoints", "streaming"),
    ("convert", "slides"),
    ("parallel", "api"),
    ("",),  # linsight/__init__.py
    ("tasks",),
    ("train",),
    ("export",),
    ("adapters", "bench"),
    ("catalogue", "doctor"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FORBIDDEN = {
    "the address of a package registry": r"index-ur[l]|\bpypi\.|/simpl[e]/|file:/{3}",
    "a path of one machine": r"(?<![\w.~}*])/(?:work|root|home|tmp|opt)/\w",
    "a folder beside the repository": r"\.\./shared\b(?!/data)",
}

# A docstring's first sentence stands alone, so it begins with the thing, or with what that does.
FORBIDDEN_STARTS = ("What", "Whether", "That", "Those", "Of", "The same", "One of", "It", "As of")


# Former names of rooms, which warn.
ALIASES = {"linsight.adapters": "linsight.convert"}


def relative(path):
    return str(path.relative_to(ROOT))


def room(module):
    """The room of `linsight.a.b`: a."""
    return module.partition(".")[2].partition(".")[0]


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMED = {module_name(path): path for path in MODULES}


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """What of linsight a file imports, inside functions too: module, name in it or "", level of a relative import."""
    package = module_name(path).split(".") if path.is_relative_to(SOURCE) else []
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", 0) for alias in node.names if alias.name.partition(".")[0] == "linsight")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            if target.partition(".")[0] == "linsight":
                for alias in node.names:
                    inner = f"{target}.{alias.name}"
                    yield (inner, "", node.level) if inner in NAMED else (target, alias.name, node.level)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_only_go_down(path):
    own = room(module_name(path))
    assert own in FLOOR, f"room '{own}' has no floor: add it to FLOORS"
    for target, name, level in imports(path):
        other = room(target)
        if other == own:
            assert level, f"{target} is in the same package: import it relatively"
            continue
        assert FLOOR[other] < FLOOR[own], f"'{own}' imports {target}, which is not below it"
        assert not level or own == "", f"{target} is another room: import it absolutely"
        private = privates(f"{target}.{name}")
        assert not private, f"{private} is of the room '{other}' alone"


def test_files_do_not_import_in_circles():
    graph = {name: {target for target, _, _ in imports(path)} for name, path in NAMED.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def privates(name):
    """The part of a dotted name up to what is private in it, if something is."""
    found = re.match(r"(\w+\.)*?_(?!_)\w+", name)
    return found.group() if found else ""


def reached(path):
    """All dotted names of linsight in a file: imported, read off a module, or in a text, as for a monkeypatch."""
    modules = {"linsight": "linsight"}
    tree = parsed(path)
    for target, name, _ in imports(path):
        yield f"{target}.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\blinsight(?:\.\w+)+", node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if modules.get(head, "") in NAMED:
                yield f"{modules[head]}.{rest}"


@pytest.mark.parametrize("path", OUTSIDE, ids=relative)
def test_only_public_names_are_used_from_outside(path):
    found = {private for name in reached(path) if (private := privates(name))}
    assert not found, f"{sorted(found)}: use what is public, or make it public by its name"


def docstrings(path):
    """Line and text of each docstring of a file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.body[0].lineno, text


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstrings_begin_with_their_subject(path):
    found = [
        f"line {line}: {text.partition(chr(10))[0]}"
        for line, text in docstrings(path)
        if re.match(rf"({'|'.join(FORBIDDEN_STARTS)})\b", text)
    ]
    assert not found, found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_constructors_are_small(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            own = [*node.args.posonlyargs, *node.args.args[1:], *node.args.kwonlyargs]
            assert len(own) <= 12, f"line {node.lineno}: {len(own)} arguments"


def written_files():
    """What people write: all but build products and hidden caches."""
    for folder in ("src", "tests", "docs", "benchmarks", ".ci"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.name != ".git")


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_project_stands_alone(what):
    found = []
    for path in written_files():
        if path.suffix in {".npz", ".png", ".jpg", ".safetensors", ".pth"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if re.search(FORBIDDEN[what], line):
                found.append(f"{relative(path)}:{number}: {line.strip()[:100]}")
    assert not found, f"{what}:\n" + "\n".join(found)


def public_names():
    lines = [f"{old}.{name}" for old in ALIASES for name in importlib.import_module(old).__all__]
    for name in ["linsight", *sorted(f"linsight.{p.parent.name}" for p in SOURCE.glob("*/__init__.py"))]:
        module = importlib.import_module(name)
        lines += [f"{name}.{former}" for former in getattr(module, "MOVED", ())]  # which warn
        for public in getattr(module, "__all__", ()):
            assert hasattr(module, public), f"{name}.__all__ names '{public}', which it lacks"
            lines.append(f"{name}.{public}")
    return "\n".join(sorted(lines)) + "\n"


def test_public_names_change_on_purpose():
    before, now = set(NAMES.read_text(encoding="utf-8").split()), set(public_names().split())
    assert now == before, (
        f"gone: {sorted(before - now)}; new: {sorted(now - before)}. On purpose? Run python tests/test_project.py"
    )


@pytest.mark.parametrize("old, new", ALIASES.items())
def test_former_names_warn_and_are_the_new_ones(old, new):
    former, module = importlib.import_module(old), importlib.import_module(new)
    for name in former.__all__:
        with pytest.warns(DeprecationWarning, match=rf"{new}\.{name}$"):
            assert getattr(former, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        former.nothing  # noqa: B018


def test_constraints_pin_every_dependency_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name != project["name"]:
            assert requirement.name in pins, f"constraints.txt lacks {requirement.name}"
            assert pins[requirement.name] in requirement.specifier


def test_pre_commit_runs_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    for command in hooks:
        assert command.startswith("pytest") or f'"{command}"' in ci
    assert len(hooks) == 5


if __name__ == "__main__":
    NAMES.write_text(public_names(), encoding="utf-8")
