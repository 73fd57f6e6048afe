"""How a golden case is run: everything is read from its json, so another size of a case needs no edit.

A builder makes the module of a case and the call on it; the published keys are filled, renamed by
the mechanism's own rules and loaded strictly.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

import linsight
from golden.fill import fill, fill_input
from linsight import Grid, Layout
from linsight.attention import Attention, Core, Rename, Tokens, create_core, mechanism, split_heads

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


def names() -> list[str]:
    """`mechanism/case` for every case in this folder."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.json"))


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
        core = mechanism("inline").factory(dim, num_heads, lepe=True)
        q, k, v = split_heads(x, num_heads)
        mean = tensor([x.shape[1], dim], "x_mean")[:, None].expand(-1, height * width, -1)
        tokens = Tokens(q, k, v, mean)
        rules = (Rename("residual.", "generator."), Rename("get_v.", "lepe."))
        return Run(core, lambda: core(tokens, Layout(Grid(height, width))).flatten(2), rules)
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


class WithLePE(nn.Module):
    """A core, and CSwin's static convolution of v beside it, under its published name."""

    def __init__(self, core: Core, dim: int) -> None:
        super().__init__()
        self.core = core
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tokens, grid: Grid) -> Tensor:
        canvas = tokens.v.flatten(2).transpose(1, 2).unflatten(2, (grid.height, grid.width))
        return self.core(tokens, Layout(grid)).flatten(2) + self.get_v(canvas).flatten(2).transpose(1, 2)


def focused_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens; of CSwin, whose block owns the projections, the core."""
    config, x = spec["config"], tensor(spec["input_shape"])
    dim, num_heads, grid = config["dim"], heads(spec), Grid(*config["grid"])
    options = {"power": config["focusing_factor"], "kernel_size": config["kernel_size"], "grid": grid[:2]}
    if config["host"] == "cswin":
        core = create_core("focused", dim, num_heads, **options)
        module = WithLePE(core, dim)
        return Run(module, lambda: module(Tokens(*split_heads(x, num_heads)), grid), core.published)
    if config["host"] != "swin":
        options |= {"projections": "q_kv", "reduction": config["sr_ratio"], "pool": 7 if config.get("linear") else 0}
    layer = linsight.create_attention("focused", dim, num_heads, **options)
    return Run(layer, lambda: layer(x, grid), REDUCTION)


def softmax_op(spec: dict[str, Any]) -> Run:
    """PVT's attention with spatial reduction."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = linsight.create_attention("softmax", config["dim"], heads(spec), reduction=config["sr_ratio"])
    return Run(layer, lambda: layer(x, Grid(*config["grid"])), REDUCTION)


class CSwinBlock(nn.Module):
    """CSwin's block with one full branch: the layer is conditioned on the stream before the norm."""

    renames = (
        Rename("attns.0.residual.", "attn.core.generator."),
        Rename("attns.0.get_v.", "attn.core.lepe."),
        Rename("attns.0.", "attn.core."),
        Rename("qkv.", "attn.qkv."),
        Rename("proj.", "attn.proj."),
    )

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = linsight.create_attention("inline", dim, num_heads, lepe=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.attn(self.norm1(x), grid, cond=x)
        return x + self.mlp(self.norm2(x))


def inline_block(spec: dict[str, Any]) -> Run:
    """A pre-norm block around the layer."""
    config, x = spec["config"], tensor(spec["input_shape"])
    if config["host"] != "cswin":
        raise KeyError(f"blocks of {config['host']}")
    hidden = dict(spec["state_dict"])["mlp.fc1.weight"][0]
    block = CSwinBlock(config["dim"], heads(spec), hidden)
    return Run(block, lambda: block(x, Grid(*config["grid"])), block.renames)


def inline_deit(spec: dict[str, Any]) -> Run:
    """The whole model."""
    config, images = spec["config"], tensor(spec["input_shape"])
    model = linsight.create_model(
        "vit_tiny",
        attention="inline",
        img_size=tuple(spec["input_shape"][2:]),
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=heads(spec),
        num_classes=spec["output_shape"][1],
    )
    return Run(model, lambda: model(images))


BUILDERS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "linear_op": linear_op,
    "efficient_op": efficient_op,
    "inline_op": inline_op,
    "inline_block": inline_block,
    "inline_deit": inline_deit,
    "focused_op": focused_op,
    "softmax_op": softmax_op,
}


def rules(run: Run) -> Iterator[Rename]:
    """Published prefixes and ours: those of the case, then those of every layer in it."""
    yield from run.renames
    for path, layer in run.module.named_modules():
        if isinstance(layer, Attention):
            prefix = f"{path}." if path else ""
            yield from (Rename(prefix + rule.published, prefix + rule.ours) for rule in layer.core.published)


def renamed(key: str, table: list[Rename], back: bool = False) -> str:
    """`key` under the first rule that fits; `back` from our name to the published one."""
    for rule in table:
        old, new = (rule.ours, rule.published) if back else (rule.published, rule.ours)
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def load_filled(run: Run, spec: dict[str, Any]) -> None:
    """Fill the published keys, rename, drop the 1x1 of pointwise convolutions, load strictly."""
    table, shapes = list(rules(run)), {key: value.shape for key, value in run.module.state_dict().items()}
    state = {}
    for key, shape in spec["state_dict"]:
        name, value = renamed(key, table), torch.from_numpy(fill(key, tuple(shape)))
        state[name] = value.reshape(shapes[name]) if name in shapes and value.numel() == shapes[name].numel() else value
    run.module.load_state_dict(state)


def first_difference(run: Run, trace: dict[str, Any]) -> str:
    """The first submodule, in published order, whose output departs from the recorded statistics."""
    table, outputs = list(rules(run)), {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, out: outputs.setdefault(renamed(f"{name}.", table, back=True)[:-1], out)

    handles = [m.register_forward_hook(record(name)) for name, m in run.module.named_modules()]
    run.call()
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
