"""Attention of transformers: of all classes that leave their softmax to the library's `AttentionInterface`.

The module stays as it is, with a mechanism inside as `mixing`; the function that averages values, "linsight", looks
for it there. transformers is imported when a model of it is met.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from linsight.errors import LinsightError

from ..mixing import Mixing
from ..place import Place
from .seam import Heads, Images, Part, Seam

# Names of the maps that make queries, keys and values; of one map that makes all three, one after the other.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
FUSED = ("Wqkv", "qkv")
OUTPUTS = ("o_proj", "out_proj", "out_lin", "o", "Wo", "proj", "projection", "dense")
OUTSIDE = "output.dense"  # of the module around a query, key, value that has none of these
NUMBERS = ("num_heads", "num_attention_heads", "n_heads")
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
SCALES = ("scaling", "scale")
DROPOUTS = ("attention_dropout", "dropout")
PREFIXES = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
INTERFACE = "ALL_ATTENTION_FUNCTIONS"


class Transformers(Seam):
    """See the module."""

    library: ClassVar[str] = "transformers"

    def knows(self, module: nn.Module) -> bool:
        """See `Seam`."""
        if "mixing" in module._modules:
            return False
        kind = type(module)
        theirs = kind.__module__.startswith("transformers.") and "Attention" in kind.__name__
        return _uses(kind, INTERFACE) or (theirs and bool(_projections(module)))

    def heads(self, module: Any) -> Heads:
        """See `Seam`."""
        kind = type(module).__name__
        if not _uses(type(module), INTERFACE):
            raise LinsightError(
                f"{kind} computes its softmax itself, not by the AttentionInterface of transformers, so it cannot be "
                f"taken over"
            )
        given = list(inspect.signature(type(module).forward).parameters)[1:]
        if given[0] != "hidden_states" or "encoder_hidden_states" in given or "Cross" in kind:
            raise LinsightError(f"{kind} is no self-attention: its keys come from another sequence than its queries")
        if getattr(module, "sinks", None) is not None:
            raise LinsightError(f"{kind} has attention sinks, which only a softmax has")
        names = _projections(module)
        if not names:
            known = ", ".join("/".join(triple) for triple in (*PROJECTIONS, *zip(FUSED)))
            raise LinsightError(f"{kind} has no {known} to make queries, keys and values of its input")
        maps = [getattr(module, name) for name in names]
        widths = [one.out_features for one in maps]
        dim = widths[0] if len(maps) == 3 else widths[0] // 3
        number, width = (_first(module, table, int) for table in (NUMBERS, WIDTHS))
        number = dim // width if width else number
        if len(set(widths)) > 1 or (width and dim % width) or (len(maps) == 1 and widths[0] % 3):
            raise LinsightError(f"{kind} makes {'/'.join(names)} of {widths} channels: heads share keys, or are gated")
        if not number or dim % number:
            raise LinsightError(f"{kind} does not tell its number of heads by any of {', '.join(NUMBERS + WIDTHS)}")
        return Heads(number, dim, maps[0].in_features, _first(module, SCALES, float))

    def parts(self, module: Any) -> Mapping[str, tuple[Part, ...]]:
        """See `Seam`."""
        names = _projections(module)
        roles = dict(zip(names, "qkv", strict=False)) if len(names) == 3 else {}
        found: dict[str, list[Part]] = {"q": [], "k": [], "v": [], "out": [], "norm": []}
        for name, tensor in module.named_parameters():
            top = name.partition(".")[0]
            if top in roles:
                found[roles[top]].append(Part(name))
            elif top in names:
                third = tensor.shape[0] // 3
                for place, role in enumerate("qkv"):
                    found[role].append(Part(name, slice(place * third, (place + 1) * third)))
            elif top in OUTPUTS:
                found["out"].append(Part(name))
            elif "norm" in top:
                found["norm"].append(Part(name))
        if not found["out"] and names == PROJECTIONS[1]:
            found["out"] = [Part(f"{OUTSIDE}.{tensor}", above=1) for tensor in ("weight", "bias")]
        return {role: tuple(parts) for role, parts in found.items() if parts}

    def images(self, model: nn.Module, name: str) -> Images | None:
        """See `Seam`.

        Raises:
            LinsightError: the model is given images, but how it cuts them is not known.
        """
        given = ""
        while name:
            name = name.rpartition(".")[0]
            module: Any = model.get_submodule(name)
            found = _patches(getattr(module, "embeddings", None))
            if found is not None:
                return found
            if hasattr(module, "main_input_name"):  # a whole model, or tower
                if "pixel" not in module.main_input_name:
                    break
                given = type(module).__name__
        if given:
            raise LinsightError(
                f"{given} does not tell where its tokens lie: give grid=(height, width) and prefix=, or grid='1d'"
            )
        return None

    def causal(self, model: nn.Module, name: str) -> bool:
        """See `Seam`. Towers whose modules do not know it, as that of CLIP, make a causal mask and no other."""
        if super().causal(model, name):
            return True
        while name:
            name = name.rpartition(".")[0]
            module = model.get_submodule(name)
            if _uses(type(module), "create_causal_mask"):
                return not _uses(type(module), "create_bidirectional_mask")
            if hasattr(module, "main_input_name"):  # a whole model, or tower
                return False
        return False

    def dropout(self, module: Any) -> float:
        """See `Seam`."""
        found = next((rate for name in DROPOUTS if (rate := getattr(module, name, None)) is not None), 0.0)
        return float(getattr(found, "p", found))

    def prepare(self, model: nn.Module) -> None:
        """See `Seam`: attentions that keep their softmax compute it by the library's "sdpa" from here on.

        Raises:
            LinsightError: they cannot.
        """
        functional = importlib.import_module(".functional", __package__)
        whole: list[Any] = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
        for one in whole:
            if not one._supports_sdpa:
                raise LinsightError(
                    f"{type(one).__name__} is not for attention by scaled_dot_product_attention, as transformers says"
                )
        for one in whole:
            one.set_attn_implementation(functional.NAME)
        for module in model.modules():
            config: Any = module.config if _uses(type(module), INTERFACE) else None
            if config is not None and config._attn_implementation != functional.NAME:  # of a module on its own
                config._attn_implementation = functional.NAME

    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """See `Seam`."""
        functional = importlib.import_module(".functional", __package__)
        module = model.get_submodule(name)
        module.add_module("mixing", mixing)
        module.register_forward_pre_hook(functional.Listener(place), with_kwargs=True)

    def describe(self, model: Any) -> dict[str, Any] | None:
        """See `Seam`: the name of the class, and the config."""
        if not hasattr(model, "set_attn_implementation") or not type(model).__module__.startswith("transformers."):
            return None
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["dtype"] = str(model.dtype).removeprefix("torch.")  # a config does not follow `model.to`
        return {"class": type(model).__name__, "config": config}

    def rebuild(self, described: Mapping[str, Any]) -> nn.Module:
        """See `Seam`."""
        transformers = importlib.import_module("transformers")
        kind: Any = getattr(transformers, str(described["class"]), None)
        if getattr(kind, "_from_config", None) is None:
            raise LinsightError(f"transformers has no model {described['class']}")
        return kind._from_config(kind.config_class.from_dict(described["config"]))


def _uses(kind: type, name: str) -> bool:
    """True where a forward of a class, or of one that it is made of, speaks of `name`."""
    return name in _spoken(kind)


@functools.cache
def _spoken(kind: type) -> frozenset[str]:
    forwards = (vars(base).get("forward") for base in kind.__mro__)
    codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards if forward is not None)
    return frozenset(name for code in codes if code is not None for name in code.co_names)


def _projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the maps of a module that make queries, keys and values: three, one for all, or none."""
    for names in (*PROJECTIONS, *zip(FUSED)):
        if all(hasattr(getattr(module, name, None), "out_features") for name in names):
            return names
    return ()


def _first(module: nn.Module, names: tuple[str, ...], kind: type) -> Any:
    return next((found for name in names if isinstance(found := getattr(module, name, None), kind)), None)


def _patches(embeddings: nn.Module | None) -> Images | None:
    """How a module cuts images: by its one convolution whose steps are its kernel; None where it has none."""
    if embeddings is None:
        return None
    cuts = [m for m in embeddings.modules() if isinstance(m, nn.Conv2d) and m.stride == m.kernel_size]
    if len(cuts) != 1:
        return None
    tokens = (getattr(embeddings, name, None) for name in PREFIXES)
    prefix = sum(token.numel() // cuts[0].out_channels for token in tokens if token is not None)
    return Images(embeddings, (cuts[0].stride[0], cuts[0].stride[1]), prefix)
