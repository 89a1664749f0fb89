"""Statistics of prepared rows: how many tokens, how many are learned, what is cut, and what seems wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from to_finetune.data.formats import Rows
from to_finetune.data.preview import IGNORED, looked_at


@dataclass(frozen=True)
class Statistics:
    """Statistics of rows as they are before they are cut or packed.

    Attributes:
        rows: how many.
        tokens: all tokens within the maximal length.
        learned: tokens within the maximal length that have a loss.
        shortest, mean, longest: tokens of an uncut row.
        cut: rows that are longer than the maximal length.
        lost: rows that have a loss only beyond the maximal length, or none.
        empty: rows that have nothing to learn but their end.
        ended: rows whose last learned token, white space aside, is the EOS token.
        doubled: rows that begin with the BOS token twice, or end in the EOS token twice.
        last: the last learned token, white space aside, of the first row that has one.
    """

    rows: int
    tokens: int
    learned: int
    shortest: int
    mean: float
    longest: int
    cut: int
    lost: int
    empty: int
    ended: int
    doubled: int
    last: int | None


def statistics(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, keeps: str = "start"
) -> Statistics:
    """Compute the statistics of the rows that `looked_at` gives.

    Args:
        rows: with `input_ids` and `labels`, uncut.
        tokenizer: the one that made them.
        max_length: number of tokens of a row that are kept; None for all.
        keeps: what is kept of a longer row: its "start", its "end", or "all" of it in several pieces.
    """
    kept = {"start": slice(max_length), "end": slice(-max_length if max_length else 0, None), "all": slice(None)}[keeps]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    @cache
    def is_blank(token: int) -> bool:
        return not str(tokenizer.decode([token])).strip()

    last = None
    counts = []
    for row in looked_at(rows):
        ids, labels = row["input_ids"], row["labels"]
        learned = [label for label in labels if label != IGNORED]
        end = next((token for token in reversed(learned) if not is_blank(token)), None)
        last = end if last is None else last
        within = labels[kept]
        counts.append(
            (
                len(ids),
                len(within),
                len(within) - within.count(IGNORED),
                all(token in (bos, eos) for token in learned),
                end == eos,
                ids[:2] == [bos, bos] or ids[-2:] == [eos, eos],
            )
        )
    lengths, tokens, with_loss, empty, ended, doubled = np.array(counts, dtype=np.int64).T
    return Statistics(
        rows=len(counts),
        tokens=int(tokens.sum()),
        learned=int(with_loss.sum()),
        shortest=int(lengths.min()),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        cut=int((tokens < lengths).sum()),
        lost=int((with_loss == 0).sum()),
        empty=int(empty.sum()),
        ended=int(ended.sum()),
        doubled=int(doubled.sum()),
        last=last,
    )


def table(parts: Mapping[str, Statistics]) -> Table:
    """Return a table with a line for each part of the data."""
    columns = ("rows", "tokens", "learned", "shortest", "mean", "longest", "cut")
    shown = Table("", *columns, header_style="bold", box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, part in parts.items():
        shown.add_row(
            name,
            f"{part.rows:,}",
            f"{part.tokens:,}",
            f"{part.learned / part.tokens:.1%}",
            f"{part.shortest:,}",
            f"{part.mean:,.0f}",
            f"{part.longest:,}",
            f"{part.cut:,}",
        )
    return shown


def notes(name: str, part: Statistics, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[str]:
    """Return a sentence on each likely problem of the rows, to be read before they are trained on."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    of = f"of {part.rows:,} {name} rows"
    end = tokenizer.decode([part.last]) if part.last is not None else ""
    another_end = not part.ended and part.last in tokenizer.added_tokens_decoder
    said = [
        (part.cut, f"{part.cut:,} {of} are cut at max_length={max_length}."),
        (part.lost, f"{part.lost:,} {of} have nothing to learn within max_length={max_length} and add nothing."),
        (part.empty, f"{part.empty:,} {of} have an empty completion: they teach to say nothing."),
        (
            part.doubled,
            f"{part.doubled:,} {of} begin with {bos!r} or end in {eos!r} twice: TRL or the tokenizer adds one.",
        ),
        (
            another_end,
            f"The {name} rows end in {end!r}, which is not the tokenizer's EOS token {eos!r}: with --eos_token {end!r} "
            "generation stops there.",
        ),
        (
            not part.ended and not another_end,
            f"No {name} row ends in the EOS token {eos!r}: the model will not learn to stop.",
        ),
    ]
    return [sentence for is_so, sentence in said if is_so]
