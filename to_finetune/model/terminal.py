"""A model's answers in the terminal: to given prompts, or in a conversation."""

from __future__ import annotations

from contextlib import nullcontext, suppress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from to_finetune.data.prompts import Message
from to_finetune.errors import UsageError
from to_finetune.model.generate import Answer, Decoding, answer, fitting
from to_finetune.model.opened import OpenModel

with suppress(ImportError):  # input() edits lines with it; Windows has none and needs none
    import readline  # noqa: F401

HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D ends."
STYLES = {"base": "dim", "tuned": ""}


def show(opened: OpenModel, prompt: str, decoding: Decoding, console: Console, compare: bool = False) -> None:
    """Print the answer to one prompt word by word; with `compare`, a table of the base's and the tuned model's answers.

    Raises:
        UsageError: for a prompt that is empty or too long.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if not compare:
        console.print(Text(f"> {prompt}", "bold"))
        _stream(opened, messages, decoding, console)
        return
    table = Table(title=Text(f"> {prompt}"), title_justify="left", title_style="bold", expand=True)
    row = []
    for voice, style in STYLES.items():
        table.add_column(voice, style=style, ratio=1, overflow="fold")
        with console.status(f"{voice} answers"), opened.as_base() if voice == "base" else nullcontext():
            said = answer(opened.model, opened.tokenizer, messages, opened.form, decoding)
        row.append(Text(said.text.strip()).append(ending(said), "dim"))
    table.add_row(*row)
    console.print(table)


def chat(opened: OpenModel, decoding: Decoding, console: Console, compare: bool = False) -> None:
    """Read questions until /exit or the end of the input, and print each answer word by word.

    Earlier messages are part of the prompt if the model has learned conversations. With `compare` the base answers
    first, in a conversation of its own.
    """
    console.print(HELP, style="dim")
    if opened.form != "chat":
        console.print("Each question stands by itself: the model has learned no conversations.", style="dim")
    said: dict[str, list[Message]] = {voice: [] for voice in (STYLES if compare else ("tuned",))}
    while (line := _read()) is not None and line != "/exit":
        if line == "/reset":
            for messages in said.values():
                messages.clear()
            console.print("Forgotten.", style="dim")
        elif line.startswith("/"):
            console.print(f"There is no {line.split()[0]}. {HELP}", style="dim", markup=False)
        elif line:
            for voice, messages in said.items():
                if compare:
                    console.print(f"{voice}:", style="bold " + STYLES[voice])
                with opened.as_base() if voice == "base" else nullcontext():
                    _turn(opened, messages, line, decoding, console, STYLES[voice])


def ending(said: Answer) -> str:
    """Return a note that an answer was cut; empty for one that ended by itself."""
    return "" if said.ended else f" [cut at {said.tokens} tokens]"


def _turn(opened: OpenModel, said: list[Message], line: str, decoding: Decoding, console: Console, style: str) -> None:
    """Answer `line` and add both to `said`; a line that cannot be answered is not added."""
    messages = [*said, {"role": "user", "content": line}]
    if opened.form != "chat":
        messages = messages[-1:]
    kept = fitting(messages, opened.model, opened.tokenizer, opened.form, decoding)
    if forgotten := (len(messages) - len(kept)) // 2:
        console.print(f"The context is full: the first {forgotten} of the answers are forgotten.", style="dim")
    try:
        text = _stream(opened, kept, decoding, console, style)
    except UsageError as error:
        console.print(str(error), style="red", markup=False)
    else:
        said[:] = [*kept, {"role": "assistant", "content": text}]


def _stream(opened: OpenModel, messages: list[Message], decoding: Decoding, console: Console, style: str = "") -> str:
    """Print an answer as it is generated, and return its text."""

    def write(text: str) -> None:
        console.print(Text(text, style), end="", soft_wrap=True)

    said = answer(opened.model, opened.tokenizer, messages, opened.form, decoding, write)
    console.print(Text(ending(said), "dim"), end="\n\n", soft_wrap=True)
    return said.text


def _read() -> str | None:
    """Return the next line, stripped; "" after a Ctrl-C, None at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt) as error:
        print()  # so that the next output begins a line
        return None if isinstance(error, EOFError) else ""
