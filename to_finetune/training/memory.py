"""A run's planned memory, and the memory that it was measured to take."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from to_finetune.planning import Plan, plan_line
from to_finetune.training.arguments import FinetuneArguments, ModelArguments
from to_finetune.training.plan import plan_live
from to_finetune.units import format_size

KINDS = {
    "allocated": "measured, beside CUDA's own",
    "resident": "measured: what the process grew by, libraries included",
}


class RunMemory(TrainerCallback):
    """Records the planned and the measured memory of a run. Create it before the model is loaded.

    Attributes:
        values: for the run's record. ``planned``: bytes of the plan's parts, or None, and ``not_planned`` says why.
            ``measured``: bytes taken by the process that took the most, or None. ``kind``: on a GPU
            "allocated", what torch handed out, without the CUDA context and the allocator's unused blocks; on the CPU
            "resident", by how much the process has grown, for whatever reason.
    """

    def __init__(self, device: torch.device) -> None:
        kind = "allocated" if device.type == "cuda" else "resident"
        self.values: dict[str, Any] = {"planned": None, "not_planned": None, "measured": None, "kind": kind}
        self._device = device
        self._resident, self._peak = psutil.Process().memory_info().rss, _peak_resident()

    def plan(self, model_args: ModelArguments, args: FinetuneArguments) -> Text:
        """Plan the run's memory, and return the plan in one line."""
        planned = plan_live(model_args, args)
        if not isinstance(planned, Plan):
            self.values["not_planned"] = planned
            return Text(f"Memory: not planned. {planned}", "dim")
        self.values["planned"] = planned.parts()
        return plan_line(planned)

    def in_words(self) -> str:
        """Return the planned and the measured memory in words."""
        planned, measured = self.values["planned"], self.values["measured"]
        words = []
        if planned:
            words.append(f"{format_size(sum(planned.values()) - planned['context'])} planned")
        if measured:
            words.append(f"{format_size(measured)} {KINDS[self.values['kind']]}")
        return ", ".join(words)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        most = torch.tensor(self._taken(), device=self._device)
        if dist.is_initialized():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        if most > 0:
            self.values["measured"] = int(most)

    def _taken(self) -> int:
        """Return the bytes taken; 0 if not known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = _peak_resident()
        return peak - self._resident if peak > self._peak else 0  # else an earlier run of this process took more


def _peak_resident() -> int:
    """Return the peak resident bytes in this process's lifetime; 0 if the system does not report them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
