"""Examples that are packed into one row do not see each other, and count as they do alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from to_finetune.data.packing import check_packing
from to_finetune.data.preview import IGNORED
from to_finetune.errors import UsageError
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import prepare_data, prepare_model, prepare_trainer

from ..helpers import ALPACA_ROWS, flags, write_jsonl
from . import rows as forms
from .rows import CHAT, prepared, tokens

Prepare = Callable[..., Any]


@pytest.fixture
def trainer_of(llama: Path, alpaca: Path, tmp_path: Path) -> Callable[..., Any]:
    """A run's trainer with its model, up to the first step."""

    def trainer_of(**options: Any) -> Any:
        settings = {
            "model_name_or_path": llama,
            "dataset_name": alpaca,
            "eval_dataset_name": alpaca,
            "output_dir": tmp_path / "out",
            "use_cpu": True,
            "report_to": "none",
            "max_length": 512,
        }
        model_args, data_args, args = parse_arguments(flags(**{**settings, **options}))
        tokenizer, *rows = prepare_data(model_args, data_args, args)
        model, _ = prepare_model(model_args, args)
        return prepare_trainer(model, tokenizer, args, *rows)

    return trainer_of


def examples(row: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    """The examples of a packed row."""
    for start, end in pairwise(accumulate(row["seq_lengths"], initial=0)):
        yield {key: row[key][start:end] for key in ("input_ids", "labels")}


def alone(model: Any, example: dict[str, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of an example by itself, [tokens, vocabulary], and the loss of each learned token."""
    ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=IGNORED, reduction="none")
    return logits, losses[labels[0, 1:] != IGNORED]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{"packing": True}, {"packing": True, "packing_strategy": "bfd_split", "max_length": 150}, {"padding_free": True}],
    ids=["bfd", "bfd_split", "padding_free"],
)
def test_packed_examples_have_the_logits_and_the_loss_that_they_have_alone(
    trainer_of: Callable[..., Any], tmp_path: Path, attention: str, options: dict[str, Any]
) -> None:
    if options.get("padding_free"):  # which wants no maximal length; only a file can say so
        (tmp_path / "config.yaml").write_text("max_length: null\n")
        options = {**options, "max_length": None, "config": tmp_path / "config.yaml"}
    trainer = trainer_of(attn_implementation=attention, **options)
    model = trainer.model.eval()
    for data in (trainer.train_dataset, trainer.eval_dataset):
        rows = [data[len(data) - i] for i in (2, 1)]  # two rows that the collator joins into one
        batch = trainer.data_collator(rows)
        parts = [part for row in rows for part in (examples(row) if "seq_lengths" in row else [row])]
        assert len(parts) > len(rows) or options.get("padding_free")
        lengths = [len(part["input_ids"]) for part in parts]
        assert batch["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            packed = model(**inputs, use_cache=False).logits[0].split(lengths)
            separate = [alone(model, part) for part in parts]
            for ours, (theirs, _) in zip(packed, separate, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            losses = torch.cat([loss for _, loss in separate])
            model.train()
            loss = trainer.compute_loss(model, trainer.data_collator(rows))
            model.eval()
        assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_packing_loses_no_row(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path) -> None:
    packs = prepare(alpaca, packing=True, max_length=512, val_set_size=8)
    for data in (packs.train_dataset, packs.eval_dataset):
        assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 512 for row in data)
    found = [part for data in (packs.train_dataset, packs.eval_dataset) for row in data for part in examples(row)]
    rows = [tokens(tokenizer, forms.alpaca(row)) for row in ALPACA_ROWS]
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert len(packs.train_dataset) < 16


def test_held_out_rows_need_not_be_packed(prepare: Prepare, alpaca: Path) -> None:
    trainer = prepare(alpaca, packing=True, eval_packing=False, max_length=512, val_set_size=8)
    plain = prepare(alpaca, max_length=512, val_set_size=8)
    assert prepared(trainer.eval_dataset) == prepared(plain.eval_dataset)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(2)])
    assert (batch["position_ids"] == 0).sum() == 2


def test_the_evaluation_of_packed_rows_is_that_of_the_rows(trainer_of: Callable[..., Any]) -> None:
    """Its mean is over tokens, however they are packed."""
    plain = trainer_of().evaluate()["eval_loss"]
    for options in ({}, {"eval_packing": False}):
        packed = trainer_of(packing=True, **options).evaluate()["eval_loss"]
        assert packed == pytest.approx(plain, rel=1e-6)


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KEEP_APART = {
    "llama": {**SIZES, "intermediate_size": 64},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mistral": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 3},
}


def model_of(kind: str, sizes: dict[str, int]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.initializer_range = 0.3  # weights that make a difference, as trained ones do
    return AutoModelForCausalLM.from_config(config)


COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


@pytest.mark.parametrize("kind", KEEP_APART)
def test_a_model_that_keeps_examples_apart_may_pack(kind: str) -> None:
    model = model_of(kind, KEEP_APART[kind]).train()
    check_packing(model, COLLATE)
    assert model.training


@pytest.fixture
def positions_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama that takes no positions, as some models of every release of transformers do."""
    forward = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "forward",
        lambda self, input_ids, position_ids=None, **rest: forward(self, input_ids, **rest),
    )


@pytest.mark.usefixtures("positions_unread")
def test_a_model_that_lets_examples_see_each_other_is_refused() -> None:
    with pytest.raises(UsageError, match=r"packing: .* LlamaForCausalLM lets packed examples see each other"):
        check_packing(model_of("llama", KEEP_APART["llama"]), COLLATE)


def test_a_collator_without_borders_is_refused() -> None:
    with pytest.raises(UsageError, match="see each other"):
        check_packing(model_of("llama", KEEP_APART["llama"]), DataCollatorForLanguageModeling(pad_token_id=0))


@pytest.mark.usefixtures("positions_unread")
def test_a_run_asks_its_own_model(trainer_of: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM lets packed examples see each other"):
        trainer_of(packing=True)
    trainer_of()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eval_packing": True}, "eval_packing=True needs --packing true"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts prompt and completion"),
        ({"packing": True, "truncation_mode": "keep_end"}, "truncation_mode='keep_end' does nothing with --packing"),
        ({"padding_free": True}, "`max_length` is not enforced"),
    ],
    ids=["eval alone", "wrapped", "keep_end", "padding_free"],
)
def test_packing_that_would_not_do_what_it_says_is_refused(
    prepare: Prepare, alpaca: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as raised:
        prepare(alpaca, val_set_size=4, **options)
    assert said in str(raised.value)


def test_plain_text_may_be_wrapped(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """All tokens in a row, cut every 16."""
    rows = [{"text": f"{row['instruction']} {row['output']}"} for row in ALPACA_ROWS]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepare(path, packing=True, packing_strategy="wrapped", max_length=16).train_dataset
    stream = [token for row in rows for token in tokenizer(row["text"] + "</s>").input_ids]
    assert data["input_ids"][:] == [stream[i : i + 16] for i in range(0, len(stream), 16)]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 2)
    with pytest.raises(UsageError, match="cuts messages anywhere"):
        prepare(chats, packing=True, packing_strategy="wrapped")
