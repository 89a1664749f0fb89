"""The forms that rows may be written in, and their conversion to the forms that TRL knows."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value

from to_finetune.data.alpaca import alpaca_prompt
from to_finetune.errors import UsageError

Rows: TypeAlias = Dataset | IterableDataset  # the rows of a stream are read while training

TEXTS, TURNS, MESSAGES, TEXT = "prompt and completion", "prompt and completion messages", "messages", "text"
WANTED = "{instruction, input, output}, {prompt, completion}, {messages}, {conversations} or {text}"
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant"},  # ShareGPT's
}


class Normalized(NamedTuple):
    """Rows in one of TRL's forms.

    Attributes:
        source: the flag and the name, for messages about the rows.
        rows: with the columns of the form, and for chats `tools` if they have any.
        form: TEXTS, TURNS, MESSAGES or TEXT.
        unread: the remaining columns of the source, which are not used.
    """

    source: str
    rows: Rows
    form: str
    unread: list[str]


def normalized(source: str, rows: Rows, text_column: str = "text") -> Normalized:
    """Convert rows to TRL's forms: Alpaca's columns to prompt and completion, ShareGPT's conversations to messages.

    Raises:
        UsageError: for columns of no known form; while reading, for a row of another form or a malformed one.
    """
    first: dict[str, Any] = next(iter(rows))
    columns = list(rows.column_names or first)
    convert: Callable[..., dict[str, Any]]
    if {"instruction", "output"} <= set(columns):
        form, used, convert = TEXTS, ["instruction", "input", "output"], _alpaca_row
    elif chats := [column for column in ("messages", "conversations") if column in columns]:
        form, used, convert = MESSAGES, [chats[0], "tools"], _chat_row
    elif {"prompt", "completion"} <= set(columns) and isinstance(first["prompt"], list):
        form, used, convert = TURNS, ["prompt", "completion", "tools"], _turns_row
    elif {"prompt", "completion"} <= set(columns):
        form, used, convert = TEXTS, ["prompt", "completion"], _text_row
    elif text_column in columns:
        form, used, convert = TEXT, [text_column], _text_row
    else:
        wanted = WANTED if text_column == "text" else f"{WANTED}, or {text_column!r} as dataset_text_field says"
        raise UsageError(f"{source} has the columns {', '.join(columns)}; needed: {wanted}.")
    used = [column for column in used if column in columns]
    prepared = rows.map(
        convert,
        with_indices=True,
        fn_kwargs={"source": source, "columns": used},
        remove_columns=columns,
        features=_features(rows.features, form, used),
    )
    return Normalized(source, prepared, form, [column for column in columns if column not in used])


def _features(before: Features | None, form: str, used: list[str]) -> Features | None:
    """Return the types of the converted columns: map() would keep the old type of a column that keeps its name."""
    if form == TEXTS:
        return Features(prompt=Value("string"), completion=Value("string"))
    if form == TEXT:
        return Features({used[0]: Value("string")})
    if before is None:
        return None
    names = {"messages": used[0]} if form == MESSAGES else {column: column for column in ("prompt", "completion")}
    types = {name: _turns_type(before[column]) for name, column in names.items()}
    return Features(types | {column: before[column] for column in used if column == "tools"})


def _turns_type(before: Any) -> Any:
    """Return the type of turns with role and content as text, and all else unchanged."""
    turn = getattr(before, "feature", None)
    if not isinstance(turn, dict):  # JSON, if turns differ; or no turns at all, which the row's check reports
        return before
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return type(before)({"role": Value("string"), "content": Value("string"), **rest})


def _alpaca_row(row: dict[str, Any], index: int, source: str, columns: list[str]) -> dict[str, str]:
    texts = _text_row(row, index, source, columns)
    return {"prompt": alpaca_prompt(texts["instruction"], texts.get("input")), "completion": texts["output"]}


def _text_row(row: dict[str, Any], index: int, source: str, columns: list[str]) -> dict[str, str]:
    """Return the cells as text, including numbers of a CSV file and its empty cells, which pandas may write as NaN."""
    for column in columns:
        if isinstance(row[column], (list, dict)):
            raise _malformed(source, index, f"{column} must be a text as in the first row", row[column])
    return {column: "" if row[column] is None or row[column] != row[column] else str(row[column]) for column in columns}


def _chat_row(row: dict[str, Any], index: int, source: str, columns: list[str]) -> dict[str, Any]:
    column, *tools = columns
    return {"messages": _turns(row, index, source, column), **{key: row[key] for key in tools}}


def _turns_row(row: dict[str, Any], index: int, source: str, columns: list[str]) -> dict[str, Any]:
    turns = {column: _turns(row, index, source, column) for column in ("prompt", "completion")}
    return {**turns, **{key: row[key] for key in columns if key not in turns}}


def _turns(row: dict[str, Any], index: int, source: str, column: str) -> list[dict[str, Any]]:
    """Return a conversation in TRL's form: each turn with its role, its content, and all else (tool calls)."""
    turns = row[column]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        wanted = f"{column} must be a list of {{role, content}} or of {{from, value}}"
        raise _malformed(source, index, wanted, turns)
    return [_turn(turn, index, source, column) for turn in turns]


def _turn(turn: dict[str, Any], index: int, source: str, column: str) -> dict[str, Any]:
    role, content = ("from", "value") if turn.get("from") else ("role", "content")
    if role not in turn or (content not in turn and not turn.get("tool_calls")):
        raise _malformed(source, index, f"a turn of {column} must have a role and a content", turn)
    if str(turn[role]) not in ROLES:
        raise _malformed(source, index, f"the role of a turn is one of {', '.join(ROLES)}", turn[role])
    rest = {key: value for key, value in turn.items() if key not in (role, content) and value is not None}
    text = _joined(turn.get(content))
    if text is None:
        raise _malformed(
            source, index, f"the {content} of a turn must be text or parts of {{type: text}}", turn[content]
        )
    return {"role": ROLES[turn[role]], "content": text, **rest}


def _joined(content: Any) -> str | None:
    """Return the text of a turn, joining OpenAI's parts, which few templates accept; None if not all of it is text."""
    if content is None:
        return ""  # of a turn that calls a tool; a template would write "None"
    if not isinstance(content, (list, dict)):
        return str(content)
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    all_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if all_text else None


def _malformed(source: str, index: int, wanted: str, found: Any) -> UsageError:
    return UsageError(f"{source} is malformed: row {index}: {wanted}, not {shorten(repr(found), 100)}.")
