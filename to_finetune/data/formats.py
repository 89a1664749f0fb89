"""The forms that rows may be written in, and what TRL calls each of them."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value

from to_finetune.data.alpaca import alpaca_prompt
from to_finetune.errors import UsageError

Rows: TypeAlias = Dataset | IterableDataset  # those of a stream are read while training

TEXTS, TURNS, MESSAGES, TEXT = "prompt and completion", "prompt and completion messages", "messages", "text"
WANTED = "{instruction, input, output}, {prompt, completion}, {messages}, {conversations} or {text}"
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant"},  # ShareGPT's
}


class Normalized(NamedTuple):
    """Rows in one of TRL's forms.

    Attributes:
        source: the flag and the name, for what is said about them.
        rows: with the columns of the form, and of chats `tools` where they have some.
        form: TEXTS, TURNS, MESSAGES or TEXT.
        unread: the columns that it has besides.
    """

    source: str
    rows: Rows
    form: str
    unread: list[str]


def normalized(source: str, rows: Rows, text_column: str = "text") -> Normalized:
    """Rows as TRL takes them: Alpaca's columns become prompt and completion, ShareGPT's conversations messages.

    Raises:
        UsageError: for columns that are none of the forms; when a row is reached whose form is another or broken.
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
    """The types of the converted columns: map() would give a column that keeps its name the type it had."""
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
    """Role and content as text, all else as it was."""
    turn = getattr(before, "feature", None)
    if not isinstance(turn, dict):  # as JSON, where turns differ; or no turns at all, which is said of the row
        return before
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return type(before)({"role": Value("string"), "content": Value("string"), **rest})


def _alpaca_row(row: dict[str, Any], index: int, source: str, columns: list[str]) -> dict[str, str]:
    texts = _text_row(row, index, source, columns)
    return {"prompt": alpaca_prompt(texts["instruction"], texts.get("input")), "completion": texts["output"]}


def _text_row(row: dict[str, Any], index: int, source: str, columns: list[str]) -> dict[str, str]:
    """The cells as text: a CSV file's numbers, and its empty cells; NaN is one too, as pandas writes them."""
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
    """A conversation as TRL has it: each turn with its role, its content, and what else it holds (tool calls)."""
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
    """The text of a turn, also where it is OpenAI's parts, which few templates take; None for what is not all text."""
    if content is None:
        return ""  # of a turn that calls a tool; a template would write "None"
    if not isinstance(content, (list, dict)):
        return str(content)
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    all_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if all_text else None


def _malformed(source: str, index: int, wanted: str, found: Any) -> UsageError:
    return UsageError(f"{source} is malformed: row {index}: {wanted}, not {shorten(repr(found), 100)}.")
