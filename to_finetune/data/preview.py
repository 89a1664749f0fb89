"""Prepared examples as the model will see them, and which part of them is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby, islice, pairwise
from typing import Any

from datasets import Dataset
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from to_finetune.data.formats import Rows
from to_finetune.errors import UsageError

IGNORED = -100  # the label of a token without loss
FIRST = 200  # number of rows of a stream that are looked at
SEEN, LEARNED, SPECIAL = "dim", "green", "underline"
MARKS = ("⟦", "⟧")  # around what is learned, if a terminal or a log file has no colours


@dataclass
class Preview:
    """Prepared rows for the terminal: learned tokens are green, all others dim, and special ones underlined.

    Attributes:
        rows: by their numbers, with `input_ids`, `labels`, and for packed examples `seq_lengths`.
        tokenizer: the one that made them.
    """

    rows: dict[int, dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        has_colours = console.color_system is not None and not console.no_color
        learned = "learned" if has_colours else "learned".join(MARKS)
        special = [("special token", f"{SEEN} {SPECIAL}")] if has_colours else []
        yield Text("  ").join(Text(*entry) for entry in [("only seen", SEEN), (learned, LEARNED), *special])
        for index, row in self.rows.items():
            yield self._panel(index, row, has_colours)

    def _panel(self, index: int, row: dict[str, Any], has_colours: bool) -> Panel:
        ids, labels = row["input_ids"], row["labels"]
        lengths = row.get("seq_lengths") or [len(ids)]
        parts: list[RenderableType] = []
        for i, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0)), start=1):
            if len(lengths) > 1:
                parts.append(Rule(Text(f"{i} of {len(lengths)} packed", SEEN), align="left", style=SEEN))
            parts.append(self._text(ids[start:end], labels[start:end], has_colours))
        learned = len(labels) - labels.count(IGNORED)
        title = Text(f"row {index:,}: {learned:,} of {len(ids):,} tokens are learned", "not dim")
        return Panel(Group(*parts), title=title, title_align="left", border_style=SEEN)

    def _text(self, ids: list[int], labels: list[int], has_colours: bool) -> Text:
        special = set(self.tokenizer.all_special_ids)
        text, before, end = Text(), "", 0
        for is_learned, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
            if is_learned and not has_colours:
                text.append(MARKS[0])
            for is_special, tokens in groupby(run, key=lambda pair: pair[0] in special):
                end += len(list(tokens))
                # Decode from the start: a tokenizer such as Llama's drops the space that a text begins with.
                whole = str(self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
                style = LEARNED if is_learned else SEEN
                text.append(whole[len(before) :], f"{style} {SPECIAL}" if is_special else style)
                before = whole
            if is_learned and not has_colours:
                text.append(MARKS[1])
        return text


def preview(rows: Rows, tokenizer: PreTrainedTokenizerBase, number: int = 1) -> Preview:
    """Return a preview of `number` prepared rows, spread over the data; of a stream, the first ones."""
    if isinstance(rows, Dataset):
        number = min(number, len(rows))
        return Preview({i: rows[i] for i in (part * len(rows) // number for part in range(number))}, tokenizer)
    return Preview(dict(enumerate(islice(rows, number))), tokenizer)


def check_labels(rows: Rows, max_length: int | None, which: str = "") -> None:
    """Raise if no prepared row has a token to learn; of a stream, only the first rows are looked at.

    Args:
        which: what the rows are called in the error.

    Raises:
        UsageError: when there is none.
    """
    if all(label == IGNORED for row in looked_at(rows) for label in row["labels"]):
        of = f" of the {which} rows" if which else ""
        raise UsageError(
            f"All labels{of} are masked: with max_length={max_length} no example keeps a token of its completion. "
            "Raise --max_length, or look for empty completions in the data."
        )


def looked_at(rows: Rows) -> Iterator[dict[str, Any]]:
    """Return an iterator over all rows, or over the first `FIRST` of a stream."""
    return iter(rows) if isinstance(rows, Dataset) else islice(rows, FIRST)
