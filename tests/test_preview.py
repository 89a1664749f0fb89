"""`to-finetune preview` shows what a run with the same flags trains on, whatever the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from to_finetune.cli import main
from to_finetune.data import preview
from to_finetune.data.preview import IGNORED
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import prepare_preview

from .helpers import ALPACA_ROWS, Run, flags, write_jsonl

TURNS = [{"role": role, "content": text} for role, text in (("user", "red?"), ("assistant", "blue"))]


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(llama)


@pytest.mark.parametrize(
    "options",
    [
        {"val_set_size": 4, "max_length": 190},
        {"packing": True, "max_length": 512, "val_set_size": 4, "shuffle_dataset": True},
        {"dataset_name": ["chats.jsonl", "more.jsonl"], "dataset_weights": [0.5, 0.5], "seed": 7},
        {"dataset_streaming": True},
    ],
    ids=["cut", "packed", "mixture", "stream"],
)
def test_it_prepares_the_rows_that_a_run_trains_on(
    finetune: Callable[..., Run],
    llama: Path,
    alpaca: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("chats.jsonl"), [{"messages": TURNS}] * 9)
    write_jsonl(Path("more.jsonl"), [{"messages": [*TURNS, *TURNS]}] * 9)
    run = finetune(tmp_path / "run", max_steps=2, **options)
    assert run.code == 0
    same = {"model_name_or_path": llama, "dataset_name": alpaca, "max_steps": 2, "use_cpu": True, **options}
    shown = prepare_preview(*parse_arguments(flags(output_dir=tmp_path / "preview", **same)))
    assert shown.args.max_length == run.trainer.args.max_length  # type: ignore[union-attr]

    def rows(data: Any) -> list[Any]:
        return [row for row, _ in zip(data, range(30), strict=False)]

    assert rows(shown.train_dataset) == rows(run.trainer.train_dataset)
    if run.trainer.eval_dataset is not None:
        assert rows(shown.eval_dataset) == rows(run.trainer.eval_dataset)


def drawn(rows: Any, tokenizer: PreTrainedTokenizerBase, number: int = 1, **console: Any) -> str:
    screen = Console(width=60, **console)
    with screen.capture() as capture:
        screen.print(preview(rows, tokenizer, number))
    return capture.get()


def row_of(tokenizer: PreTrainedTokenizerBase, *pieces: tuple[str, bool]) -> dict[str, list[int]]:
    """Pieces of text and whether they are learned."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": []}
    for text, is_learned in pieces:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        row["input_ids"] += ids
        row["labels"] += ids if is_learned else [IGNORED] * len(ids)
    return row


DIM, GREEN, END = "\x1b[2m", "\x1b[32m", "\x1b[0m"
DIM_SPECIAL, GREEN_SPECIAL = "\x1b[2;4m", "\x1b[4;32m"


def test_what_is_masked_is_dim_and_what_is_learned_green(tokenizer: PreTrainedTokenizerBase) -> None:
    row = row_of(tokenizer, ("<s>red:\n", False), ("blue</s>", True))
    shown = drawn(Dataset.from_list([row]), tokenizer, force_terminal=True, color_system="standard", no_color=False)
    for piece in (f"{DIM_SPECIAL}<s>{END}{DIM}red:{END}", f"{GREEN}blue{END}{GREEN_SPECIAL}</s>{END}"):
        assert piece in shown
    learned = len(tokenizer("blue</s>", add_special_tokens=False).input_ids)
    assert f"row 0: {learned} of {len(row['labels'])} tokens are learned" in shown
    legend = f"{DIM}only seen{END}  {GREEN}learned{END}  {DIM_SPECIAL}special token{END}"
    assert shown.splitlines()[0].rstrip() == legend


@pytest.mark.parametrize("console", [{}, {"force_terminal": True, "no_color": True}], ids=["log file", "no colours"])
def test_what_is_learned_is_marked_where_there_are_no_colours(
    tokenizer: PreTrainedTokenizerBase, console: dict[str, Any]
) -> None:
    row = row_of(tokenizer, ("<s>red: ", False), ("blue</s>", True), (" and ", False), ("stone</s>", True))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", drawn(Dataset.from_list([row]), tokenizer, **console))
    assert "<s>red: ⟦blue</s>⟧ and ⟦stone</s>⟧" in shown
    assert "only seen  ⟦learned⟧" in shown


def test_packed_examples_are_parted(tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = (row_of(tokenizer, (f"<s>{word}:", False), (f"{word}</s>", True)) for word in ("red", "blue"))
    packed = {key: one[key] + two[key] for key in one}
    packed["seq_lengths"] = [len(one["input_ids"]), len(two["input_ids"])]
    lines = [line.strip("│ ").rstrip("─ ") for line in drawn(Dataset.from_list([packed]), tokenizer).splitlines()]
    assert lines[2:6] == ["1 of 2 packed", "<s>red:⟦red</s>⟧", "2 of 2 packed", "<s>blue:⟦blue</s>⟧"]


def test_a_space_at_a_border_is_kept() -> None:
    """Which SentencePiece's tokenizers drop at the beginning of what they decode."""

    class Spaces:
        all_special_ids = (0,)

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(("<s>", " red", " blue")[i] for i in ids).lstrip()

    row = {"input_ids": [0, 1, 2], "labels": [IGNORED, IGNORED, 2]}
    assert "<s> red⟦ blue⟧" in drawn(Dataset.from_list([row]), Spaces())  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "chosen"), [(0, []), (1, [0]), (3, [0, 3, 6]), (20, list(range(10)))])
def test_the_rows_are_spread_over_the_data(tokenizer: PreTrainedTokenizerBase, number: int, chosen: list[int]) -> None:
    rows = Dataset.from_list([row_of(tokenizer, ("red", True))] * 10)
    assert list(preview(rows, tokenizer, number).rows) == chosen


@pytest.fixture
def command(llama: Path, alpaca: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`to-finetune preview`, its exit code and what it wrote."""

    def command(*words: str, **options: Any) -> tuple[int, str]:
        given = flags(**{"model_name_or_path": llama, "dataset_name": alpaca, "use_cpu": True, **options})
        code = main(["preview", *words, *given])
        written = capsys.readouterr()
        return code, written.out if code == 0 else written.err.splitlines()[-1]

    return command


def test_the_command_shows_the_examples_and_writes_nothing(
    command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = command("--rows", "2", output_dir=tmp_path / "out", val_set_size=4)
    assert code == 0
    words = " ".join(shown.split())
    assert "training 20" in words
    assert "held-out 4" in words
    assert shown.count("tokens are learned") == 2
    assert sum(f"⟦{row['output']}</s>⟧" in words for row in ALPACA_ROWS) >= 2
    assert not list(tmp_path.iterdir())


def test_it_needs_no_weights(command: Callable[..., tuple[int, str]], llama: Path, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((llama / file).read_bytes())
    assert command("--rows=1", model_name_or_path=tmp_path)[0] == 0


def test_it_makes_no_repository(command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with (
        mock.patch("huggingface_hub.create_repo") as created,
        mock.patch("transformers.trainer.Trainer.init_hf_repo", autospec=True) as begun,
    ):
        assert command(push_to_hub=True)[0] == 0
    begun.assert_not_called()
    created.assert_not_called()


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["--rows", "-1"], {}, "rows=-1 is not valid: at least 0."),
        (["--row", "1"], {}, "Unknown flag 'row'. Did you mean 'rows'"),
        ([], {"max_length": 20}, "All labels are masked: with max_length=20"),
        ([], {"dataset_nam": "x"}, "'dataset_nam'. Did you mean 'dataset_name'"),
        ([], {"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere': no such folder."),
    ],
)
def test_what_cannot_be_shown_is_said(
    command: Callable[..., tuple[int, str]], words: list[str], options: dict[str, Any], said: str
) -> None:
    code, error = command(*words, **options)
    assert code == 2
    assert said in error
