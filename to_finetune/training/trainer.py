"""The Trainable Optimizers in any Hugging Face Trainer, through one mixin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.training_args import OptimizerNames

from to_finetune.errors import RunError, UsageError
from to_finetune.model.trained import (
    check_finite,
    holds_trained,
    is_restorable,
    load_trained,
    parameter_names,
    read_trained,
    save_trained,
    trained_tensors,
)
from to_finetune.optim import DiagonalTO, RankOneTO, TrainableOptimizer
from to_finetune.optim.checkpoint import load_state, load_weights, named, save_state, whole_weights
from to_finetune.optim.sharding import whole_parameter
from to_finetune.training.arguments import TrainableOptimizerArguments
from to_finetune.training.callbacks import ShortBackward
from to_finetune.training.layout import check_clipping, check_layout, check_processes
from to_finetune.training.optimizers import OPTIMIZERS, recommended_learning_rate, unwrapped, with_embeddings_apart
from to_finetune.training.proofs import EngagementProofs

STATE_NAME = "to_state"  # folder in a checkpoint

if TYPE_CHECKING:
    _Base = Trainer
else:  # the mixin goes before any Trainer class
    _Base = object


class TrainableOptimizerMixin(_Base):
    """Mixin to put before a `transformers.Trainer` class: ``class MyTrainer(TrainableOptimizerMixin, Trainer)``.

    Takes arguments that are a `TrainableOptimizerArguments`. Creates the optimizer that ``optim`` names, proves that
    it is the one that trains, logs its quantities, saves its state by the parameters' names, and, if asked to
    (``save_only_trained``), only the trained tensors of a model of which part is frozen.

    Attributes:
        engagement: the proofs, filled in while training.
    """

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.optimizer_cls_and_kwargs or self.optimizer
        if not (isinstance(self.args, TrainableOptimizerArguments) or given):
            optim = OptimizerNames(self.args.optim).value
            raise UsageError(
                f"{type(self).__name__} would train with {optim}: give it TOTrainingArguments, or your own arguments "
                "with TrainableOptimizerArguments before them."
            )
        if self.saves_part() and not is_restorable(self.accelerator.unwrap_model(self.model)):
            raise UsageError(
                f"save_only_trained=True: what trains in this {type(self.model).__name__} could not be put back, which "
                "takes a pretrained model with a name or one LoRA adapter. Leave it out, and the whole model is saved."
            )
        if self.args.learning_rate is None:
            self.args.learning_rate = recommended_learning_rate(self.model)
        expected, _ = self._class_and_options()
        is_class = isinstance(expected, type) and issubclass(expected, Optimizer)
        check_processes(self.args.world_size)
        check_layout(self.args, self.accelerator.state, self.is_sharded(), self.optimizer)
        self.engagement = EngagementProofs(expected if is_class else None)
        self.add_callback(self.engagement)
        self.add_callback(ShortBackward())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create Hugging Face's optimizer; a TO gets the parameter groups of `with_embeddings_apart`."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and isinstance(optimizer, TrainableOptimizer):
            groups = with_embeddings_apart(optimizer.param_groups, self.model)
            if len(groups) > len(optimizer.param_groups):
                cls, options = self._class_and_options()
                self.optimizer = optimizer = cls(groups, **options)
        return optimizer

    def _class_and_options(self) -> tuple[Any, dict[str, Any]]:
        """Return the optimizer's class (or factory) and keyword arguments: as given, else those of the arguments."""
        return self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Return the class that ``args.optim`` names and its keyword arguments; the TO names come first."""
        if isinstance(args, TrainableOptimizerArguments) and args.optim in OPTIMIZERS:
            return OPTIMIZERS[args.optim], {"lr": args.learning_rate, **args.to_options}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the estimate's relative error of the last step, the gradient's peak, and any skipped steps."""
        if "loss" in logs:
            optimizer = unwrapped(self.optimizer)
            if isinstance(optimizer, TrainableOptimizer):
                if skipped := int(optimizer.skipped_steps()):
                    logs["skipped_steps"] = skipped
                for key, value in (
                    ("estimate_error", optimizer.estimate_error()),
                    ("gradient_peak", optimizer.gradient_peak()),
                ):
                    if not value.isnan():
                        logs[key] = value.item()
        super().log(logs, start_time)

    def saves_part(self) -> bool:
        """Whether only the trained tensors are saved: it was asked for, and part of the model is frozen."""
        return getattr(self.args, "save_only_trained", False) and any(
            not p.requires_grad for p in self.model.parameters()
        )

    def is_sharded(self) -> bool:
        """Whether processes hold parts of the trained weights or of their state."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the trained weights, named as they are saved; if sharded, on process 0 only, and all must call it."""
        weights = self._whole_weights() if self.is_sharded() else None
        return trained_tensors(self.accelerator.unwrap_model(self.model), weights)

    def _whole_weights(self, frozen: bool = False) -> dict[str, Tensor]:
        """Return the whole trained weights by name, on process 0 only; with `frozen`, all weights and the buffers."""
        optimizer = self._by_name()
        weights = whole_weights(self.model_wrapped, optimizer) if optimizer else {}
        for name, p in named(self.model_wrapped).items():
            is_missing = optimizer is None if p.requires_grad else frozen
            if is_missing:
                whole = whole_parameter(p)
                if self.args.should_save:
                    weights[name] = whole.cpu()
        if frozen and self.args.should_save:
            kept = self.model.state_dict().keys()
            weights |= {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        return weights

    def _by_name(self) -> TrainableOptimizer | None:
        """Return the live DiagonalTO or RankOneTO, whose state is saved by parameter names; None for any other."""
        optimizer = unwrapped(self.optimizer)
        return optimizer if isinstance(optimizer, (DiagonalTO, RankOneTO)) else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Hugging Face does; gather sharded weights one after the other, and none that are not saved."""
        if not self.is_sharded():
            super().save_model(output_dir, _internal_call)
            return
        saves_adapters = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        self._save(output_dir, self._whole_weights(frozen=not (self.saves_part() or saves_adapters)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.saves_part():
            check_finite(dict(self.model.named_parameters()) if state_dict is None else state_dict)
            with without_token(self.args):
                super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:  # Hugging Face calls this in every process
            return
        folder = str(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        save_trained(model, folder, trained_tensors(model, state_dict))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        with without_token(self.args):
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the state by the parameters' names, which any layout reads; other optimizers' as Hugging Face does."""
        optimizer = self._by_name()
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        whole = not self.saves_part()  # no other file has these weights as any layout reads them
        save_state(self.model_wrapped, optimizer, os.path.join(output_dir, STATE_NAME), weights=whole)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each process's last file, and wait for all: trainer_state.json, next, marks a complete checkpoint."""
        super()._save_rng_state(output_dir)
        self.args.distributed_state.wait_for_everyone()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as Hugging Face does, but do not look in DeepSpeed's own files for state that is saved by name."""
        ours = self.is_deepspeed_enabled and os.path.isdir(os.path.join(str(resume_from_checkpoint), STATE_NAME))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if ours else resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            check_clipping(self.model_wrapped, self.args)
        if ours:
            self._load_from_checkpoint(str(resume_from_checkpoint), self.model_wrapped)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch as Hugging Face does, unless a finished run is resumed, which would take one more step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the trained weights; the frozen ones too if the model is saved whole and no process holds only shards.

        Sharded weights that `_by_name`'s optimizer trains are loaded with its state.
        """
        folder = str(resume_from_checkpoint)
        if self._loads_trained(folder):
            self._load_trained(folder)
        elif not (self.is_sharded() and os.path.isdir(os.path.join(folder, STATE_NAME))):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._load_optimizer_states(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's has it inside
        if checkpoint is None or self.optimizer is None or schedule is None:
            return
        rates = schedule.get_last_lr()
        if isinstance(schedule, LambdaLR):  # which another number of steps has changed
            rates = [
                rate * f(schedule.last_epoch) for rate, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
        for group, rate in zip(unwrapped(self.optimizer).param_groups, rates, strict=False):
            group["lr"] = rate
        schedule._last_lr = rates  # which is logged

    def _load_optimizer_states(self, checkpoint: str | None) -> None:
        state = os.path.join(str(checkpoint), STATE_NAME)
        optimizer = self._by_name()
        is_ours = os.path.isdir(state)
        is_theirs = os.path.isfile(os.path.join(str(checkpoint), OPTIMIZER_NAME))  # of a plain Trainer
        if checkpoint is None or (not is_ours and (optimizer is None or is_theirs)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if optimizer is None or not is_ours:
            live = type(unwrapped(self.optimizer)).__name__
            raise RunError(f"{checkpoint} holds no state of {live}'s, which would begin anew in the middle of the run.")
        assert self.lr_scheduler is not None
        try:
            load_state(self.model_wrapped, optimizer, state, weights=not self.saves_part())
            self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
        except (RuntimeError, OSError, CheckpointException, UnpicklingError) as error:
            reason = shorten(str(error), 300)
            raise RunError(f"{checkpoint} cannot be resumed from, it is damaged or another run's: {reason}") from error

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self._loads_trained(best):
            self._load_trained(best)
        elif self.is_sharded() and (optimizer := self._by_name()):
            load_state(self.model_wrapped, optimizer, os.path.join(best, STATE_NAME))
        else:
            super()._load_best_model()

    def _loads_trained(self, folder: str) -> bool:
        """Whether the trained weights are read from our file: if sharded, only where `_by_name` has an optimizer."""
        return holds_trained(folder) and self.saves_part() and (self._by_name() is not None or not self.is_sharded())

    def _load_trained(self, folder: str) -> None:
        optimizer = self._by_name() if self.is_sharded() else None
        model = self.accelerator.unwrap_model(self.model)
        parameters, names = named(model), parameter_names(model)
        trained = {saved for saved, name in names.items() if parameters[name].requires_grad}
        tensors = read_trained(folder)[0]
        if tensors.keys() != trained:
            raise RunError(f"{folder} holds {len(tensors)} trained tensors, not the {len(trained)} that train here.")
        if optimizer is None:
            load_trained(model, folder)
        else:
            load_weights(self.model_wrapped, optimizer, {names[name]: tensor for name, tensor in tensors.items()})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write Hugging Face's card only if the folder is a whole model: it shows how to load it as one."""
        if not self.saves_part():
            super().create_model_card(*args, **kwargs)


class TOTrainer(TrainableOptimizerMixin, Trainer):
    """`transformers.Trainer` with the Trainable Optimizers."""


@contextmanager
def without_token(args: TrainingArguments) -> Iterator[None]:
    """Hide the hub token while `args` are written to a file that is shared with the weights."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token
