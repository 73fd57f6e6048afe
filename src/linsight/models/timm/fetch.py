"""Models of timm with their weights: a line that says what could not be fetched, from where, and what else to do."""

from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from linsight.errors import LinsightError

_NETWORK = ("httpx", "requests", "urllib3", "huggingface_hub")  # whose errors need not derive from OSError


def place_of(name: str) -> str:
    """Where timm has the weights of its model `name`."""
    try:
        cfg = get_pretrained_cfg(name)
    except (RuntimeError, ValueError):  # no such tag
        cfg = None
    hub = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg and cfg.hf_hub_id else ""
    return (cfg and cfg.url) or hub or "timm"


def create_fetched(name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The model of timm called `name`.

    Raises:
        LinsightError: its weights are asked for, and cannot be had.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except LinsightError:
        raise
    except Exception as error:
        if str(error).startswith("Invalid pretrained tag"):
            way = f"timm.list_pretrained('{name.partition('.')[0]}*') lists its tags"
            raise LinsightError(f"{str(error).rstrip('.')}: {way}") from None
        network = type(error).__module__.partition(".")[0] in _NETWORK
        if not pretrained or not (network or isinstance(error, OSError | RuntimeError)):
            raise
        raise LinsightError(
            f"the weights of '{name}' could not be fetched from {place_of(name)}: {str(error).splitlines()[0]}; "
            f"with pretrained=False, linsight.load_published(model, path) takes a file of them"
        ) from error
