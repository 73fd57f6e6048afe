"""Which device computes, and in which precision."""

import contextlib
from typing import Any

import torch

from linsight.errors import LinsightError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA, else Apple's GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LinsightError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16 natively, where it is quicker than float32 and not slower."""
    # private names of PyTorch, some of them missing in some versions: then the answer is no
    checks = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks)


def pick_dtype(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The dtype of mixed precision, None for none, and one phrase about it."""
    if amp in _DTYPES:
        if amp == "fp16" and device.type == "cpu":
            raise LinsightError("amp=fp16 needs a GPU: use bf16 or off on the CPU")
        return _DTYPES[amp], f"{amp} mixed precision"
    if amp == "off":
        return None, "float32"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (_DTYPES["bf16"], "bf16 mixed precision") if native else (_DTYPES["fp16"], "fp16 mixed precision")
    if device.type == "cpu" and cpu_has_bf16():
        return _DTYPES["bf16"], "bf16 mixed precision"
    return None, "float32" + (", no native bf16" if device.type == "cpu" else "")


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
