"""Which mechanism to take: what it costs at a size, by what was measured, beside how well it learns in a small host.

The accuracies are those of `benchmarks/accuracy.py`, which come with linsight (`accuracy.csv` in this folder).
"""

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from linsight.attention import FLAGS, WAYS, mechanism
from linsight.errors import LinsightError, UnknownNameError

from ._advise import Advice, Choice
from .operators import SOFTMAX
from .rows import digits

SHIPPED = Path(__file__).with_name("accuracy.csv")
NEEDS = (*FLAGS, *WAYS)
COLUMNS = frozenset(("place", "mechanism", "seed", "budget", "top1", "error"))


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Top-1 of each seed in percent, by mechanism: at a `place` of the benchmark, with a `budget` of images."""

    place: str
    budget: str
    top1: Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Pick:
    """A mechanism that does what is needed: its cost, its accuracy, and why it is on the short list.

    reason: "" where another one is as accurate and as fast, or more.
    """

    choice: Choice
    top1: float
    seeds: tuple[float, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Shortlist:
    """An answer: `words`, one sentence a line, and the `picks`, those with a reason first, then the most accurate."""

    words: tuple[str, ...]
    picks: tuple[Pick, ...]


def read_accuracies(place: str, path: Path = SHIPPED) -> Accuracies:
    """The accuracies at a place, of the budget that was measured last.

    Raises:
        LinsightError: the file is not there, is something else, or knows no such place.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LinsightError(f"'{path}' cannot be read: {error}") from None
    if not rows or not rows[0].keys() >= COLUMNS:
        raise LinsightError(f"'{path}' has no accuracies: give a file that benchmarks/accuracy.py has written")
    places = dict.fromkeys(row["place"] for row in rows)
    if place not in places:
        raise UnknownNameError("place of the accuracies", place, places)
    budget = [row["budget"] for row in rows if row["place"] == place][-1]
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["place"], row["budget"]) == (place, budget) and not row["error"]:
            found.setdefault(row["mechanism"], {})[row["seed"]] = _percent(row["top1"], path)  # the later one counts
    return Accuracies(place, budget, {name: tuple(seeds.values()) for name, seeds in found.items()})


def _percent(text: str, path: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise LinsightError(f"'{path}' is no file of accuracies: top1 is {text!r}, and should be in 0..100")
    return value


def check_needs(needs: Iterable[str]) -> None:
    """Raise an UnknownNameError, with the nearest, unless each of `needs` is a capability or a way out."""
    for need in needs:
        if need not in NEEDS:
            raise UnknownNameError("need", need, NEEDS)


def lacking(name: str, needs: Iterable[str]) -> list[str]:
    """A list of what a mechanism does not meet of `needs`."""
    entry = mechanism(name)
    return [need for need in needs if (need in entry.unmet if need in WAYS else not entry.can(need))]


def shortlist(advice: Advice, accuracies: Accuracies, needs: Sequence[str] = ()) -> Shortlist:
    """Mechanisms worth their time: beside each no other is both faster and more accurate (the Pareto front).

    One that is slower has to gain more than the seeds of one mechanism differ by.

    Raises:
        LinsightError: a need is unknown, or nothing with both figures meets all of them.
    """
    check_needs(needs)
    both = [choice for choice in advice.choices if accuracies.top1.get(choice.name)]
    refused = {choice.name: lacks for choice in both if (lacks := lacking(choice.name, needs))}
    fitting = [choice for choice in both if choice.name not in refused]
    if not fitting:
        why = f", and with {', '.join(needs)}" if needs else ""
        raise LinsightError(
            f"nothing was measured both in time and in accuracy{why}: 'linsight bench inline,agent,softmax' measures "
            f"time, and of accuracy there are {', '.join(accuracies.top1) or 'none'}"
        )
    means = {choice.name: statistics.fmean(accuracies.top1[choice.name]) for choice in fitting}
    chance = _chance(accuracies.top1[choice.name] for choice in fitting)
    reasons = _front(fitting, means, chance)
    picks = [
        Pick(choice, means[choice.name], accuracies.top1[choice.name], reasons.get(choice.name, ""))
        for choice in sorted(fitting, key=lambda choice: (choice.name not in reasons, -means[choice.name]))
    ]
    return Shortlist(tuple(_words(accuracies, picks, refused, advice, chance)), tuple(picks))


def _chance(seeds: Iterable[Sequence[float]]) -> float:
    """Points by which the seeds of one mechanism differ; 0 where each has one."""
    spreads = [statistics.stdev(values) for values in seeds if len(values) > 1]
    return statistics.median(spreads) if spreads else 0.0


def _front(choices: Sequence[Choice], means: Mapping[str, float], chance: float) -> dict[str, str]:
    """The reason of each that is on the front, the fastest first; what gains no more than `chance` is not."""
    by_ratio = all(choice.ratio or choice.name == SOFTMAX for choice in choices)  # of the same rounds, so better
    ordered = sorted(choices, key=lambda c: ((c.ratio or 1.0) if by_ratio else c.milliseconds, -means[c.name]))
    front: list[Choice] = []
    for choice in ordered:
        if not front or means[choice.name] > means[front[-1].name] + chance:
            front.append(choice)
    found = {}
    for before, choice in zip([None, *front], front, strict=False):
        if before is None:
            found[choice.name] = "the fastest" if len(front) > 1 else "the fastest and the most accurate"
        else:
            points = means[choice.name] - means[before.name]
            times = choice.milliseconds / before.milliseconds
            found[choice.name] = f"{points:.1f} points more than {before.name}, at {times:.2f} times its time"
    return found


def _words(
    accuracies: Accuracies, picks: Sequence[Pick], refused: Mapping[str, list[str]], advice: Advice, chance: float
) -> Iterable[str]:
    yield f"Accuracies: {accuracies.place}, {accuracies.budget}, in a small host; they tell how quickly each learns."
    for pick in picks:
        if pick.reason:
            once = " (of one seed)" if len(pick.seeds) == 1 else ""
            yield f"{pick.choice.name}: {pick.top1:.1f} %{once}, {digits(pick.choice.milliseconds)} ms; {pick.reason}."
    if chance:
        yield f"Seeds of one mechanism differ by {chance:.1f} points: what gains no more than that is not on the list."
    for lacks in dict.fromkeys(map(tuple, refused.values())):
        names = [name for name, lacking in refused.items() if tuple(lacking) == lacks]
        yield f"Not in it, without {' and '.join(lacks)}: {', '.join(names)}."
    timed = {choice.name for choice in advice.choices}
    untimed = [name for name in accuracies.top1 if name not in timed]
    whole = [name for name in untimed if mechanism(name).kind != "core"]
    cores = [name for name in untimed if name not in whole]
    if cores:
        yield f"Without a time at this size, so not in it: {', '.join(cores)} ('linsight bench' measures them)."
    if whole:
        yield f"Whole layers and blocks, which are timed in models alone, so not in it: {', '.join(whole)}."
