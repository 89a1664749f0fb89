"""What a run or a measurement ran on, for the head of its record."""

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
    """Processor, cores, threads, GPU and the versions of what computes."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python's, and those of the installed packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def file_word(name: str) -> str:
    """The name of a device as a part of a file's name, as "nvidia-h200"."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
