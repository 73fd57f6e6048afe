"""Names that users chose are shown as they are: in pictures, in pages, on the terminal."""

import itertools
import json
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from linsight import bench, cli
from linsight.bench.plot import draw, svg
from linsight.runtime.figures import Label, drawing, label_points, new_figure
from linsight.runtime.text import cells, folded, printable, shorten

NAMES = ["$", "$$", "[bold]", "[red] :cat:", "x^2_{y}", "_hidden", "a\nb", "猫", "قطة", "<b>&", "%d{0}\\frac"]
TINY = "patch_size=4,embed_dim=8,depth=1,num_heads=2"
SMALL = {"model": "vit_tiny", "attention": "linear", "model_args": TINY, "img_size": 8, "mean": "0.5,0.5,0.5"}
SMALL |= {"std": "0.5,0.5,0.5", "epochs": 1, "warmup_epochs": 0, "workers": 0, "device": "cpu", "amp": "off"}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def photos(tmp_path):
    """A folder of class folders called by `NAMES`."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["linsight", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


def test_a_run_draws_and_prints_classes_as_they_are(tmp_path, photos, drawn, monkeypatch, capsys):
    # settings of a user who writes papers
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    out = tmp_path / "[bold]run[/red] :cat:"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert command(monkeypatch, "train", "--recipe=photos", f"--data={photos}", f"--out={out}", *options) == 0
    assert f"folder {out}" in capsys.readouterr().out.replace("\n", "")
    titles = [axes.title for axes in drawn[1].axes if axes.title.get_text()]
    assert len(titles) == len(NAMES) and not any(title.get_parse_math() or title.get_usetex() for title in titles)
    said = "\n".join(title.get_text() for title in titles)
    shown = {name for name in NAMES if f"true: {printable(name)}" in said or f"{printable(name)}, " in said}
    assert shown == set(NAMES)

    colours = [title.get_color() for title in titles]  # errors first, of these the surest
    assert colours == sorted(colours, reverse=True) and set(colours) == {"tab:red", "black"}
    sure = [int(title.get_text().partition("\N{NO-BREAK SPACE}%")[0].split()[-1]) for title in titles]
    wrong = [value for value, colour in zip(sure, colours, strict=True) if colour == "tab:red"]
    assert len(wrong) > 1 and wrong == sorted(wrong, reverse=True)
    assert drawn[1].get_suptitle().endswith(f": {len(wrong)} of {len(NAMES)} images that it was not trained on")

    file = tmp_path / "[/bold]" / "[red] a :cat:.png"
    file.parent.mkdir(parents=True)
    next(photos.glob("*/*.png")).rename(file)
    assert command(monkeypatch, "predict", out, file, "--top", len(NAMES)) == 0
    told = capsys.readouterr().out
    assert str(file) in told and all(f"  {printable(name)} " in told for name in NAMES)
    (tmp_path / "broken\n[x].png").write_bytes(b"no picture")
    assert command(monkeypatch, "predict", out, file, tmp_path / "broken\n[x].png", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["predictions"][0]["classes"]) <= set(NAMES)


def test_results_are_written_where_they_are_asked_for(tmp_path, monkeypatch, capsys):
    row = {"kind": "operator", "model": "$a$ [red]", "beside": "", "tokens": 4, "device": "cpu: [/bold] <i>"}
    row |= {f"infer_{key}": 1 for key in ("step_time", "step_time_min", "step_time_max", "batch_size", "img_size")}
    facts = {"device": row["device"], "precision": "float32"}
    monkeypatch.setattr(bench, "bench", lambda plan: [bench.Done(None, None, {}, [row], facts)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "[/red] $ :cat:"
    assert command(monkeypatch, "bench", "linear", "--out", out) == 0
    told = capsys.readouterr().out
    assert f"wrote {out}" in told and "$a$ [red]" in told and row["device"] in told
    for name in ("bench.csv", "bench.html", "bench.svg"):
        assert "$a$ [red]" in (out / name).read_text(encoding="utf-8")
    assert "<i>" not in (out / "bench.html").read_text(encoding="utf-8")


def lines(count):
    """Rows of `count` operators that end close by each other."""
    for place in range(count):
        for tokens in (10, 1000):
            time = (1 + place / 100) * (5 if place else tokens / 50)
            row = {"kind": "operator", "model": f"m{place}$" if place else "softmax", "tokens": tokens}
            row |= {f"infer_step_time{end}": time for end in ("", "_min", "_max")}
            row |= {"infer_batch_size": 1, "infer_img_size": tokens, "beside": "softmax" if place else ""}
            yield row | ({"infer_ratio": 50 * time / tokens} if place else {})


def test_labels_of_lines_stand_apart_and_say_where_softmax_is_passed():
    figure = draw(list(lines(11)), "cpu $x$ $y$")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = sorted(axes.texts, key=lambda text: Text.get_window_extent(text).y0)  # without the line that leads there
    assert [text.get_text().partition(":")[0] for text in texts] == [*(f"m{i}$" for i in range(1, 11)), "softmax"]
    assert texts[0].get_text() == "m1$: quicker from 252 tokens"
    boxes = [Text.get_window_extent(text) for text in texts]
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    frame = axes.get_window_extent()
    assert all(box.x0 > frame.x1 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert "m1$: quicker from 252 tokens" in svg(list(lines(2)))


@drawing()
def test_labels_of_points_hide_nothing():
    figure = new_figure(4, 4)
    axes = figure.subplots()
    places = [(0, 0), (0.02, 0), (0.04, 0.01), (1, 1), (0.98, 1), (0.5, 0.5)]
    axes.plot(*zip(*places, strict=True), "s")
    label_points(axes, [Label(x, y, f"point {i}") for i, (x, y) in enumerate(places)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
        assert not any(box.contains(*axes.transData.transform(place)) for place in places)


def test_names_fit_where_there_is_room():
    assert printable("a\nb\x1b\udcff\u2028é猫") == "a\\nb\\x1b\\udcff\\u2028é猫"
    assert cells("猫e\u0301") == 3
    assert shorten("left_and_right", 20) == "left_and_right"
    assert shorten("benign/left_side/upper", 13) == "benign/l…pper"
    assert folded("n01440764 tench, Tinca tinca", 17, 2) == ["n01440764 tench,", "Tinca tinca"]
    for name in ("a_very_long_name_of_a_class_that_goes_on_to_the_left", "猫" * 40, "x" * 60, " ", ""):
        assert len(folded(name, 17, 2)) <= 2 and all(cells(line) <= 17 for line in folded(name, 17, 2))
