"""The page on servers does what it says: its snippets run on exported files, and Triton's description is theirs."""

import json
import re
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linsight
from linsight.errors import LinsightError
from linsight.export import Facts, Served, export_onnx, write_triton

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.timeout(180)  # of a machine that is busy

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
FACTS = Facts("compact_pico", ("cat", "a dog"), (3, 32, 32), MEAN, STD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, `model.onnx`, `served.onnx` and a photograph."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(0)
    small = {"stem": ((8, 1),), "stages": ((16, 1, 2),), "num_classes": 2}
    model = linsight.create_model("compact_pico", attention="linear", img_size=32, **small).eval()
    torch.nn.init.normal_(model.get_classifier().weight)  # so that answers differ
    export_onnx(model, folder / "model.onnx", facts=FACTS)
    served = Served(model, (32, 32), MEAN, STD)
    export_onnx(served, folder / "served.onnx", facts=FACTS._replace(pixels=True))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg", quality=95)
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder, model, served


def executed(words):
    (code,) = [code for code in BLOCKS if words in code]
    names = {"__name__": "documentation"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_onnxruntime_alone_gives_the_class(folder, monkeypatch, capsys):
    path, model, _ = folder
    monkeypatch.chdir(path)
    code = next(code for code in BLOCKS if '"model.onnx"' in code)
    assert "linsight" not in re.sub(r'"linsight"', "", code) and code.count("\n") <= 16
    names = executed('session.run(["output"]')
    image = Image.open("photo.jpg").resize((32, 32), Image.Resampling.BICUBIC)
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]).float()
    with torch.no_grad():
        wanted = model((x / torch.tensor(STD)[:, None, None])[None])
    torch.testing.assert_close(torch.from_numpy(names["logits"]), wanted, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.strip() == FACTS.classes[wanted.argmax()]


def test_pixels_give_probabilities(folder, monkeypatch):
    path, _, served = folder
    monkeypatch.chdir(path)
    names = executed("print(dict(zip(classes")
    with torch.no_grad():
        wanted = served(torch.from_numpy(np.array(Image.open("photo.jpg")))[None])
    torch.testing.assert_close(torch.from_numpy(names["probabilities"]), wanted, rtol=0, atol=2e-3)


def test_the_server_answers_and_refuses(folder, monkeypatch):
    monkeypatch.chdir(folder[0])
    handler = executed("BaseHTTPRequestHandler")["Handler"]
    monkeypatch.setattr(handler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(address, (folder[0] / "photo.jpg").read_bytes()) as answer:
            found = json.loads(answer.read())
        assert found.keys() == {"cat", "a dog"} and sum(found.values()) == pytest.approx(1, abs=1e-5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, b"no image")
        assert refused.value.code == 400
        refused.value.close()
        server.shutdown()


def test_graphs_are_made_of_operators_that_every_runtime_has(folder):
    for name in ("model.onnx", "served.onnx"):
        model = onnx.load(folder[0] / name)
        assert {entry.domain for entry in model.opset_import} == {""} and not model.functions
        assert {node.domain for node in model.graph.node} == {""}


def test_triton_is_told_what_the_file_has(folder, tmp_path, monkeypatch):
    path, *_ = folder
    monkeypatch.chdir(path)
    place = write_triton("model.onnx", tmp_path, name="photos", max_batch=16, delay=500)
    assert place == tmp_path / "photos" and (place / "1" / "model.onnx").read_bytes() == Path("model.onnx").read_bytes()
    assert (place / "labels.txt").read_text() == "cat\na dog\n"
    assert (place / "config.pbtxt").read_text() == (
        'name: "photos"\nbackend: "onnxruntime"\nmax_batch_size: 16\n'
        'input [ { name: "images" data_type: TYPE_FP32 dims: [3, -1, -1] } ]\n'
        'output [ { name: "output" data_type: TYPE_FP32 dims: [2] label_filename: "labels.txt" } ]\n'
        "dynamic_batching { max_queue_delay_microseconds: 500 }\n"
    )
    text = (write_triton("served.onnx", tmp_path) / "config.pbtxt").read_text()
    assert 'name: "served"' in text and '"pixels" data_type: TYPE_UINT8 dims: [-1, -1, 3]' in text
    assert '"probabilities" data_type: TYPE_FP32 dims: [2]' in text
    assert executed("write_triton")["folder"] == Path("models/photos")
    with pytest.raises(LinsightError, match="is there already: give the next version, 2"):
        write_triton("model.onnx", tmp_path, name="photos")
    for bad in ("../photos", "", "a b", ".hidden"):
        with pytest.raises(LinsightError, match="cannot name a model"):
            write_triton("model.onnx", tmp_path / "other", name=bad)
    with pytest.raises(LinsightError, match="no ONNX file"):
        write_triton("weights.pt", tmp_path)
    assert not (tmp_path / "other").exists() and sorted(each.name for each in tmp_path.iterdir()) == [
        "photos",
        "served",
    ]


def test_openvino_gives_the_same(folder, monkeypatch):
    pytest.importorskip("openvino")
    path, model, _ = folder
    monkeypatch.chdir(path)
    run = executed("openvino.Core()")["model"]
    for shape in ((1, 3, 33, 71), (3, 3, 64, 48)):
        x = torch.randn(shape)
        with torch.no_grad():
            wanted = model(x)
        found = torch.from_numpy(run(x.numpy())[0])
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), shape
