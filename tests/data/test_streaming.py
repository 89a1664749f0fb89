"""Rows that are read while training: in order, without end, none twice in a pass, also after a resume."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, cycle, islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from to_finetune.data import check_labels, load_data, preview
from to_finetune.data.preview import looked_at
from to_finetune.errors import UsageError
from to_finetune.training.callbacks import StopOnNonFinite

from .. import helpers
from ..helpers import ALPACA_ROWS, Run, assert_same_bits, write_jsonl
from . import rows as forms
from .rows import CHAT, prepared, tokens, write

Prepare = Callable[..., Any]
STEPS = 8  # of 4 rows, from 24, or 20 with 4 held out: the stream begins again


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_stream_is_the_file_in_order_again_and_again(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    data = prepare(write(tmp_path / f"rows.{kind}", ALPACA_ROWS), dataset_streaming=True, max_steps=1).train_dataset
    assert isinstance(data, IterableDataset)
    expected = [tokens(tokenizer, forms.alpaca(row)) for row in ALPACA_ROWS]
    assert prepared(islice(data, 30)) == expected + expected[:6]


@pytest.mark.parametrize("rows", [{"messages": CHAT}, {"text": "red"}, {"prompt": CHAT[:2], "completion": CHAT[2:3]}])
def test_a_stream_is_prepared_as_a_file_is(prepare: Prepare, tmp_path: Path, rows: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [rows] * 2)
    stream = prepare(path, dataset_streaming=True, max_steps=1).train_dataset
    assert prepared(islice(stream, 2)) == prepared(prepare(path).train_dataset)


def test_a_stream_is_packed_a_thousand_rows_at_a_time(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path
) -> None:
    """None of them is lost: those of 41 passes and 16 more."""
    stream = prepare(alpaca, packing=True, max_length=512, dataset_streaming=True, max_steps=1).train_dataset
    examples: Counter[tuple[int, ...]] = Counter()
    for row in stream:
        assert len(row["input_ids"]) <= 512
        for start, end in pairwise(accumulate(row["seq_lengths"], initial=0)):
            examples[tuple(row["input_ids"][start:end])] += 1
        if examples.total() >= 1000:
            break
    rows = [tuple(tokens(tokenizer, forms.alpaca(row))["input_ids"]) for row in ALPACA_ROWS]
    assert examples == Counter(islice(cycle(rows), 1000))


def test_rows_are_read_only_when_they_are_asked_for(tmp_path: Path) -> None:
    """A broken one is met when it is its turn."""
    rows = [{"messages": CHAT}, {"messages": CHAT}, {"messages": []}]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    stream = iter(load_data([path], streaming=True).train)
    assert [next(stream)["messages"] for _ in range(2)] == [CHAT] * 2
    with pytest.raises(UsageError, match="row 2: messages must be a list"):
        next(stream)


def test_a_stream_that_cannot_be_read_on_ends_the_run_in_a_sentence(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in its second file, which is as far away for it as what lies 10 MB on."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), ALPACA_ROWS)
    Path("b.jsonl").write_text(f'{json.dumps(ALPACA_ROWS[0])}\n{{"instruction":\n')
    assert load_data(["*.jsonl"], streaming=True).train.num_shards == 2
    options = {"model_name_or_path": llama, "dataset_name": "*.jsonl", "dataset_streaming": True, "max_steps": STEPS}
    with mock.patch("to_finetune.data.preview.FIRST", 5):  # else it is met before the first step
        run = helpers.finetune(tmp_path / "run", **options)
    assert run.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("error: dataset_name='*.jsonl' cannot be read to its end: JSON parse error")
    assert run.record["status"] == "failed"
    assert "cannot be read to its end" in run.record["error"]
    assert not list(run.folder.glob("*.safetensors"))


def test_streams_are_mixed_by_their_weights_for_ever(tmp_path: Path) -> None:
    """The short one begins again, each in its order; the seed settles the draws."""
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)]))
        for name, count in (("red", 5), ("blue", 400))
    ]

    def drawn(seed: int) -> list[str]:
        data = load_data(files, weights=[0.3, 0.7], streaming=True, seed=seed)
        return [row["text"] for row in islice(data.train, 300)]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    red = [row for row in first if row.startswith("red")]
    blue = [row for row in first if row.startswith("blue")]
    assert len(red) / 300 == pytest.approx(0.3, abs=0.06)
    assert red == [f"red {i % 5}" for i in range(len(red))]
    assert blue == [f"blue {i}" for i in range(len(blue))]


def test_the_first_rows_of_a_stream_are_held_out(tmp_path: Path) -> None:
    """Of several in proportion to the weights; in no pass are they trained on."""
    red, blue = (
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(10)]))
        for name in ("red", "blue")
    )
    one = load_data([red], val_set_size=3, streaming=True)
    assert one.held_out is not None
    assert [row["text"] for row in one.held_out] == ["red 0", "red 1", "red 2"]
    assert [row["text"] for row in islice(one.train, 8)] == [f"red {i}" for i in (3, 4, 5, 6, 7, 8, 9, 3)]

    both = load_data([red, blue], weights=[0.25, 0.75], val_set_size=4, streaming=True)
    assert both.held_out is not None
    held_out = [row["text"] for row in both.held_out]
    assert held_out == ["red 0", "blue 0", "blue 1", "blue 2"]
    assert set(held_out).isdisjoint(row["text"] for row in islice(both.train, 60))


def test_held_out_data_of_a_stream_are_read_whole(alpaca: Path) -> None:
    data = load_data([str(alpaca)], streaming=True, eval_name=str(alpaca))
    assert data.held_out is not None
    assert data.held_out.to_list() == load_data([str(alpaca)]).train.to_list()


def test_the_first_rows_are_checked_and_shown(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path
) -> None:
    stream = prepare(alpaca, dataset_streaming=True, max_steps=1).train_dataset
    with mock.patch("to_finetune.data.preview.FIRST", 5):
        check_labels(stream, None)
        assert len(list(looked_at(stream))) == 5
    assert list(preview(stream, tokenizer, 2).rows) == [0, 1]


def test_two_processes_share_a_stream(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, alpaca: Path) -> None:
    """Batch by batch, as accelerate makes it of one file: each row comes to one of them."""
    trainer = prepare(alpaca, dataset_streaming=True, max_steps=1)
    shares = []
    for process in (0, 1):
        loader = DataLoader(trainer.train_dataset, batch_size=3, collate_fn=lambda rows: rows)
        mine = prepare_data_loader(
            loader, num_processes=2, process_index=process, put_on_device=False, dispatch_batches=False
        )
        shares.append(list(islice(mine, 4)))
    seen = [row for batches in zip(*shares, strict=True) for batch in batches for row in batch]
    assert prepared(seen) == [tokens(tokenizer, forms.alpaca(row)) for row in ALPACA_ROWS]


@pytest.mark.parametrize("case", ["one", "mixture", "shuffled"])
def test_a_resumed_run_goes_on_in_the_stream(llama: Path, alpaca: Path, tmp_path: Path, case: str) -> None:
    """Bit for bit as the run that was not interrupted, here in the stream's second pass."""
    options: dict[str, Any] = {
        "model_name_or_path": llama,
        "dataset_name": alpaca,
        "dataset_streaming": True,
        "val_set_size": 4,
        "max_steps": STEPS,
        "shuffle_dataset": case == "shuffled",
    }
    if case == "mixture":
        more = write_jsonl(tmp_path / "more.jsonl", ALPACA_ROWS[5:15])
        options |= {"dataset_name": [alpaca, more], "dataset_weights": [0.5, 0.5]}

    class Interrupt(StopOnNonFinite):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = helpers.finetune(tmp_path / "whole", **options)
    with mock.patch("to_finetune.finetune.StopOnNonFinite", Interrupt):
        first = helpers.finetune(tmp_path / "parts", **options)
    assert first.code == 128 + signal.SIGTERM
    second = helpers.finetune(tmp_path / "parts", resume_from_checkpoint=True, **options)
    assert second.losses == whole.losses
    assert_same_bits(second.weights, whole.weights)
    assert second.record["results"]["eval_loss"] == whole.record["results"]["eval_loss"]


def test_a_streamed_run_trains_on_the_rows_in_their_order(llama: Path, alpaca: Path, tmp_path: Path) -> None:
    """Its losses are those of a run that is given the same rows in that order."""
    options = {"model_name_or_path": llama, "dataset_name": alpaca, "max_steps": STEPS}
    streamed = helpers.finetune(tmp_path / "stream", dataset_streaming=True, **options)
    ordered: Run = helpers.finetune(tmp_path / "file", train_sampling_strategy="sequential", **options)
    assert streamed.losses == ordered.losses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": None}, "dataset_streaming=True needs --max_steps"),
        ({"dataset_train_split": "train[:5]"}, "a stream has no parts such as 'train[:5]'"),
        ({"val_set_size": 0.1}, "val_set_size=0.1: a stream's length is not known; give a number of rows"),
        ({"val_set_size": 24}, "val_set_size=24 leaves nothing to train on"),
    ],
)
def test_what_a_stream_cannot_is_refused(prepare: Prepare, alpaca: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        prepare(alpaca, **{"dataset_streaming": True, "max_steps": 1, **options})
    assert said in str(raised.value)


def test_several_streams_need_weights(prepare: Prepare, alpaca: Path) -> None:
    with pytest.raises(UsageError, match="2 sets need --dataset_weights"):
        prepare([alpaca, alpaca], dataset_streaming=True, max_steps=1)
