"""The flags of a run from a YAML file and the command line, each checked as if it were typed."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments

ALIASES = {  # what other tools call our flags
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
}

WAYS = ("unfrozen_parameters", "unfrozen_last_layers", "unfrozen_modules")  # to say what trains


class _Parser(TrlParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def parse_arguments(
    argv: Sequence[str] | None = None,
    training: type[FinetuneArguments] = FinetuneArguments,
    other_flags: Collection[str] = (),
) -> tuple[ModelArguments, DataArguments, FinetuneArguments]:
    """Parse ``--config recipe.yaml`` and the flags that override it.

    Args:
        argv: None for this process's command line.
        training: `ArgumentsElsewhere` for a run outside of this process.
        other_flags: other flags of the command, suggested for an unknown one as well.

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
    _check_names(config, argv, types, parser, other_flags)
    config = {key.replace("-", "_"): value for key, value in config.items()}
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    for excluded in (("unfrozen_parameters",), ("unfrozen_last_layers", "unfrozen_modules")):  # by each other
        if given & {key for key in WAYS if key not in excluded}:
            config = {key: value for key, value in config.items() if key not in excluded}
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
    config: Iterable[str], argv: Sequence[str], types: Mapping[str, Any], parser: _Parser, other_flags: Collection[str]
) -> None:
    """Raise if keys or flags are unknown, naming all of them in one error."""
    options = {option.lstrip("-").replace("-", "_") for option in parser._option_string_actions} | {"config"}
    flags = [item[2:].split("=")[0] for item in argv if item.startswith("--")]
    problems = [
        f"Unknown {where} {key!r}.{did_you_mean(ALIASES.get(key, key), [*types, *other_flags])}"
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
