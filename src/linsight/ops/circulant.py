"""Circular correlations of maps `(..., H, W)`, both axes modulo their length.

    correlation(a, b)[s] = sum_p a[p] b[p + s]        irfft2(conj(A) B)
    convolution(a, b)[s] = sum_p a[p] b[s - p]        irfft2(A B), which gradients need

Nothing is padded, not to a power of two either: that would be another function. Any height and width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .sizes import divided
from .states import accumulator, full_precision


def circular_correlation(a: Tensor, b: Tensor) -> Tensor:
    """sum_p a[p] b[p + s]: maps `(..., H, W)` of one shape -> the same shape, at least float32.

    Real FFTs, O(N log N); when compiled, behind an operator with real inputs and outputs. No complex dtype may be in
    an exported graph: there it is products with small matrices of cosines and sines, O(N (H + W)).
    """
    dtype = accumulator(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        with full_precision(a):
            return by_matrices(a, b)
    if torch.compiler.is_compiling():
        return operator(a, b, True)
    return _by_fft(a, b, correlate=True)


def _by_fft(a: Tensor, b: Tensor, correlate: bool) -> Tensor:
    """The only place with complex numbers."""
    first = torch.fft.rfft2(a)
    if correlate:
        first = torch.conj_physical(first)  # the lazy conj() is lost below aot_autograd
    return torch.fft.irfft2(first * torch.fft.rfft2(b), s=a.shape[-2:])  # half a spectrum does not tell odd widths


@torch.library.custom_op("linsight::circular_product", mutates_args=())
def operator(a: Tensor, b: Tensor, correlate: bool) -> Tensor:
    """`_by_fft` behind an operator of torch, for compiled graphs."""
    return _by_fft(a, b, correlate).contiguous()


@operator.register_fake
def _(a: Tensor, b: Tensor, correlate: bool) -> Tensor:
    return a.new_empty(a.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    a, b, ctx.correlate = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b = ctx.saved_tensors
    if ctx.correlate:
        return operator(grad, b, True), operator(a, grad, False), None
    return operator(b, grad, True), operator(a, grad, True), None


operator.register_autograd(_backward, setup_context=_save)


def by_matrices(a: Tensor, b: Tensor) -> Tensor:
    """The correlation by products with matrices of cosines and sines, for exported graphs."""
    height, width = a.shape[-2], a.shape[-1]
    half = width // 2 + 1  # the rest of the spectrum of a real map mirrors it
    factory: dict[str, Any] = {"device": a.device, "dtype": a.dtype}
    cos_y, sin_y = _waves(height, height, **factory)
    cos_x, sin_x = _waves(width, half, **factory)

    def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = x @ cos_x, -(x @ sin_x)
        return cos_y @ real + sin_y @ imaginary, cos_y @ imaginary - sin_y @ real

    (a_re, a_im), (b_re, b_im) = spectrum(a), spectrum(b)
    real, imaginary = a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re
    real, imaginary = cos_y @ real - sin_y @ imaginary, cos_y @ imaginary + sin_y @ real
    place = torch.arange(half, device=a.device)
    alone = (place == 0) | (2 * place == width)  # frequencies without a mirror image
    count = (2 - alone.to(a.dtype)) / (height * width)
    return real * count @ cos_x.T - imaginary * count @ sin_x.T


def _waves(length: int, frequencies: int, **factory: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi p f / length, each `(length, frequencies)`; the length may be symbolic."""
    places = torch.arange(length, device=factory["device"])[:, None]
    # Whole turns cost digits.
    _, turns = divided(places * torch.arange(frequencies, device=factory["device"]), length)
    angles = turns.to(factory["dtype"]) * (2 * math.pi / length)
    return angles.cos(), angles.sin()
