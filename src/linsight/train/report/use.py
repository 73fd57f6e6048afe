"""Commands on a run: the one that makes it again, and those that use its model."""

import json
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from linsight.recipe import Recipe
from linsight.runtime.files import to_json
from linsight.runtime.text import printable

from ..recipes import FINETUNE, RECIPES
from .page import code, paragraph

# Options that a recipe drops where what they belong to is changed.
_DEPENDENT = {"model_args": "model", "attention_options": "attention"}
_PYTHON = """
import linsight

run = linsight.load_run({folder!r})
print(run.predict("photo.jpg")[0].classes)
logits = run(run.transform("photo.jpg")[None])
"""


def again(recipe: str, fields: Mapping[str, Any]) -> str:
    """The command that trains by `fields`, which are those of a recipe by name, changed or not.

    Fields that the result does not depend on are left out, and what is secret in an address.
    """
    if recipe not in RECIPES or recipe == FINETUNE:  # which takes some of the run that it starts from
        recipe = "photos"
    base = json.loads(to_json(RECIPES[recipe].recipe.values()))
    changed = {name for name in fields if name not in Recipe.RESUMABLE and name in base and fields[name] != base[name]}
    changed |= {name for name, head in _DEPENDENT.items() if head in changed and fields.get(name)}
    options = [_option(name, value) for name, value in fields.items() if name in changed]
    return " ".join(["linsight train --recipe", shlex.quote(recipe), *options])


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{flag}"
    if isinstance(value, Mapping):
        text = ",".join(f"{key}={item!r}" for key, item in value.items())
    else:
        text = ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    text = shlex.quote(secretless(printable(text)))
    return f"--{flag}={text}" if text.startswith("-") else f"--{flag} {text}"


def secretless(text: str) -> str:
    """`text`, of addresses in it neither names and passwords nor what follows a question mark."""
    return re.sub(r"(https?://)(?:[^/\s@]*@)?([^\s?#,]*)(?:[?#][^\s,]*)?", r"\1\2", text)


def usage(folder: pathlib.Path, *, finished: bool) -> Markup:
    """Commands for the model of the run in `folder`."""
    run = shlex.quote(printable(str(folder)))
    lines = [] if finished else [f"linsight train --resume {run}"]
    lines += [
        f"linsight predict {run} photo.jpg",
        f"linsight predict {run} folder/ --out found.csv",
        f"linsight eval {run} --data path/to/other/images",
        f"linsight export {run} --onnx model.onnx",
    ]
    python = code(_PYTHON.format(folder=str(folder)).strip())
    return code("\n".join(lines)) + paragraph("From Python:") + python
