"""The model card tells what is known, and takes no name for Markdown, HTML or YAML."""

import csv
import dataclasses
import re

import pytest
import yaml
from markdown_it import MarkdownIt
from small_runs import CLASSES, SMALL, write_run

import linsight
from linsight.errors import LinsightError
from linsight.export import save_for_hub
from linsight.export.about import About, shared_recipe
from linsight.export.card import escaped, make_card
from linsight.tasks import ClassifyRecipe

ODD = (
    "---",
    "a|b",
    "`rm`",
    "<script>alert(1)</script>",
    "line\nfeed\r\n---\nlicense: mit",
    "{{ x }}{% y %}",
    "left\u202eright\u200f",
    "**b** _i_ ~s~ $x$",
    "[x](javascript:1)",
    "![i](http://evil.example/i.png)",
    "https://evil.example www.evil.example a@evil.example",
    "&lt;b&gt; &#60;",
    "# head",
    "\ud800\x00\x1b[31m",
    ": yes",
    "'\"\\",
)


def front(card):
    _, head, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), body


def rendered(body):
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)


def inline(tokens):
    return [child for token in tokens for child in token.children or ()]


def test_a_run_tells_of_itself(run_folder, tmp_path):
    card = (
        save_for_hub(run_folder, tmp_path / "hub", name="me/colours", licence="cc-by-4.0") / "README.md"
    ).read_text()
    head, body = front(card)
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "timm"
    assert head["pipeline_tag"] == "image-classification"
    assert {"image-classification", "timm", "linsight", "linear-attention", "agent"} <= set(head["tags"])
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert index["name"] == "colours" and result["metrics"] == [{"type": "accuracy", "value": 91.25}]
    assert result["dataset"]["name"] == "colours"
    params = sum(p.numel() for p in linsight.load_run(run_folder).model.parameters())
    for text in (
        "# colours\n",
        f"| parameters | {params:,} |",
        "| classes | 3: blue, green, red |",
        "| top-1 | 91.25 % |",
        "| data | colours |",
        "| images | 24x16, 3 channels; other sizes work too |",
        "https://arxiv.org/abs/2312.08874",
        'linsight.from_pretrained("me/colours")',
        'timm.create_model("hf-hub:me/colours", pretrained=True)',
        "Licence of these weights: `cc-by-4.0`.",
        "| `epochs` | 3 |",
    ):
        assert text in body, text
    assert "Speed" not in body and "top-5" not in body  # nothing measured; of three classes


def test_nothing_is_told_that_is_not_known(tmp_path):
    model = linsight.create_model("compact_pico", num_classes=2)
    head, body = front((save_for_hub(model, tmp_path) / "README.md").read_text())
    assert "license" not in head and "model-index" not in head and "datasets" not in head
    assert "Licence of these weights: not stated" in body and "Nothing is told here of how well it does" in body
    assert "Results" not in body and "Recipe" not in body and "OWNER/NAME" in body and "trained with" not in body


def test_speed_is_that_of_a_bench_in_the_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    columns = ("kind", "model", "beside", "device", "infer_img_size", "infer_batch_size", "infer_ratio")
    rows = [
        ("model", "vit_tiny (agent)", "deit|tiny", "CPU <b>", "24x16", "1", "0.4321"),
        ("model", "deit|tiny", "", "CPU", "24x16", "1", ""),
        ("model", "x", "y", "CPU", "24x16", "1", "nan"),
    ]
    with (folder / "bench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    body = front((save_for_hub(folder, tmp_path / "hub") / "README.md").read_text())[1]
    assert "| vit_tiny (agent) | 24x16 | 1 | deit&#124;tiny | 0.43 | CPU &#60;b&#62; |" in body
    assert body.count("| 24x16 |") == 1
    (folder / "bench.csv").write_bytes(b"\xff\xfe\x00")
    assert "Speed" not in (save_for_hub(folder, tmp_path / "other") / "README.md").read_text()


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_stay_text(odd):
    about = About(
        name=odd,
        architecture="vit_tiny",
        attention="agent",
        params=7,
        input_size=(3, 24, 16),
        outputs=1,
        classes=(odd,),
        recipe={"data": odd, "model_args": {"x": odd}},
        results={"top1": 50.0},
        data=odd,
        speed=[dict.fromkeys(("model", "size", "batch", "beside", "ratio", "device"), odd)],
    )
    card = make_card(about)
    card.encode()
    head, body = front(card)
    assert "license" not in head and set(head) <= {
        *("library_name", "metrics", "pipeline_tag", "tags", "model-index", "datasets"),
    }
    plain = rendered(front(make_card(dataclasses.replace(about, name="x", classes=("x",), data="x",
        recipe={"data": "x", "model_args": {"x": "x"}},
        speed=[dict.fromkeys(("model", "size", "batch", "beside", "ratio", "device"), "x")])))[1])  # fmt: skip
    tokens = rendered(body)
    assert [token.type for token in tokens] == [token.type for token in plain]
    kinds = [child.type for child in inline(tokens) if child.type != "text"]
    assert kinds == [child.type for child in inline(plain) if child.type != "text"]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x09\x0b-\x1f]", card)
    assert "{{" not in card and "www.evil" not in body and "https://evil" not in body


def test_names_are_read_as_they_are():
    assert escaped("deit_tiny-2, a=b (c)") == "deit_tiny-2, a=b (c)" and escaped("猫 e\u0301é") == "猫 e\u0301é"
    assert escaped("_x_") == "&#95;x&#95;" and escaped("x" * 100) == "x" * 79 + "…"


def test_many_classes_are_counted(tmp_path):
    model = linsight.create_model("compact_pico", num_classes=30)
    names = [f"c{i}" for i in range(30)]
    body = (save_for_hub(model, tmp_path, classes=names) / "README.md").read_text()
    assert "| classes | 30: c0, c1," in body and "c19, and 10 more |" in body


def test_recipes_lose_their_folders():
    for given, told in (
        ({"data": "/home" + "/me/images"}, {"data": "images"}),
        ({"data": "C:\\users\\me\\images\\"}, {"data": "images"}),
        ({"data": "../images"}, {"data": "images"}),
        ({"data": "torch/cifar10"}, {"data": "torch/cifar10"}),
        ({"data": "hfds/owner/images", "data_dir": "~/x"}, {"data": "hfds/owner/images"}),
        ({"init": "https://me:secret@host.example/a/b.pth?key=1"}, {"init": "https://host.example/a/b.pth"}),
        ({"model_args": {"x": ("~/x/y",)}, "workers": 3}, {"model_args": {"x": ("y",)}}),
        ({"attention": "inline:1/softmax"}, {"attention": "inline:1/softmax"}),
    ):
        assert shared_recipe(ClassifyRecipe(**given)) == told
    data = SMALL.changed(data="hfds/owner/images")
    about = About("me/x", "vit_tiny", "agent", 1, (3, 8, 8), 3, CLASSES, recipe=shared_recipe(data), data="x")
    assert front(make_card(about))[0]["datasets"] == ["owner/images"]


def test_a_licence_is_an_identifier(tmp_path):
    model = linsight.create_model("compact_pico", num_classes=2)
    for odd in ("MIT Licence", "mit\nx: y", "<b>", "../x", "a" * 99):
        with pytest.raises(LinsightError, match="no identifier of the Hub"):
            save_for_hub(model, tmp_path, licence=odd)
