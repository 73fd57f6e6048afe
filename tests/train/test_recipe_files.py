"""Recipes as files, and `linsight recipe`."""

import json

import pytest
import yaml
from small import TINY

from linsight.errors import LinsightError, UnknownNameError
from linsight.tasks import read_recipe
from linsight.tasks.files import read_values, schema, written
from linsight.train import RECIPES, Interrupted, resolve, resume, train
from linsight.train.progress import Silent

SOME = (
    "digits",
    "cifar10",
    "finetune",
    "masks",
    "objects",
    "agent_swin_tiny_upernet",
    "inline_swin_tiny",
    "dynp_resnet18_t128",
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_file_says_what_the_command_line_says(tmp_path, suffix):
    text = {
        "yaml": "recipe: cifar10\nmodel: {attention: agent}\noptimisation:\n  lr: 1e-3\n"
        "  opt_args: {betas: [0.9, 0.95]}\namp: off\nrun:\n",
        "toml": 'recipe = "cifar10"\namp = "off"\n[model]\nattention = "agent"\n[optimisation]\nlr = 1e-3\n'
        "opt_args = {betas = [0.9, 0.95]}\n",
        "json": json.dumps(
            {"recipe": "cifar10", "attention": "agent", "lr": "1e-3", "opt_args": {"betas": [0.9, 0.95]}, "amp": "off"}
        ),
    }[suffix]
    found = resolve(write(tmp_path / f"mine.{suffix}", text), {"epochs": 3})
    given = {"attention": "agent", "lr": 1e-3, "opt_args": "betas=(0.9,0.95)", "amp": "off", "epochs": 3}
    assert found == resolve("cifar10", given) and found.lr == 0.001 and found.opt_args == {"betas": (0.9, 0.95)}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "changed"])
def test_a_recipe_that_is_printed_is_read_as_the_same(tmp_path, name, whole):
    text = written(resolve(name), about=RECIPES[name].about, all_fields=whole)
    assert resolve(write(tmp_path / "a.yaml", text)) == resolve(name)
    fields = {line.split(":")[0].strip() for line in text.splitlines() if not line.startswith("#")}
    assert (set(resolve(name).values()) <= fields) == whole


def test_without_a_base_a_file_starts_from_the_defaults(tmp_path):
    found = resolve(write(tmp_path / "a.yml", "model: inline_deit_tiny\ninit:\nimg_size: 96x64\n"))
    assert (found.model, found.init, found.img_size, found.differences().keys()) == (
        "inline_deit_tiny",
        None,
        (96, 64),
        {"model", "img_size"},
    )
    assert read_values(tmp_path / "a.yml") == (None, {"model": "inline_deit_tiny", "init": None, "img_size": "96x64"})


WRONG = {
    "epoch: 3": "unknown recipe field or group 'epoch': did you mean 'epochs'?",
    "optimization: {lr: 1}": "did you mean 'optimisation'?",
    "data: {lr: 1}": "lr is a field of optimisation, not of data",
    "run: {seeds: 1}": "unknown recipe field 'seeds': did you mean 'seed'?",
    "lr: 1\noptimisation: {lr: 2}": "has lr twice",
    "lr: 1\nlr: 2": "cannot be read: lr is there twice",
    "optimisation: {lr: 1, epochs: 2, lr: 2}": "cannot be read: lr is there twice",
    "recipe: cifar": "unknown recipe 'cifar': did you mean 'cifar10'?",
    "recipe: 3": "recipe=3 must be the name of a recipe",
    "task: classifi": "unknown task 'classifi': did you mean 'classify'?",
    "epochs: many": "epochs='many' is not a whole number",
    "epochs: yes": "epochs='yes' is not a whole number",
    "amp: no": "unknown amp 'no'",
    "- 1": "is no recipe: write fields in it",
    "": "is no recipe: write fields in it",
    "lr: [": "cannot be read",
    "lr: !!python/object/apply:os.system [echo]": "cannot be read",
    "a: &a [1]\nb: *a": "references (*name) are not read",
    "lr: {1: 2}": "lr={1: 2} is not a number",
    "? [1, 2]\n: 3": "cannot be read",
    "lr: .nan": "lr=nan is out of range",
    "model_args: [1]": "model_args=[1] is not understood: write name=value,name=value",
    "img_size: [[1]]": "img_size=[[1]] is not understood",
    "2026-11-28: 3": "unknown recipe field or group '2026-11-28'",
    "[" * 5000: "cannot be read",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:20])
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, text):
    with pytest.raises(LinsightError) as caught:
        resolve(write(tmp_path / "a.yaml", text))
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_name_comes_once_in_json_too(tmp_path):
    with pytest.raises(LinsightError, match=r"a\.json' cannot be read: lr is there twice"):
        read_values(write(tmp_path / "a.json", '{"optimisation": {"lr": 1, "lr": 2}}'))


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * 2**20)
    (tmp_path / "folder.yaml").mkdir()
    for name, said in (
        ("a.yaml", "cannot be read"),
        ("large.yaml", "larger than 1 MiB"),
        ("folder.yaml", "no such recipe file"),
        ("none.toml", "no such recipe file"),
    ):
        with pytest.raises(LinsightError, match=said):
            resolve(str(tmp_path / name))
    with pytest.raises(UnknownNameError, match=r"file that ends in \.yaml"):
        resolve("mine.txt")


def test_the_schema_knows_fields_in_groups_and_without():
    found = schema()["properties"]
    assert found["lr"]["minimum"] > 0 and found["amp"]["enum"] == ["auto", "off", "bf16", "fp16"]
    assert found["optimisation"]["properties"]["lr"] == found["lr"]
    text, group = found["model"]["anyOf"]
    assert text["type"] == "string" and group["properties"]["img_size"] == found["img_size"]
    assert set(schema("budget")["properties"]) == set(found)
    assert all(inner.get("description") for name, inner in found.items() if name in resolve().values())


def test_the_command_prints_lists_and_a_run_is_called_like_its_file(linsight, tmp_path, monkeypatch, tiny_options):
    monkeypatch.chdir(tmp_path)
    code, out, _ = linsight("recipe", "cifar10")
    assert code == 0 and "optimisation:\n  opt: nmuon" in out and "# peak learning rate" in out
    assert yaml.safe_load(out)["model"]["model"] == "inline_compact_tiny"
    assert linsight("recipe", "cifar10", "--changed")[1].count("\n") < out.count("\n") / 2
    assert json.loads(linsight("recipe", "cifar10", "--json")[1])["lr"] == 0.004
    assert json.loads(linsight("recipe", "--schema")[1])["title"].endswith("task classify")
    assert "cifar10" in linsight("recipe")[1]
    code, _, err = linsight("recipe", "cifar")
    assert (
        code == 2
        and err
        == "linsight: unknown recipe 'cifar': did you mean 'cifar10'? (or a file that ends in .yaml, .toml or .json)\n"
    )
    write(tmp_path / "mine.yaml", "recipe: digits\nepochs: 1\nwarmup_epochs: 0\n")
    code, _, err = linsight("train", "--recipe", "mine.yaml", *tiny_options, "--epochs", "1", "--warmup-epochs", "0")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-")


class Stopped(Silent):
    """Ends a run in its second epoch."""

    def step(self, epoch, step, images, loss):
        if (epoch, step) == (1, 2):
            raise KeyboardInterrupt


def test_old_run_folders_go_on(tmp_path):
    """Of a time when a recipe named no task."""
    recipe = resolve("digits", {**TINY, "save_every": 1})
    train(recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", report=Stopped())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"].pop("task") == "classify"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    resume(tmp_path / "run")
    weights = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["self", "cls", "values", "model_config", "__init__"])
def test_no_name_of_python_is_a_field(name):
    """As a hostile file of weights may have it."""
    with pytest.raises(UnknownNameError, match="unknown recipe field"):
        read_recipe({name: 1})
