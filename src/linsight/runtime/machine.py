"""The machine as plain data: system, processor, memory and GPUs."""

import contextlib
import os
import platform
from typing import Any

from .device import list_devices


def describe_machine() -> dict[str, Any]:
    """System, name and cores of the CPU, GiB of memory (None where the system does not tell), and names of GPUs."""
    devices = list_devices()
    memory = None
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on every system
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "system": platform.platform(terse=True),
        "cpu": devices[-1]["name"],
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "gpus": [row["name"] for row in devices[:-1]],
    }
