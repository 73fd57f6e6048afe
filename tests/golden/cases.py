"""How a golden case is run: everything is read from its json, so another size of a case needs no edit.

A builder makes the module of a case and the call on it; the published keys are filled, renamed by
the mechanism's own rules and loaded strictly.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

import linsight
from golden.fill import fill, fill_input
from linsight import Grid, Layout
from linsight.attention import Rename, Tokens, create_core, mechanism, split_heads
from linsight.checkpoints._keys import key_map, to_published
from linsight.models.cswin import Branch, CSwinTransformer
from linsight.models.pvt_v2 import PyramidVisionTransformerV2
from linsight.models.swin import SwinTransformer

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4  # of the largest value of the published output
# Statistics in a trace are means over many values: a real difference shows far above this.
TRACE_TOLERANCE = 1e-3
REDUCTION = (Rename("sr.", "reduction.sr."), Rename("norm.", "reduction.norm."))


class Run(NamedTuple):
    """A module ready to load a case, the call on it, and key rules beyond those of its mechanisms."""

    module: nn.Module
    call: Callable[[], Tensor]
    renames: tuple[Rename, ...] = ()


# Cases whose name is not that of a model here.
MODELS = {"cswin_64_12211_tiny_224": "cswin_tiny"}


def names(*, models: bool) -> list[str]:
    """`mechanism/case` for every case in this folder: whole models, or layers and blocks."""
    found = sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.json"))
    return [name for name in found if (model_name(name) is not None) == models]


def model_name(case: str) -> str | None:
    """The model of a case; None where it is a part of one."""
    name = case.rpartition("/")[2]
    name = MODELS.get(name, name)
    return name if timm.is_model(name) else None


def published_state(spec: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint of a case: every key filled by the rule, and the constant buffers, which nobody may read."""
    filled = {key: torch.from_numpy(fill(key, tuple(shape))) for key, shape in spec["state_dict"]}
    return filled | {key: torch.full(shape, torch.nan) for key, shape in spec.get("constant_buffers", ())}


def load(name: str) -> tuple[dict[str, Any], Tensor]:
    """The json of a case and its published output."""
    path = FOLDER / f"{name}.json"
    spec: dict[str, Any] = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as arrays:
        return spec, torch.from_numpy(arrays["output"])


def build(spec: dict[str, Any]) -> Run:
    """The module and the call of a case."""
    mechanism_name, kind = spec["name"].split("_")[:2]
    return BUILDERS[f"{mechanism_name}_{kind}"](spec)


def tensor(shape: list[int], name: str = "input") -> Tensor:
    """An input of a case."""
    return torch.from_numpy(fill_input(tuple(shape), name))


def heads(spec: dict[str, Any]) -> int:
    """Heads as configured, or traced, or (one family of cases has them nowhere else) named."""
    if "num_heads" in spec.get("config", {}):
        return int(spec["config"]["num_heads"])
    for entry in spec["trace"].values():
        if len(entry["shape"]) == 4 and entry["shape"][2:] != spec["input_shape"][2:]:
            return int(entry["shape"][2])
    found = re.search(r"h(\d+)", spec["name"])
    assert found, f"no head count in {spec['name']}"
    return int(found[1])


def linear_op(spec: dict[str, Any]) -> Run:
    """q, k and v as inputs, no projections."""
    q, k, v = (split_heads(tensor(spec["inputs"][name], name), heads(spec)) for name in "qkv")
    core = mechanism("linear").factory(spec["inputs"]["v"][2], heads(spec), causal=spec["causal"])
    layout = Layout(Grid(1, q.shape[1]))
    return Run(core, lambda: core(Tokens(q, k, v), layout).flatten(2))


def efficient_op(spec: dict[str, Any]) -> Run:
    """The layer on an image, with the residual that belongs to the block here."""
    x = tensor(spec["input_shape"])
    _, channels, height, width = x.shape
    layer = linsight.create_attention("efficient", channels, heads(spec), projections="q_k_v")

    def call() -> Tensor:
        out = layer(x.flatten(2).transpose(1, 2), Grid(height, width))
        return x + out.transpose(1, 2).unflatten(2, (height, width))

    return Run(layer, call)


def inline_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens; of CSwin, whose block owns the projections, the core."""
    config = spec["config"]
    dim, num_heads, (height, width) = config["dim"], heads(spec), config["grid"]
    x = tensor(spec["input_shape"])
    if config["host"] == "cswin":
        branch = Branch(create_core("inline", dim, num_heads), dim)
        mean = tensor([x.shape[1], dim], "x_mean")[:, None].expand(-1, height * width, -1)
        return Run(branch, lambda: branch(x.movedim(0, 2), Grid(height, width), mean))
    feature_map = {"leakyrelu": "leaky_relu"}.get(config.get("kernel_func", "identity"), config.get("kernel_func"))
    layer = linsight.create_attention(
        "inline",
        dim,
        num_heads,
        qkv_bias=config["qkv_bias"],
        projections="q_kv" if config["host"] == "pvt" else "qkv",
        feature_map=feature_map or "identity",
    )
    grid = Grid(height, width, x.shape[1] - height * width)
    return Run(layer, lambda: layer(x, grid))


def focused_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens; of CSwin, whose block owns the projections, the core."""
    config, x = spec["config"], tensor(spec["input_shape"])
    dim, num_heads, grid = config["dim"], heads(spec), Grid(*config["grid"])
    options = {"power": config["focusing_factor"], "kernel_size": config["kernel_size"], "grid": grid[:2]}
    if config["host"] == "cswin":
        branch = Branch(create_core("focused", dim, num_heads, **options), dim)
        return Run(branch, lambda: branch(x.movedim(0, 2), grid, x[0]))
    if config["host"] != "swin":
        options |= {"projections": "q_kv", "reduction": config["sr_ratio"], "pool": 7 if config.get("linear") else 0}
    layer = linsight.create_attention("focused", dim, num_heads, **options)
    return Run(layer, lambda: layer(x, grid), REDUCTION)


def softmax_op(spec: dict[str, Any]) -> Run:
    """PVT's attention with spatial reduction."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = linsight.create_attention("softmax", config["dim"], heads(spec), reduction=config["sr_ratio"])
    return Run(layer, lambda: layer(x, Grid(*config["grid"])), REDUCTION)


def block(spec: dict[str, Any]) -> Run:
    """A block of a host, out of a model of one stage."""
    config, x = spec["config"], tensor(spec["input_shape"])
    dim, num_heads, grid = config["dim"], heads(spec), Grid(*config["grid"])
    attention = next((name for name in ("inline", "focused") if name in spec["name"]), "softmax")
    hidden = dict(spec["state_dict"])["mlp.fc1.weight"][0]
    options = {}
    if attention == "focused":
        options = {"power": config["focusing_factor"], "kernel_size": config["kernel_size"]}
    shared = {"attention": attention, "attention_options": options, "img_size": (4 * grid.height, 4 * grid.width)}
    if config["host"] == "swin":
        window = config["window_size"]
        model = SwinTransformer(
            embed_dim=dim, depths=[2], num_heads=[num_heads], window_size=window, attention_window=window, **shared
        )
        second = model.layers[0].blocks[1]  # the shifted one
        assert max(second.shift) == config["shift_size"]
        return Run(second, lambda: second(x, grid))
    if config["host"] == "pvt_v2":
        model = PyramidVisionTransformerV2(
            depths=[1],
            embed_dims=[dim],
            num_heads=num_heads,
            sr_ratios=config["sr_ratio"],
            mlp_ratios=hidden / dim,
            **shared,
        )
        first = model.stages[0].blocks[0]
        sr = tuple(Rename(f"attn.{r.published}", f"attn.{r.ours}") for r in REDUCTION)
        return Run(first, lambda: first(x, grid), (Rename("mlp.dwconv.dwconv.", "mlp.dwconv."), *sr))
    # Not the last stage, which has no stripes.
    stages = [(dim, 1, num_heads, hidden / dim, config["split_size"])] * 2
    model = CSwinTransformer(stages=stages, **shared)
    first = model.stages[0].blocks[0]
    return Run(first, lambda: first(x, grid))


BUILDERS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "linear_op": linear_op,
    "efficient_op": efficient_op,
    "inline_op": inline_op,
    "inline_block": block,
    "lepe_block": block,
    "softmax_block": block,
    "focused_block": block,
    "block_pvt": block,
    "focused_op": focused_op,
    "softmax_op": softmax_op,
}


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


def first_difference(module: nn.Module, call: Callable[[], Tensor], trace: dict[str, Any], table: list[Rename]) -> str:
    """The first submodule, in published order, whose output departs from the recorded statistics."""
    table = sorted(table, key=lambda rule: -len(rule.ours))
    outputs: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, out: outputs.setdefault(renamed(f"{name}.", table, back=True)[:-1], out)

    handles = [m.register_forward_hook(record(name)) for name, m in module.named_modules()]
    call()
    for handle in handles:
        handle.remove()
    for name, entry in trace.items():
        out = outputs.get(name)
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
