"""Estimate how long a run takes and what it costs, from its FLOPs and the GPU's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.planning.memory import Plan

# TFLOP/s of dense bfloat16 matrix products with float32 accumulation, from the data sheets.
GPUS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}
UTILISATION = 0.4  # assumed fraction of it that training reaches; small batches and slow links reach less


@dataclass(frozen=True)
class Speed:
    """An estimate of a run's speed.

    Attributes:
        tokens_per_second: over all GPUs, padding included.
        seconds: duration of the training; None if its length is not known.
        cost: in the price's currency; None without a price or a length.
    """

    tokens_per_second: float
    seconds: float | None
    cost: float | None


def check_gpu(gpu: str) -> None:
    """Raise unless the GPU is in the table.

    Raises:
        UsageError: naming the known GPUs.
    """
    if gpu not in GPUS:
        raise UsageError(f"gpu={gpu!r} is not known.{did_you_mean(gpu, GPUS)} It takes {', '.join(GPUS)}.")


def speed(plan: Plan, gpu: str, tokens: int | None = None, price_per_hour: float | None = None) -> Speed:
    """Estimate the planned run's speed on one kind of GPU, without the optimizer's step and communication.

    Args:
        plan: the run's plan.
        gpu: a key of `GPUS`.
        tokens: of the whole training, padding included: optimizer steps times `Settings.tokens_per_step`.
        price_per_hour: of one GPU.

    Raises:
        UsageError: for a GPU that is not in the table.
    """
    check_gpu(gpu)
    processes = plan.settings.processes
    rate = processes * GPUS[gpu] * 1e12 * UTILISATION / plan.flops_per_token
    seconds = None if tokens is None else tokens / rate
    cost = None if seconds is None or price_per_hour is None else processes * price_per_hour * seconds / 3600
    return Speed(rate, seconds, cost)
