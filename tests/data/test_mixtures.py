"""Several sets as one: nothing is lost or repeated without being said, and the seed settles the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from to_finetune.data import load_data
from to_finetune.errors import UsageError

from ..helpers import ALPACA_ROWS, write_jsonl
from . import rows as forms
from .rows import CHAT, CHAT_PIECES, SHAREGPT, prepared, tokens, write

Prepare = Callable[..., Any]


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Three files of 400, 100 and 50 rows, each text once."""
    return [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(rows)]))
        for name, rows in (("red", 400), ("blue", 100), ("green", 50))
    ]


def texts(rows: Any) -> list[str]:
    return [row["text"] for row in rows]


def sources(rows: Any) -> Counter[str]:
    return Counter(text.split()[0] for text in texts(rows))


def test_without_weights_every_row_is_there_once_and_shuffled(sets: list[str]) -> None:
    in_order = [text for name in sets for text in texts(load_data([name]).train)]
    mixed = load_data(sets, seed=1)
    assert texts(mixed.train) != in_order
    assert sorted(texts(mixed.train)) == sorted(in_order)
    assert mixed.notes == []


def test_weights_are_shares_until_the_first_set_is_used_up(sets: list[str]) -> None:
    """Without a repeat; and what is left over is said."""
    mixed = load_data(sets, weights=[0.5, 0.4, 0.1], seed=1)
    rows, counts = texts(mixed.train), sources(mixed.train)
    assert len(set(rows)) == len(rows)
    assert counts["blue"] == 100  # all of them: the first to end
    assert counts["red"] / len(rows) == pytest.approx(0.5, abs=0.06)  # two standard deviations of 250 draws
    assert counts["green"] / len(rows) == pytest.approx(0.1, abs=0.04)
    assert mixed.notes == [
        f"dataset_name={name!r}: {counts[Path(name).stem]} of {there} rows are drawn."
        for name, there in zip(sets, (400, 100, 50), strict=True)
    ]
    red = [int(row.split()[1]) for row in rows if row.startswith("red")]
    assert max(red) > 350  # not the first rows of the file alone


@pytest.mark.parametrize("weights", [None, [0.5, 0.4, 0.1]], ids=["all", "weights"])
def test_the_seed_of_the_data_or_of_the_run_settles_the_order(
    prepare: Prepare, sets: list[str], weights: list[float] | None
) -> None:
    def rows(**options: int) -> list[Any]:
        return prepare(sets, dataset_weights=weights, **options).train_dataset["input_ids"]

    assert rows(seed=1) == rows(seed=1) != rows(seed=2)
    assert rows(seed=1, data_seed=3) == rows(seed=3)


@pytest.mark.parametrize(("val_set_size", "held_out"), [(22, (16, 4, 2)), (0.02, (8, 2, 1)), (3, (2, 1, 0))])
@pytest.mark.parametrize("weights", [None, [0.5, 0.4, 0.1]], ids=["all", "weights"])
def test_rows_are_held_out_of_each_set_in_proportion(
    sets: list[str], val_set_size: float, held_out: tuple[int, ...], weights: list[float] | None
) -> None:
    """The same ones for every seed, and none is trained on."""
    first, second = (load_data(sets, weights=weights, val_set_size=val_set_size, seed=seed) for seed in (1, 2))
    assert first.held_out is not None
    assert texts(first.held_out) == texts(second.held_out)
    assert sources(first.held_out) == +Counter(dict(zip(("red", "blue", "green"), held_out, strict=True)))
    assert not set(texts(first.held_out)) & set(texts(first.train))
    if weights is None:
        assert len(first.train) == 550 - sum(held_out)


def test_one_form_may_come_in_different_columns_and_files(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Alpaca's rows are prompts and completions in the end."""
    pairs = [{"prompt": forms.alpaca(row)[0][3:], "completion": row["output"]} for row in ALPACA_ROWS[2:6]]
    files = [
        write(tmp_path / "rows.json", ALPACA_ROWS[:2]),
        write(tmp_path / "pairs.csv", pairs[:2]),
        write(tmp_path / "pairs.parquet", pairs[2:]),
    ]
    expected = [tokens(tokenizer, forms.alpaca(row)) for row in ALPACA_ROWS[:6]]
    assert sorted(prepared(prepare(files).train_dataset), key=str) == sorted(expected, key=str)


def test_messages_of_both_kinds_may_be_mixed(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    files = [
        write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}]),
        write_jsonl(tmp_path / "sharegpt.jsonl", [{"conversations": SHAREGPT, "id": 1}]),
    ]
    assert prepared(prepare(files).train_dataset) == [tokens(tokenizer, CHAT_PIECES)] * 2


def test_the_test_splits_of_all_sets_are_evaluated_on(tmp_path: Path) -> None:
    folders = []
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [{"text": f"{name} {split}"}])
        folders.append(str(tmp_path / name))
    data = load_data(folders, eval_split="test")
    assert sorted(texts(data.train)) == ["blue train", "red train"]
    assert texts(data.held_out) == ["red test", "blue test"]


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in "aabcd"])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"text": text} for text in "aaxd"])
    said = load_data([str(train)], eval_name=str(held_out)).notes
    assert said == ["3 of the 4 held-out rows are trained on as well."]
    assert load_data([str(train)], val_set_size=1).notes == []


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"eval_name": "test.jsonl"}, "val_set_size=0.05 holds nothing out: eval_dataset_name='test.jsonl' says"),
        ({"eval_split": "train[:1]"}, "val_set_size=0.05 holds nothing out: dataset_test_split='train[:1]' says"),
    ],
    ids=["data", "split"],
)
def test_what_is_evaluated_on_is_said_where_two_flags_name_it(
    sets: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("test.jsonl"), [{"text": "a"}])
    data = load_data(sets[:1], val_set_size=0.05, **named)  # type: ignore[arg-type]
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (400, 1)
    assert said in data.notes[-1]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0], "dataset_weights=1 is not valid: one for each of the 2 sets"),
        ([0.2, 0.3, 0.5], "dataset_weights=0.2 0.3 0.5 is not valid: one for each of the 2 sets"),
        ([1.5, -0.5], "dataset_weights=1.5 -0.5 is not valid: each above 0"),
        ([1.0, 0.0], "dataset_weights=1 0 is not valid: each above 0"),
        ([float("nan"), 1.0], "dataset_weights=nan 1 is not valid: each above 0"),
        ([0.7, 0.7], "dataset_weights=0.7 0.7 is not valid: with a sum of 1, not 1.4"),
    ],
)
def test_weights_that_are_no_shares_are_refused(sets: list[str], weights: list[float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_data(sets[:2], weights=weights)


def test_sets_of_different_forms_are_refused(tmp_path: Path, alpaca: Path, sets: list[str]) -> None:
    chats = str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}]))
    with pytest.raises(UsageError) as raised:
        load_data([str(alpaca), chats, sets[0]])
    assert f"dataset_name={str(alpaca)!r} has prompt and completion, dataset_name={chats!r} has messages" in str(
        raised.value
    )
    with pytest.raises(UsageError, match=r"eval_dataset_name=.* has text"):
        load_data([chats], eval_name=sets[0])


def test_a_stream_whose_share_is_less_than_a_row_holds_none_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", ALPACA_ROWS)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    data = load_data(names, weights=[0.01, 0.99], streaming=True, val_set_size=4)
    assert data.held_out is not None
    assert len(data.held_out) == 4
