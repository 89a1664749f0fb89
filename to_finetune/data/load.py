"""Reading files and hub sets into training rows and held-out rows."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import escape, glob, has_magic
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError

from to_finetune.data.formats import Normalized, Rows, normalized
from to_finetune.data.mixture import check_weights, hold_out, mix, read_all, same_form
from to_finetune.errors import UsageError, did_you_mean

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


class Data(NamedTuple):
    """The data that a run is trained and evaluated on.

    Attributes:
        train: rows to train on.
        held_out: rows to evaluate on.
        form: of both, one of those in `to_finetune.data.formats`.
        notes: what was left out, and other remarks, in a sentence each.
    """

    train: Rows
    held_out: Dataset | None
    form: str
    notes: list[str]


def load_data(
    names: Sequence[str],
    split: str = "train",
    *,
    weights: Sequence[float] | None = None,
    streaming: bool = False,
    config: str | None = None,
    eval_name: str | None = None,
    eval_split: str | None = None,
    val_set_size: float = 0.0,
    text_column: str = "text",
    seed: int = 42,
) -> Data:
    """Read one or several sets as rows that TRL can prepare.

    Args:
        names: of .json, .jsonl, .csv, .parquet and .txt files, patterns (``data/*.jsonl``) and folders of them, or
            of hub sets. A folder has the splits that its files are named after, by Hugging Face's convention.
        split: the split to train on; ``"train[:100]"`` takes a part.
        weights: the share of each set in what is drawn; see `mix`.
        streaming: read the training rows only when they are needed, and repeat them endlessly.
        config: configuration of the hub sets.
        eval_name: held-out data, named in the same way.
        eval_split: the split to evaluate on.
        val_set_size: rows (or, below 1, the share) of the training data to hold out instead; see `hold_out`.
        text_column: the column of plain text.
        seed: for drawing from several sets, and for shuffling them.

    Raises:
        UsageError: for data that are missing, malformed or empty, have unknown columns, or cannot be combined.
    """
    check_weights(names, weights, streaming)
    if config and all(_is_local(name) for name in (*names, eval_name) if name):
        raise UsageError(f"dataset_config={config!r} is of a hub set; dataset_name={' '.join(names)!r} names none.")

    def read(flag: str, name: str, split: str) -> Normalized:
        source = f"{flag}={name!r}"
        return normalized(source, _read(source, name, split, config, streaming), text_column)

    sets = [read("dataset_name", name, split) for name in names]
    same_form(sets)
    notes = [f"{one.source}: not read are the columns {', '.join(one.unread)}." for one in sets if one.unread]
    rows: list[Rows] = [one.rows for one in sets]
    held_out = None
    if eval_name or eval_split:
        flag, eval_names = ("eval_dataset_name", [eval_name]) if eval_name else ("dataset_name", list(names))
        eval_sets = [read(flag, name, eval_split or default_eval_split(name)) for name in eval_names]
        same_form([*sets, *eval_sets])
        held_out = concatenate_datasets([read_all(one.rows) for one in eval_sets])
        if not streaming and (known := _also_in(held_out, rows)):
            notes.append(f"{known:,} of the {len(held_out):,} held-out rows are trained on as well.")
        if val_set_size:
            other = f"eval_dataset_name={eval_name!r}" if eval_name else f"dataset_test_split={eval_split!r}"
            notes.append(f"val_set_size={val_set_size:g} holds nothing out: {other} says what is evaluated on.")
    elif val_set_size:
        rows, held_out = hold_out(rows, val_set_size, weights)
    train, drawn = mix(rows, weights, seed)
    for one, used, there in zip(sets, drawn, rows, strict=False):
        notes.append(f"{one.source}: {used:,} of {len(there):,} rows are drawn.")
    return Data(train, held_out, sets[0].form, notes)


def _is_local(name: str) -> bool:
    """Whether `name` is a file, a folder or a pattern of files, and not a hub set."""
    return Path(name).suffix.lower() in BUILDERS or has_magic(name) or Path(name).exists()


def default_eval_split(name: str) -> str:
    """Return the default split to evaluate on: "test" for hub sets and for folders that have it, else "train"."""
    if Path(name).is_dir():
        with suppress(OSError, ValueError):  # reading the folder will report it
            return "test" if "test" in _splits(name) else "train"
    return "train" if _is_local(name) else "test"


def _also_in(held_out: Dataset, train: Sequence[Rows]) -> int:
    """Return how many of the held-out rows are also among the training rows."""
    rows = Counter(map(repr, held_out))
    return sum(rows.pop(repr(row), 0) for part in train for row in part)


def _read(source: str, name: str, split: str, config: str | None, streaming: bool) -> Rows:
    """Read the rows as they are written; there must be at least one."""
    if streaming and "[" in split:
        raise UsageError(f"{source}: a stream has no parts such as {split!r}; name a whole split.")
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    where, kind = (name, config), None
    try:
        if _is_local(name):
            files = _existing(source, name)
            kind = _only_kind(source, files)
            if kind == "csv":
                options |= _as_text(source, files)
            if kind == "text":
                options["encoding"] = "utf-8-sig"  # drops a byte order mark
            if Path(name).is_dir():
                _check_splits(source, name, files)
            else:
                where, options["data_files"] = (kind, None), [escape(str(file)) for file in files]
        rows = load_dataset(*where, **options)
        if kind == "text":
            rows = rows.filter(_is_not_blank)  # blank lines separate paragraphs; as rows they would teach silence
        if next(iter(rows), None) is None:
            raise UsageError(f"{source} is empty.")
        return _watched(source, rows) if streaming else rows
    except UsageError:
        raise
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise UsageError(f"{source} is malformed: {shorten(str(reason), 400)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a hub set that is a script
        if "corresponds to no data" in str(error):
            raise UsageError(f"{source}: {split!r} is empty.") from error
        raise UsageError(f"{source} cannot be loaded: {shorten(str(error), 400)}") from error


def _watched(source: str, rows: IterableDataset) -> IterableDataset:
    """Return the same stream, of as many shards, whose errors while reading name the source."""
    parts = [rows.shard(rows.num_shards, i) for i in range(rows.num_shards)]
    return IterableDataset.from_generator(
        _read_on, features=rows.features, gen_kwargs={"parts": parts, "source": source}
    )


def _read_on(parts: Sequence[IterableDataset], source: str) -> Iterator[dict[str, Any]]:
    try:
        for rows in parts:
            yield from rows
    except (OSError, ValueError) as error:
        raise UsageError(f"{source} cannot be read to its end: {shorten(str(error), 400)}") from error


def _as_text(source: str, files: Sequence[Path]) -> dict[str, Any]:
    """Return options to read CSV files' cells as text: 007 is not a number, and None is not an empty cell."""
    columns = _columns(files[0])
    for file in files[1:]:
        if sorted(others := _columns(file)) != sorted(columns):
            raise UsageError(
                f"{source}: {str(files[0])!r} has the columns {', '.join(columns)}, and {str(file)!r} "
                f"{', '.join(others)}: they must be the same."
            )
    names = [column or f"Unnamed: {i}" for i, column in enumerate(columns)]  # as pandas, which reads it, names them
    features = Features({name: Value("string") for name in names})
    # Without index_col=False, pandas takes the first column for row names if a row ends in a comma.
    return {"features": features, "keep_default_na": False, "index_col": False}


def _columns(file: Path) -> list[str]:
    """Return the names in a CSV file's first line."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines)
        columns, first = next(rows), next(rows, [])
        if len(first) > len(columns):  # pandas would drop cells without a column
            for row in chain([first], rows):
                if any(row[len(columns) :]):
                    raise UsageError(f"{str(file)!r} has {len(columns)} columns, and a row of {len(row)} cells.")
    return columns


def _is_not_blank(row: dict[str, str]) -> bool:
    return not row["text"].isspace() and row["text"] != ""


def _existing(source: str, name: str) -> list[Path]:
    """Return the file called `name`, or the files that a pattern matches or a folder holds."""
    path = Path(name)
    if path.is_dir() or (has_magic(name) and not path.exists()):
        found = _inside(path) if path.is_dir() else map(Path, glob(name, recursive=True))
        files = sorted(file for file in found if file.suffix.lower() in BUILDERS)
        if not files:
            raise UsageError(f"{source} finds no file that ends in {', '.join(BUILDERS)}.")
    else:
        files = [path]
        if not path.is_file():
            siblings = map(str, path.parent.iterdir()) if path.parent.is_dir() else []
            raise UsageError(f"{source}: no such file.{did_you_mean(name, siblings)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UsageError(f"{source} is empty." if len(files) == 1 else f"{source}: {str(file)!r} is empty.")
    return files


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the contents of a folder except hidden files and metadata, which `datasets` does not read either."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if not hidden and file.name not in FILES_TO_IGNORE:
            yield file


def _check_splits(source: str, folder: str, files: Sequence[Path]) -> None:
    """Raise if `datasets` would drop files: if some are named after splits such as train, it ignores the others."""
    splits = _splits(folder)
    used = set(map(os.path.realpath, chain(*splits.values())))
    if dropped := [file for file in files if os.path.realpath(file) not in used]:
        raise UsageError(
            f"{source}: its files are read as the splits {', '.join(splits)}, by their names, and "
            f"{str(dropped[0])!r} is in none, as {len(dropped)} of {len(files)} are. Name every file after a split, or "
            f"say which to read with a pattern: {str(Path(folder, '*' + dropped[0].suffix))!r}."
        )


def _splits(folder: str) -> dict[str, list[str]]:
    """Return the files of each split that `datasets` finds in a folder."""
    return {str(key): list(value) for key, value in load_dataset_builder(folder).config.data_files.items()}


def _only_kind(source: str, files: Sequence[Path]) -> str:
    """Return the builder of all `files`; of several kinds, `datasets` would read the commonest and drop the rest."""
    endings = sorted({file.suffix.lower() for file in files})
    if unknown := [ending for ending in endings if ending not in BUILDERS]:
        raise UsageError(f"{source} ends in {unknown[0]!r}; read are files that end in {', '.join(BUILDERS)}.")
    builders = {BUILDERS[ending] for ending in endings}
    if len(builders) > 1:
        raise UsageError(
            f"{source} holds files of several kinds ({', '.join(endings)}): name those of one, as in 'folder/*.jsonl'."
        )
    return builders.pop()
