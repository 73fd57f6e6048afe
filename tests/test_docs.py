"""What the documentation says is current, and what it shows runs."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linsight import Grid, create_attention, create_model
from linsight.attention import Tokens, run_rounds, unregister
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS
from linsight.ops import Layout, tiles
from linsight.train import resolve, train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
OTHERS = (
    "transformers",
    "diffusers",
    "segmentation_models_pytorch",
    "accelerate",
    "lightning",
    "peft",
)  # which a snippet may need, and warn of themselves


def generator(name="generate"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(path):
    """`(line, code)` of each Python block of a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: found.start()].count("\n") + 2, found[1]


def execute(path, line, code):
    """Run `code` as if it stood at `line` of `path`, so that a failure is found there."""
    names = {"__name__": "documentation"}
    exec(compile("\n" * (line - 1) + code, str(ROOT / path), "exec"), names)
    return names


@pytest.mark.full  # .ci/run and pre-commit ask docs/generate.py itself
def test_generated_parts_are_current():
    found = {path: path.read_text(encoding="utf-8") == text for path, text in generator().outputs().items()}
    assert all(found.values()) and len(found) == 7, f"run python docs/generate.py: {found}"


def test_every_model_has_a_row_and_none_is_built(monkeypatch):
    generate = generator()
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail("built a module"))
    rows = re.findall(r"^\| `(\w+)` \|", generate.models(), re.MULTILINE)
    assert sorted(rows) == sorted([*HOSTS, *VARIANTS, *ARCHITECTURES])


def test_rows_of_models_tell_what_is_published():
    text = generator().models()
    for row in (
        "| `inline_swin_base` | `inline,inline,inline:2/softmax,softmax` | 224x224 | 88.35 | 15.40 | 84.1 "
        "| `inline_swin_base` |",
        "| `focused_pvt_large` | `focused` | 224x224 | 50.65 | 10.38 | about 83.45 | `focused_pvt_large` |",
        "| `cswin_base_384` | any | 384x384 | 77.38 | 46.96 | 85.5 (EMA) | - |",
        "| `inline_compact_pico` | `inline` | 8x8 | - | - | - | `digits` |",
    ):
        assert f"\n{row}\n" in text


@pytest.mark.parametrize(
    ("path", "line", "code"),
    [
        pytest.param(path, line, code, id=f"{path}:{line}")
        for path in PAGES
        if path not in ("docs/split.md", "docs/deploy.md")  # which take several processes, or exported files
        for line, code in blocks(path)
    ],
)
def test_examples_run(path, line, code, tmp_path, monkeypatch, request):
    """In a folder of its own, or in one with a run and photographs, where they are spoken of."""
    monkeypatch.chdir(request.getfixturevalue("workplace") if "runs/digits" in code else tmp_path)
    for package in OTHERS:
        if re.search(rf"^(from|import) {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)
            request.applymarker(pytest.mark.filterwarnings("ignore"))
    execute(path, line, code)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run on digits and two photographs."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("photo.png", "other.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 10), dtype=np.uint8)).save(folder / name)
    quick = {"model": "compact_pico", "attention": "linear", "model_args": "stem=((8,1),),stages=((16,1,2),)"}
    quick |= {"epochs": 1, "warmup_epochs": 0, "figures": False, "report": False, "device": "cpu", "threads": 1}
    train(resolve("digits", quick), out=folder / "runs" / "digits")
    return folder


def test_scripts_of_timm_know_our_models(tmp_path, monkeypatch, capsys):
    """The wrapper of docs/timm-scripts.md around a script that makes a model as timm's do."""
    (_, wrapper), _ = blocks("docs/timm-scripts.md")
    (tmp_path / "with_linsight.py").write_text(wrapper)
    (tmp_path / "train.py").write_text(
        "import argparse, timm\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--model')\n"
        "if __name__ == '__main__':\n"
        "    print(type(timm.create_model(parser.parse_args().model, depth=1)).__module__)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["with_linsight.py", "train.py", "--model", "inline_deit_tiny"])
    runpy.run_path("with_linsight.py", run_name="__main__")
    assert capsys.readouterr().out.startswith("linsight.models.hosts.vit")


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 195


@pytest.mark.parametrize("path", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_exist(path):
    text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert ((ROOT / path).parent / target).exists(), target


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in PAGES[1:]:
        assert path == "docs/index.md" or f"({path.removeprefix('docs/')})" in index, path
    assert "(docs/index.md)" in README


def test_readme_has_two_commands_of_one_line():
    commands = re.findall(r"^<!-- command: (\w+) -->\n```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in commands] == ["train", "test"]
    assert all(text.count("\n") == 1 for _, text in commands)


def test_ci_runs_the_test_command_of_the_readme(tmp_path):
    """`.ci/run` in a copy whose README has a command that leaves a mark, then fails."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/run", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    text = re.sub(r"(?<=<!-- command: test -->\n```bash\n).*", "echo .venv > mark && false pytest", README)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")],
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "mark").read_text().startswith(str(tmp_path / "cache" / "linsight-ci"))


def test_the_mechanism_of_the_contributing_guide():
    ((line, code),) = blocks("CONTRIBUTING.md")
    try:
        execute("CONTRIBUTING.md", line, code)
        layer = create_attention("average", 32, 4, scale=2.0)
        grid = Grid(5, 7, prefix=1)
        q, k, v = torch.randn(3, 2, grid.tokens, 4, 8)
        keep = torch.rand(2, grid.tokens) > 0.3
        out = layer.core(Tokens(q, k, v, keep=keep), Layout(grid))
        expected = [2 * v[b, keep[b]].mean(dim=0) for b in range(2)]
        torch.testing.assert_close(out[:, 0], torch.stack(expected))
        tokens = Tokens(q, k, v, keep=keep)
        torch.testing.assert_close(run_rounds(layer.core, tokens, tiles(grid, 2, 3)), out)
        model = create_model("vit_tiny", attention="average", depth=1, num_classes=3)
        assert model(torch.randn(1, 3, 40, 56)).shape == (1, 3)
    finally:
        unregister("average")


def test_patterns_are_what_a_token_depends_on(tmp_path, capsys):
    patterns = generator("patterns")
    window, whole = patterns.pattern("nat"), patterns.pattern("softmax")
    seen = torch.zeros(15, 15, dtype=torch.bool)
    seen[4:11, 4:11] = True  # 7x7 around the middle
    assert torch.equal(window > 0, seen) and (whole > 0).all() and whole[7, 7] == whole.max() == 1
    patterns.main(["nat", "softmax", "--out", str(tmp_path / "p.png")])
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 100
    with pytest.raises(SystemExit):
        patterns.main(["softmaxx"])
    assert "'softmax'" in capsys.readouterr().err
