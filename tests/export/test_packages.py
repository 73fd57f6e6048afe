"""Packages of torch.export: what is kept, and what hostile ones are refused by, before anything in them runs."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from small_runs import Small
from torch import nn

from linsight.errors import CheckpointError, LinsightError
from linsight.export import Facts, export_program, load_exported, open_exported

FACTS = Facts(model="small", classes=("a", "b", "c", "d"), input_size=(3, 16, 16))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("packages") / "small.pt2"
    return path, Small().eval(), export_program(Small().eval(), path, facts=FACTS)


def test_a_package_tells_what_was_checked(package):
    path, _, done = package
    opened = open_exported(path)
    assert opened.facts == done.facts._replace(recipe={})
    assert [check.shape for check in done.checks] == [(1, 3, 33, 16), (3, 3, 11, 33), (2, 3, 19, 9)]
    assert opened.facts.checks == tuple((check.shape, check.error) for check in done.checks)
    assert done.error < 1e-6 < done.limit == 1e-4
    assert opened.model(torch.zeros(5, 3, 7, 40)).shape == (5, 4)
    content = path.read_bytes()
    assert os.path.dirname(__file__).encode() not in content and b"site-packages" not in content


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 3, 8, 8, dtype=torch.int8), torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), [1.0]]
)
def test_inputs_that_do_not_fit_are_one_line(package, x):
    with pytest.raises(LinsightError, match=r"takes (a tensor of )?float32 \(any, 3, any, any\)"):
        open_exported(package[0]).model(x)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def rewritten(path, target, changes, extra=None):
    """A copy of a package, some of its records changed: `changes` maps ends of names to functions of bytes."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            for end, change in changes.items():
                data = change(data) if name.endswith(end) else data
            new.writestr(name, data)
        for name, data in (extra or {}).items():
            new.writestr(f"archive/{name}", data)
    return target


def edited(change):
    def edit(data):
        program = json.loads(data)
        change(program)
        return json.dumps(program).encode()

    return edit


def pickled_weight(config):
    next(iter(config["config"].values()))["use_pickle"] = True


def opaque(config):
    config["config"]["evil"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}


def sym_code(code):
    def change(program):
        program["graph_module"]["graph"]["sym_int_values"]["s9"] = {"as_expr": {"expr_str": code, "hint": None}}

    return change


def guard(code):
    return lambda program: program["guards_code"].append(code)


def target(name):
    def change(program):
        program["graph_module"]["graph"]["nodes"][0]["target"] = name

    return change


def named(name):
    def change(program):
        program["graph_module"]["graph"]["nodes"][0]["name"] = name

    return change


def spec(kind, context):
    text = json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])

    def change(program):
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = text

    return change


MODEL, WEIGHTS, CONSTANTS = "models/model.json", "model_weights_config.json", "model_constants_config.json"


def attacks(mark):
    code = f"open({str(mark)!r}, 'w')"
    evil = pickle.dumps(Evil(mark))
    buffer = io.BytesIO()
    torch.save({"a": Evil(mark)}, buffer)
    yield "sample inputs", {"data/sample_inputs/model.pt": lambda data: buffer.getvalue()}, {}
    yield "pickled weight", {WEIGHTS: edited(pickled_weight), "weight_0": lambda data: buffer.getvalue()}, {}
    yield "opaque object", {CONSTANTS: edited(opaque)}, {"data/constants/opaque_obj_0": evil}
    yield "expression", {MODEL: edited(sym_code(code))}, {}
    yield "dunder", {MODEL: edited(sym_code("().__class__.__base__"))}, {}
    yield "guard", {MODEL: edited(guard(code))}, {}
    yield "guard by a subscript", {MODEL: edited(guard(f"L[{code}] == 1"))}, {}
    yield "target", {MODEL: edited(target("torch.os.system"))}, {}
    yield "name", {MODEL: edited(named(f"x = {code} #"))}, {}
    enum = {"__enum__": True, "fqn": "evil:Kind", "name": "A"}
    yield "module of an enum", {MODEL: edited(spec("builtins.tuple", enum))}, {}
    factory = {"default_factory_module": "evil", "default_factory_name": "Kind", "dict_context": []}
    yield "module of a factory", {MODEL: edited(spec("collections.defaultdict", factory))}, {}


@pytest.mark.parametrize("number", range(11))
def test_what_a_package_would_run_is_refused(package, tmp_path, number, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    name, changes, extra = list(attacks(mark))[number]
    path = rewritten(package[0], tmp_path / "evil.pt2", changes, extra)
    with pytest.raises(CheckpointError, match="not safe to read") as error:
        open_exported(path)
    assert "\n" not in str(error.value) and not mark.exists(), name


def test_records_that_are_not_read_are_not_run(package, tmp_path):
    """Older layouts of torch.export, which torch itself would unpickle."""
    mark, buffer = tmp_path / "mark", io.BytesIO()
    torch.save({"a": Evil(mark)}, buffer)
    extra = {f"data/{kind}/model.pt": buffer.getvalue() for kind in ("weights", "constants")}
    opened = open_exported(rewritten(package[0], tmp_path / "evil.pt2", {}, extra))
    assert opened.model(torch.zeros(1, 3, 8, 8)).shape == (1, 4) and not mark.exists()


def test_machine_code_is_not_loaded(package, tmp_path):
    path = rewritten(package[0], tmp_path / "code.pt2", {}, {"data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(CheckpointError, match="machine code, of AOTInductor: if you trust it"):
        open_exported(path)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"half"], ids=["empty", "text", "half"])
def test_damaged_files_are_one_line(package, tmp_path, suffix, content, capfd):
    whole = package[0].read_bytes()
    path = tmp_path / f"model{suffix}"
    path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(CheckpointError) as error:
        open_exported(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_package_of_others_says_what_it_lacks(tmp_path, small):
    program = torch.export.export(small, (torch.zeros(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "theirs.pt2")
    with pytest.raises(CheckpointError, match="not exported by linsight: its metadata lacks 'linsight'"):
        open_exported(tmp_path / "theirs.pt2")


class Several(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x):
        return self.give(x)


@pytest.mark.parametrize(
    ("give", "names"),
    [
        (lambda x: {"map": x + 1, "mean": x.mean((2, 3))}, ("map", "mean")),
        (lambda x: (x + 1, x.mean((2, 3))), ("output_0", "output_1")),
        (lambda x: [x + 1], ("output_0",)),
        (lambda x: x + 1, ("output",)),
    ],
)
def test_outputs_have_names(tmp_path, facts, give, names):
    done = export_program(Several(give), tmp_path / "m.pt2", facts=facts)
    assert done.facts.outputs == names
    if names == ("output",):
        with pytest.raises(CheckpointError, match=r"gives maps \(1, 3, 16, 16\) and no classes"):
            load_exported(tmp_path / "m.pt2")


def test_a_model_of_numbers_that_are_none_is_not_exported(tmp_path, small, facts):
    with torch.no_grad():
        small.head.bias[0] = float("nan")
    with pytest.raises(LinsightError, match="no number: nothing can be compared"):
        export_program(small, tmp_path / "m.pt2", facts=facts)
    assert not list(tmp_path.iterdir())


def test_a_float64_model_takes_float64(tmp_path, small, facts):
    done = export_program(small.double(), tmp_path / "m.pt2", facts=facts)
    assert done.facts.dtype == "float64" and done.error < 1e-13
    with pytest.raises(LinsightError, match="takes float64"):
        open_exported(tmp_path / "m.pt2").model(torch.zeros(1, 3, 8, 8))


def test_a_static_file_says_what_it_takes(tmp_path, small, facts):
    export_program(small, tmp_path / "m.pt2", facts=facts._replace(dynamic=False))
    opened = open_exported(tmp_path / "m.pt2")
    assert not opened.facts.dynamic and opened.facts.checks[2][0] == (1, 3, 16, 16)
    with pytest.raises(LinsightError, match=r"takes float32 \(1, 3, 16, 16\): float32 \(2, 3, 16, 16\) came"):
        opened.model(torch.zeros(2, 3, 16, 16))
