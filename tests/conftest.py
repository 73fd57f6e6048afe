"""Every test starts from the same random state; property tests draw the same examples every time."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, and those that tests start; before torch reads it
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run without a GPU; before Triton is imported

settings.register_profile("linsight", max_examples=20, deadline=None, derandomize=True, database=None)
settings.load_profile("linsight")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
