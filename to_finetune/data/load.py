"""A file or a hub set as rows that TRL can prepare: prompt/completion, chat messages, or plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
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
        held_out: int | float = val_set_size if val_set_size < 1 else int(val_set_size)
        if held_out >= len(train):
            raise UsageError(f"val_set_size={held_out} leaves nothing of the {len(train)} rows to train on.")
        parts = train.train_test_split(test_size=held_out, seed=SPLIT_SEED)
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
        raise UsageError(f"dataset_name={name!r} is malformed: {' '.join(str(reason).split())}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"dataset_name={name!r} cannot be loaded: {' '.join(str(error).split())}") from error
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
    """Only the columns that TRL reads; Alpaca's three become prompt and completion."""
    columns = set(rows.column_names)
    if {"instruction", "output"} <= columns:
        return rows.map(_alpaca_row, remove_columns=rows.column_names, desc="Alpaca prompts")
    for known in (("prompt", "completion"), ("messages",), ("conversations",), ("text",)):
        if columns.issuperset(known):
            return rows.select_columns(list(known))
    raise UsageError(f"dataset_name={name!r} has the columns {', '.join(rows.column_names)}; needed: {FORMATS}.")


def _alpaca_row(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": alpaca_prompt(row["instruction"], row.get("input")), "completion": row["output"] or ""}
