"""Mixing several sets of rows into one, and holding out some rows of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

from datasets import Dataset, concatenate_datasets, interleave_datasets

from to_finetune.data.formats import Normalized, Rows
from to_finetune.errors import UsageError

SPLIT_SEED = 42  # the held-out rows are the same for every --seed
SOURCE = "source of the row"  # a temporary column for mixing


def check_weights(names: Sequence[str], weights: Sequence[float] | None, streaming: bool) -> None:
    """Raise unless the weights are shares of the sets.

    Raises:
        UsageError: with the weights.
    """
    if weights is None:
        if streaming and len(names) > 1:
            raise UsageError(
                f"dataset_streaming: {len(names)} sets need --dataset_weights, as it is not known how long they are."
            )
        return
    wanted = None
    if len(weights) != len(names):
        wanted = f"one for each of the {len(names)} sets of dataset_name"
    elif not all(weight > 0 for weight in weights):
        wanted = "each above 0"
    elif not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        wanted = f"with a sum of 1, not {sum(weights):g}"
    if wanted:
        raise UsageError(f"dataset_weights={' '.join(f'{weight:g}' for weight in weights)} is not valid: {wanted}.")


def same_form(sets: Sequence[Normalized]) -> None:
    """Raise if TRL would have to prepare the sets in different ways.

    Raises:
        UsageError: naming the form of each.
    """
    if len({one.form for one in sets}) > 1:
        forms = ", ".join(f"{one.source} has {one.form}" for one in sets)
        raise UsageError(f"Sets of different forms cannot be mixed: {forms}. Bring them to one form.")


def mix(sets: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> tuple[Rows, list[int]]:
    """Return the sets mixed into one, and how many rows of each were drawn (empty unless finite sets have weights).

    Without weights, all rows of several sets are shuffled. With weights, each row is drawn, without replacement, from a
    set chosen with that probability, until the first set is used up: the shares hold, and the remaining rows of the
    other sets are left out. Streams begin again at their end, endlessly.

    Args:
        sets: of one form.
        weights: as `check_weights` accepts them.
        seed: for the order and the draws.

    Raises:
        UsageError: if the columns have different types.
    """
    try:
        if not isinstance(sets[0], Dataset):
            endless = [rows.repeat(None) for rows in sets]
            return (interleave_datasets(endless, weights, seed=seed) if len(sets) > 1 else endless[0]), []
        if len(sets) == 1:
            return sets[0], []
        if weights is None:
            return concatenate_datasets(list(sets)).shuffle(seed=seed), []
        marked = [rows.shuffle(seed=seed).add_column(SOURCE, [i] * len(rows)) for i, rows in enumerate(sets)]
        mixed = interleave_datasets(marked, weights, seed=seed, stopping_strategy="first_exhausted")
    except ValueError as error:
        raise UsageError(f"dataset_name: the sets cannot be mixed: {error}") from error
    drawn = Counter(mixed[SOURCE])
    return mixed.remove_columns(SOURCE), [drawn[i] for i in range(len(sets))]


def hold_out(sets: Sequence[Rows], val_set_size: float, weights: Sequence[float] | None) -> tuple[list[Rows], Dataset]:
    """Split off held-out rows; return the sets without them, and the held-out rows.

    They are drawn from each set in proportion to its length. From streams they are the first rows, for several streams
    in proportion to the weights.

    Args:
        sets: of one form.
        val_set_size: number of rows from all sets together or, below 1, their share.
        weights: as `check_weights` accepts them.

    Raises:
        UsageError: for an invalid number, or one that leaves nothing to train on.
    """
    if not isinstance(sets[0], Dataset):
        if val_set_size < 1:
            raise UsageError(f"val_set_size={val_set_size:g}: a stream's length is not known; give a number of rows.")
        counts = _in_proportion(int(val_set_size), weights or [1.0])
        first = [read_all(rows.take(count)) for rows, count in zip(sets, counts, strict=True) if count]
        rest = [rows.skip(count) for rows, count in zip(sets, counts, strict=True)]
        if any(next(iter(rows), None) is None for rows in rest):
            raise UsageError(f"val_set_size={val_set_size:g} leaves nothing to train on.")
        return rest, concatenate_datasets(first)
    lengths = [len(rows) for rows in sets]
    total = sum(lengths)
    held_out = math.ceil(val_set_size * total) if val_set_size < 1 else int(val_set_size)
    counts = _in_proportion(held_out, lengths)
    if held_out < 1 or any(count >= length for count, length in zip(counts, lengths, strict=True)):
        raise UsageError(
            f"val_set_size={val_set_size:g} is not valid: a number or a share of the {total} rows, which leaves some "
            "to train on."
        )
    parts = [
        rows.train_test_split(test_size=count, seed=SPLIT_SEED) if count else {"train": rows, "test": rows.select([])}
        for rows, count in zip(sets, counts, strict=True)
    ]
    return [part["train"] for part in parts], concatenate_datasets([part["test"] for part in parts])


def read_all(rows: Rows) -> Dataset:
    """Return all rows, also of a stream, in memory: held-out rows are read again and again."""
    if isinstance(rows, Dataset):
        return rows
    return Dataset.from_list(list(rows), features=rows.features)


def _in_proportion(total: int, parts: Sequence[float]) -> list[int]:
    """Split `total` into whole numbers in proportion to `parts`; rounding the running sum leaves no remainder."""
    ends = [round(total * part / sum(parts)) for part in accumulate(parts, initial=0)]
    return [end - start for start, end in pairwise(ends)]
