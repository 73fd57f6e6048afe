"""A folder of images, and the command line in this process."""

import pytest
from small import TINY, colours


@pytest.fixture
def folder(tmp_path):
    return colours(tmp_path / "data", {"blue": 20, "green": 20, "red": 20})


@pytest.fixture
def tiny_options():
    """`TINY` as options of `linsight train`."""
    options = []
    for name, value in TINY.items():
        dashed = name.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return options
