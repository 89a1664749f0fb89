"""What prepared data come to, and what is said where something seems wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from to_finetune.data import check_labels
from to_finetune.data.preview import IGNORED
from to_finetune.data.statistics import Statistics, notes, statistics, table
from to_finetune.errors import UsageError
from to_finetune.training.prepare import data_report

from ..helpers import ALPACA_ROWS, write_jsonl
from . import rows as forms
from .rows import CHAT, prepared, tokens

Prepare = Callable[..., Any]
WithTokenizer = Callable[[Callable[[Any], None]], Path]
PAIRS = [{"prompt": f"{word}:\n", "completion": word} for word in ("red", "blue", "green river", "stone")]


def report(trainer: Any) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(data_report(trainer))
    return capture.get()


def test_tokens_are_counted(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path) -> None:
    trainer = prepare(alpaca, val_set_size=4, max_length=200)
    rows = [tokens(tokenizer, row) for row in map(forms.alpaca, ALPACA_ROWS)]
    held_out = prepared(prepare(alpaca, val_set_size=4).eval_dataset)
    assert all(row in rows for row in held_out)
    training = [row for row in rows if row not in held_out]
    lengths = [len(row["input_ids"]) for row in training]
    kept = [row["labels"][:200] for row in training]
    assert statistics(trainer.uncut["train"], tokenizer, 200) == Statistics(
        rows=20,
        tokens=sum(map(len, kept)),
        learned=sum(len(labels) - labels.count(IGNORED) for labels in kept),
        shortest=min(lengths),
        mean=sum(lengths) / 20,
        longest=max(lengths),
        cut=sum(length > 200 for length in lengths),
        lost=sum(set(labels) == {IGNORED} for labels in kept),
        empty=0,
        ended=20,
        doubled=0,
        last=tokenizer.eos_token_id,
    )
    assert 0 < sum(length > 200 for length in lengths) < 20


def test_the_table_shows_the_counts() -> None:
    part = Statistics(
        20, 4000, 1000, shortest=7, mean=210.4, longest=1234, cut=3, lost=1, empty=0, ended=20, doubled=0, last=1
    )
    cells = [next(iter(column.cells)) for column in table({"training": part}).columns]
    assert cells == ["training", "20", "4,000", "25.0%", "7", "210", "1,234", "3"]


@pytest.mark.parametrize(
    ("options", "tokens", "learned", "cut", "lost"),
    [
        ({}, 6, 3, 0, 0),
        ({"max_length": 4}, 6, 3, 0, 0),
        ({"max_length": 3}, 5, 2, 1, 0),
        ({"max_length": 1}, 2, 0, 2, 2),
        ({"max_length": 2, "keeps": "end"}, 4, 3, 1, 0),
        ({"max_length": 2, "keeps": "all"}, 6, 3, 0, 0),
    ],
)
def test_what_is_cut(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], tokens: int, learned: int, cut: int, lost: int
) -> None:
    ids, labels = [[5, 6, 7, 1], [5, 1]], [[IGNORED, IGNORED, 7, 1], [IGNORED, 1]]
    part = statistics(Dataset.from_dict({"input_ids": ids, "labels": labels}), tokenizer, **options)
    assert (part.tokens, part.learned, part.cut, part.lost) == (tokens, learned, cut, lost)


@pytest.mark.parametrize(
    ("options", "kept", "said"),
    [
        ({"max_length": 190}, slice(190), "{cut} of 24 training rows are cut at max_length=190."),
        ({"max_length": 190, "truncation_mode": "keep_end"}, slice(-190, None), "{cut} of 24 training rows are cut"),
    ],
    ids=["start", "end"],
)
def test_cut_rows_are_said_and_are_the_runs(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path, options: dict[str, Any], kept: slice, said: str
) -> None:
    """Those that keep nothing to learn are said as well, for TRL drops them."""
    trainer = prepare(alpaca, **options)
    rows = [tokens(tokenizer, row) for row in map(forms.alpaca, ALPACA_ROWS)]
    cut = [{key: row[key][kept] for key in row} for row in rows]
    left = [row for row in cut if set(row["labels"]) != {IGNORED}]
    assert prepared(trainer.train_dataset) == left
    shown = report(trainer)
    assert said.format(cut=sum(len(row["input_ids"]) > 190 for row in rows)) in shown
    lost = 24 - len(left)
    assert (f"{lost} of 24 training rows have nothing to learn within max_length=190" in shown) == (lost > 0)


def test_empty_completions_are_counted(prepare: Prepare, tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "red:\n", "completion": ""}, {"prompt": "red:\n", "completion": None}]
    shown = report(prepare(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert "2 of 6 training rows have an empty completion: they teach to say nothing." in shown


def test_what_is_wrong_with_held_out_rows_is_said_too(prepare: Prepare, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*PAIRS, {"prompt": "red:\n", "completion": ""}])
    shown = report(prepare(write_jsonl(tmp_path / "rows.jsonl", PAIRS), eval_dataset_name=held_out))
    assert "1 of 5 held-out rows have an empty completion" in shown


def test_good_data_are_no_cause_for_a_remark(prepare: Prepare, alpaca: Path) -> None:
    assert len(report(prepare(alpaca)).strip().splitlines()) == 2


@pytest.mark.parametrize(
    "options",
    [{"max_length": 512}, {"max_length": 100}, {"max_length": 100, "packing_strategy": "bfd_split"}],
    ids=["whole", "cut", "split"],
)
def test_packs_are_counted(prepare: Prepare, alpaca: Path, options: dict[str, Any]) -> None:
    trainer = prepare(alpaca, packing=True, assistant_only_loss=False, completion_only_loss=False, **options)
    packs, length = trainer.train_dataset, options["max_length"]
    tokens = sum(map(len, packs["input_ids"]))
    shown = report(trainer)
    full = f"{tokens / (length * len(packs)):.0%} full"
    assert f"The 24 training rows are packed into {len(packs)} of {length} tokens, {full}." in shown
    assert f"{tokens:,}" in shown
    assert ("rows are cut" in shown) == ("packing_strategy" not in options and length == 100)


def test_the_first_rows_of_a_stream_are_counted(prepare: Prepare, alpaca: Path) -> None:
    shown = report(prepare(alpaca, dataset_streaming=True, max_steps=1))
    assert "The training data are a stream, of which the first 200 rows are counted." in shown


@pytest.mark.parametrize("pad_token", [None, "</s>"], ids=["no pad token", "pad is eos"])
def test_the_end_keeps_its_label_where_padding_has_its_token(
    prepare: Prepare, tmp_path: Path, with_tokenizer: WithTokenizer, pad_token: str | None
) -> None:
    """Else the model would never learn to stop."""

    def change(tokenizer: Any) -> None:
        tokenizer.pad_token = pad_token

    trainer = prepare(write_jsonl(tmp_path / "rows.jsonl", PAIRS), model_name_or_path=with_tokenizer(change))
    eos = trainer.processing_class.eos_token_id
    assert trainer.processing_class.pad_token_id == trainer.model.config.pad_token_id == eos
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    for row, ids, labels, mask in zip(
        trainer.train_dataset, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        end = len(row["input_ids"])
        assert labels[end - 1] == ids[end - 1] == eos
        assert labels[end:].tolist() == [IGNORED] * (len(ids) - end)
        assert mask.tolist() == [1] * end + [0] * (len(ids) - end)
    assert len({len(row["input_ids"]) for row in trainer.train_dataset}) > 1


def test_a_pad_token_may_be_named(prepare: Prepare, tmp_path: Path) -> None:
    trainer = prepare(write_jsonl(tmp_path / "rows.jsonl", PAIRS), pad_token="<s>")
    assert trainer.data_collator.pad_token_id == trainer.processing_class.bos_token_id


@pytest.mark.parametrize("flag", ["eos_token", "pad_token"])
def test_a_token_that_is_not_there_is_refused(prepare: Prepare, tmp_path: Path, flag: str) -> None:
    with pytest.raises(UsageError, match=rf"`{flag}` \('<end>'\) is not found in the vocabulary"):
        prepare(write_jsonl(tmp_path / "rows.jsonl", PAIRS), **{flag: "<end>"})


def test_a_tokenizer_without_an_end_is_refused(prepare: Prepare, alpaca: Path, with_tokenizer: WithTokenizer) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.eos_token = None

    with pytest.raises(UsageError, match="its tokenizer has no end-of-sequence token"):
        prepare(alpaca, model_name_or_path=with_tokenizer(change))


TURN_ENDS = (
    "{% for message in messages %}{{ message.role + ':' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + END }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("eos_token", None),
        ("eos_token + '\\n'", None),
        (
            "'<|end|>\\n'",
            "The training rows end in '<|end|>', which is not the tokenizer's EOS token '</s>': with --eos_token "
            "'<|end|>' generation stops there.",
        ),
        ("''", "No training row ends in the EOS token '</s>': the model will not learn to stop."),
    ],
    ids=["eos", "eos and a line break", "another token", "nothing"],
)
def test_turns_that_do_not_end_in_the_eos_token_are_said(
    prepare: Prepare, tmp_path: Path, with_tokenizer: WithTokenizer, end: str, said: str | None
) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = TURN_ENDS.replace("END", end)
        tokenizer.add_tokens(["<|end|>"])

    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2)
    trainer = prepare(rows, model_name_or_path=with_tokenizer(change))
    part = statistics(trainer.uncut["train"], trainer.processing_class)
    assert notes("training", part, trainer.processing_class, None) == ([said] if said else [])


def test_doubled_tokens_are_said(prepare: Prepare, tmp_path: Path, with_tokenizer: WithTokenizer) -> None:
    """The data's own beginning, and the end that a tokenizer adds to TRL's."""
    rows = [{"text": "<s>red"}, {"text": "blue"}]
    shown = report(prepare(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert "1 of 2 training rows begin with '<s>' or end in '</s>' twice" in shown

    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )

    trainer = prepare(write_jsonl(tmp_path / "pairs.jsonl", PAIRS), model_name_or_path=with_tokenizer(change))
    assert "4 of 4 training rows begin with '<s>' or end in '</s>' twice" in report(trainer)


def test_learned_tokens_are_counted() -> None:
    check_labels(Dataset.from_dict({"labels": [[IGNORED, IGNORED], [IGNORED, 7]]}), None)
    with pytest.raises(UsageError, match="All labels are masked"):
        check_labels(Dataset.from_dict({"labels": [[IGNORED], [IGNORED]]}), None)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (
            [{"text": "red"}] * 2,
            {"completion_only_loss": True},
            "completion_only_loss=True needs prompts and completions",
        ),
        ([{"messages": CHAT}] * 2, {"completion_only_loss": True}, "for messages there is --assistant_only_loss"),
        (PAIRS, {"assistant_only_loss": True}, "assistant_only_loss=True"),
        (PAIRS, {"dataset_kwargs": '{"skip_prepare_dataset": true}'}, "the rows are texts, which have to be prepared"),
    ],
    ids=["text", "messages", "pairs", "skip"],
)
def test_a_loss_that_the_data_have_no_place_for_is_refused(
    prepare: Prepare, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as raised:
        prepare(write_jsonl(tmp_path / "rows.jsonl", rows), **options)
    assert said in str(raised.value)
