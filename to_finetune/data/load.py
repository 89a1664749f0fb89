"""A file or a hub set as rows that TRL can prepare: prompt/completion, chat messages, or plain text."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from to_finetune.data.alpaca import alpaca_prompt
from to_finetune.errors import UsageError, did_you_mean

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
SPLIT_SEED = 42  # the held-out rows are the same for every --seed
FORMATS = (
    "{instruction, input, output}, {prompt, completion}, {messages}, {conversations} or {text}"  # what users may bring
)
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def load_data(
    dataset_name: str,
    config: str | None = None,
    split: str = "train",
    eval_dataset_name: str | None = None,
    eval_split: str | None = None,
    val_set_size: float = 0.0,
) -> tuple[Dataset, Dataset | None]:
    """The training rows, and the held-out ones where there are any.

    Args:
        dataset_name: a .json, .jsonl, .csv, .parquet or .txt file, or a hub name.
        config: configuration of a hub set.
        split: the split to train on; ``"train[:100]"`` takes a part.
        eval_dataset_name: held-out data, named in the same way.
        eval_split: the split to evaluate on.
        val_set_size: rows (or, below 1, the share) of the training data to hold out instead.

    Raises:
        UsageError: for data that is missing, malformed, empty, or in columns that are not known.
    """
    train = _load(dataset_name, config, split)
    if eval_dataset_name or eval_split:
        name = eval_dataset_name or dataset_name
        return train, _load(name, config, eval_split or ("train" if _is_file(name) else "test"))
    if val_set_size:
        try:
            held_out = val_set_size if val_set_size < 1 else int(val_set_size)
            parts = train.train_test_split(test_size=held_out, seed=SPLIT_SEED)
        except ValueError:
            raise UsageError(
                f"val_set_size={val_set_size:g} is not valid: a number or a share of the {len(train)} rows, which "
                "leaves some to train on."
            ) from None
        return parts["train"], parts["test"]
    return train, None


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in BUILDERS


def _load(name: str, config: str | None, split: str) -> Dataset:
    path = _existing(name) if _is_file(name) else None
    try:
        if path:
            rows = load_dataset(BUILDERS[path.suffix.lower()], data_files=str(path), split=split)
        else:
            rows = load_dataset(name, config, split=split)
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise UsageError(f"dataset_name={name!r} is malformed: {shorten(str(reason), 400)}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"dataset_name={name!r} cannot be loaded: {shorten(str(error), 400)}") from error
    if isinstance(rows, DatasetDict):
        raise UsageError(f"dataset_name={name!r}: name one split, of {', '.join(rows)}.")
    if len(rows) == 0:
        raise UsageError(f"dataset_name={name!r} is empty.")
    return _standard_columns(rows, name)


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        files = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"dataset_name={name!r}: no such file.{did_you_mean(str(path), files)}")
    if path.stat().st_size == 0:
        raise UsageError(f"dataset_name={name!r} is empty.")
    return path


def _standard_columns(rows: Dataset, name: str) -> Dataset:
    """Only the columns that TRL reads; Alpaca's three become prompt and completion, conversations messages."""
    columns = set(rows.column_names)
    if {"instruction", "output"} <= columns:
        return rows.map(_alpaca_row, remove_columns=rows.column_names, desc="Alpaca prompts")
    for chat in ("messages", "conversations"):
        if chat in columns:
            return rows.map(_chat_row, fn_kwargs={"column": chat, "name": name}, remove_columns=rows.column_names)
    for known in (["prompt", "completion"], ["text"]):
        if columns.issuperset(known):
            rows = rows.select_columns(known)
            for column in known:
                if isinstance(rows.features[column], Value):  # a CSV file's numbers; map() alone would not change them
                    rows = rows.cast_column(column, Value("string"))
            return rows.map(_text_row)
    raise UsageError(f"dataset_name={name!r} has the columns {', '.join(rows.column_names)}; needed: {FORMATS}.")


def _alpaca_row(row: dict[str, Any]) -> dict[str, str]:
    prompt = alpaca_prompt(_text(row["instruction"]), _text(row.get("input")))
    return {"prompt": prompt, "completion": _text(row["output"])}


def _chat_row(row: dict[str, Any], column: str, name: str) -> dict[str, Any]:
    try:
        return {"messages": [_message(turn) for turn in row[column]]}
    except (TypeError, KeyError, AttributeError):
        raise UsageError(
            f"dataset_name={name!r} is malformed: {column} must be a list of {{role, content}} or of {{from, value}}, "
            f"not {shorten(repr(row[column]), 100)}."
        ) from None


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    if turn.get("from"):  # as ShareGPT has it
        turn = {"role": turn["from"], "content": turn["value"]}
    return {**turn, "role": ROLES.get(turn["role"], turn["role"])}


def _text_row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: "" if value is None else value for key, value in row.items()}


def _text(value: Any) -> str:
    """A cell as text: a CSV file's numbers, and its empty cells."""
    return "" if value is None else str(value)
