"""The exit status of benchmark scripts, and the pictures that they put into pages."""

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from linsight.errors import LinsightError
from linsight.runtime.files import replacing


def exit_status(script: str, work: Callable[[], int | None]) -> int:
    """That of `script`, a path, which does `work`: bad input costs one line and 2; Ctrl-C ends it with 130."""
    try:
        return work() or 0
    except (LinsightError, OSError) as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def put_picture(source: Path, page: Path) -> str:
    """A picture of a run beside a page of the documentation, as PAGE.jpg; the line that shows it, "" without one."""
    if not source.exists():
        return ""
    target = page.with_suffix(".jpg")
    with Image.open(source) as picture, replacing(target) as temporary:
        small = picture.convert("RGB")
        small.thumbnail((1000, 2**16))
        small.save(temporary, "jpeg", quality=80)
    return f"![What the model finds]({target.name})"
