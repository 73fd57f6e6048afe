"""Devices: which there are, which one computes, and in which precision."""

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from linsight.errors import LinsightError

from .text import shorten

_SAID = 160  # letters of what torch says: of a device that it was not built for, it lists all that it knows
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA, else Apple's GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torch gives up
            device = torch.device(name)
            torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it keeps no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = shorten(str(error).splitlines()[0].partition(". ")[0].rstrip("."), _SAID)
        raise LinsightError(f"device '{name}' cannot be used: {said} (auto takes the best there is)") from error
    return device


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
    if device.type == "cpu" and cpu_bf16():
        return _DTYPES["bf16"], "bf16 mixed precision"
    return None, "float32" + (", no native bf16" if device.type == "cpu" else "")


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """A context in which operations give the same numbers every time, where that is wanted."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def list_devices() -> list[dict[str, Any]]:
    """Type, name and memory of each device: first the one that commands choose, last the CPU."""
    rows: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append({"type": "cuda", "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        rows.append({"type": "mps", "name": platform.processor() or "Apple GPU", "memory_gib": None})
    rows.append({"type": "cpu", "name": _cpu_flags().get("cpu_name") or platform.machine(), "memory_gib": None})
    return rows


def cpu_bf16() -> str:
    """The instructions by which the CPU multiplies in bfloat16, quicker than in float32; "" where it emulates that."""
    return ", ".join(name for name, present in _cpu_flags().items() if "bf16" in name and present is True)


def _cpu_flags() -> dict[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}


def is_out_of_memory(error: BaseException) -> bool:
    """True for what is raised where memory has no room, on any device: on the CPU it is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
