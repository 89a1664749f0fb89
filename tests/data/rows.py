"""Rows of every form in files of every kind, and the tokens and labels that they must become."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from to_finetune.data.preview import IGNORED

from ..helpers import write_jsonl

TURNS = [("system", "Be brief."), ("user", "red?"), ("assistant", "blue"), ("user", "river?"), ("assistant", "stone")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS]

# As Stanford Alpaca has them (train.py, PROMPT_DICT).
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Learned(str):
    """A piece of an example that has a loss; plain pieces have none."""


def alpaca(row: Mapping[str, str]) -> list[str]:
    """Stanford's prompt and a line break, so that no token reaches from the prompt into the response."""
    prompt = (PROMPT_WITH_INPUT if row["input"] else PROMPT_NO_INPUT).format(**row)
    return [f"<s>{prompt}\n", Learned(f"{row['output']}</s>")]


CHAT_PIECES = [
    "<s>Be brief.\n\n### Instruction:\nred?\n\n### Response:\n",
    Learned("blue</s>"),
    "\n\n### Instruction:\nriver?\n\n### Response:\n",
    Learned("stone</s>"),
]


def tokens(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> dict[str, list[int]]:
    """The row that `pieces` become, each tokenized by itself."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": []}
    for piece in pieces:
        ids = tokenizer(str(piece), add_special_tokens=False).input_ids
        row["input_ids"] += ids
        row["labels"] += ids if isinstance(piece, Learned) else [IGNORED] * len(ids)
    return row


def prepared(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    """What the model gets of prepared rows."""
    return [{key: row[key] for key in ("input_ids", "labels")} for row in rows]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows in the format that the ending of `path` says."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(list(rows)).to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
