"""The proofs of engagement: a run stops if it does not train the requested weights with the requested optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from to_finetune.errors import RunError
from to_finetune.model.trained import read_trained
from to_finetune.optim import TrainableOptimizer
from to_finetune.optim.sharding import all_reduce, local, reshard
from to_finetune.training.optimizers import unwrapped

NOTHING_MOVED = "No trained weight moved in the first steps: no gradient reaches them, or the rate is too low."


class EngagementProofs(TrainerCallback):
    """Checks the live optimizer before the first step, and which tensors have moved after it and at the end.

    Args:
        expected: the optimizer class that was asked for; None where only Hugging Face knows it (a factory).

    Attributes:
        proofs: what has been proven so far, for the run's record.
    """

    def __init__(self, expected: type[Optimizer] | None) -> None:
        self.expected = expected
        self.proofs: dict[str, Any] = {}
        self._before: dict[str, int] = {}
        self._steps = 0
        self._skipped = 0
        self._began_at = 0
        self._can_move = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # else a checkpoint says how often to save and to evaluate
        self.proofs, self._steps = {}, 0  # of this training: hyperparameter_search calls train() once a trial
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        live = unwrapped(optimizer)
        self.proofs["live_optimizer"] = check_optimizer(live, self.expected)
        reshard(model)
        self.proofs["trained_tensors"] = check_trained_parameters(model, optimizer)
        if isinstance(live, TrainableOptimizer):
            layouts = [layout for group in live.param_groups for _, layout in live.layouts(group) if layout.shards]
            if layouts:
                self.proofs["sharded_tensors"] = sum(len(layout.runs) for layout in layouts)
            self._skipped = int(live.skipped_steps())
        self._before = fingerprints(model)
        self._began_at = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note whether the gradients are all zero, as of rewards that are all the same: nothing has to move then."""
        if "moved_after_first_step" not in self.proofs:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.requires_grad and p.grad is not None]
            self._can_move = not gradients or any(local(gradient).any() for gradient in gradients)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "moved_after_first_step" in self.proofs:
            return
        moved = self._moved(kwargs["model"], args)
        if self._can_move and not self._was_skipped(kwargs["optimizer"]):
            self._steps += 1
        if moved:
            self.proofs["moved_after_first_step"] = len(moved)
            self.proofs["frozen_tensors_unmoved"] = len(self._before) - self.proofs["trained_tensors"]
        elif self._steps == 2:  # the first step of a warm-up has rate 0, so nothing moves
            raise RunError(NOTHING_MOVED)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = {name for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        if "moved_after_first_step" not in self.proofs and not self._began_at and state.global_step >= state.max_steps:
            raise RunError(NOTHING_MOVED)  # a whole run of one step, or of none
        moved = self._moved(kwargs["model"], args)
        if not self._began_at:  # what moved before a resume is not known
            self.proofs["never_moved"] = sorted(trained - moved)

    def _was_skipped(self, optimizer: Any) -> bool:
        """Whether float16's loss scaler, or the TO itself, took no step because a gradient was not finite."""
        if getattr(optimizer, "step_was_skipped", False):
            return True
        live = unwrapped(optimizer)
        before, self._skipped = self._skipped, int(live.skipped_steps()) if isinstance(live, TrainableOptimizer) else 0
        return self._skipped > before

    def _moved(self, model: nn.Module, args: TrainingArguments) -> set[str]:
        """Return the names of the trained tensors that differ from the start.

        Raises:
            RunError: when a frozen tensor does. With `use_vllm`, adapted ones may: for vLLM, TRL merges the adapters
                into them and takes them out again, which rounds.
        """
        rounds = getattr(args, "use_vllm", False)
        reshard(model)
        moved = {name for name, value in fingerprints(model).items() if value != self._before[name]}
        still = [name for name, p in model.named_parameters() if not p.requires_grad]
        frozen = [name for name in still if name in moved and not (rounds and ".base_layer." in name)]
        if frozen:
            raise RunError(
                f"{len(frozen)} frozen tensors changed, {frozen[0]} first: something else than --optim writes."
            )
        return moved.difference(still)


def check_optimizer(live: Optimizer, expected: type[Optimizer] | None) -> str:
    """Return the live optimizer's class name.

    Raises:
        RunError: when it is not the class that was asked for.
    """
    name = type(live).__name__
    if expected is not None and not isinstance(live, expected):
        raise RunError(
            f"The live optimizer is {name}, not {expected.__name__}, which was asked for. Under DeepSpeed, remove the "
            "'optimizer' block of its JSON, and with offload set \"zero_force_ds_cpu_optimizer\": false there; do not "
            "pass optimizers= to the Trainer, use optim= or the mixin."
        )
    return name


def held_parameters(optimizer: Any) -> list[Tensor]:
    """Return the model's parameters that an optimizer steps, even if DeepSpeed has put others in their place."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)  # of ZeRO 1-2, 3
        if groups:
            return [p for group in groups for p in group]
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_trained_parameters(model: nn.Module, optimizer: Any) -> int:
    """Return the number of trained tensors.

    Raises:
        RunError: when the optimizer's tensors are not exactly the model's that require a gradient.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise RunError("Nothing trains: no parameter of the model requires a gradient.")
    held = {id(p) for p in held_parameters(optimizer)}
    missing, extra = set(trained) - held, held - set(trained)
    if missing or extra:
        first = f", {trained[next(iter(missing))]} first" if missing else ""
        raise RunError(
            f"The optimizer holds {len(extra)} tensors that do not train and misses {len(missing)} that do{first}."
        )
    return len(trained)


@torch.no_grad()
def fingerprints(model: nn.Module) -> dict[str, int]:
    """Return a 64-bit sum of each parameter's bits, over all processes: a change of any one element changes it."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def bits(p: Tensor) -> Tensor:
        p = getattr(p, "ds_tensor", p)  # under ZeRO-3, this process's shard
        p = local(p).detach()
        if p.ndim == 1 and p.is_floating_point() and p.itemsize == 2:
            p = p.float()  # bitsandbytes casts biases to the dtype of the input, which keeps their values
        return p.contiguous().view(-1).view(integer[p.element_size()]).sum(dtype=torch.int64)

    names, parts = zip(*((name, bits(p)) for name, p in model.named_parameters()), strict=True)
    sums = torch.stack([part.to(parts[0].device) for part in parts])
    if dist.is_initialized() and dist.group.WORLD is not None:
        sums = all_reduce(sums, (dist.group.WORLD,))
    return dict(zip(names, sums.tolist(), strict=True))


def check_saved(live: Mapping[str, Tensor], folder: str | os.PathLike[str], trained: int) -> int:
    """Read the saved trained tensors back, compare them with the live ones bit for bit, and return their bytes.

    Args:
        live: the trained tensors by the names that they are saved under.
        folder: where they were saved.
        trained: the number of tensors that train.

    Raises:
        RunError: when a tensor is missing or differs.
    """
    saved, _ = read_trained(folder)
    if saved.keys() != live.keys() or len(saved) != trained:
        raise RunError(f"{folder}: {len(saved)} tensors were saved where {trained} train.")
    for name, tensor in saved.items():
        if not torch.equal(tensor, live[name].detach().cpu()):
            raise RunError(f"{folder}: {name} does not read back as it was saved.")
    return sum(tensor.nbytes for tensor in saved.values())
