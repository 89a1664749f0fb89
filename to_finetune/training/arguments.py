"""The flags of a run, from a YAML file and the command line: Hugging Face's own, with the Trainable Optimizers."""

from __future__ import annotations

import math
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig, TrlParser

from to_finetune.errors import UsageError, at_least_one, did_you_mean
from to_finetune.model.quantized import Quantization
from to_finetune.model.select import chosen_patterns, listed
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
SECRETS = ("hub_token",)  # flags whose values are written nowhere


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
            raise UsageError(f"val_set_size={size:g} is not valid: a number or a share of the rows.")


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


class _Defaults(FinetuneArguments):
    """The defaults alone: setting up devices again, for another device, would reset the run's distributed state."""

    _setup_devices = torch.device("cpu")


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


ELSEWHERE = {  # what other tools call our flags
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
}


class _Parser(TrlParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def parse_arguments(
    argv: Sequence[str] | None = None,
    training: type[FinetuneArguments] = FinetuneArguments,
    beside: Collection[str] = (),
) -> tuple[ModelArguments, DataArguments, FinetuneArguments]:
    """Parse ``--config recipe.yaml`` and the flags that override it.

    Args:
        argv: None for this process's command line.
        training: `ArgumentsElsewhere` for a run outside of this process.
        beside: other flags of the command, suggested for an unknown one as well.

    Raises:
        UsageError: naming every unknown key with the nearest known one, or the bad value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    classes = (ModelArguments, DataArguments, training)
    parser = _Parser(classes, allow_abbrev=False)
    parser.prog = "finetune.py"
    flags_of_fields = {action.dest for action in parser._actions}
    for action in parser._actions:
        if getattr(action.type, "__name__", None) == "string_to_bool":  # done already for those that are never None
            action.nargs, action.const = "?", True
    types = {k: t for cls in classes for k, t in get_type_hints(cls).items() if k in flags_of_fields}

    config, argv = _take_config(argv)
    if "warmup_ratio" not in types:  # newer transformers: warmup_steps below 1
        parser.add_argument("--warmup_ratio", dest="warmup_steps", type=float, default=SUPPRESS, help=SUPPRESS)
        if "warmup_ratio" in config:
            config["warmup_steps"] = config.pop("warmup_ratio")
    _check_names(config, argv, types, parser, beside)
    config = {key.replace("-", "_"): value for key, value in config.items()}
    _check_given(config, types)
    structured = {key: value for key, value in config.items() if _has_structure(value, types[key])}
    # All others go in front of the flags, as if typed there, so that their types and choices are checked as well.
    argv = [f"--{key}={value}" for key, value in config.items() if key not in structured] + argv
    try:
        for action in parser._actions:
            if isinstance(value := structured.get(action.dest), list):  # its items are checked here
                structured[action.dest] = [parser._get_value(action, str(item)) for item in value]
        parser.set_defaults_with_config(**structured)
        model, data, args, *rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except UsageError:
        raise
    except (ArgumentError, ValueError, TypeError, ImportError, OSError) as error:
        raise UsageError(str(error)) from error
    if rest[0]:
        raise UsageError(f"Cannot make sense of {' '.join(rest[0])!r}: a flag begins with '--'.")
    return model, data, args


def _check_names(
    config: Iterable[str], argv: Sequence[str], types: Mapping[str, Any], parser: _Parser, beside: Collection[str]
) -> None:
    """Raise if keys or flags are unknown, naming all of them in one error."""
    options = {option.lstrip("-").replace("-", "_") for option in parser._option_string_actions} | {"config"}
    flags = [item[2:].split("=")[0] for item in argv if item.startswith("--")]
    problems = [
        f"Unknown {where} {key!r}.{did_you_mean(ELSEWHERE.get(key, key), [*types, *beside])}"
        for where, keys, known in (("key in the configuration file", config, types), ("flag", flags, options))
        for key in keys
        if key.replace("-", "_") not in known
    ]
    if problems:
        raise UsageError(" ".join(problems))


def _check_given(config: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise if a key of the file has no value."""
    for key, value in config.items():
        if value is None and not _has_structure(None, types[key]):
            raise UsageError(f"--config: {key} has no value; leave it out for its default.")
        if value == [] and key != "report_to":  # for which it means none
            raise UsageError(f"--config: {key} is an empty list; leave it out for its default.")


def _has_structure(value: Any, declared: Any) -> bool:
    """Whether `value` is a list, a mapping or null, and the declared type allows it."""
    kinds = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    return type(value) in (list, dict, NoneType) and type(value) in {get_origin(kind) or kind for kind in kinds}


def _take_config(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the mapping in the file that ``--config`` names, and the other flags."""
    for i, item in enumerate(argv):
        flag, equals, value = item.partition("=")
        if flag != "--config":
            continue
        if not equals and i + 1 == len(argv):
            raise UsageError("--config needs a file name.")
        path = Path(value if equals else argv[i + 1])
        rest = argv[:i] + argv[i + (1 if equals else 2) :]
        if any(word.partition("=")[0] == "--config" for word in rest):
            raise UsageError("--config is given twice, and only one file can be the run's.")
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config {path}: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            raise UsageError(f"--config {path} must hold a mapping of keys to values.")
        return {str(key): value for key, value in config.items()}, rest
    return {}, argv


def resolved_config(model: ModelArguments, data: DataArguments, training: FinetuneArguments) -> dict[str, Any]:
    """Return the settings that differ from the defaults or were derived: a recipe that repeats the run."""
    pairs: list[tuple[Any, Any]] = [
        (model, ModelArguments(model_name_or_path="")),
        (data, DataArguments(dataset_name=[""])),
        (training, _Defaults(output_dir="")),
    ]
    always = ("optim", "learning_rate", "max_grad_norm", "bf16", "seed", "max_length")
    config = {
        f.name: getattr(given, f.name)
        for given, default in pairs
        for f in fields(given)
        if f.name in always or getattr(given, f.name) != getattr(default, f.name)
    }
    for key in (*SECRETS, "resume_from_checkpoint"):  # not part of the recipe
        config.pop(key, None)
    if model.unfrozen_parameters is not None:
        config["unfrozen_parameters"] = listed(model.unfrozen_parameters)  # the file may change later
    if training.optim in OPTIMIZERS:
        config["optim_args"] = {
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in training.to_options.items()
        }
    return {key: _plain(value) for key, value in config.items()}


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line to show or to save, with stars in place of a token."""

    def is_secret(flag: str) -> bool:
        return flag.removeprefix("--").replace("-", "_") in SECRETS

    shown = list[str]()
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        if is_secret(before):
            word = "***"
        elif equals and is_secret(flag):
            word = f"{flag}=***"
        shown.append(word)
    return shown


def _plain(value: Any) -> Any:
    """Convert enums, other string-like values and Hugging Face's own settings to what YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return str(getattr(value, "value", value))
