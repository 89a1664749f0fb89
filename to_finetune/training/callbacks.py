"""Callbacks of the training: a clear terminal, a stop on NaN, a checkpoint on Ctrl-C."""

from __future__ import annotations

import math
import signal
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from to_finetune.errors import RunError
from to_finetune.signals import on_stop

# key in the log -> how a line of the terminal shows it
COLUMNS = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "|g| {:.2e}",
    "estimate_error": "estimate error {:.3f}",
    "gradient_peak": "peak {:.2f}",
    "skipped_steps": "{} steps skipped",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class TerminalLines(TrainerCallback):
    """Prints one short line per log, for a terminal or a log file."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = [form.format(logs[key]) for key, form in COLUMNS.items() if logs and key in logs]
        if shown and state.is_world_process_zero:
            step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            self.write("  ".join([step, *shown]))

    def write(self, line: str) -> None:
        print(line, flush=True)


class TerminalProgress(TerminalLines, ProgressCallback):
    """Prints the lines of `TerminalLines` above Hugging Face's progress bar."""

    def write(self, line: str) -> None:
        if self.training_bar is None:
            super().write(line)
        else:
            self.training_bar.write(line)


class ShortBackward(TrainerCallback):
    """Ends the backward pass at the lowest trained layer, also under gradient checkpointing.

    There Hugging Face makes the embedding's output require a gradient, which only reentrant checkpoints need: the
    frozen layers at the bottom would be recomputed and differentiated for nothing.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        on = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
        names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
        can = hasattr(kwargs["model"], "disable_input_require_grads")
        if on and can and not any((getattr(args, name, None) or {}).get("use_reentrant") for name in names):
            kwargs["model"].disable_input_require_grads()


class LogBeforeSave(TrainerCallback):
    """Logs the loss whenever a checkpoint is saved: a resumed run does not know the steps since the last log."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or (control.should_save and args.logging_strategy != "no")

    on_epoch_end = on_step_end


class WholeRuntime(TrainerCallback, ExportableState):
    """Makes the logged ``train_runtime`` cover the whole run, including the seconds before a resume."""

    def __init__(self) -> None:
        self._before, self._began = 0.0, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()
        callbacks: Any = state.stateful_callbacks  # after a resume those of the checkpoint, which may lack this
        before = callbacks.setdefault(type(self).__name__, self.state())
        self._before = before["attributes"]["seconds"] if state.global_step else 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.log_history[-1]["train_runtime"] += self._before

    def state(self) -> dict[str, Any]:
        """Return the state for Hugging Face to save in a checkpoint's trainer_state.json."""
        return {"args": {}, "attributes": {"seconds": self._before + time.perf_counter() - self._began}}


class StopOnNonFinite(TrainerCallback):
    """Stops a run at the first log with a NaN or infinite loss; the last step is always logged."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for key in ("loss", "eval_loss", "train_loss"):
            value = (logs or {}).get(key, 0.0)
            if not math.isfinite(value):
                raise RunError(
                    f"{key} is {value} at step {state.global_step}: the run has diverged. Lower --learning_rate "
                    "or alpha. A checkpoint that was saved before it is still good."
                )


class SaveOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second signal stops at once.

    Attributes:
        received: the signal that came to this process, or None.
        stopped: the signal that stopped the run, or None; the same in all processes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped: signal.Signals | None = None
        self._handler = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handler.enter_context(on_stop(self._receive))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._any_process_received(args):
            self.stopped = self.received or signal.SIGTERM
            control.should_save = True
            control.should_training_stop = True
            # Else Hugging Face would replace these weights with the best ones, and delete the checkpoint.
            args.load_best_model_at_end = False
            args.save_total_limit = max(args.save_total_limit, 2) if args.save_total_limit else None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the previous signal handlers."""
        self._handler.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: saving a checkpoint after this step; once more to stop at once.", flush=True)
        self.close()

    def _any_process_received(self, args: TrainingArguments) -> bool:
        """Whether any process got a signal: all must stop at the same step, but it may reach them at different ones."""
        if args.world_size == 1:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)
