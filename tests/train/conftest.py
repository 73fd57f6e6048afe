"""A folder of images, and the command line in this process."""

import sys

import pytest
from small import TINY, colours

from linsight import cli


@pytest.fixture
def folder(tmp_path):
    return colours(tmp_path / "data", {"blue": 20, "green": 20, "red": 20})


@pytest.fixture
def linsight(monkeypatch, capsys):
    """Run a command: its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["linsight", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture
def tiny_options():
    """`TINY` as options of `linsight train`."""
    options = []
    for name, value in TINY.items():
        dashed = name.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return options
