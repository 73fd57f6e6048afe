"""The CIFAR-10 benchmark: both models alike, and where its rows go."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cifar10

from linsight.train import resolve

README = Path(__file__).parents[1] / "README.md"


def summary(model, attention, top1):
    found = {"model": model, "attention": attention, "top1": top1, "params": 1.17e6}
    return found | {"train_images": 50000, "epochs": 16, "seconds": 3300.0}


def test_both_models_are_trained_alike_and_told_in_the_readme(tmp_path, monkeypatch, capsys):
    recipes = []

    def train(recipe, out, name, report):
        recipes.append(recipe)
        return summary(name, "inline" if name == cifar10.OURS else "softmax", 84.4 if name == cifar10.OURS else 83.0)

    monkeypatch.setattr(cifar10, "train", train)
    monkeypatch.setattr(cifar10, "speeds", lambda options: [(120.0, 100.0), (50.0, 1000.0)])
    page = tmp_path / "README.md"
    page.write_bytes(README.read_bytes())
    arguments = ["--readme", str(page), "--out", str(tmp_path / "runs"), "--threads", "2"]
    assert cifar10.main(arguments) == 0
    inline, softmax = recipes
    assert (inline.model, softmax.model) == (cifar10.OURS, cifar10.SOFTMAX)
    for name in ("lr", "epochs", "batch_size", "img_size", "crop_mode", "seed", "opt", "model_args", "attention"):
        assert getattr(inline, name) == getattr(softmax, name) == getattr(resolve("cifar10"), name), name
    text = page.read_text(encoding="utf-8")
    assert f"| `{cifar10.OURS}` (inline) | 1.17 M | 84.4 | 55 min | 120 ms (1.20) | 50 ms (0.05) |\n" in text
    assert f"| `{cifar10.SOFTMAX}` (softmax) | 1.17 M | 83.0 | 55 min | 100 ms | 1000 ms |\n" in text
    before, after = README.read_text(encoding="utf-8"), text
    for whole in (before, after):  # all else is as it was
        assert whole.count("<!-- results: cifar10 -->\n|") == 1 and "linsight train --recipe cifar10" in whole
    assert cifar10.BLOCK.sub("", before) == cifar10.BLOCK.sub("", after)
    (tmp_path / "other.md").write_text("nothing\n")
    assert cifar10.main(["--readme", str(tmp_path / "other.md")]) == 2
    assert "has no place for the result" in capsys.readouterr().err
