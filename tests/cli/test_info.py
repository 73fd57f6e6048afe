"""`linsight list | info | doctor`: tables for people, JSON for programs, one line for what is wrong."""

import json
import sys

import pytest
import rich.console

import linsight
import linsight.doctor
from linsight import cli, ops
from linsight.cli import show


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command: `(exit code, standard output, standard error)`."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["linsight", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return command


def test_list_is_searched_by_words(run):
    def names(*options):
        return [row["name"] for row in json.loads(run("list", "--json", *options)[1])["mechanisms"]]

    assert names("--search", "DINAT") == ["nat"] == names("--search", "neighborhood 2023")
    assert names("--search", "mamba", "--can", "stream") == ["mlla"]
    assert names("--search", "nothing like that") == []
    assert "also called" in run("info", "nat")[1] and "DiNAT" in run("info", "nat")[1]
    assert "it is 'lka' here" in run("info", "van")[2]


def test_list(run):
    code, out, _ = run("list")
    assert code == 0
    (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["softmax"])
    assert row[1:] == [
        "scores",
        "2017",
        "O(N^2",
        "d)",
        "keep,",
        "sizes,",
        "packed,",
        "cross,",
        "reduced,",
        "score_bias,",
        "prefix,",
        "causal,",
        "rotary",
    ]
    assert "\x1b" not in out


def test_list_searches(run):
    code, out, _ = run("list", "--family", "window", "--can", "keep, stream", "--json")
    found = {row["name"]: row for row in json.loads(out)["mechanisms"]}
    assert code == 0 and "models" not in json.loads(out) and "clear" in found
    assert all(row["capabilities"]["keep"] and row["capabilities"]["stream"] for row in found.values())
    assert {row["family"] for row in found.values()} == {"window"}
    for case in (("--family", "windows"), ("--can", "keeps")):
        code, _, err = run("list", *case)
        assert code == 2 and err.count("\n") == 1 and case[1][:-1] in err


def test_list_has_each_model_on_one_line(run):
    names = [line.split()[0] for line in run("list", "--models")[1].splitlines() if line.strip()]
    expected = [*sorted(linsight.models.VARIANTS), *sorted(linsight.models.HOSTS)]
    assert [name for name in names if name in expected] == expected


def test_list_fits_a_terminal_of_80_columns(run, monkeypatch):
    """Names are not broken, and plans of attention only between stages."""
    narrow = rich.console.Console(width=80, no_color=True)
    monkeypatch.setattr(show, "terminal", lambda: narrow)
    words = {word.strip(",") for word in run("list")[1].split()}
    assert {*linsight.models.VARIANTS, *linsight.models.HOSTS} <= words
    assert {"inline:2/softmax", "focused", "O(N^2"} <= words


def test_list_json(run):
    _, out, _ = run("list", "--json")
    found = json.loads(out)
    assert [row["name"] for row in found["mechanisms"]] == [entry.name for entry in linsight.list_attentions()]
    (tiny,) = (row for row in found["models"] if row["name"] == "inline_deit_tiny")
    assert (tiny["host"], tiny["attention"], tiny["published"]["top1"]) == ("vit_tiny", "inline", 74.5)
    assert list(json.loads(run("list", "--models", "--json")[1])) == ["models"]


def test_info_of_a_mechanism(run):
    _, out, _ = run("info", "linear")
    assert "phi(q_i)" in out
    assert "elu+1, relu" in out
    assert "https://arxiv.org/abs/2006.16236" in out


@pytest.mark.parametrize(("name", "expected"), [("linear", 2 * 192 * 32 + 192), ("softmax", 2 * 192)])
def test_operations_are_those_of_the_formula(run, name, expected):
    """Beside the projections: S and z once and read once a token; or N scores and N values a token."""
    cost = json.loads(run("info", name, "--json")[1])["cost"]
    for row, n in zip(cost, (14 * 14, 64 * 64), strict=True):
        per_token = expected * (n if name == "softmax" else 1)
        assert row["macs"] == n * (4 * 192 * 192 + per_token)
        assert row["params"] == 4 * 192 * 192 + 4 * 192


@pytest.mark.parametrize("name", ["inline_deit_tiny", "inline_deit_small", "inline_deit_base"])
def test_models_cost_what_their_paper_says(run, name):
    found = json.loads(run("info", name, "--json")[1])
    assert found["params"] == pytest.approx(found["published"]["params"], rel=2e-3)
    assert found["gmacs"] == pytest.approx(found["published"]["gmacs"], rel=2e-3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("inline_cswin_tiny", "83.2 % top-1 of averaged weights, 20.60 M parameters, 4.31 G multiply-adds"),
        ("focused_pvt_large", "about 83.45 % top-1, 50.65 M parameters, 10.38 G multiply-adds"),
        ("inline_swin_base_384", "88.47 M parameters, 46.20 G multiply-adds"),
        ("pvt_tiny", "75.1 % top-1, 13.23 M parameters, 1.93 G multiply-adds"),
        ("vit_tiny", None),
    ],
)
def test_info_shows_what_is_published(run, monkeypatch, name, published):
    monkeypatch.setattr("linsight.catalogue.count_macs", lambda *_: 0)  # which takes seconds
    lines = [line.strip() for line in run("info", name)[1].splitlines()]
    shown = [line.partition(" ")[2].strip() for line in lines if line.startswith("published ")]
    assert shown == ([published] if published else [])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("wfm_tiny", "https://huggingface.co/RuizeHe/weightformer-t/resolve/main/model.safetensors"),
        ("focused_pvt_v2_b0", "the repository LeapLabTHU/FLatten-Transformer"),
        ("inline_pvt_tiny", "the README of LeapLabTHU/InLine"),
        ("agent_pvt_tiny", ""),
    ],
)
def test_info_shows_where_weights_are(run, monkeypatch, name, place):
    monkeypatch.setattr("linsight.catalogue.count_macs", lambda *_: 0)  # which takes seconds
    shown = dict(line.strip().split(maxsplit=1) for line in run("info", name)[1].splitlines() if " " in line.strip())
    assert shown.get("weights", "") == place
    assert shown["code"].startswith("of its authors") and "https://github.com/LeapLabTHU/" in shown["code"]
    assert "https://arxiv.org/abs/" in shown["paper"]
    assert "LeapLabTHU/" not in run("info", name, "--attention", "softmax")[1]


def test_info_names_the_recipe_of_the_published_model(run):
    assert "--recipe inline_deit_small --data IMAGENET" in run("info", "inline_deit_small")[1]
    assert "--recipe" not in run("info", "inline_deit_small", "--attention", "linear")[1]


def test_info_with_another_mechanism(run):
    found = json.loads(run("info", "inline_deit_tiny", "--attention", "linear", "--json")[1])
    assert found["attention"] == "linear"
    assert found["published"] == {}


def test_doctor(run, monkeypatch):
    monkeypatch.setitem(ops.FORMS, "outer_sum", (ops.Form("fused", "quicker", lambda device: "needs a GPU"),))
    found = json.loads(run("doctor", "--json")[1])
    assert found["linsight"] == linsight.__version__
    rows = {row["operator"]: row for row in found["forms"]}
    if found["devices"][0]["type"] == "cpu":
        assert rows["outer_sum"]["form"] == "plain PyTorch"
        assert rows["outer_sum"]["reason"] == "fused: needs a GPU"
    _, out, _ = run("doctor")
    assert all(name in out for name in ("torch", "timm", "dynamic_depthwise_conv", "compiler"))


def test_doctor_says_how_to_get_what_is_missing(run, monkeypatch):
    real = linsight.doctor.version_of
    monkeypatch.setattr(linsight.doctor, "version_of", lambda name: "" if name == "matplotlib" else real(name))
    _, out, _ = run("doctor")
    assert "pip install -e '.[train]'" in out


def test_every_form_is_of_a_public_operator():
    assert set(ops.FORMS) <= set(ops.__all__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "inlne"], "did you mean 'inline'?"),
        (["info", "inline_diet_tiny"], "did you mean 'inline_deit_tiny'?"),
        (["info", "vit_tiny", "--attention", "lineer"], "did you mean 'linear'?"),
        (["info"], "Missing argument"),
        (["lst"], "No such command 'lst'"),
        (["list", "--jsn"], "--json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("linsight: ")
    assert message in err
    assert err.count("\n") == 1


def test_version_and_help(run):
    assert run("--version") == (0, f"{linsight.__version__}\n", "")
    assert all(name in run()[1] for name in ("train", "eval", "predict", "list", "info", "doctor"))
