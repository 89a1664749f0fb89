"""The machine and the package versions of a run or a measurement, for its record."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("to-finetune", "torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "deepspeed", "triton"),
    *("datasets", "safetensors", "numpy", "scikit-learn"),
)


def machine() -> dict[str, Any]:
    """Return the processor, cores, threads, GPU, system and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def file_word(name: str) -> str:
    """Return a device's name as part of a file name, such as "nvidia-h200"."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
