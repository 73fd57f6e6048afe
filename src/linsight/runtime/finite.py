"""Answers of a model, none of which is passed on unless it is a number."""

from torch import Tensor

from linsight.errors import LinsightError


def require_finite(answer: Tensor, name: str) -> Tensor:
    """`answer` itself, what a model gives for the images `name`; raises a LinsightError where a value is no number."""
    if not answer.isfinite().all():
        raise LinsightError(
            f"the model gives values that are no numbers for {name}: its weights have some, or its values outgrow "
            f"the precision, where float32 (--amp off) may do"
        )
    return answer
