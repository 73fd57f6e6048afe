"""The least that a step can cost: its operations and bytes, and what the machine does at its best."""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .rounds import timed

PEAKS = ("peak_tflops", "peak_gb_per_sec")


class Traffic(TorchDispatchMode):
    """Sums, while entered, the bytes of the inputs and outputs of all operators that are no views.

    That is what a step moves if nothing stays in a cache and nothing is fused. `fused` names our own operators seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.fused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            self.bytes += sum(map(size_of, tensors(args, kwargs))) + sum(map(size_of, tensors(out)))
        if func.namespace == "linsight":
            self.fused.add(func._schema.name.partition("::")[2])
        return out


def tensors(*trees: Any) -> list[Tensor]:
    """All tensors in nested arguments, each once."""
    leaves = itertools.chain.from_iterable(map(tree_leaves, trees))
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


def size_of(tensor: Tensor) -> int:
    """The bytes of a tensor; of an expanded one, those that exist."""
    whole = tensor.numel() * tensor.element_size()
    return min(whole, tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else whole


def least_bytes(inputs: list[Tensor], module: nn.Module | None, output: Tensor, train: bool) -> int:
    """Bytes that an operator must read and write: inputs, parameters, output; then its gradient in, and theirs out."""
    given = sum(map(size_of, inputs)) + sum(size_of(p) for p in (module.parameters() if module else ()))
    out = size_of(output)
    return 3 * given + 2 * out if train else given + out


def measure_peaks(device: torch.device, dtype: torch.dtype | None) -> dict[str, float]:
    """The best of a few large products and of a few large copies, on this machine, now.

    Products are in this precision, or in float32 where that is quicker, as on a CPU that emulates bfloat16.
    """
    side, room = (8192, 2**30) if device.type == "cuda" else (1536, 2**28)
    source = torch.zeros(room // 4, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        copied = best_of(lambda: target.copy_(source), device)
        product = min(_product(side, each, device) for each in {dtype or torch.float32, torch.float32})
    return dict(zip(PEAKS, (2 * side**3 / product / 1e12, 2 * room / copied / 1e9), strict=True))


def _product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return best_of(lambda: torch.mm(a, b, out=out), device)


def best_of(act: Callable[[], Any], device: torch.device, seconds: float = 0.5) -> float:
    """The shortest time of `act` in seconds, of those that fit in so many."""
    timed(act, 1, device)
    end, found = time.perf_counter() + seconds, math.inf
    for _ in range(100):
        found = min(found, timed(act, 1, device))
        if time.perf_counter() > end:
            break
    return found


def roofline(facts: Mapping[str, Any], peaks: Mapping[str, Any], seconds: float) -> tuple[float, str] | None:
    """Percent of the machine's limit that a step reaches, and which limit that is: "operations" or "bytes".

    The limit is the longer of two times: operations at the peak of large products, bytes at that of large copies.
    """
    if not all(facts.get(key) for key in ("flops", "bytes")) or not all(peaks.get(key) for key in PEAKS):
        return None
    least = {
        "operations": facts["flops"] / (peaks["peak_tflops"] * 1e12),
        "bytes": facts["bytes"] / (peaks["peak_gb_per_sec"] * 1e9),
    }
    limit = max(least, key=least.__getitem__)
    return 100 * least[limit] / seconds, limit
