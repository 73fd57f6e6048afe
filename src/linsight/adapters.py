"""The former name of `linsight.convert`: each use warns."""

import warnings
from typing import Any

from linsight import convert

__all__ = ["Attention2d", "MultiheadAttention", "attention_class", "replace_attention"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    warnings.warn(f"{__name__}.{name} is now linsight.convert.{name}", DeprecationWarning, stacklevel=2)
    return getattr(convert, name)
