"""Which mechanism is the fastest at a size, by what was measured: honest where softmax is, and where nothing was."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from linsight.errors import LinsightError

from ._curves import Curve, at, pays_from
from .operators import SOFTMAX
from .rows import Row, digits, read_rows, results_folder

SHIPPED = Path(__file__).with_name("operators.csv")
FAR = 2.0  # times beyond the measured sizes from which it is said in words
EVEN = 0.05  # the least difference of ratios that counts
# Beyond the sizes measured a time grows at least with the tokens and at most with their square: what is flat in small
# images is overhead, and what is steeper, memory that is nearer.
_SLOPES = (1.0, 2.0)
_SAME = ("device", "precision", "threads", "compiled", "graphs", "fused")  # columns in which comparable results agree


@dataclasses.dataclass(frozen=True)
class Question:
    """A choice that is asked for: for images of `height` x `width` in patches of `patch`.

    device: a type, as "cpu".  precision: as "float32" or "bf16 mixed precision"; "" for any.
    model: what the models to choose among stand beside; "" for operators of `dim` and `heads`.
    """

    height: int
    width: int
    patch: int = 16
    device: str = "cpu"
    precision: str = ""
    train: bool = False
    dim: int = 192
    heads: int = 6
    model: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of an image; borders count as whole patches."""
        return -(-self.height // self.patch) * -(-self.width // self.patch)

    @property
    def step(self) -> str:
        """The columns that answer it."""
        return "train" if self.train else "infer"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mechanism, or a model, at the size asked for.

    milliseconds: of one image.  ratio: to softmax, measured in the same rounds.  from_tokens: from where on it is
    faster than softmax, as far as was measured; 0: always, None: never.  measured: the least and most tokens.
    beyond: how many times outside of them the size is.
    """

    name: str
    milliseconds: float
    ratio: float | None
    from_tokens: float | None
    measured: tuple[float, float]
    beyond: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Advice:
    """An answer: `words`, one sentence a line, and the `choices`, the fastest first.  where: what was measured on."""

    words: tuple[str, ...]
    choices: tuple[Choice, ...]
    tokens: int
    where: Mapping[str, Any]


def known_results(files: Iterable[Path] = ()) -> list[Row]:
    """The rows of this machine's results, oldest first, then of `files`. A file of this machine's that cannot be read
    is passed by.

    Raises:
        LinsightError: one of `files` is not there, or is something else.
    """
    rows: list[Row] = []
    for path in sorted(results_folder().glob("*.csv")):
        try:
            rows += read_rows(path)
        except LinsightError:
            continue
    return rows + [row for path in files for row in read_rows(path)]


def shipped_results() -> list[Row]:
    """The rows of operators that come with linsight: those of docs/how-fast.md, of the machine that it names."""
    return read_rows(SHIPPED)


def can_answer(rows: Iterable[Row], question: Question) -> bool:
    """True where something was measured that answers the question, on whatever machine."""
    return any(_fits(row, question) and row.get(f"{question.step}_step_time") for row in rows)


def advise(rows: Sequence[Row], question: Question) -> Advice:
    """Answer by `rows`; of the same thing measured twice, the later one counts.

    Results of another device or precision serve where there are none of those asked for, and are named as such.

    Raises:
        LinsightError: nothing was measured that could answer; the command that does is named.
    """
    if not can_answer(rows, question):
        raise LinsightError(_nothing(question, rows))
    fitting = [row for row in rows if _fits(row, question) and row.get(f"{question.step}_batch_size")]
    where, fitting = _best_matching(fitting, question)
    times, ratios, errors = _curves(fitting, question)
    base = question.model or SOFTMAX
    choices = []
    for name, curve in times.items():
        found = at(curve, question.tokens, _SLOPES)
        if found is None:
            errors.setdefault(name, f"measured at {_number(next(iter(curve)))} tokens alone")
            continue
        choices.append(
            Choice(
                name,
                found.value,
                _ratio(ratios.get(name, {}), curve, times.get(base, {}), question.tokens),
                pays_from(ratios.get(name, {})),
                (min(curve), max(curve)),
                found.beyond,
                errors.pop(name, ""),
            )
        )
    if not choices:
        raise LinsightError(_nothing(question, rows))
    if all(choice.ratio or choice.name == base for choice in choices):  # free of how the machine did between runs
        choices.sort(key=lambda choice: choice.ratio or 1.0)
    else:
        choices.sort(key=lambda choice: choice.milliseconds)
    return Advice(tuple(_words(question, where, choices, errors)), tuple(choices), question.tokens, where)


def _ratio(ratios: Curve, time: Curve, base: Curve, tokens: float) -> float | None:
    """The ratio of two times: as it was measured, and beyond that with the two curves."""
    found = at(ratios, tokens)
    if found is None or tokens <= max(ratios):
        return found.value if found else None
    edge = max(ratios)
    grown = [(at(curve, tokens, _SLOPES), at(curve, edge, _SLOPES)) for curve in (time, base)]
    if any(far is None or near is None for far, near in grown):
        return found.value
    own, other = (far.value / near.value for far, near in grown if far and near)
    return ratios[edge] * own / other


def _fits(row: Row, question: Question) -> bool:
    if question.model:
        return row["kind"] == "model" and question.model in (row["model"], row["beside"])
    return row["kind"] == "operator" and (row.get("dim"), row.get("heads")) == (question.dim, question.heads)


def _best_matching(rows: list[Row], question: Question) -> tuple[Row, list[Row]]:
    """The rows of one machine and precision: those asked for if there are any, else the ones that were made last."""
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get(f"{question.step}_step_time"):
            kinds.setdefault(tuple(row.get(key) for key in _SAME), []).append(row)

    def match(key: tuple[Any, ...]) -> tuple[Any, ...]:
        device, precision = str(key[0]).partition(":")[0], str(key[1])
        asked = question.precision or "float32"
        return device == question.device, precision.startswith(asked), max(str(row["date"]) for row in kinds[key])

    best = max(kinds, key=match)
    found = [row for row in rows if tuple(row.get(key) for key in _SAME) == best]
    return dict(zip(_SAME, best, strict=True)), found


def _curves(
    rows: Iterable[Row], question: Question
) -> tuple[dict[str, dict[float, float]], dict[str, dict[float, float]], dict[str, str]]:
    """Milliseconds of an image by tokens, the ratio to softmax likewise, and what failed: each by name."""
    times: dict[str, dict[float, float]] = {}
    ratios: dict[str, dict[float, float]] = {}
    errors: dict[str, str] = {}
    step = question.step
    for row in rows:
        name, tokens = str(row["model"]), float(row["tokens"])
        if question.model:  # rows tell those of patches of 16 pixels
            height, _, width = str(row[f"{step}_img_size"]).partition("x")
            tokens = float(-(-int(height) // question.patch) * -(-int(width or height) // question.patch))
        if row.get(f"{step}_error"):
            errors[name] = f"failed at {_number(tokens)} tokens: {row[f'{step}_error']}"
        if not row.get(f"{step}_step_time"):
            continue
        times.setdefault(name, {})[tokens] = row[f"{step}_step_time"] / row[f"{step}_batch_size"]
        if row.get(f"{step}_ratio"):
            ratios.setdefault(name, {})[tokens] = row[f"{step}_ratio"]
    return times, ratios, errors


def _words(question: Question, where: Row, choices: list[Choice], errors: Mapping[str, str]) -> list[str]:
    base = question.model or SOFTMAX
    others = [choice for choice in choices if choice.name != base]
    softmax = next((choice for choice in choices if choice.name == base), None)
    size = f"{_number(question.tokens)} tokens ({question.height}x{question.width} in patches of {question.patch})"
    lines = []
    if not str(where["device"]).startswith(f"{question.device}:"):
        lines.append(f"No results of {question.device}: these are of another device, {where['device']}.")
    if question.precision and not str(where["precision"]).startswith(question.precision):
        lines.append(f"No results in {question.precision}: these are in {where['precision']}.")
    how = ["training" if question.train else "forward", where["precision"]]
    said = {"compiled": "compiled", "graphs": "CUDA graphs", "fused": "fused"}
    how += [words for key, words in said.items() if where.get(key)]
    lead = f"At {size}, {', '.join(how)}, on {where['device']}: "
    best = others[0] if others else None
    beyond = ", beyond what was measured" if any(c is not None and c.beyond > 1 for c in (best, softmax)) else ""
    if best is None:
        lines.append(f"{lead}nothing but {choices[0].name} was measured.")
    elif softmax is None:
        lines.append(
            f"{lead}{best.name} is the fastest{beyond}, {digits(best.milliseconds)} ms an image; "
            f"{base} has no time here."
        )
    else:
        ratio = best.ratio or best.milliseconds / softmax.milliseconds
        if abs(ratio - 1) < EVEN:
            words = f"{best.name} and {base} take the same time{beyond}, {digits(softmax.milliseconds)} ms an image"
        elif ratio < 1:
            words = f"{best.name} is the fastest, {1 / ratio:.3g} times as fast as {base}{beyond}: "
            words += f"{digits(best.milliseconds)} ms an image against {digits(softmax.milliseconds)} ms"
        else:
            words = f"{base} is the fastest, {ratio:.3g} times as fast as {best.name}{beyond}: "
            words += f"{digits(softmax.milliseconds)} ms an image against {digits(best.milliseconds)} ms"
        lines.append(f"{lead}{words}.")
    lines += _threshold(base, others)
    far = max(choices, key=lambda choice: choice.beyond)
    if far.beyond > FAR:
        low, high = map(_number, far.measured)
        lines.append(
            f"Measured from {low} to {high} tokens only: this is {far.beyond:.3g} times beyond, a guess by the slope."
        )
    return lines + [f"Not in it: {name}, {why}." for name, why in errors.items()]


def _threshold(base: str, others: Sequence[Choice]) -> list[str]:
    paying = {choice.name: choice.from_tokens for choice in others if choice.from_tokens is not None}
    if paying:
        first = min(paying, key=paying.__getitem__)
        if paying[first]:
            return [f"{base} is faster below {_number(paying[first])} tokens here; from there on {first} is."]
        return [f"{first} is faster than {base} at every size measured."]
    return [f"{base} is faster at the largest size measured, too."] if others else []


def _nothing(question: Question, rows: Sequence[Row]) -> str:
    step = f"--steps {question.step} --device {question.device}"
    if question.model:
        what = f"models beside {question.model}"
        command = f"linsight bench {shlex.quote(question.model)} --attention inline,agent --sizes 224,448,896 {step}"
    else:
        what = f"operators of width {question.dim} with {question.heads} heads"
        command = f"linsight bench inline,focused,agent,softmax --dim {question.dim} --heads {question.heads} {step}"
    there = sorted({f"{row['dim']:.0f}/{row['heads']:.0f}" for row in rows if row["kind"] == "operator" and row["dim"]})
    hint = f" (there are those of width/heads {', '.join(there)})" if there and not question.model else ""
    return f"no results of {what}{hint}: make them with '{command}', or name a file with --from"


def _number(value: float) -> str:
    return f"{value:,.0f}"
