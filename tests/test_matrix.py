"""The matrix over the registry: a new mechanism is tested by being registered."""

import itertools
import shutil

import pytest

import matrix
from linsight.attention import Cost
from matrix import fused, graphs

pytestmark = [
    pytest.mark.timeout(300),  # tracing and C++ are slow where cores are shared
    *map(pytest.mark.filterwarnings, graphs.WARNINGS),
]
WAY = {check: way for way, check in graphs.CHECKS.items()}
SLOWEST, QUICK = (graphs.CHECKS["compile"], graphs.CHECKS["onnx"]), (graphs.CHECKS["trace"],)


@pytest.mark.parametrize("check", matrix.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", matrix.subjects(), ids=str)
def test_mechanism(subject, check):
    check(subject)


@pytest.mark.parametrize("check", matrix.VARIANT_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", [s for s in matrix.subjects(variants=True) if s.options], ids=str)
def test_options(subject, check):
    check(subject)


def rest_is_full(subjects, checks, kind="sort"):
    """Pairs, of which those whose subject is not the first of its kind, or InLine, are for `pytest -m full`.

    Windows, which take long to trace, are the first of no kind that has others. Of the slowest checks the default run
    has InLine's alone, of quick ones all. Of a way out that a mechanism does not have, the check fails, as its reason
    says.
    """
    kinds, pairs = set(), []
    for subject in sorted(subjects, key=lambda s: (s.name != "inline", s.entry.structure.cost is Cost.WINDOWED)):
        later = getattr(subject, kind) in kinds
        kinds.add(getattr(subject, kind))
        for check in checks:
            rest = check not in QUICK and (later or (check in SLOWEST and subject.name != "inline"))
            marks = [pytest.mark.full] if rest else []
            reason = subject.entry.unmet.get(WAY.get(check))
            pairs.append(pytest.param(subject, check, marks=[*marks, *unmet(reason)]))
    return pairs


def rest_is_full_but(name):
    """All mechanisms, of which all but one are for `pytest -m full`."""
    return [pytest.param(s, marks=[] if s.name == name else pytest.mark.full) for s in matrix.subjects()]


def unmet(reason):
    return [pytest.mark.xfail(reason=reason)] if reason else []


def named(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("subject", "check"), rest_is_full(matrix.subjects(), matrix.SLOW_CHECKS), ids=named)
def test_slowly(subject, check):
    check(subject)


@pytest.mark.parametrize("subject", rest_is_full_but("inline"), ids=str)
def test_a_million_tokens(subject):
    matrix.precision.a_million_tokens(subject)


FUSED = [
    *rest_is_full(matrix.subjects(), fused.VARIANT_CHECKS, "family"),
    *rest_is_full(matrix.subjects(), fused.CHECKS),
    *(
        pytest.param(subject, check, marks=pytest.mark.full)
        for subject, check in itertools.product(matrix.subjects(variants=True), fused.VARIANT_CHECKS)
        if subject.options
    ),
]


@pytest.mark.parametrize(("subject", "check"), FUSED, ids=named)
def test_fused(subject, check):
    pytest.importorskip("triton")
    check(subject)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler for inductor")
@pytest.mark.full  # C++ is slow to compile
@pytest.mark.parametrize(("name", "gradients"), [("linear", False), ("inline", False), ("inline", True)])
def test_inductor(name, gradients):
    graphs.compile_parity(matrix.Subject(name), "inductor", gradients)
