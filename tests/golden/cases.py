"""How a golden case is run: everything is read from its json, so another size of a case needs no edit.

A builder makes the module of a case and the call on it; the published keys are filled, renamed by
the mechanism's own rules and loaded strictly.
"""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import linsight
from golden.builders import builder
from golden.fill import fill, unit_noise
from golden.spec import Run
from linsight.attention import Rename
from linsight.checkpoints.keys import key_map, to_published

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4  # of the largest value of the published output
# Statistics in a trace are means over many values: a real difference shows far above this.
TRACE_TOLERANCE = 1e-3

_BUFFERS = ("constant_buffers", "kept_buffers")

# Cases whose name is not that of a model here.
MODELS = {"cswin_64_12211_tiny_224": "cswin_tiny"}


def names(*, models: bool) -> list[str]:
    """`mechanism/case` for every case in this folder: whole models, or layers and blocks."""
    found = sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.json"))
    return [name for name in found if (model_name(name) is not None) == models]


def model_name(case: str) -> str | None:
    """The model of a case; None where it is a part of one."""
    name = case.rpartition("/")[2]
    dense = re.fullmatch(r"(?:det_)?(\w+?)(?:_dense)?_\d+x\d+", name)  # a backbone for dense tasks, and its image
    name = f"{dense[1]}_dense" if dense else MODELS.get(name, name)
    return name if timm.is_model(name) else None


def published_state(spec: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint of a case: keys filled by the rule or given, and the constant buffers, which nobody may read."""
    filled = {key: torch.from_numpy(np.asarray(fill(key, tuple(shape)))) for key, shape in spec["state_dict"]}
    filled |= {key: torch.tensor(value) for key, value in spec.get("literal_state", {}).items()}
    listed = [found for name in _BUFFERS if not isinstance(found := spec.get(name, ()), str)]  # or told in words
    constant = {key: shape for key, shape, *_ in itertools.chain(*listed)}
    for key, shape in constant.items():
        counter = key.endswith("num_batches_tracked")
        filled[key] = torch.zeros(shape, dtype=torch.int64) if counter else torch.full(shape, torch.nan)
    return filled


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The json of a case, and what was recorded: `output`, further outputs, gradients.

    A case without a trace is located nowhere; its parameters, where they are not counted, are what is filled.
    """
    path = FOLDER / f"{name}.json"
    spec: dict[str, Any] = json.loads(path.read_text())
    spec.setdefault("trace", {})
    spec.setdefault("params", sum(math.prod(shape) for _, shape in spec["state_dict"]))
    with np.load(path.with_suffix(".npz")) as arrays:
        return spec, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def outputs(result: Any) -> dict[str, Tensor]:
    """What a call gave, by the names of the npz: one tensor, a sequence of maps, or a dict of such names."""
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, dict):
        return result
    return {f"output{i or ''}": tensor for i, tensor in enumerate(result)}


def build(spec: dict[str, Any]) -> Run:
    """The module and the call of a case."""
    return builder(spec["name"])(spec)


def gradients(run: Run, found: dict[str, Tensor], rule: str) -> dict[str, Tensor]:
    """Those of sum(output * cotangent), plus the losses among the outputs `found`, by the names of the npz.

    Of the output itself where the rule has no cotangent.
    """
    run.module.zero_grad()
    out = found["output"]
    cotangent = unit_noise("cotangent", tuple(out.shape)) if "cotangent" in rule else np.ones(out.shape, np.float32)
    losses = [loss.sum() for name, loss in found.items() if name == "balance"]
    sum(losses, (out * torch.from_numpy(cotangent)).sum()).backward()
    grads = copy.deepcopy(run.module)
    for parameter, source in zip(grads.parameters(), run.module.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    exported = linsight.export_published(grads)
    found = {f"grad:{renamed(key, list(run.renames), back=True)}": value for key, value in exported.items()}
    return found | {f"grad_input:{name}": x.grad for name, x in run.inputs.items() if x.grad is not None}


def rules(run: Run) -> list[Rename]:
    """Published names and ours: those of the case, then those of the modules in it."""
    return [*run.renames, *model_rules(run.module)]


def renamed(key: str, table: list[Rename], back: bool = False) -> str:
    """`key` under the first rule that fits; `back` from our name to the published one."""
    for rule in table:
        old, new = (rule.ours, rule.published) if back else (rule.published, rule.ours)
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def load_filled(run: Run, spec: dict[str, Any]) -> None:
    """Load the published state of a case."""
    state = {renamed(key, list(run.renames)): value for key, value in published_state(spec).items()}
    if state:
        linsight.load_published(run.module, state)


def model_rules(model: nn.Module) -> list[Rename]:
    """Full names of a model's modules, published and ours."""
    steps = key_map(model)
    paths = (path for path, _ in model.named_modules() if path)
    return [Rename(to_published(f"{path}.", torch.empty(()), steps)[0], f"{path}.") for path in paths]


def first_difference(module: nn.Module, call: Callable[[], Any], trace: dict[str, Any], table: list[Rename]) -> str:
    """The first submodule, in published order, whose output departs from the recorded statistics."""
    table = sorted(table, key=lambda rule: -len(rule.ours))
    seen: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:  # what a hook returns would be the output
            seen.setdefault(renamed(f"{name}.", table, back=True)[:-1], out)

        return hook

    handles = [m.register_forward_hook(record(name)) for name, m in module.named_modules()]
    call()
    for handle in handles:
        handle.remove()
    for name, entry in trace.items():
        out = seen.get(name)
        if not isinstance(out, Tensor):
            continue
        if out.numel() != np.prod(entry["shape"]):
            return f"'{name}': shape {tuple(out.shape)}, published {tuple(entry['shape'])}"
        pairs = [("mean", out.mean().item(), entry["mean"]), ("std", out.std().item(), entry["std"])]
        if out.shape[-1] == entry["shape"][-1]:  # the same order of values
            pairs += zip(["first values"] * 4, out.flatten()[:4].tolist(), entry["first"], strict=True)
        for what, ours, published in pairs:
            if abs(ours - published) > TRACE_TOLERANCE * max(entry["std"], abs(entry["mean"])):
                return f"'{name}': {what} {ours:.6g}, published {published:.6g}"
    return "no traced submodule: the difference is outside them"
