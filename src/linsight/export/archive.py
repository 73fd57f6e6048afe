"""Reading a torch.export package without running what is in it.

`torch.export.load` unpickles what a package calls pickled, evaluates its expressions of sizes, and makes Python code of
its names. Here a package is read as text and numbers first. What is not plain is refused, and torch is given a copy of
what has been looked at, so that it cannot read anything else.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from linsight.errors import CheckpointError
from linsight.runtime.files import to_json

from .facts import KEY

_MODEL, _EXTRA, _SAMPLES = "models/model.json", f"extra/{KEY}", "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSORS = re.compile(r"data/(weights/weight_|constants/tensor_)\d+")
_FORMAT = re.compile(r"archive_(format|version)|byteorder|version|\.[\w./]+")
_COMPILED = "data/aotinductor/"

# Texts of a program, by the key that they stand under, and of all others.
_NAME = re.compile(r"[\w.]*")
_TEXTS = {
    "target": re.compile(
        r"torch\.ops\.(aten|prims|linsight|torchvision)\.(?!__[^aox])\w+\.(?!_)\w+|(_operator|math)\.[a-z]\w*|"
        r"torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)|torch\._?sym_\w+"
    ),
    # "tanh" of gelu, "floor" of a division, the message of an assertion: no file has such a name
    "as_string": re.compile(
        r"[a-z_]{0,20}|Runtime assertion failed for expression [\w<>=!&|()+* .,/-]{1,300} on node '\w+'"
    ),
    "torch_version": re.compile(r"[\w.+<= -]*"),
}
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_FUNCTIONS = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|And|Or|Not|Eq|Ne|Le|Lt|Ge|Gt|Equality|Unequality|"
    r"(Strict)?(LessThan|GreaterThan)|floor|ceiling|(Floor|Clean)Div|PythonMod|ModularIndexing|Where|Identity|"
    r"(Floor|Ceil|Trunc|Round)ToInt|Int(TrueDiv)|FloatTrueDiv|(Float)?Pow|PowByNatural|ToFloat|(Trunc)?To(Float|Int)|"
    r"Abs|Piecewise|(OpaqueUnary|Bitwise)Fn_\w+|[LR]Shift|min|max|abs|int|float|torch\._?sym_[a-z_]+|math\.[a-z]+"
)
_LONGEST = 50_000  # letters of an expression: a detector counts the anchors of all its levels
_SYMBOL = re.compile(r"[a-z]{1,4}\d*|True|False|int_oo|L")
_PLAIN = (
    *(ast.Expression, ast.Constant, ast.Load, ast.keyword, ast.List, ast.Tuple),
    *(ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def read_program(path: Path) -> tuple[torch.export.ExportedProgram, str]:
    """The program of a package, and what it says of itself.

    Raises:
        CheckpointError: it holds compiled code, or what is not safe to read.
        Exception: of zipfile, json or torch, where it is damaged.
    """
    content = path.read_bytes()
    records = dict(_records(content, path))
    if any(name.startswith(_COMPILED) for name in records):
        raise CheckpointError(
            f"'{path}' is machine code, of AOTInductor: if you trust it, torch._inductor.aoti_load_package runs it"
        )
    if _MODEL not in records:
        raise CheckpointError(f"'{path}' is no package of torch.export: it has no {_MODEL}")
    texts = {_EXTRA: records.get(_EXTRA, b"")}
    for config in _CONFIGS:
        _check_config(json.loads(records[config]), path)
    program = json.loads(records[_MODEL])
    _check(program, "", path)
    _safely_loaded(records[_SAMPLES], path)
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name == _MODEL:
                data = to_json(program, finite=False).encode()
            if name in (_MODEL, _SAMPLES, *_CONFIGS) or _TENSORS.fullmatch(name) or _FORMAT.fullmatch(name):
                archive.writestr(f"model/{name}", data)
    copy.seek(0)
    return torch.export.load(copy), texts[_EXTRA].decode()


def _records(content: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    """Names, without the folder that all are in, and contents."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # as torch writes them: none is larger than it is here
                raise CheckpointError(f"'{path}' is no package of torch.export: it is compressed")
            yield entry.filename.partition("/")[2], archive.read(entry)


def _check_config(config: Any, path: Path) -> None:
    """Refuse what torch would unpickle."""
    for name, tensor in config["config"].items():
        if tensor["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", tensor["path_name"]):
            raise CheckpointError(f"'{path}' is not safe to read: '{name[:100]!a}' in it is pickled")
        _check(tensor, "", path)


def _safely_loaded(content: bytes, path: Path) -> None:
    """Refuse sample inputs that torch would unpickle after it failed to load them as tensors alone."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise CheckpointError(f"'{path}' is not safe to read: its sample inputs are no tensors") from error


def _check(value: Any, key: str, path: Path) -> None:
    """Refuse a part of a program with a text that is no name, no option and no plain expression."""
    if isinstance(value, dict):
        if "metadata" in value:
            value["metadata"] = {}  # where the code of the nodes was: of no use here
        for name, part in value.items():
            _check(name, "", path)
            _check(part, name, path)
    elif isinstance(value, list):
        for part in value:
            _check(part, key, path)
    elif isinstance(value, str) and not _is_plain(value, key):
        raise CheckpointError(f"'{path}' is not safe to read: {value[:100]!a} in it is no plain {key or 'name'}")


def _is_plain(text: str, key: str) -> bool:
    if key in ("expr_str", "guards_code"):
        return _is_expression(text)
    if key in ("in_spec", "out_spec"):
        return not text or _is_spec(json.loads(text)[1])
    return bool(_TEXTS.get(key, _NAME).fullmatch(text))


def _is_spec(spec: Any) -> bool:
    """True for plain containers in each other, whose keys are texts: others import modules by their names."""
    plain = spec["type"] in _CONTAINERS and "{" not in (spec["context"] or "")
    return plain and all(map(_is_spec, spec["children_spec"]))


def _is_expression(text: str) -> bool:
    """True for numbers, symbols, sizes of inputs, and the functions of these that torch writes."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(text) < _LONGEST and _is_plain_node(tree)


def _is_plain_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        if _is_size(node):
            return True
        named = (
            _FUNCTIONS.fullmatch(ast.unparse(node.func)) if isinstance(node.func, ast.Name | ast.Attribute) else None
        )
        return bool(named) and all(map(_is_plain_node, [*node.args, *node.keywords]))
    if isinstance(node, ast.Subscript):
        return _is_plain_node(node.value) and isinstance(node.slice, ast.Constant)
    if isinstance(node, ast.Name):
        return bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(re.fullmatch(r"[\w.+-]*", node.value))
    return isinstance(node, _PLAIN) and all(map(_is_plain_node, ast.iter_child_nodes(node)))


def _is_size(node: ast.Call) -> bool:
    """True for `L['images'].size()` and its like."""
    called = node.func
    if not isinstance(called, ast.Attribute) or called.attr not in ("size", "stride", "storage_offset"):
        return False
    return (
        not node.args
        and not node.keywords
        and isinstance(called.value, ast.Subscript | ast.Name)
        and (_is_plain_node(called.value))
    )
