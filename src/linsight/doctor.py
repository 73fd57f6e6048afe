"""The machine as plain data: versions, devices, the compiler, and which form of each operator runs."""

import importlib.util
import os
import platform
import re
import shutil
from importlib import metadata
from typing import Any

import torch

from linsight import __version__
from linsight.errors import install_line
from linsight.ops import TRITON, forms
from linsight.runtime.device import cpu_bf16, list_devices


def diagnose() -> dict[str, Any]:
    """Everything `linsight doctor` shows."""
    devices = list_devices()
    return {
        "linsight": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": _packages(),
        "devices": devices,
        "cpu": _cpu(),
        "triton": _triton(devices[0]["type"]),
        "compiler": _compiler(),
        "forms": [form._asdict() for form in forms(devices[0]["type"])],
    }


def _packages() -> list[dict[str, str]]:
    """One row for each dependency: the extra that asks for it, its version or "", and how to get it."""
    rows: dict[str, dict[str, str]] = {}
    for line in sorted(_requirements(), key=lambda line: "extra == 'dev'" in line):  # dev repeats other extras
        name = _match(r"[\w.-]+", line)
        extra = _match(r"(?<=extra == ['\"])\w+", line)
        if name in ("linsight", *rows):
            continue
        version = version_of(name)
        get = "" if version else install_line(extra) if extra else f"pip install '{name}'"
        rows[name] = {"name": name, "extra": extra, "version": version, "get": get}
    return list(rows.values())


def _requirements() -> list[str]:
    try:
        return metadata.requires("linsight") or []
    except metadata.PackageNotFoundError:  # run from its source folder
        return ["torch", "torchvision", "timm"]


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group() if found else ""


def version_of(package: str) -> str:
    """The installed version of a package, "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> dict[str, Any]:
    """The CPU. bf16: the instructions that make bfloat16 quick; "" where it is emulated."""
    return {
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": cpu_bf16(),
    }


def _triton(device: str) -> dict[str, Any]:
    """The state of Triton. used: whether any operator takes it on `device`."""
    if importlib.util.find_spec("triton") is None:
        return {"version": "", "used": False, "why": "not installed: no operator needs it"}
    used = [form.operator for form in forms(device) if form.form == TRITON]
    why = f"{len(used)} operators take it on {device}" if used else f"not made for {device}: no operator takes it"
    return {"version": version_of("triton"), "used": bool(used), "why": why}


def _compiler() -> dict[str, Any]:
    """The C++ compiler that torch.compile's CPU code needs."""
    path = next((found for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if (found := _which(name))), "")
    return {"path": path, "why": "" if path else "torch.compile on the CPU needs a C++ compiler: install g++ or clang"}


def _which(name: str | None) -> str:
    return (shutil.which(name) or "") if name else ""
