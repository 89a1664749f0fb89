"""One prepared example as the model will see it, and which part of it is learned."""

from __future__ import annotations

from itertools import groupby

from datasets import Dataset
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from to_finetune.errors import UsageError

IGNORED = -100  # the label of a token without loss


def preview(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> Table:
    """Row `row` of a prepared dataset ({input_ids, labels}), run by run: masked tokens dim, learned ones green."""
    example = dataset[row]
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    learned = sum(label != IGNORED for _, label in pairs)
    title = f"Training example {row}: {learned} of {len(pairs)} tokens are learned"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, show_lines=True)
    for masked, run in groupby(pairs, key=lambda pair: pair[1] == IGNORED):
        text = Text(str(tokenizer.decode([token for token, _ in run])), style="dim" if masked else "green")
        table.add_row("masked" if masked else "learned", text)
    return table


def check_labels(dataset: Dataset, max_length: int | None) -> int:
    """The tokens with a loss in a prepared dataset.

    Raises:
        UsageError: when there is none.
    """
    learned = sum(sum(label != IGNORED for label in labels) for labels in dataset["labels"]) if len(dataset) else 0
    if learned == 0:
        raise UsageError(
            f"All labels are masked: with max_length={max_length} no example keeps a token of its completion. "
            "Raise --max_length, or look for empty completions in the data."
        )
    return learned
