"""Which tokens the model sees and which of them it learns, for every form that data may have."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from to_finetune.data import alpaca_prompt, check_labels, load_data, preview
from to_finetune.data.preview import IGNORED
from to_finetune.errors import UsageError
from to_finetune.training.arguments import parse_arguments
from to_finetune.training.prepare import prepare_data, prepare_model, prepare_trainer

from .helpers import ALPACA_ROWS, flags, write_jsonl

Prepare = Callable[..., Any]

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

TURNS = [("system", "Be brief."), ("user", "red?"), ("assistant", "blue"), ("user", "river?"), ("assistant", "stone")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS]
CHAT_TEXT = (
    "<s>Be brief.\n\n### Instruction:\nred?\n\n### Response:\nblue</s>\n\n"
    "### Instruction:\nriver?\n\n### Response:\nstone</s>"
)


@pytest.fixture
def prepare(llama: Path, tmp_path: Path) -> Prepare:
    """The trainer, with its data tokenized, of a run on `data`."""

    def prepare(data: Path, **options: Any) -> Any:
        settings = {"model_name_or_path": llama, "dataset_name": data, "output_dir": tmp_path / "out", "use_cpu": True}
        model_args, data_args, args = parse_arguments(flags(**{**settings, **options}))
        model, tokenizer, _ = prepare_model(model_args, args)
        return prepare_trainer(model, tokenizer, args, *prepare_data(data_args, args, tokenizer))

    return prepare


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(llama)


def seen(dataset: Dataset, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """All that the model sees of a row."""
    return tokenizer.decode(dataset[row]["input_ids"])


def learned(dataset: Dataset, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What it learns of it; the labels must be the tokens themselves."""
    pairs = [(i, label) for i, label in zip(*map(dataset[row].get, ("input_ids", "labels")), strict=True)]
    assert all(label in (i, IGNORED) for i, label in pairs)
    return tokenizer.decode([i for i, label in pairs if label != IGNORED])


def expected_prompt(row: dict[str, str]) -> str:
    """Stanford's prompt and a line break, so that no token reaches from the prompt into the response."""
    return (PROMPT_WITH_INPUT if row["input"] else PROMPT_NO_INPUT).format(**row) + "\n"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the ending of `path` says."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_alpaca_rows_learn_the_output_and_its_end(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ending: str
) -> None:
    """Rows 0 and 1 of the file are without and with an input."""
    data = prepare(write(tmp_path / f"rows.{ending}", ALPACA_ROWS)).train_dataset
    assert len(data) == len(ALPACA_ROWS)
    for i in (0, 1):
        row = ALPACA_ROWS[i]
        assert seen(data, i, tokenizer) == f"<s>{expected_prompt(row)}{row['output']}</s>"
        assert learned(data, i, tokenizer) == f"{row['output']}</s>"


def test_the_prompt_is_stanford_alpacas() -> None:
    for row in ALPACA_ROWS:
        assert alpaca_prompt(row["instruction"], row["input"]) == expected_prompt(row)


@pytest.mark.parametrize(
    ("row", "all_text", "learned_text"),
    [
        ({"prompt": "red:\n", "completion": "blue"}, "<s>red:\nblue</s>", "blue</s>"),
        ({"prompt": "3 + 4:\n", "completion": 7}, "<s>3 + 4:\n7</s>", "7</s>"),
        ({"prompt": "red", "completion": None}, "<s>red</s>", "</s>"),
        ({"text": "red river"}, "<s>red river</s>", "<s>red river</s>"),
        ({"messages": CHAT}, CHAT_TEXT, "blue</s>stone</s>"),
        ({"conversations": SHAREGPT}, CHAT_TEXT, "blue</s>stone</s>"),
        (
            {"prompt": CHAT[:2], "completion": CHAT[2:3]},
            "<s>Be brief.\n\n### Instruction:\nred?\n\n### Response:\nblue</s>",
            "blue</s>",
        ),
    ],
    ids=["prompt-completion", "numbers", "empty", "text", "messages", "conversations", "prompt-completion messages"],
)
def test_what_is_seen_and_what_is_learned(
    prepare: Prepare,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    row: dict[str, Any],
    all_text: str,
    learned_text: str,
) -> None:
    data = prepare(write_jsonl(tmp_path / "rows.jsonl", [row] * 2)).train_dataset
    assert seen(data, 0, tokenizer) == all_text
    assert learned(data, 0, tokenizer) == learned_text


def test_every_turn_is_learned_if_asked(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2)
    assert learned(prepare(data, assistant_only_loss=False).train_dataset, 0, tokenizer) == CHAT_TEXT


def test_numbers_in_a_csv_file_are_text(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"instruction": "Two and two?", "input": "", "output": 4}, {"instruction": 5, "input": 6, "output": 0}]
    data = prepare(write(tmp_path / "rows.csv", rows)).train_dataset
    assert [learned(data, i, tokenizer) for i in (0, 1)] == ["4</s>", "0</s>"]


def test_a_text_file_is_a_row_a_line(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("red river\nblue bird\n")
    data = prepare(tmp_path / "rows.txt").train_dataset
    assert [learned(data, i, tokenizer) for i in (0, 1)] == ["<s>red river</s>", "<s>blue bird</s>"]


def test_the_preview_shows_what_is_masked_and_what_is_learned(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = prepare(write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2)).train_dataset
    table = preview(data, tokenizer)
    kinds, texts = ([*column.cells] for column in table.columns)
    assert kinds == ["masked", "learned", "masked", "learned"]
    assert [text.plain for text in texts] == [
        "<s>Be brief.\n\n### Instruction:\nred?\n\n### Response:\n",
        "blue</s>",
        "\n\n### Instruction:\nriver?\n\n### Response:\n",
        "stone</s>",
    ]
    count = len(tokenizer("blue</s>stone</s>", add_special_tokens=False).input_ids)
    assert f" {count} of {len(data[0]['labels'])} tokens are learned" in str(table.title)


def test_learned_tokens_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    assert check_labels(Dataset.from_dict({"labels": [[IGNORED, 5, 6], [IGNORED, 7]]}), None) == 3
    with pytest.raises(UsageError, match="All labels are masked"):
        check_labels(Dataset.from_dict({"labels": [[IGNORED], [IGNORED]]}), None)


@pytest.mark.parametrize(("val_set_size", "rows"), [(6, 6), (0.25, 6), (1, 1)])
def test_held_out_rows_are_the_same_for_every_seed(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path, val_set_size: float, rows: int
) -> None:
    """And no row is on both sides or lost."""
    first, second = (prepare(alpaca, val_set_size=val_set_size, seed=seed) for seed in (1, 2))
    assert first.eval_dataset["input_ids"] == second.eval_dataset["input_ids"]
    assert len(first.eval_dataset) == rows
    parts = [seen(data, i, tokenizer) for data in (first.train_dataset, first.eval_dataset) for i in range(len(data))]
    everything = prepare(alpaca).train_dataset
    assert sorted(parts) == sorted(seen(everything, i, tokenizer) for i in range(len(everything)))


def test_a_file_is_evaluated_on_if_asked(prepare: Prepare, tmp_path: Path, alpaca: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ALPACA_ROWS[:5])
    trainer = prepare(alpaca, eval_dataset_name=held_out, dataset_test_split="train[2:]")
    everything = prepare(alpaca).train_dataset
    assert trainer.eval_dataset["input_ids"] == everything["input_ids"][2:5]
    assert trainer.train_dataset["input_ids"] == everything["input_ids"]


def test_a_split_takes_a_part(alpaca: Path) -> None:
    whole, _ = load_data(str(alpaca))
    part, held_out = load_data(str(alpaca), split="train[:7]")
    assert part.to_list() == whole.to_list()[:7]
    assert held_out is None
