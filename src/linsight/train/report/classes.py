"""Sections on a classifier: which classes it takes for which, how well it knows each, and its worst mistakes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from .charts import matrix
from .look import Outcome
from .page import Findings, Section, folded, isolated, number, paragraph, table

_MATRIX = 50  # classes of which all pairs are drawn
_PAIRS, _SHOWN, _LISTED = 20, 20, 300  # pairs of classes; classes shown, and those behind a title


def class_sections(outcome: Outcome) -> list[Section]:
    """The sections of a page on what a classifier sees."""
    counts = outcome.counts()
    return [Section("Confusion", _confusion(outcome, counts)), _per_class(outcome, counts), _mistakes(outcome)]


def _confusion(outcome: Outcome, counts: np.ndarray) -> Markup:
    many, right = len(outcome.classes), int(np.trace(counts))
    total = len(outcome.truths)
    said = f"{total - right:,} of {total:,} images are taken for another class."
    if many <= _MATRIX:
        said += " Rows are the true classes, columns those that the model sees; a shade is a share of its row."
        return paragraph(said) + matrix(counts, outcome.classes)
    off = counts * (1 - np.eye(many, dtype=counts.dtype))
    order = np.argsort(off, axis=None, kind="stable")[::-1][:_PAIRS]
    places = [divmod(int(place), many) for place in order if off.flat[place]]
    rows = [
        (
            *map(isolated, (outcome.classes[i], outcome.classes[j])),
            counts[i, j],
            f"{counts[i, j] / counts[i].sum():.1%}",
        )
        for i, j in places
    ]
    head = ("true class", "taken for", "images", "of those of the class")
    return paragraph(f"{said} The pairs that are confused most:") + table(head, rows, numbers=(2, 3))


def _per_class(outcome: Outcome, counts: np.ndarray) -> Section:
    totals = np.bincount(outcome.truths, minlength=len(outcome.classes))
    shares = np.diag(counts) / np.maximum(totals, 1)
    there = np.flatnonzero(totals)
    order = there[np.argsort(shares[there], kind="stable")]
    meter = Markup('<meter min="0" max="1" value="{:.4f}"></meter>')
    rows = [
        (isolated(outcome.classes[i]), meter.format(shares[i]), f"{100 * shares[i]:.1f} %", f"{totals[i]:,}")
        for i in order[:_LISTED]
    ]
    head = ("class", "", "right", "images")
    body = table(head, rows[:_SHOWN], numbers=(2, 3))
    if rest := rows[_SHOWN:]:
        left_out = len(order) - len(rows)
        title = f"{len(rest)} more classes" + (f", without the {left_out:,} that are known best" if left_out else "")
        body += folded(title, table(head, rest, numbers=(2, 3)))
    return Section("Accuracy by class", paragraph("The least known first.", "soft") + body)


def _mistakes(outcome: Outcome) -> Section:
    if not outcome.mistakes:
        return Section("Worst mistakes", paragraph("None: every image is recognised."))
    figure = Markup(
        '<figure><img alt="" src="data:image/png;base64,{}">'
        '<figcaption><span class="bad">{}, {:.0f} %</span><br>true: {}<br>{}</figcaption></figure>'
    )
    figures = Markup("\n").join(
        figure.format(
            entry.picture,
            isolated(outcome.name(entry.guess), 40),
            100 * entry.sure,
            isolated(outcome.name(entry.truth), 40),
            isolated(entry.file, 48),
        )
        for entry in outcome.mistakes
    )
    said = "The wrong guesses that the model is surest of; some may be labels that are wrong."
    return Section("Worst mistakes", paragraph(said) + Markup('<div class="pictures">\n{}\n</div>').format(figures))


def class_findings(
    rows: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    outcome: Outcome | None,
    notes: Sequence[str] = (),
    more: Sequence[Section] = (),
) -> Findings:
    """All that the page of a classifier tells.

    rows: of metrics.jsonl.  outcome: what its best weights see, None where that is not known, as `notes` then say.
    more: sections that its task adds.
    """
    known = [row for row in rows if None not in map(number, (row.get("top1"), row.get("top5"), row.get("val_loss")))]
    metrics = {"top1": "top-1"}
    if len(classes) > 5:  # of five classes the five are all
        metrics["top5"] = "top-5"
    if not known:
        return Findings("No epoch is done", {}, metrics, more, notes)
    best = max(known, key=lambda row: row["top1"])
    words = f"{best['top1']:.2f} % of the images that it was not trained on are recognised"
    if len(classes) > 5:
        words += f"; of {best['top5']:.2f} % the class is among its first five guesses"
    if len(rows) > 1:
        words += ". Its epoch was chosen by the same images"
    figures = {label: f"{best[column]:.2f} %" for column, label in metrics.items()}
    figures |= {"loss": f"{best['val_loss']:.4f}", "epoch of these weights": f"{best['epoch']} of {rows[-1]['epoch']}"}
    return Findings(words, figures, metrics, [*more, *(class_sections(outcome) if outcome else ())], notes)
