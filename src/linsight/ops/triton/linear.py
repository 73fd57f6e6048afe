"""The fused form of linear attention: the reads and absorbs of `linsight.ops.linear`, each one pass over its tokens.

Four operators of torch, functional, with every choice as an argument: `linsight::linear_absorb`,
`linsight::linear_read` and their backwards. Autocast has no rule for them, so they compute in what they are given.
"""

from typing import Any

import torch
from torch import Tensor

from linsight.errors import LinsightError

from ..conv import Convolved, made
from ..features import Features
from ..linear import LinearState, plain_absorb, plain_affine, plain_central, plain_read
from ..states import accumulator, count_tokens
from . import linear_kernels as kernels
from .launch import SCHEMA, Inputs, Plan, block, on, widest

_WIDTH, _TENSORS = len(Inputs._fields), Inputs._fields.index("place")


def absorb(k: Features, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """`linear_absorb`."""
    if not _fits(k, v):
        return plain_absorb(k, v, keep)
    matrix, left, _ = absorb_tokens(*Inputs.of(k), v, keep, False)
    return matrix, left


def central(k: Features, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`central_absorb`."""
    if not _fits(k, v):
        moments = plain_central(k, v, keep)
        return moments.count, moments.k, moments.v, moments.cross
    cross, mean_k, mean_v = absorb_tokens(*Inputs.of(k), v, keep, True)
    return count_tokens(v, keep), mean_k, mean_v, cross


def read(q: Features, state: LinearState, eps: float, add: Convolved | Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear_read`."""
    if not _fits(q, state.kv):
        return plain_read(q, state, eps, add, dtype)
    return read_tokens(*Inputs.of(q), state.kv, state.k, made(add), eps, True, dtype)


def affine(q: Features, matrix: Tensor, shift: Tensor, add: Convolved | Tensor | None, dtype: torch.dtype) -> Tensor:
    """`affine_read`."""
    if not _fits(q, matrix):
        return plain_affine(q, matrix, shift, add, dtype)
    return read_tokens(*Inputs.of(q), matrix, shift, made(add), 0.0, False, dtype)


def _fits(features: Features, values: Tensor) -> bool:
    """True where a program can hold a head: not too wide, and no rotation of a channel of one with one of the next."""
    width = features.x.shape[-1]
    return max(width, values.shape[-1]) <= widest(values) and (features.turn is None or width % 2 == 0)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return () if x is None else x.stride()


def _ahead(x: Tensor, add: Tensor | None) -> int:
    """Tokens in front, to which nothing is added."""
    return 0 if add is None else x.shape[1] - add.shape[1]


def _fold(
    matrix: Tensor, left: Tensor | None, right: Tensor | None, count: Tensor | None = None
) -> tuple[Tensor, Any, Any]:
    """Partial sums `(splits, B, H, ...)`, or moments with their `count`, as one."""
    splits, images, heads, d, e = matrix.shape
    if splits == 1:
        return matrix[0], None if left is None else left[0], None if right is None else right[0]
    out = [None if t is None else torch.empty_like(t[0]) for t in (matrix, left, right)]
    # The interpreter takes as long for a row as for all of them.
    rows = block(d) if matrix.device.type == "cpu" else 1
    with on(matrix):
        kernels.fold_kernel[(images * heads, -(-d // rows))](
            *(matrix, left, right, count, *out, splits),
            CENTRAL=count is not None,
            D=d,
            E=e,
            BLOCK_S=1 << (splits - 1).bit_length(),
            ROWS=rows,
            BLOCK_E=block(e),
        )
    return out[0], out[1], out[2]  # type: ignore[return-value]


def _factor_gradients(plan: Plan, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Empty tensors for the gradients of column and after, which kernels write for each share, or each head."""
    x, column, after = plan.inputs.x, plan.inputs.column, plan.inputs.after
    images, tokens, heads, d = x.shape
    return (
        None if column is None else x.new_empty(plan.splits, images, heads, d, dtype=dtype),
        None if after is None else x.new_empty(images, tokens, heads, dtype=dtype),
    )


def _summed(inputs: Inputs, dcolumn: Tensor | None, dafter: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of column and after, summed; empty where there is none."""
    column, after = inputs.column, inputs.after
    return (
        inputs.x.new_empty(0) if column is None or dcolumn is None else dcolumn.sum(dim=(0, 1)).to(column.dtype),
        inputs.x.new_empty(0) if after is None or dafter is None else dafter.sum(dim=-1).to(after.dtype),
    )


def _fake_factors(inputs: Inputs) -> tuple[Tensor, Tensor]:
    column, after = (
        inputs.x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (inputs.column, inputs.after)
    )
    return column, after


@torch.library.custom_op(
    "linsight::linear_absorb",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor v, Tensor? keep, bool central) -> (Tensor, Tensor, Tensor)",
)
def absorb_tokens(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A state: (matrix `(B, H, D, E)`, left `(B, H, D)`, right `(B, H, E)`), the last empty unless `central`."""
    inputs, (v, keep, central) = Inputs(*arguments[:_WIDTH]), arguments[_WIDTH:]
    (images, _, heads, d), e, dtype = inputs.x.shape, v.shape[-1], accumulator(v.dtype)
    plan = inputs.plan(e, dtype, v.dtype, False, CENTRAL=central)

    def parts(*shape: int) -> Tensor:
        return v.new_empty(plan.splits, images, heads, *shape, dtype=dtype)

    matrix, left = parts(d, e), parts(d)
    right, count = (parts(e), parts()) if central else (None, None)
    plan.run(kernels.absorb_kernel, v, v.stride(), keep, _strides(keep), matrix, left, right, count)
    matrix, left, right = _fold(matrix, left, right, count)
    return matrix, left, matrix.new_empty(0) if right is None else right


@absorb_tokens.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, (v, _, central) = arguments[0], arguments[_WIDTH:]
    (images, _, heads, d), e, dtype = x.shape, v.shape[-1], accumulator(v.dtype)
    left, right = v.new_empty(images, heads, d, dtype=dtype), (images, heads, e) if central else (0,)
    return v.new_empty(images, heads, d, e, dtype=dtype), left, v.new_empty(right, dtype=dtype)


@torch.library.custom_op(
    "linsight::linear_absorb_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor v, Tensor? keep, bool central, Tensor left, Tensor right, Tensor dmatrix, Tensor dleft, "
    "Tensor dright) -> (Tensor, Tensor, Tensor, Tensor)",
)
def absorb_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dv, dcolumn, dafter), the last two empty where there is none; `left`, `right` as absorb gave."""
    inputs, (v, keep, central, left, right, *gradients) = Inputs(*arguments[:_WIDTH]), arguments[_WIDTH:]
    dtype = accumulator(v.dtype)
    plan = inputs.plan(v.shape[-1], dtype, v.dtype, True, CENTRAL=central)
    dx, dv = inputs.x.new_empty(inputs.x.shape), v.new_empty(v.shape)
    dfactors = _factor_gradients(plan, dtype)
    plan.run(
        kernels.absorb_backward_kernel,
        *(v, v.stride(), keep, _strides(keep), left, right, count_tokens(v, keep)),
        *(t.contiguous() for t in gradients),
        *(dx, dv, *dfactors),
    )
    return dx, dv, *_summed(inputs, *dfactors)


@absorb_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, v = Inputs(*arguments[:_WIDTH]), arguments[_WIDTH]
    return inputs.x.new_empty(inputs.x.shape), v.new_empty(v.shape), *_fake_factors(inputs)


@torch.library.custom_op(
    "linsight::linear_read",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor matrix, Tensor vector, Tensor? add, float eps, bool normalised, ScalarType dtype) -> "
    "Tensor",
)
def read_tokens(*arguments: Any) -> Tensor:
    """The outputs `(B, N, H, E)`; `vector` is `(B, H, D)` where `normalised`, else `(B, H, E)`."""
    inputs, (matrix, vector, add, eps, normalised, dtype) = Inputs(*arguments[:_WIDTH]), arguments[_WIDTH:]
    plan = inputs.plan(matrix.shape[-1], matrix.dtype, dtype, False, NORMALISED=normalised)
    out = inputs.x.new_empty(*inputs.x.shape[:3], matrix.shape[-1], dtype=dtype)
    plan.run(
        kernels.read_kernel,
        matrix.contiguous(),
        vector.contiguous(),
        add,
        _strides(add),
        _ahead(inputs.x, add),
        out,
        eps,
    )
    return out


@read_tokens.register_fake
def _(*arguments: Any) -> Tensor:
    x, matrix, dtype = arguments[0], arguments[_WIDTH], arguments[-1]
    return x.new_empty(*x.shape[:3], matrix.shape[-1], dtype=dtype)


@torch.library.custom_op(
    "linsight::linear_read_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor matrix, Tensor vector, float eps, bool normalised, Tensor dout) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def read_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dmatrix, dvector, dcolumn, dafter), the last two empty where there is none."""
    inputs, (matrix, vector, eps, normalised, dout) = Inputs(*arguments[:_WIDTH]), arguments[_WIDTH:]
    plan = inputs.plan(matrix.shape[-1], matrix.dtype, dout.dtype, True, NORMALISED=normalised)
    dx = inputs.x.new_empty(inputs.x.shape)
    dmatrix, dvector = (t.new_empty(plan.splits, *t.shape) for t in (matrix, vector))
    dfactors = _factor_gradients(plan, matrix.dtype)
    plan.run(
        kernels.read_backward_kernel,
        *(matrix.contiguous(), vector.contiguous(), dout, dout.stride(), dx, dmatrix, dvector, *dfactors, eps),
    )
    dmatrix, left, right = _fold(dmatrix, *((dvector, None) if normalised else (None, dvector)))
    return dx, dmatrix, left if normalised else right, *_summed(inputs, *dfactors)


@read_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, (matrix, vector, *_) = Inputs(*arguments[:_WIDTH]), arguments[_WIDTH:]
    dx = inputs.x.new_empty(inputs.x.shape)
    return dx, matrix.new_empty(matrix.shape), vector.new_empty(vector.shape), *_fake_factors(inputs)


def _gradients(tensors: Any, dx: Tensor, dcolumn: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all fields of `Inputs`, in their order; None for those that have none."""
    column, after = (None if t is None else d for t, d in ((tensors[1], dcolumn), (tensors[3], dafter)))
    return dx, column, None, after, *[None] * (_WIDTH - 4)


def _save_absorb(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v, keep, ctx.central = inputs[_WIDTH:]
    ctx.save_for_backward(*inputs[:_TENSORS], v, keep, *output[1:])
    ctx.choices = inputs[_TENSORS:_WIDTH]


def _absorb_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, v, keep, left, right = ctx.saved_tensors
    dx, dv, *dfactors = absorb_backward(*tensors, *ctx.choices, v, keep, ctx.central, left, right, *gradients)
    return *_gradients(tensors, dx, *dfactors), dv, None, None


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrix, vector, add, *ctx.flags, _ = inputs[_WIDTH:]
    ctx.save_for_backward(*inputs[:_TENSORS], matrix, vector)
    ctx.choices = inputs[_TENSORS:_WIDTH]
    ctx.add = None if add is None else (_ahead(inputs[0], add), add.dtype)


def _read_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, matrix, vector = ctx.saved_tensors
    dx, dmatrix, dvector, *dfactors = read_backward(*tensors, *ctx.choices, matrix, vector, *ctx.flags, dout)
    dadd = None if ctx.add is None else dout[:, ctx.add[0] :].to(ctx.add[1])
    return *_gradients(tensors, dx, *dfactors), dmatrix, dvector, dadd, None, None, None


def _no_second(ctx: Any, *gradients: Any) -> None:
    raise LinsightError("the fused form of linear attention has no second derivatives: run it under use_form('plain')")


absorb_tokens.register_autograd(_absorb_gradients, setup_context=_save_absorb)
read_tokens.register_autograd(_read_gradients, setup_context=_save_read)
absorb_backward.register_autograd(_no_second)
read_backward.register_autograd(_no_second)
