"""What a measurement ran on, for the head of its result file."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from to_finetune.training.record import package_versions


def machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU and the versions of what computes."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
