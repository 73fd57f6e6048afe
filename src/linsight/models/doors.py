"""The door of `create_model`: one line for each argument that no model can have."""

import contextlib
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch

from linsight.errors import LinsightError

LARGEST = 65536  # pixels of a side
_MOST, _DEEPEST = 10**7, 1000
# Whole numbers: the smallest that a model can have.
_WHOLE = {"num_classes": 0, "in_chans": 1, "depth": 1, "embed_dim": 1, "num_heads": 1}
_RATES = ("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate")


def whole_size(img_size: Any) -> tuple[int, int]:
    """Height and width of images, of a side or a pair of whole numbers, NumPy's too.

    Raises:
        LinsightError: it is neither, or less than a pixel.
    """
    sides = tuple(img_size) if isinstance(img_size, tuple | list) else (img_size, img_size)
    if len(sides) != 2 or not all(_is_whole(side, 1) and side <= LARGEST for side in sides):
        raise LinsightError(
            f"img_size={_shown(img_size)} must be a side or (height, width) in pixels, of 1 to {LARGEST}"
        )
    return int(sides[0]), int(sides[1])


def checked(name: Any, attention: Any, options: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `given` to the model `name`, sizes as plain numbers.

    Raises:
        LinsightError: one of them is of another kind, or out of range.
    """
    if not isinstance(name, str):
        raise LinsightError(f"a model is asked for by its name, not by a {type(name).__name__}")
    if attention is not None and not isinstance(attention, str):
        raise LinsightError(f"attention={_shown(attention)} must be text: a mechanism, or one a stage")
    if options is not None and not isinstance(options, Mapping):
        raise LinsightError(f"attention_options={_shown(options)} must be a dict of options of the mechanism")
    found = dict(given)
    if found.get("img_size") is not None:
        found["img_size"] = whole_size(found["img_size"])
    for key, least in _WHOLE.items():
        value = found.get(key)
        if isinstance(value, tuple | list) or value is None:  # one a stage
            continue
        most = _DEEPEST if key == "depth" else _MOST
        if not _is_whole(value, least) or value > most:
            raise LinsightError(f"{key}={_shown(value)} must be a whole number, {least} or more, and {most} at most")
        found[key] = int(value)
    for key in _RATES:
        rate = found.get(key)
        if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
            raise LinsightError(f"{key}={_shown(rate)} must be a rate from 0 to 1")
    return found


def check_whole(least: int = 1, **given: Any) -> None:
    """Raise a LinsightError for the first of the arguments `given` that is no whole number of `least` or more."""
    for name, value in given.items():
        if not _is_whole(value, least):
            raise LinsightError(f"{name}={_shown(value)} must be a whole number, {least} or more")


# Errors of timm and torch for arguments of another kind, or that do not go together.
_MISFITS = (AssertionError, TypeError, ValueError, LookupError, ZeroDivisionError, AttributeError, RuntimeError)


@contextlib.contextmanager
def building(name: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a model is built with the arguments `given`; an error that names none of them becomes one that does."""
    try:
        yield
    except (LinsightError, torch.OutOfMemoryError):
        raise
    except _MISFITS as error:
        said = ", ".join(f"{key}={_shown(value)}" for key, value in given.items() if value is not None)
        if not said:  # then it is no mistake of the caller's
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LinsightError(f"'{name}' cannot be built with {said}: {reason:.200}") from error


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:40]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
