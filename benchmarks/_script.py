"""What all benchmark scripts end with."""

import sys
from collections.abc import Callable
from pathlib import Path

from linsight.errors import LinsightError


def exit_status(script: str, work: Callable[[], int | None]) -> int:
    """That of `script`, a path, which does `work`: bad input costs one line and 2; Ctrl-C ends it with 130."""
    try:
        return work() or 0
    except (LinsightError, OSError) as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
