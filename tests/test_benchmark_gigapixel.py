"""The gigapixel benchmark: its limit holds, it goes on where it was stopped, and its page says what was measured."""

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import _gigapixel_docs as docs
import gigapixel

from linsight.bench import Side, Worker

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
FAILS = {"all scores in memory": 256}  # from where on


@pytest.fixture
def options(tmp_path):
    return gigapixel.parse(["--sides", "256,512", "--scratch", str(tmp_path), "--csv", str(tmp_path / "a.csv")])


class Measured(Worker):
    """In place of the process."""

    asked: ClassVar[list] = []

    def run(self, point, sides):
        assert np.load(point.picture, mmap_mode="r").shape == (512, 512, 3)
        self.asked.append((*point.form[:2], point.side))
        if point.side >= FAILS.get(point.form.way, 1e9):
            return [Side({"wall_s": 0.5, "cpu_s": 0.5}, error="no memory for 9.0 GB more")]
        seconds = point.side**2 / 1e4
        facts = {"wall_s": 0.6 * seconds, "cpu_s": seconds, "start_mb": 470.0, "anon_mb": 600.0, "data_mb": 1100.0}
        return [Side({**facts, "scratch_gb": 0.1, "logits": "0.5 -2 1"})]


@pytest.mark.full
@pytest.mark.timeout(180)  # of a machine that is busy: it starts a process
def test_the_limit_is_hard(options, tmp_path):
    gigapixel.make_picture(tmp_path / "picture.npy", 2048, [np.zeros((8, 8, 3), np.uint8)])
    form = next(form for form in gigapixel.WHOLE if form.way == "all scores in memory")
    point = gigapixel.Point(form, 2048, 0, 3e9, 1, tmp_path / "picture.npy", tmp_path / "maps")
    with Worker(gigapixel.measure, 120) as worker:
        (side,) = worker.run(point, [0])
    assert side.error == "no memory for 3.2 GB more"  # 3 heads, 16385 x 16385 scores
    assert 100 < side.facts["start_mb"] < side.facts["anon_mb"] < 3000 and side.facts["cpu_s"] > 0


def test_a_stopped_run_goes_on(options, monkeypatch):
    monkeypatch.setattr(gigapixel, "Worker", Measured)
    monkeypatch.setattr(Measured, "asked", [])
    monkeypatch.setattr(gigapixel, "photographs", lambda folder: [np.zeros((8, 8, 3), np.uint8)])
    options.patience, options.threads = 60.0, 1
    first = gigapixel.run(options)
    streams = [(*form[:2], side) for side in (256, 512) for form in gigapixel.STREAMS]
    assert [asked for asked in Measured.asked if asked[1] == "streamed"] == streams
    softmax = [asked[2] for asked in Measured.asked if asked[1] == "scaled_dot_product_attention"]
    assert softmax == [64, 128, 256] and "would take about 1.7 min" in first[-1]["error"]
    assert [asked[2] for asked in Measured.asked if asked[1] in FAILS] == [64, 128, 256]
    assert list(options.scratch.iterdir()) == [options.csv]
    lines = options.csv.read_text().splitlines()
    options.csv.write_text("\n".join(lines[:-1]) + "\n")
    Measured.asked.clear()
    assert len(gigapixel.run(options)) == len(first) == 19
    assert Measured.asked == []  # what was left is too slow
    options.csv.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    gigapixel.run(options)
    assert Measured.asked == [("inline_deit_tiny", "dense", 64)]
    options.csv.write_text("a,b\n1,2\n")
    assert gigapixel.main(["--csv", str(options.csv)]) == 2


def test_the_page_keeps_its_words(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gigapixel, "Worker", Measured)
    monkeypatch.setattr(gigapixel, "photographs", lambda folder: [np.zeros((8, 8, 3), np.uint8)])
    page = tmp_path / "gigapixel.md"
    text = (DOCS / "gigapixel.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    arguments = ["--sides", "256,512", "--scratch", str(tmp_path), "--csv", str(options.csv), "--docs", str(tmp_path)]
    assert gigapixel.main(arguments) == 0
    written = page.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- generated: gigapixel -->\n")
    assert written.startswith(head) and written.endswith(rest[rest.index("<!-- end -->") :])
    assert "- `inline_deit_tiny`, streamed: from 256 to 512 pixels a side, 4 times the pixels, 4.0 times" in written
    assert "(a power of 1.00); memory 600 and 600 MB" in written and "by 0.0e+00 of the largest logit at 512" in written
    assert "all scores in memory: stops at 256 pixels a side: no memory for 9.0 GB more." in written
    left = [row for row in gigapixel.read(options.csv) if (row["maps"], row["side"]) != ("bfloat16", 512)]
    assert "`inline_pvt_tiny`, streamed: measured up to 256 pixels a side. Not measured yet: 512." in docs.text_of(
        left, ()
    )
    assert (tmp_path / "gigapixel.png").stat().st_size > 10_000
    assert gigapixel.main(["--docs", str(tmp_path / "none")]) == 2
    assert "has no line" in capsys.readouterr().err


def test_pictures_are_made_of_the_photographs(tmp_path):
    photos = [np.full((700, 30, 3), value, np.uint8) for value in (7, 9)]
    gigapixel.make_picture(tmp_path / "a.npy", 1100, photos)
    picture = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert picture.shape == (1100, 1100, 3) and {*np.unique(picture)} == {7, 9}
    assert all(np.ptp(picture[top : top + 512, left : left + 512]) == 0 for top in (0, 512) for left in (0, 512))
    assert all(photo.ndim == 3 and photo.dtype == np.uint8 for photo in gigapixel.photographs(None))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.14, "3.1 s"), (100, "1.7 min"), (1e6, "12 days"), (1e10, "317 years")]
)
def test_durations_are_in_a_unit_of_their_size(seconds, shown):
    assert docs.duration(seconds) == shown
