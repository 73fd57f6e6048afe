"""ONNX files: what they say, and what hostile and foreign ones are refused by."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_runs import Small

from linsight import create_model
from linsight.errors import CheckpointError, LinsightError
from linsight.export import Facts, export_onnx, load_exported, open_exported
from linsight.export import onnx as room

FACTS = Facts(model="small", classes=("a", "b", "c", "d"), input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(1)
    path, model = tmp_path_factory.mktemp("onnx") / "small.onnx", Small().eval()
    return path, model, export_onnx(model, path, facts=FACTS)


def test_a_file_is_the_model_and_tells_what_it_takes(file):
    path, model, done = file
    opened = open_exported(path)
    assert opened.facts == done.facts and opened.facts.classes == FACTS.classes and opened.facts.version
    assert opened.facts.checks == tuple((check.shape, check.error) for check in done.checks)
    assert done.error < 1e-6 and done.form == "ONNX, opset 20" and done.float32 == ()
    x = torch.randn(5, 3, 31, 7)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(x), model(x), rtol=1e-4, atol=1e-5)
    graph = onnx.load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "output"]
    assert sorted(path.parent.iterdir()) == [path]
    assert not any(node.metadata_props for node in graph.node)  # lines of code, and where they are
    with pytest.raises(LinsightError, match=r"takes float32 \(any, 3, any, any\): int8 \(1, 3, 8, 8\) came"):
        opened.model(torch.zeros(1, 3, 8, 8, dtype=torch.int8))


def test_weights_too_large_for_one_file_lie_beside_it(file, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "LARGE", 10)
    path = tmp_path / "large.onnx"
    export_onnx(file[1], path, facts=FACTS)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "large.onnx.data"]
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(open_exported(path).model(x), open_exported(file[0]).model(x))
    (tmp_path / "large.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the file of its weights, 'large\.onnx\.data'"):
        open_exported(path)
    (tmp_path / "large.onnx.data").symlink_to(file[0])
    with pytest.raises(CheckpointError, match="weights in another file"):
        open_exported(path)


@pytest.mark.full
def test_a_half_file_is_compared_with_float32(file, tmp_path):
    done = export_onnx(file[1], tmp_path / "half.onnx", facts=FACTS, half=True)
    assert done.facts.dtype == "float16" and 1e-6 < done.error <= done.limit < 5e-3
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert (load_exported(tmp_path / "half.onnx").model(x) - file[1](x)).abs().max() < 0.01
    with pytest.raises(LinsightError, match="takes float16"):
        open_exported(tmp_path / "half.onnx").model(x)
    assert all(p.dtype == torch.float32 for p in file[1].parameters())


@pytest.mark.full
def test_another_opset_is_written(file, tmp_path):
    export_onnx(file[1], tmp_path / "m.onnx", facts=FACTS, opset=18)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 18


@pytest.mark.parametrize("opset", [1, 17, 999])
def test_an_opset_that_cannot_be_written_is_one_line(file, tmp_path, opset):
    with pytest.raises(LinsightError, match=rf"opset {opset} cannot be written: 18 to \d+ can$"):
        export_onnx(file[1], tmp_path / "none.onnx", facts=FACTS, opset=opset)
    assert not list(tmp_path.iterdir())


def edited(path, target, change):
    model = onnx.load(path)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def external(location):
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def in_an_attribute(model):
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "x")
    external("/etc/passwd")(helper.make_model(helper.make_graph([], "", [], [], [tensor])))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def custom(model):
    model.graph.node[0].domain = "com.evil"
    model.opset_import.append(helper.make_opsetid("com.evil", 1))


def facts(**given):
    def change(model):
        (entry,) = [entry for entry in model.metadata_props if entry.key == "linsight"]
        entry.value = json.dumps({**json.loads(entry.value), **given})

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (external("../secret"), "weights in another file, '../secret', which is not read"),
        (external("/etc/passwd"), "weights in another file"),
        (external("weights\nbin"), r"weights in another file, 'weights\\nbin'"),
        (in_an_attribute, "weights in another file, '/etc/passwd'"),
        (custom, "cannot be read"),
        (lambda model: model.metadata_props.pop(), "not exported by linsight: its metadata lacks 'linsight'"),
        (lambda model: model.graph.ClearField("node"), "cannot be read"),
        (facts(classes=[1, 2]), "in a way that cannot be read"),
        (facts(mean=["a", "b", "c"]), "in a way that cannot be read"),
        (facts(std=[0, 1, 1]), "in a way that cannot be read"),
        (facts(input_size=[3, -1, 5]), "in a way that cannot be read"),
        (facts(input_size=[3, 1e9, 5]), "in a way that cannot be read"),
        (facts(dtype="os.system"), "in a way that cannot be read"),
        (facts(crop_pct=0), "in a way that cannot be read"),
        (facts(interpolation="eval"), "unknown interpolation 'eval'"),
        (facts(classes=["a"]), "names 1 classes and answers 4"),
        (facts(recipe={"fill": "x"}), "fill='x' is not a number"),
    ],
)
def test_files_that_are_not_right_are_one_line(file, tmp_path, change, told):
    path = edited(file[0], tmp_path / "m.onnx", change)
    with pytest.raises(LinsightError, match=told) as error:
        load_exported(path)
    assert "\n" not in str(error.value)


def test_facts_of_a_newer_version_are_read(file, tmp_path):
    path = edited(file[0], tmp_path / "m.onnx", facts(new_fact=1))
    assert open_exported(path).facts == open_exported(file[0]).facts


def test_what_is_no_exported_file_is_one_line(tmp_path):
    for name, told in (("none.onnx", "no such file"), ("m.bin", "no exported model by its name"), ("d.onnx", "folder")):
        if name == "d.onnx":
            (tmp_path / name).mkdir()
        if name == "m.bin":
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(LinsightError, match=told):
            open_exported(tmp_path / name)


@pytest.mark.full
def test_small_images_do_not_fix_the_size_of_the_graph(tmp_path):
    """A stage of PVTv2 has one key at 32 pixels, and several at 64."""
    stages = {"embed_dims": (8,), "depths": (1,), "num_heads": (1,)}
    model = create_model("pvt_v2_b0", attention="softmax", num_classes=4, **stages).eval()
    path = tmp_path / "m.onnx"
    export_onnx(model, path, facts=FACTS._replace(input_size=(3, 32, 32)))
    run = open_exported(path).model
    for shape in ((1, 3, 32, 32), (2, 3, 64, 96), (3, 3, 161, 70)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=0, atol=1e-5)
