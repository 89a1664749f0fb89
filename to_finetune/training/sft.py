"""TRL's SFTTrainer with the mixin, and what a fine-tuning run adds: uncut rows, speed, a loss over tokens."""

from __future__ import annotations

import time
from copy import copy
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from trl import SFTTrainer

from to_finetune.data.preview import IGNORED
from to_finetune.training.trainer import TrainableOptimizerMixin


class TOSFTTrainer(TrainableOptimizerMixin, SFTTrainer):
    """`trl.SFTTrainer` with the Trainable Optimizers, its speed in the log, and a held-out loss over tokens.

    Hugging Face averages the batches' mean losses, so that its loss depends on the batch size and on the number of
    processes.

    Attributes:
        uncut: the tokenized rows at full length, under "train" and "eval", to tell what was cut.
    """

    _last_log: tuple[float, float] = (0.0, 0.0)  # its time, and the tokens until then

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.uncut: dict[str, Any] = {}
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
        super().__init__(model, *args, **kwargs)
        for p, data in trained:
            if p.dtype != data.dtype:  # TRL casts what trains on a quantised base to bfloat16
                p.data = data.to(p.device)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Run TRL's preparation in two steps: tokenize the rows, then cut or pack them.

        Held-out rows are filled up to divide evenly among processes: accelerate would repeat some, which would count,
        and with `dataloader_drop_last` Hugging Face leaves some out.
        """
        whole = copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        rows = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        self.uncut[dataset_name] = rows
        rows = super()._prepare_dataset(rows, processing_class, args, packing, None, dataset_name)
        is_uneven = args.world_size > 1 or args.dataloader_drop_last
        if dataset_name != "train" and is_uneven and isinstance(rows, Dataset):
            return filled_up(rows, args.world_size * args.eval_batch_size)
        return rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the tokens per second of all processes since the last log; time spent in evaluations does not count."""
        if "loss" in logs:
            before, tokens_before = self._last_log
            tokens = self._total_train_tokens - tokens_before
            logs["tokens_per_second"] = tokens / (time.perf_counter() - before)
        self._last_log = (time.perf_counter(), self._total_train_tokens)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Replace the loss with the mean over all held-out tokens of all processes."""
        self._held_out = torch.zeros(2, dtype=torch.float64)  # the sum of the losses, and the tokens
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        total, tokens = self.accelerator.reduce(self._held_out.to(self.args.device, torch.float32)).tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; in an evaluation, also add to the sums of `evaluation_loop`."""
        if self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().cpu()
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = (result[0] if isinstance(result, tuple) else result).detach().cpu()
        if tokens:  # else there is no mean loss
            self._held_out += torch.stack([loss * tokens, tokens])
        return result

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._last_log = (time.perf_counter(), self._total_train_tokens)
        return super().train(*args, **kwargs)


def filled_up(rows: Dataset, size: int) -> Dataset:
    """Append rows without a loss to prepared ones, up to a multiple of `size`."""
    missing = -len(rows) % size
    if not missing:
        return rows
    without_loss = {**rows[0], "labels": [IGNORED] * len(rows[0]["labels"])}
    return concatenate_datasets([rows, Dataset.from_list([without_loss] * missing, features=rows.features)])
