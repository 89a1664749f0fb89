"""The flags of a run: the model's, the data's, and Hugging Face's own with the Trainable Optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from to_finetune.errors import UsageError, at_least_one, did_you_mean
from to_finetune.model.quantized import Quantization
from to_finetune.model.select import chosen_patterns
from to_finetune.training.optimizers import (
    OPTIMIZERS,
    check_options,
    optimizer_options,
    parse_optim_args,
)

WITHOUT_OPTIONS = (  # Hugging Face ignores their optim_args
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
)


@dataclass
class ModelArguments:
    """The base model and the part of it that is trained."""

    model_name_or_path: str = field(metadata={"help": "A folder or a hub name of a causal language model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "How the weights are loaded. Default: bfloat16 with --bf16, float16 with --fp16 (the trained part "
            "is then kept in float32), else float32.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ...: Hugging Face's own switch."}
    )
    unfrozen_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions; the parameters whose name one of them is found in are trained, all others "
            "frozen. A word that ends in .yaml is a file that lists some, as Spectrum and `to-finetune select` write "
            "it. Default: everything is trained."
        },
    )
    unfrozen_last_layers: int | None = field(
        default=None, metadata={"help": "Train the last so many decoder layers instead, or only within them."}
    )
    unfrozen_modules: list[str] | None = field(
        default=None, metadata={"help": "Train these modules instead, by their names in the model: q_proj v_proj."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the frozen linear layers in 8 bits (bitsandbytes)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen linear layers in 4 bits, nf4 (bitsandbytes)."}
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters (peft) instead of weights of the model."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale, times the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter: q_proj v_proj, or all-linear. Default: peft's."}
    )

    @property
    def quantization(self) -> Quantization | None:
        """The quantisation of the frozen linear layers, or None."""
        return "8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None

    def patterns(self, model: nn.Module) -> list[str] | None:
        """Return what trains in `model` as patterns for `select_trainable`; reads names and shapes, not weights.

        Raises:
            UsageError: as `chosen_patterns`.
        """
        sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
        return chosen_patterns(sizes, self.unfrozen_parameters, self.unfrozen_last_layers, self.unfrozen_modules)


@dataclass
class DataArguments:
    """What the model is trained on."""

    dataset_name: list[str] = field(
        metadata={
            "help": "A .json, .jsonl, .csv, .parquet or .txt file, a folder of them, a pattern ('data/*.jsonl') or a "
            "hub name; or several, which are mixed: all rows of all, shuffled."
        }
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "For several: the share of each in what is drawn, with a sum of 1. No row is drawn twice; an epoch "
            "ends when the first set is used up, and how many rows of each were drawn is said."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows while training, in their order, and begin again at the end, each set of a mixture "
            "by itself; needs --max_steps. With --shuffle_dataset true the next row is one of the next thousand."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on, e.g. 'train[:2000]'."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out data: named in the same way, and of the same form."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on. Default: 'test' of a hub dataset and of a folder that has it, else 'train'."
        },
    )
    val_set_size: float = field(
        default=0.0,
        metadata={
            "help": "Rows (or, below 1, the share) of the training data to hold out, the same for every --seed. Of a "
            "stream: its first rows, and no share."
        },
    )

    def __post_init__(self) -> None:
        size = self.val_set_size
        if not 0 <= size < math.inf or (size > 1 and size != int(size)):
            raise UsageError(f"val_set_size={size:g} is not valid: a whole number of rows, or a share below 1.")


@dataclass
class TrainableOptimizerArguments:
    """Adds the Trainable Optimizers to a `transformers.TrainingArguments`; list it before that class."""

    optim: str = field(
        default="diagonal_to", metadata={"help": "diagonal_to, rank_one_to, full_to, or any name that HF knows."}
    )
    optim_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the optimizer: 'alpha=0.1,beta=0.1', or a mapping in YAML."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Default: for a TO from the model's width and what trains of it, for others 5e-5 in finetune.py, "
            "and elsewhere Hugging Face's."
        },
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Clip the gradient to this norm. Default: 1.0, but 0 (off) for a TO with a grad_scale, which "
            "undoes any clipping."
        },
    )
    save_only_trained: bool = field(
        default=False,
        metadata={
            "help": "If part of the model is frozen, save only the weights that train, and their base's name: the "
            "frozen ones must be those that the base has there. Default: the whole model, as Hugging Face saves it."
        },
    )

    def __post_init__(self) -> None:
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        at_least_one(**{key: getattr(self, key) for key in counts})
        name = self.optim
        hf_names = [option.value for option in OptimizerNames]
        if name not in OPTIMIZERS and name not in hf_names:
            raise UsageError(
                f"optim={name!r} is not known.{did_you_mean(name, [*OPTIMIZERS, *hf_names])} It takes "
                f"{', '.join(OPTIMIZERS)} and every name that Hugging Face has, such as adamw_torch."
            )
        scaled = False
        if name in OPTIMIZERS:
            options = self.to_options
            scaled = options.get("grad_scale") is not None
            decay = self.weight_decay  # type: ignore[attr-defined]
            check_options(name, {**options, "weight_decay": decay}, self.learning_rate or 0.0)
        elif self.optim_args and name in WITHOUT_OPTIONS:
            raise UsageError(
                f"optim_args={self.optim_args!r}: Hugging Face gives {name} none; its flags are adam_beta1, adam_beta2 "
                "and adam_epsilon."
            )
        elif isinstance(self.optim_args, dict):
            self.optim_args = ",".join(f"{key}={value}" for key, value in parse_optim_args(self.optim_args).items())
        if self.learning_rate is None and name not in OPTIMIZERS:  # a TO's is set once the model is known
            self.learning_rate = _default_rate(type(self))
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if scaled else 1.0

        if name in OPTIMIZERS:  # HF's own check refuses names that it does not know
            self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()  # type: ignore[misc]
        self.optim = name

    @property
    def to_options(self) -> dict[str, Any]:
        """The TO's options from the current `optim_args`, which Hugging Face's hyperparameter_search sets per trial."""
        return optimizer_options(self.optim, self.optim_args)


def _default_rate(arguments: type) -> float:
    """Return the learning rate of the class that `TrainableOptimizerArguments` stands before: 1e-6 of a DPOConfig."""
    theirs = [cls for cls in arguments.__mro__ if not issubclass(cls, TrainableOptimizerArguments)]
    return next(cls.learning_rate for cls in theirs if hasattr(cls, "learning_rate"))


@dataclass
class TOTrainingArguments(TrainableOptimizerArguments, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` that know the Trainable Optimizers."""


@dataclass
class FinetuneArguments(TrainableOptimizerArguments, SFTConfig):
    """`trl.SFTConfig` that knows the Trainable Optimizers, with the defaults of a fine-tuning run."""

    output_dir: str = field(default="runs/finetune", metadata={"help": "Where the run is written; must be new."})
    save_only_trained: bool = field(default=True, init=False)
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Cut rows to so many tokens. Default: 1024, or the model's context if that is shorter."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision. Default: on where the GPU has it."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass instead of keeping them."}
    )
    assistant_only_loss: bool | None = field(
        default=None, metadata={"help": "For chat messages: loss on the assistant's turns only. Default: on."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide a non-finite loss. Default: off."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for trained weights without a gradient. Default: off, there are none."}
    )
    include_num_input_tokens_seen: str = field(
        default="no", metadata={"help": "Count the tokens.", "choices": ["no", "all", "non_padding"]}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (HF's parser needs this order)
        default="tensorboard", metadata={"help": "tensorboard, wandb, ..., or none."}
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.optim not in OPTIMIZERS:
            self.learning_rate = 5e-5
        at_least_one(max_length=self.max_length)
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            key = "num_train_epochs" if self.max_steps else "max_steps"
            raise UsageError(f"{key}={getattr(self, key)} is not valid: it trains nothing.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else torchrun's processes would each run alone
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = not self.fp16 and cuda and torch.cuda.is_bf16_supported()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if self.gradient_checkpointing and hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = True  # its name from transformers 5.2x on; the old one warns
        if (switch := str(self.fsdp).lower()) in ("true", "false"):  # as text, Hugging Face would read them as options
            self.__dict__["fsdp"] = switch == "true"
        super().__post_init__()

    @property
    def autocast_dtype(self) -> Literal["bfloat16", "float16"] | None:
        """The dtype of mixed precision; None without it."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None


class ArgumentsElsewhere(FinetuneArguments):
    """The flags of a run on another machine or in other processes: sets up no device and queries no GPU.

    bfloat16 is on unless float16 or the CPU is asked for.
    """

    _setup_devices = torch.device("cpu")
    distributed_state = None

    def __post_init__(self) -> None:
        looks = ("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")  # their checks query the GPU
        asked = {name: getattr(self, name) for name in (*looks, "use_cpu")}
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu
        # On the CPU Hugging Face allows any precision.
        self.__dict__.update(dict.fromkeys(looks), torch_compile=False, use_cpu=True)
        super().__post_init__()
        self.__dict__.update(asked)
