"""Models of timm and of the Hub: a line that says what could not be fetched, from where, and what else to do."""

import contextlib
from collections.abc import Iterator
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from linsight.errors import LinsightError
from linsight.runtime.text import printable

# Packages of the network, whose errors need not derive from OSError.
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub", "hf_xet")
_LOGIN = "log in with 'hf auth login', or set HF_TOKEN"
# By the names of huggingface_hub's errors, what they mean; the more special ones first.
_MEANING = {
    "GatedRepoError": f"it is given on request only: ask for it on its page, and {_LOGIN}",
    "DisabledRepoError": "the Hub has closed it",
    "RevisionNotFoundError": "it has no such revision",
    "RepositoryNotFoundError": f"there is no such repository, or it is private: {_LOGIN}",
    "HFValidationError": "a repository is called OWNER/NAME, of letters, digits, '-', '_' and '.'",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE keeps this process off the network",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and its files are not in the cache",
    "LocalTokenNotFoundError": f"the Hub wants a token: {_LOGIN}",
}
_STATUS = {
    401: f"the Hub does not know who asks: {_LOGIN}",
    403: "the token has no right to do this: take one that may write there",
    409: "somebody else changed it at this moment: try again",
    429: "the Hub has been asked too often: try again later",
}


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
        if not pretrained or not (_of_network(error) or isinstance(error, OSError | RuntimeError)):
            raise
        raise LinsightError(
            f"the weights of '{name}' could not be fetched from {place_of(name)}: {str(error).splitlines()[0]}; "
            f"with pretrained=False, linsight.load_published(model, path) takes a file of them"
        ) from error


@contextlib.contextmanager
def speaking_to_hub(name: str) -> Iterator[None]:
    """Inside, errors of the Hub and of the network become one line about the repository `name`."""
    try:
        yield
    except LinsightError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload
        if not _of_network(cause) and not isinstance(cause, OSError | RuntimeError | ValueError):
            raise
        kinds = [kind.__name__ for kind in type(cause).__mro__]
        status = getattr(getattr(cause, "response", None), "status_code", None)
        said = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        meaning = next((text for kind, text in _MEANING.items() if kind in kinds), _STATUS.get(status or 0))
        meaning = meaning or f"the Hub cannot be spoken to ({said:.200})"
        raise LinsightError(f"'{printable(name)}' on the Hub: {meaning}") from error


def _of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK
