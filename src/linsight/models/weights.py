"""Weights by timm's conventions: a `pretrained_cfg` tells where they are. What reads them is of a room above."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import load_pretrained
from torch import Tensor, nn

from .timm.saved import fetch_weights, weights_in

_LOADERS: list[Callable[..., Any]] = []
SOURCES = ("source", "state_dict", "file", "hf_hub_id")  # where weights may be, beside `url`


def load_pretrained_with(load: Callable[..., Any]) -> None:
    """For `pretrained=True`: `load(model, address, head=)` fills a model; `head=False` spares its classifier."""
    _LOADERS[:] = [load]


def load_weights(model: nn.Module, source: Any, *, head: bool) -> None:
    """Fill a model from a file, an address or a state dict; head=False spares its classifier."""
    _LOADERS[0](model, source, head=head)


def find_weights(cfg: Mapping[str, Any], cache_dir: str | None = None) -> Any:
    """The file or the state dict that a pretrained_cfg tells of, fetched where it is on the Hub; None: timm knows it.

    Raises:
        LinsightError: there is none, or it cannot be fetched.
    """
    source = cfg.get("source")
    if source == "local-dir":
        return weights_in(Path(cfg["file"]))
    if source != "hf-hub" and (cfg.get("state_dict") or cfg.get("file")):
        return cfg.get("state_dict") or cfg["file"]
    if cfg.get("hf_hub_id"):
        return fetch_weights(cfg["hf_hub_id"], cfg.get("hf_hub_filename"), cache_dir)
    return None


def load_from_cfg(model: nn.Module, cfg: Mapping[str, Any], found: Any, cache_dir: str | None = None) -> None:
    """Fill a model from what `find_weights` found of its pretrained_cfg: our keys, or the published ones."""
    head = getattr(model, "num_classes", cfg["num_classes"]) == cfg["num_classes"]

    def fill(state: Any, _: nn.Module | None = None) -> dict[str, Tensor]:
        load_weights(model, state, head=head)
        return model.state_dict()

    if found is not None:
        fill(found)
    else:  # timm fetches them; what it would adapt is adapted already
        alike = {"num_classes": cfg["num_classes"], "in_chans": cfg["input_size"][0]}
        load_pretrained(model, dict(cfg), filter_fn=fill, cache_dir=cache_dir, **alike)
