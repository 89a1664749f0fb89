"""Several sets of rows as one, and some rows of each held out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

from datasets import Dataset, concatenate_datasets, interleave_datasets

from to_finetune.data.formats import Normalized, Rows
from to_finetune.errors import UsageError

SPLIT_SEED = 42  # the held-out rows are the same for every --seed
SOURCE = "source of the row"  # a column, for the moment of mixing


def check_weights(names: Sequence[str], weights: Sequence[float] | None, streaming: bool) -> None:
    """Refuse weights that are no shares of the sets.

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
    """Refuse sets that TRL would have to prepare in different ways.

    Raises:
        UsageError: naming the form of each.
    """
    if len({one.form for one in sets}) > 1:
        forms = ", ".join(f"{one.source} has {one.form}" for one in sets)
        raise UsageError(f"Sets of different forms cannot be mixed: {forms}. Bring them to one form.")


def mix(sets: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> tuple[Rows, list[int]]:
    """The sets as one, and with weights how many rows of each are in it.

    Without weights all rows of all sets, shuffled. With weights each next row is drawn from a set with that
    probability and without a repeat, until the first set is used up: the shares hold, and what is left of the other
    sets is not in it. Streams begin again at their end, for ever.

    Args:
        sets: of one form.
        weights: from `check_weights`.
        seed: of the order and the draws.

    Raises:
        UsageError: where the columns have different types.
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
    """The sets without the held-out rows, and these.

    They are drawn from each set in proportion to its length. Of a stream they are the first rows, of several streams
    in proportion to the weights.

    Args:
        sets: of one form.
        val_set_size: rows of all sets together, or, below 1, the share.
        weights: from `check_weights`.

    Raises:
        UsageError: for a number that is none, or that leaves nothing to train on.
    """
    if not math.isfinite(val_set_size):
        raise UsageError(f"val_set_size={val_set_size:g} is not valid: a number or a share of the rows.")
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
    """All rows, also of a stream: what is evaluated on is read again and again."""
    if isinstance(rows, Dataset):
        return rows
    return Dataset.from_list(list(rows), features=rows.features)


def _in_proportion(total: int, parts: Sequence[float]) -> list[int]:
    """`total` in whole numbers as `parts` are to each other, by rounding the running sum: nothing is left over."""
    ends = [round(total * part / sum(parts)) for part in accumulate(parts, initial=0)]
    return [end - start for start, end in pairwise(ends)]
