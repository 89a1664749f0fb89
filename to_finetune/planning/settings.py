"""The inputs of a plan: a model without its weights, which parameters train, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.optim import Optimizer
from transformers import PretrainedConfig

from to_finetune.errors import UsageError, at_least_one, did_you_mean
from to_finetune.model.load import load_config
from to_finetune.model.quantized import Quantization
from to_finetune.optim import DiagonalTO

# The files of configs/accelerate; one process trains the same way under `ddp`.
LAYOUTS = ("ddp", "multi_node", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


class CannotSay(UsageError):
    """The plan would be a guess: the optimizer's state or the model's activations cannot be worked out."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A model described by its configuration alone."""

    name: str
    config: PretrainedConfig
    trust_remote_code: bool = False


def load_blueprint(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Blueprint:
    """Load a model's configuration from a hub name, a folder with a config.json, or such a file; no weights needed.

    Raises:
        UsageError: if there is none.
    """
    return Blueprint(name, load_config(name, revision, trust_remote_code), trust_remote_code)


@dataclass(frozen=True)
class Lora:
    """LoRA adapters, as peft makes them, that train in place of the model's weights.

    Attributes:
        rank: `lora_r`.
        targets: `lora_target_modules`; None for peft's own choice.
        dropout: `lora_dropout`.
    """

    rank: int = 16
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Workload:
    """One micro-batch on one GPU: all that activations and FLOPs depend on.

    Attributes:
        model: from `load_blueprint`.
        unfrozen_parameters: patterns as `select_trainable` takes them; None trains everything.
        rows: `per_device_train_batch_size`.
        length: tokens per row; every row is assumed to be this long.
        joined: whether all rows are joined into one, as with `packing` and `padding_free`.
        mixed_precision: "bfloat16" or "float16" as with --bf16 and --fp16; the trained weights are then float32.
        dtype: of the loaded weights; None for `mixed_precision`'s, or float32 without it.
        checkpointing: `gradient_checkpointing`.
        attention: `attn_implementation`.
        quantization: of the frozen linear layers except the head: bitsandbytes' int8 ("8bit") or nf4 ("4bit").
        lora: adapters, which train in place of `unfrozen_parameters`.
        device: "cuda", or "cpu", whose kernels need more memory.
    """

    model: Blueprint
    unfrozen_parameters: tuple[str, ...] | None = None
    rows: int = 8
    length: int = 1024
    joined: bool = False
    mixed_precision: Literal["bfloat16", "float16"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    checkpointing: bool = False
    attention: str | None = None
    quantization: Quantization | None = None
    lora: Lora | None = None
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def loaded_dtype(self) -> str:
        return self.dtype or self.mixed_precision or "float32"


@dataclass(frozen=True)
class Settings:
    """The settings of a run that determine its memory.

    Attributes:
        work: a micro-batch.
        accumulation: `gradient_accumulation_steps`.
        optimizer: the optimizer class, as `Trainer.get_optimizer_cls_and_kwargs` returns it.
        optimizer_options: its keyword arguments.
        layout: one of `LAYOUTS`.
        processes: number of GPUs over all machines.
        max_steps: total optimizer steps, with which FullTO's state grows; None if not known.
    """

    work: Workload
    accumulation: int = 1
    optimizer: type[Optimizer] = DiagonalTO
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "ddp"
    processes: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(
                f"layout={self.layout!r} is not known.{did_you_mean(self.layout, LAYOUTS)} It takes "
                f"{', '.join(LAYOUTS)}."
            )
        if self.work.quantization and self.is_sharded:
            raise CannotSay(
                f"A {self.work.quantization} base under {self.layout} cannot be planned; plan it under ddp."
            )
        at_least_one(
            per_device_train_batch_size=self.work.rows,
            gradient_accumulation_steps=self.accumulation,
            max_length=self.work.length,
            num_processes=self.processes,
        )

    @property
    def is_deepspeed(self) -> bool:
        return self.layout.startswith("zero")

    @property
    def is_sharded(self) -> bool:
        return self.is_deepspeed or self.layout == "fsdp2"

    @property
    def is_offloaded(self) -> bool:
        return self.layout.endswith("offload")

    @property
    def passes(self) -> str:
        """The layout that stands for all those with the same forward and backward passes."""
        shared = {"multi_node": "ddp", "zero2_offload": "zero2", "zero3": "zero2", "zero3_offload": "zero2"}
        return shared.get(self.layout, self.layout)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all processes, padding included."""
        return self.work.rows * self.work.length * self.accumulation * self.processes
