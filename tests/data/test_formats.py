"""Which tokens the model sees and which of them it learns, for every form of row in every kind of file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from to_finetune.data import alpaca_prompt, load_data
from to_finetune.errors import UsageError

from ..helpers import ALPACA_ROWS, write_jsonl
from .rows import CHAT, CHAT_PIECES, SHAREGPT, Learned, alpaca, prepared, tokens, write

Prepare = Callable[..., Any]

PARTS = [{"type": "text", "text": "red "}, {"type": "text", "text": "bird"}]
FORMS: dict[str, tuple[list[dict[str, Any]], list[list[str]]]] = {
    "alpaca": (ALPACA_ROWS[:2], [alpaca(row) for row in ALPACA_ROWS[:2]]),  # without and with an input
    "prompt-completion": (
        [{"prompt": "red:\n", "completion": "blue"}, {"prompt": "tree\n", "completion": "a house"}],
        [["<s>red:\n", Learned("blue</s>")], ["<s>tree\n", Learned("a house</s>")]],
    ),
    "text": (
        [{"text": "red river"}, {"text": "blue bird"}],
        [[Learned("<s>red river</s>")], [Learned("<s>blue bird</s>")]],
    ),
    "messages": (
        [{"messages": CHAT}, {"messages": CHAT[1:]}],
        [CHAT_PIECES, ["<s>" + CHAT_PIECES[0][14:], *CHAT_PIECES[1:]]],
    ),
    "sharegpt": ([{"conversations": SHAREGPT}] * 2, [CHAT_PIECES] * 2),
    "prompt-completion messages": (
        [{"prompt": CHAT[:2], "completion": CHAT[2:3]}, {"prompt": CHAT[:4], "completion": CHAT[4:]}],
        [CHAT_PIECES[:2], [CHAT_PIECES[0], "blue</s>", *CHAT_PIECES[2:]]],
    ),
}
KINDS = {
    **{form: ["json", "jsonl", "csv", "parquet"] for form in ("alpaca", "prompt-completion")},
    "text": ["json", "jsonl", "csv", "parquet", "txt"],
    **{form: ["json", "jsonl", "parquet"] for form in ("messages", "sharegpt", "prompt-completion messages")},
}


@pytest.mark.parametrize(("form", "kind"), [(form, kind) for form, kinds in KINDS.items() for kind in kinds])
def test_every_form_in_every_kind_of_file(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, form: str, kind: str
) -> None:
    rows, pieces = FORMS[form]
    data = prepare(write(tmp_path / f"rows.{kind}", rows)).train_dataset
    assert prepared(data) == [tokens(tokenizer, row) for row in pieces]


def test_the_prompt_is_stanford_alpacas() -> None:
    for row in ALPACA_ROWS:
        assert f"<s>{alpaca_prompt(row['instruction'], row['input'])}" == alpaca(row)[0]


@pytest.mark.parametrize("empty", ["", None], ids=["empty", "null"])
def test_an_empty_input_is_none(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, empty: str | None
) -> None:
    row = {"instruction": "Say red.", "output": "red"}
    data = prepare(write_jsonl(tmp_path / "rows.jsonl", [{**row, "input": empty}, row])).train_dataset
    assert prepared(data) == [tokens(tokenizer, alpaca({**row, "input": ""}))] * 2


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"prompt": "3 + 4:\n", "completion": 7}, ["<s>3 + 4:\n", Learned("7</s>")]),
        ({"prompt": "red", "completion": None}, ["<s>red", Learned("</s>")]),
        ({"prompt": None, "completion": "red"}, ["<s>", Learned("red</s>")]),
        # Tokens that reach across the border: " blue" is one, so the prompt's last space is learned as a part of it.
        ({"prompt": "red: ", "completion": "blue"}, ["<s>red:", Learned(" blue</s>")]),
        ({"prompt": "red:", "completion": " blue"}, ["<s>red:", Learned(" blue</s>")]),
        # The data's own end is not doubled.
        ({"prompt": "red:\n", "completion": "blue</s>"}, ["<s>red:\n", Learned("blue</s>")]),
        ({"text": "red</s>"}, [Learned("<s>red</s>")]),
        # Content that is not there, as of a turn that calls a tool, is not the word None.
        (
            {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "red"}]},
            ["<s>### Instruction:\n\n\n### Response:\n", Learned("red</s>")],
        ),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT[1:3]]},
            CHAT_PIECES[:2],
        ),
        # A number in a turn is text.
        (
            {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": 4}]},
            ["<s>### Instruction:\n3\n\n### Response:\n", Learned("4</s>")],
        ),
        # OpenAI's parts are one text, also beside turns that are plain text.
        (
            {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]},
            ["<s>### Instruction:\nred bird\n\n### Response:\n", Learned("red bird</s>")],
        ),
        (
            {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "blue"}]},
            ["<s>### Instruction:\nred bird\n\n### Response:\n", Learned("blue</s>")],
        ),
        # What comes after the last answer is seen at most.
        ({"messages": CHAT[:4]}, [*CHAT_PIECES[:2], CHAT_PIECES[2]]),
    ],
    ids=[
        "number",
        "no completion",
        "no prompt",
        "space before",
        "space after",
        "own end",
        "own end of text",
        "no content",
        "developer",
        "numbers in turns",
        "parts",
        "parts and text",
        "question at the end",
    ],
)
def test_the_edges_of_what_is_learned(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], pieces: list[str]
) -> None:
    data = prepare(write_jsonl(tmp_path / "rows.jsonl", [row] * 2)).train_dataset
    assert prepared(data) == [tokens(tokenizer, pieces)] * 2


@pytest.mark.parametrize(
    ("row", "options", "pieces"),
    [
        ({"messages": CHAT}, {"assistant_only_loss": False}, [Learned("".join(CHAT_PIECES))]),
        ({"prompt": "red:\n", "completion": "blue"}, {"completion_only_loss": False}, [Learned("<s>red:\nblue</s>")]),
        ({"story": "red"}, {"dataset_text_field": "story"}, [Learned("<s>red</s>")]),
        ({"prompt": "red:\n", "completion": "a"}, {"eos_token": "<pad>"}, ["<s>red:\n", Learned("a<pad>")]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_flags_change_what_is_learned(
    prepare: Prepare,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    row: dict[str, Any],
    options: dict[str, Any],
    pieces: list[str],
) -> None:
    data = prepare(write_jsonl(tmp_path / "rows.jsonl", [row] * 2), **options).train_dataset
    assert prepared(data) == [tokens(tokenizer, pieces)] * 2


def test_the_cells_of_a_csv_file_are_text_as_they_stand(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Numbers keep their zeros, beside empty cells too, and a word such as None is no empty cell."""
    rows = [
        {"instruction": "Two and two?", "input": "", "output": 4},
        {"instruction": 5, "input": 6, "output": "007"},
        {"instruction": "1.50", "input": "NA", "output": "None"},
    ]
    data = prepare(write(tmp_path / "rows.csv", rows)).train_dataset
    assert prepared(data) == [tokens(tokenizer, alpaca({k: str(v) for k, v in row.items()})) for row in rows]


def test_blank_lines_of_a_text_file_are_no_rows(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "rows.txt").write_text("red river\n\n  \nblue bird\n")
    data = prepare(tmp_path / "rows.txt").train_dataset
    assert prepared(data) == [tokens(tokenizer, row) for row in FORMS["text"][1]]


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    rows = [{**row, "history": [], "system": "Be brief."} for row in ALPACA_ROWS[:2]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load_data([str(path)]).notes == [f"dataset_name={str(path)!r}: not read are the columns history, system."]


ROLE = {"conversations": [{"from": "human", "value": "red?"}, {"from": "bard", "value": "blue"}]}
GOOD = {"messages": CHAT}
IMAGE = {"type": "image_url", "image_url": {"url": "red.png"}}
BROKEN = {
    "role": ([{"conversations": SHAREGPT}, ROLE], "row 1: the role of a turn is one of", "human, gpt, not 'bard'"),
    "role that is no word": ([{"messages": [{"role": ["user"], "content": "red"}]}], "human, gpt, not ['user']"),
    "no turns": ([GOOD, {"messages": []}], "row 1: messages must be a list of {role, content}", "not []"),
    "text for turns": ([{"messages": "red"}], "row 0: messages must be a list", "not 'red'"),
    "no content": ([{"messages": [{"role": "user"}]}], "row 0: a turn of messages must have a role and a content"),
    "image": (
        [{"messages": [{"role": "user", "content": PARTS}]}, {"messages": [{"role": "user", "content": [IMAGE]}]}],
        "row 1: the content of a turn must be text or parts of {type: text}, not [{'type': 'image_url'",
    ),
    "parts without a type": ([{"messages": [{"role": "user", "content": ["red"]}]}], "row 0: the content", "['red']"),
    "mapping": ([{"messages": [{"role": "user", "content": {"red": 1}}]}], "row 0: the content", "not {'red': 1}"),
    "prompt of turns": ([{"prompt": CHAT, "completion": "red"}], "row 0: completion must be a list of {role, content}"),
    "mixed prompts": (
        [{"prompt": "red", "completion": "blue"}, {"prompt": CHAT[:2], "completion": CHAT[2:3]}],
        "row 1: prompt must be a text as in the first row",
    ),
    "mixed texts": (
        [{"text": "red"}, {"text": ["blue"]}],
        "row 1: text must be a text as in the first row, not ['blue']",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named(tmp_path: Path, case: str) -> None:
    rows, *said = BROKEN[case]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError) as raised:
        load_data([str(path)])
    assert [words for words in (f"{str(path)!r} is malformed", *said) if words not in str(raised.value)] == []
