"""The matrix over the registry: a new mechanism is tested by being registered."""

import itertools
import shutil

import pytest

import matrix
from matrix import fused, graphs

pytestmark = pytest.mark.timeout(300)  # tracing and C++ are slow where cores are shared


@pytest.mark.parametrize("check", matrix.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", matrix.subjects(), ids=str)
def test_mechanism(subject, check):
    check(subject)


@pytest.mark.parametrize("check", matrix.VARIANT_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", [s for s in matrix.subjects(variants=True) if s.options], ids=str)
def test_options(subject, check):
    check(subject)


FUSED = [
    *itertools.product(matrix.subjects(variants=True), fused.VARIANT_CHECKS),
    *itertools.product(matrix.subjects(), fused.CHECKS),
]


@pytest.mark.parametrize(("subject", "check"), FUSED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_fused(subject, check):
    pytest.importorskip("triton")
    check(subject)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler for inductor")
def test_inductor():
    graphs.compile_parity(matrix.Subject("inline"), "inductor")
