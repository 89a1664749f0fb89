"""How long a run takes and what it costs, from its arithmetic and what a GPU is sold to do."""

from __future__ import annotations

from dataclasses import dataclass

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.planning.memory import Plan

# Matrix products in bfloat16, dense, summed up in float32: 1e12 a second, from the data sheets.
GPUS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}
UTILISATION = 0.4  # of it, reached in training: an assumption; small batches and slow links reach less


@dataclass(frozen=True)
class Speed:
    """An estimate.

    Attributes:
        tokens_per_second: of all GPUs, padding included.
        seconds: of the training; None where its length is not known.
        cost: in the price's currency; None without a price or a length.
    """

    tokens_per_second: float
    seconds: float | None
    cost: float | None


def check_gpu(gpu: str) -> None:
    """Refuse a GPU that is not in the table.

    Raises:
        UsageError: naming those that are.
    """
    if gpu not in GPUS:
        raise UsageError(f"gpu={gpu!r} is not known.{did_you_mean(gpu, GPUS)} It takes {', '.join(GPUS)}.")


def speed(plan: Plan, gpu: str, tokens: int | None = None, price_per_hour: float | None = None) -> Speed:
    """How fast the planned run is on GPUs of a kind; the optimizer's step and communication are not counted.

    Args:
        plan: of the run.
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
