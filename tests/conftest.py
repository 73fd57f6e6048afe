"""Every test starts from the same random state; property tests draw the same examples every time."""

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, and those that tests start; before torch reads it
    os.environ["OMP_NUM_THREADS"] = "1"

if not any(os.path.exists(f"/dev/{device}") for device in ("nvidiactl", "kfd", "dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run without a GPU; before torch imports Triton

import pytest
import torch
from hypothesis import settings
from timm.layers import weight_init

from linsight import cli

if not torch.accelerator.is_available():
    # Else each call, in some tests one for each parameter, writes down its stack for three kinds of device.
    torch.manual_seed = torch.default_generator.manual_seed

settings.register_profile("linsight", max_examples=20, deadline=None, derandomize=True, database=None)
settings.load_profile("linsight")


def pytest_collection_modifyitems(items):
    """Those that train come first: workers share what is quick evenly to the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("train", "parallel"))


def pytest_collection_finish():
    """Let the garbage collector leave out what stays to the end: libraries, and thousands of tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """At the end all is collected, or extensions would report leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is kept in the cache of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """Weights that are not drawn, where to draw them takes half the time of a test.

    Those without memory, and, of modules that say LOADS = True because they load weights, all.
    """
    draw, loads = getattr(weight_init, "_trunc_normal_", None), getattr(request.module, "LOADS", False)
    if draw is not None:  # a private one of timm's
        monkeypatch.setattr(weight_init, "_trunc_normal_", lambda x, *args: x if loads or x.is_meta else draw(x, *args))


@pytest.fixture(autouse=True, scope="session")
def same_precision():
    """amp=auto is float32 on every CPU, also on one that multiplies in bfloat16: numbers are those of all machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linsight.runtime.device.cpu_bf16", lambda: "")
        yield


@pytest.fixture
def linsight(monkeypatch, capsys):
    """Run a command in this process: its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["linsight", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run
