"""A module for each family of golden cases, found by itself: `BUILDERS` maps starts of cases' names to builders."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from golden.spec import Run

Builder = Callable[[dict[str, Any]], Run]


def builder(name: str) -> Builder:
    """That of the case `name`: the longest start that fits."""
    found: dict[str, Builder] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").BUILDERS
    fitting = [start for start in found if name.startswith(start)]
    assert fitting, f"no builder for the golden case {name}"
    return found[max(fitting, key=len)]
