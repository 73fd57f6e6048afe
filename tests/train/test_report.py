"""The page of a run: what it tells is so, it fetches and runs nothing, and names are text in it."""

import html.parser
import io
import json
import re
import shlex
import shutil
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image
from small import TINY
from torch import nn

from linsight.data.images import Normalise, Samples
from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.signals import Interrupted
from linsight.train import resolve, train, write_report
from linsight.train.progress import Silent
from linsight.train.report import Findings, Kept, Outcome, Section, look, numbered, write_page
from linsight.train.report.charts import line_chart, matrix
from linsight.train.report.classes import class_findings
from linsight.train.report.use import again, secretless

HOSTILE = ['<img src=x onerror="alert(1)">', "<script>alert(2)", "'\"><b>&amp;\u202eabc\u0007"]
FILE = "<svg onload=alert(3)> {} &lt;.png"
QUICK = {**TINY, "epochs": 2, "in_chans": 3, "mean": "0.5,0.5,0.5", "std": "0.2,0.2,0.2", "report": True}


class Page(html.parser.HTMLParser):
    """The texts, the tags and the attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.given = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.given += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def safe(path):
    """The page, which needs nothing from elsewhere and runs nothing."""
    content = path.read_text(encoding="utf-8")
    assert len(content.encode()) < 2_000_000
    page = Page(content)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "a"} & set(page.tags)
    for tag, name, value in page.given:
        assert not name.startswith("on") and name not in ("href", "style", "srcset", "action"), (tag, name)
        assert name != "src" or value.startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", content)
    policy = [value for tag, name, value in page.given if tag == "meta" and name == "content"]
    assert any("default-src 'none'" in value for value in policy)
    return page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on noise in classes of hostile names, which it cannot know."""
    place, rng = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    for name in HOSTILE:
        (place / "data <i>" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "data <i>" / name / FILE.format(number))
    summary = train(resolve("digits", {**QUICK, "data": str(place / "data <i>"), "track": None}), out=place / "run <u>")
    return place, summary


def test_a_run_ends_with_its_page_and_names_are_text_in_it(hostile):
    place, summary = hostile
    page = safe(place / "run <u>" / "report.html")
    assert not {"i", "u"} & set(page.tags)
    wrong = round(12 * (1 - summary["top1"] / 100))
    assert wrong and f"{wrong} of 12 images are taken for another class" in page.text
    assert (
        f"{summary['top1']:.2f} % of the images that it was not trained on are recognised. Its epoch was" in page.text
    )
    assert page.tags.count("img") == wrong
    assert HOSTILE[0] in page.text and FILE[-8:] in page.text and "'\"><b>&amp;\u202eabc\\x07" in page.text
    config = json.loads((place / "run <u>" / "config.json").read_text())
    assert config["machine"]["cpu"] and config["machine"]["cores"] and config["machine"]["cpu"] in page.text
    assert config["versions"]["torch"] in page.text and "linsight export " in page.text


def test_a_page_made_anew_is_the_same(hostile, tmp_path, linsight):
    folder = hostile[0] / "run <u>"
    code, out, err = linsight("report", folder, "--out", tmp_path / "page.html", "--device", "cpu")
    assert (code, out, err) == (0, f"{tmp_path / 'page.html'}\n", "")
    assert (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_page_tells_what_it_cannot_show(hostile, tmp_path):
    folder = shutil.copytree(hostile[0] / "run <u>", tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["data"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    page = safe(write_report(folder))
    assert "Its images are not shown: " in page.text and "img" not in page.tags and "Make it again" in page.text


class StopIn(Silent):
    """Asks for the end of the run at a step."""

    def __init__(self, at):
        self.left = at

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_stopped_run_has_a_page_of_what_is_done(tmp_path, folder, epochs):
    recipe = resolve("digits", {**QUICK, "data": folder, "batch_size": 24, "epochs": 3})
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", report=StopIn(2 * epochs + 1))
    page = safe(write_report(tmp_path / "run", workers=0))
    assert f"The run was stopped, or goes on: {epochs} of 3 epochs are done." in page.text
    assert f"linsight train --resume {tmp_path / 'run'}" in page.text
    assert ("No epoch is done" in page.text) == (not epochs) == ("Confusion" not in page.text)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "is no run folder: it has no config.json"),
        ("config.json", "{", "is damaged, or no JSON"),
        ("config.json", '{"recipe": 3, "data": {}, "versions": {}}', "its 'recipe' is no object"),
        (
            "config.json",
            '{"recipe": {"epochs": "many"}, "data": {}, "versions": {}}',
            "the recipe of .* cannot be read",
        ),
        ("metrics.jsonl", "{}\n", "a line of it is not of an epoch"),
        ("metrics.jsonl", "[" * 100_000, "metrics.jsonl' is damaged"),
        ("summary.json", "[]", "holds no object of JSON"),
    ],
)
def test_a_damaged_folder_is_one_line(hostile, tmp_path, linsight, file, content, words):
    folder = shutil.copytree(hostile[0] / "run <u>", tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    (folder / "report.html").write_text("before")
    code, _, err = linsight("report", folder)
    assert code == 2 and re.search(words, err) and err.count("\n") == 1
    assert (folder / "report.html").read_text() == "before"


def test_odd_values_in_the_files_of_a_run_do_not_stop_the_page(hostile, tmp_path):
    folder = shutil.copytree(hostile[0] / "run <u>", tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config |= {"machine": {"cpu": ["<b>"], "gpus": {"a": None}}, "threads": None, "name": 7}
    config["data"] |= {"train": "many", "classes": "abc"}
    (folder / "config.json").write_text(json.dumps(config))
    odd = {"epoch": 1, "top1": "x", "val_loss": None, "lr": [1], "images_per_second": True, "seconds": {}}
    (folder / "metrics.jsonl").write_text(json.dumps(odd) + '\n{"epoch": 2, "train_loss": NaN}\n')
    (folder / "summary.json").write_text('{"seconds": "long", "params": null}')
    assert "No epoch is done" in safe(write_report(folder)).text


class Colours(nn.Module):
    """Gives logits of what the first three pixels of an image are."""

    def forward(self, images):
        return images[:, 0, 0, :3]


class Memory:
    """Images in memory, of which the second cannot be read."""

    classes, targets, notes = ("a", "b"), [0, 1, 1, 0, 1], ()
    pixels = ([9, 0, 0], None, [5, 1, 0], [0, 2, 0], [0, 0, 7])

    def __len__(self):
        return 5

    def name(self, index):
        return f"file {index}"

    def decoded(self, index, mode, fill, draft):
        if self.pixels[index] is None:
            raise LinsightError("file 1: damaged")
        return type("Found", (), {"image": self.pixels[index], "notes": ()})


def test_an_outcome_is_that_of_each_image():
    recipe = Recipe(in_chans=1, mean=(0.0,), std=(1 / 255,))
    samples = Samples(Memory(), lambda row: torch.tensor([[row]], dtype=torch.uint8), 1, 0)
    seen = []
    normalise = Normalise(recipe, torch.device("cpu"))
    found = look(Colours(), numbered(samples, 2, 0), Memory(), normalise, None, seen.append)
    assert found.truths.tolist() == [0, 1, 0, 1] and found.guesses.tolist() == [0, 0, 1, 2]
    logits = torch.tensor([[5.0, 1, 0], [0, 2, 0], [0, 0, 7]])
    sure = logits.softmax(1).max(1).values.tolist()
    assert found.sure[1:].tolist() == pytest.approx(sure)
    assert [(m.file, m.truth, m.guess, pytest.approx(m.sure)) for m in found.mistakes] == [
        ("file 4", 1, 2, sure[2]),
        ("file 2", 1, 0, sure[0]),
        ("file 3", 0, 1, sure[1]),
    ]
    assert found.counts().tolist() == [[1, 1], [1, 0]] and found.name(2) == "output 2"
    picture = Image.open(io.BytesIO(b64decode(found.mistakes[0].picture)))
    assert np.asarray(picture).tolist() == [[0, 0, 7]]
    assert Memory.targets == [0, 1, 1, 0, 1] and [batch.bad for batch in seen] == [["file 1: damaged"], [], []]


def random_outcome(classes, images=20_000):
    """Guesses of which one in three is right, and mistakes of noise."""
    rng = np.random.default_rng(0)
    truths, guesses = rng.integers(0, classes, (2, images))
    guesses = np.where(rng.random(images) < 1 / 3, truths, guesses)
    pixels = torch.from_numpy(rng.integers(0, 255, (20, 3, 224, 224), dtype=np.uint8))
    samples = [(pixels[i], i, ()) for i in range(20)]
    source = type("Source", (), {"targets": [0] * 20, "classes": ("a", "b"), "name": lambda self, i: "long " * 50})()
    batch = type("Batch", (), {"images": pixels, "targets": torch.arange(20), "bad": []})

    class Wrong(nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 9.0]]).expand(len(samples), 2)

    normalise = Normalise(Recipe(), torch.device("cpu"))
    mistakes = look(Wrong(), [batch], source, normalise, None).mistakes
    names = tuple(f"{'class ' * 9}{index}" for index in range(classes))
    return Outcome(names, truths, guesses, rng.random(images), mistakes)


def kept(folder, **changes):
    row = {"train_loss": 1.0, "val_loss": 2.0, "top1": 50.0, "top5": 80.0, "lr": 1e-3, "images_per_second": 100.0}
    rows = [{"epoch": epoch + 1, **row, "seconds": 10, "skipped": 0, **changes} for epoch in range(300)]
    recipe = {"model": "m", "data": "https://me:secret@host/data?token=hidden", "epochs": 300}
    return Kept(folder, {"recipe": recipe, "data": {"train": 5}, "versions": {}}, rows, {})


@pytest.mark.parametrize("classes", [3, 50, 1000])
def test_the_largest_pages_are_small(tmp_path, classes):
    outcome, facts = random_outcome(classes), kept(tmp_path, waited=4)
    page = safe(write_page(facts, class_findings(facts.rows, outcome.classes, outcome)))
    assert page.tags.count("img") == 20 and "It waited for images to be read for 40 % of the time" in page.text
    assert "secret" not in page.text and "hidden" not in page.text and "https://host/data" in page.text
    counts = outcome.counts()
    right = int(np.trace(counts))
    assert f"{20_000 - right:,} of 20,000 images are taken" in page.text
    if classes <= 50:
        assert page.tags.count("rect") == np.count_nonzero(counts)
    else:
        assert "rect" not in page.tags and "280 more classes, without the 700 that are known best" in page.text
        np.fill_diagonal(counts, 0)
        assert f" {counts.max()} " in page.text


def test_sections_of_another_task_stand_in_the_page(tmp_path):
    findings = Findings("All is well", {"error": "3 <mm>"}, {}, [Section("Depth & width", line_chart("depth", {}))])
    page = safe(write_page(kept(tmp_path), findings))
    assert "All is well." in page.text and "3 <mm>" in page.text and "Depth & width" in page.texts


def test_lines_are_where_their_values_are():
    chart = line_chart("loss <1>", {"a & b": [(1, 0.0), (2, float("nan")), (3, 10.0)], "one": [(2, 5.0)], "none": []})
    page = Page(str(chart))
    first, second = [value for tag, name, value in page.given if (tag, name) == ("path", "d")]
    (x0, y0), (x1, y1) = (tuple(map(float, part.split())) for part in re.split(" ?[ML]", first)[1:])
    (x, y) = map(float, re.match(r"M(\S+) (\S+) h", second).groups())
    assert x0 < x < x1 and y0 > y > y1 and x - x0 == pytest.approx(x1 - x, abs=0.2)
    assert y0 - y == pytest.approx(y - y1, abs=0.2)
    assert "loss <1>" in page.texts and "a & b 10  " in page.texts and not line_chart("loss", {"a": []})


def test_a_long_line_is_thinned_and_keeps_its_end():
    chart = str(line_chart("loss", {"a": [(n, float(n)) for n in range(10_000)]}))
    assert 300 < chart.count("L") < 500 and "a 9999  " in chart


def test_a_matrix_has_its_counts_in_rows_of_true_classes():
    page = Page(str(matrix(np.array([[5, 2], [0, 3]]), ("cat", "<dog>"))))
    assert [text for text in page.texts if "taken for" in text] == [
        "cat taken for cat: 5",
        "cat taken for <dog>: 2",
        "<dog> taken for <dog>: 3",
    ]
    kinds = [value for tag, name, value in page.given if (tag, name) == ("rect", "class")]
    assert kinds == ["cell", "miss", "cell"]


CHANGED = {
    "attention": "focused",
    "attention_options": "kernel_size=3",
    "img_size": "9,11",
    "mixup": "0.2",
    "opt_args": "betas=(0.9,0.95)",
    "val_split": "my test",
    "mean": "",
    "channels_last": "true",
    "data": "-odd & 'quoted' name",
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("digits", {}),
        ("digits", CHANGED),
        ("photos", {**CHANGED, "in_chans": "1", "std": "0.5"}),
        ("run", {"model": "swin_tiny", "attention": "inline"}),
        ("inline_deit_tiny", {"model": "pvt_tiny", "model_args": "drop_rate=0.1,global_pool='avg'"}),
        ("finetune", {"init": "somewhere"}),
    ],
)
def test_the_command_makes_the_same_recipe(name, changes):
    recipe = resolve("photos" if name == "run" else name, changes)
    words = shlex.split(again(name, json.loads(json.dumps(recipe.values()))))
    assert words[:3] == ["linsight", "train", "--recipe"]
    given, left = {}, words[4:]
    while left:
        option, equals, value = left.pop(0).removeprefix("--").partition("=")
        if not equals:
            value = "false" if option.startswith("no-") else left.pop(0) if left and left[0][:2] != "--" else "true"
        given[option.removeprefix("no-").replace("-", "_")] = value
    assert resolve(words[3], given) == recipe


def test_what_is_secret_in_an_address_is_left_out():
    assert secretless("a=https://me:pass@host.org/x.pth?token=3#part, b=2") == "a=https://host.org/x.pth, b=2"
    assert secretless("hfds/me@there?") == "hfds/me@there?"
