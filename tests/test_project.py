"""The house rules that a machine can hold: floors, sizes, public names, versions, what must not be written down.

`python tests/test_project.py` rewrites the list of public names.
"""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "linsight"
MODULES = sorted(SOURCE.rglob("*.py"))
NAMES = Path(__file__).with_name("public_names.txt")
# A room imports from rooms of a lower floor, or from itself.
FLOORS = {
    "errors": 0,
    "recipe": 1,
    "ops": 1,
    "attention": 2,
    "models": 3,
    "adapters": 3,
    "checkpoints": 4,
    "streaming": 4,
    "": 5,  # linsight/__init__.py
    "parallel": 5,
    "train": 6,
    "describe": 6,
    "doctor": 6,
    "bench": 7,
    "cli": 8,
}
FORBIDDEN = {
    "the address of a package registry": r"index-ur[l]|\bpypi\.|/simpl[e]/|file:/{3}",
    "a path of one machine": r"(?<![\w.~}*])/(?:work|root|home|tmp|opt)/\w",
    "a folder beside the repository": r"\.\./shared\b(?!/data)",
}


def relative(path):
    return str(path.relative_to(ROOT))


def room(module):
    """The room of `linsight.a.b`: a; the command line's modules are one room."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return "cli" if name.startswith("_cli") else name


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The modules of linsight that a file imports, and whether it says so relatively."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names if alias.name.partition(".")[0] == "linsight")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            if target.partition(".")[0] != "linsight":
                continue
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                is_room = target == "linsight" and room(inner) in FLOORS
                yield (inner if is_room else target), bool(node.level)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_only_go_down(path):
    own = room(module_name(path))
    assert own in FLOORS, f"room '{own}' has no floor: add it to FLOORS"
    for target, is_relative in imports(path):
        other = room(target)
        if other == own:
            assert is_relative or own == "cli", f"{target} is in the same package: import it relatively"
        else:
            assert FLOORS[other] < FLOORS[own], f"'{own}' (floor {FLOORS[own]}) imports {target}"
            assert not is_relative or own == "", f"{target} is another room: import it absolutely"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_constructors_are_small(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    lines = []
    for name in ["linsight", *sorted(f"linsight.{p.parent.name}" for p in SOURCE.glob("*/__init__.py"))]:
        module = importlib.import_module(name)
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.__all__ names '{public}', which it lacks"
            lines.append(f"{name}.{public}")
    return "\n".join(sorted(lines)) + "\n"


def test_public_names_change_on_purpose():
    before, now = set(NAMES.read_text(encoding="utf-8").split()), set(public_names().split())
    assert now == before, (
        f"gone: {sorted(before - now)}; new: {sorted(now - before)}. On purpose? Run python tests/test_project.py"
    )


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
