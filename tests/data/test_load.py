"""Where rows come from: files, folders, patterns and hub sets; and what is no such thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from to_finetune.data import load_data
from to_finetune.errors import UsageError

from ..helpers import ALPACA_ROWS, write_jsonl
from . import rows as forms
from .rows import prepared, tokens, write

Prepare = Callable[..., Any]


@pytest.mark.parametrize("name", ["parts", "parts/*.jsonl", "parts/**/*.jsonl"])
def test_a_folder_and_a_pattern_are_all_their_files(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    for i in (2, 0, 1):
        write_jsonl(Path(f"parts/{i}.jsonl"), ALPACA_ROWS[i : i + 1])
    Path("parts/README.md").write_text("Three rows.")
    assert prepared(prepare(name).train_dataset) == [tokens(tokenizer, forms.alpaca(row)) for row in ALPACA_ROWS[:3]]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_a_folder_some_of_whose_files_would_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """One name that holds a split's makes splits of all files, and those that it has no split for are lost."""
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    for name, rows in (("train_part", 3), ("extra", 5), ("more_eval", 2)):
        write_jsonl(Path(f"parts/{name}.jsonl"), [{"text": f"{name} {i}"} for i in range(rows)])
    with pytest.raises(UsageError) as raised:
        load_data(["parts"], streaming=streaming)
    said = "the splits train, test, by their names, and 'parts/extra.jsonl' is in none, as 1 of 3 are."
    assert said in str(raised.value)
    assert str(raised.value).endswith("with a pattern: 'parts/*.jsonl'.")
    assert len(load_data(["parts/*.jsonl"]).train) == 10


@pytest.mark.parametrize("names", [("train-0", "training_1", "my_test"), ("train/a", "train/b", "test/a")])
def test_a_folder_has_the_splits_that_its_files_are_named_after(tmp_path: Path, names: tuple[str, ...]) -> None:
    """What an editor or `datasets` itself leaves there is no data."""
    for name in (*names, ".hidden/train", "dataset_info"):
        path = tmp_path / "parts" / f"{name}.json{'' if name == 'dataset_info' else 'l'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [{"text": name}])
    (tmp_path / "link").symlink_to("parts")
    for folder in ("parts", "link"):
        data = load_data([str(tmp_path / folder)], eval_split="test")
        assert [row["text"] for row in data.train] == list(names[:2])
        assert data.held_out is not None
        assert data.held_out["text"] == [names[2]]


def test_a_csv_files_column_without_a_name_is_not_read(tmp_path: Path) -> None:
    """pandas writes its index as such a one."""
    rows = [{"prompt": "red", "completion": "007"}, {"prompt": "blue", "completion": "None"}]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv")
    data = load_data([str(tmp_path / "rows.csv")])
    assert data.train.to_list() == rows
    assert [note.split(": ", 1)[1] for note in data.notes] == ["not read are the columns Unnamed: 0."]


def test_a_split_takes_a_part(alpaca: Path) -> None:
    whole = load_data([str(alpaca)])
    part = load_data([str(alpaca)], "train[:7]")
    assert part.train.to_list() == whole.train.to_list()[:7]
    assert part.held_out is None


def test_what_a_hub_set_is_asked_for(monkeypatch: pytest.MonkeyPatch, alpaca: Path) -> None:
    """The name, the configuration and the split go to `datasets` as they are; the default of the evaluation is test."""
    asked = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((*args, options["split"]))
        return datasets.load_dataset("json", data_files=str(alpaca), split="train")

    monkeypatch.setattr("to_finetune.data.load.load_dataset", load_dataset)
    load_data(["some/set"], "train[:9]", config="en", eval_name="other/set")
    load_data(["some/set"], eval_split="validation")
    assert asked == [
        ("some/set", "en", "train[:9]"),
        ("other/set", "en", "test"),
        ("some/set", None, "train"),
        ("some/set", None, "validation"),
    ]


@pytest.fixture
def _some_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with files of two kinds, one with an empty one, and one with none."""
    monkeypatch.chdir(tmp_path)
    for folder in ("both", "half", "none"):
        Path(folder).mkdir()
    write_jsonl(Path("both/a.jsonl"), ALPACA_ROWS[:2])
    write(Path("both/b.csv"), ALPACA_ROWS[:2])
    write_jsonl(Path("half/a.jsonl"), ALPACA_ROWS[:2])
    Path("half/b.jsonl").touch()
    Path("none/README.md").write_text("Nothing here.")
    Path("blank.txt").write_text("\n  \n")
    Path("inside.json").write_text('{"data": [{"text": "red"}]}')
    Path("uneven.csv").write_text("prompt,completion\nred,blue\nred,blue,green\n")


@pytest.mark.usefixtures("_some_files")
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("both", {}, "dataset_name='both' holds files of several kinds (.csv, .jsonl)"),
        ("both/*", {}, "dataset_name='both/*' holds files of several kinds (.csv, .jsonl)"),
        ("none", {}, "dataset_name='none' finds no file that ends in .json, .jsonl, .csv, .parquet, .txt."),
        ("*.parquet", {}, "dataset_name='*.parquet' finds no file"),
        ("half", {}, "dataset_name='half': 'half/b.jsonl' is empty."),
        ("blank.txt", {}, "dataset_name='blank.txt' is empty."),
        ("inside.json", {}, "dataset_name='inside.json' has the columns data; needed: {instruction, input, output}"),
        ("uneven.csv", {}, "Expected 2 fields in line 3, saw 3"),
        ("some/set", {}, "dataset_name='some/set' cannot be loaded"),
        (
            "half/a.jsonl",
            {"config": "en"},
            "dataset_config='en' is of a hub set; dataset_name='half/a.jsonl' names none",
        ),
        ("half/a.jsonl", {"eval_name": "half/c.jsonl"}, "eval_dataset_name='half/c.jsonl': no such file. Did you mean"),
        ("half/a.jsonl", {"eval_name": "both"}, "eval_dataset_name='both' holds files of several kinds"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_what_holds_no_rows_is_refused(name: str, options: dict[str, Any], said: str, streaming: bool) -> None:
    with pytest.raises(UsageError) as raised:
        next(iter(load_data([name], streaming=streaming, **options).train))
    assert said in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_a_csv_whose_rows_end_in_a_comma_keeps_its_columns(tmp_path: Path, streaming: bool) -> None:
    """pandas would take the first for the rows' names, and shift the others."""
    (tmp_path / "rows.csv").write_text("prompt,completion\nred,blue,\ntwo,three,\n")
    data = load_data([str(tmp_path / "rows.csv")], streaming=streaming)
    first = next(iter(data.train))
    assert first == {"prompt": "red", "completion": "blue"}


def test_a_csv_with_cells_in_no_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nred,blue,green\n")
    with pytest.raises(UsageError, match=r"rows\.csv' has 2 columns, and a row of 3 cells"):
        load_data([str(tmp_path / "rows.csv")])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("prompt,completion\nred,blue,green\n", r"b\.csv' has 2 columns, and a row of 3 cells"),
        ("prompt,more,completion\nred,and,blue\n", r"b\.csv' prompt, more, completion: they must be the same"),
    ],
    ids=["cells", "columns"],
)
def test_every_csv_of_several_is_looked_at(tmp_path: Path, other: str, said: str) -> None:
    """What the first has no column for would be lost."""
    (tmp_path / "a.csv").write_text("prompt,completion\nred,blue\n")
    (tmp_path / "b.csv").write_text(other)
    with pytest.raises(UsageError, match=said):
        load_data([str(tmp_path / "*.csv")])


def test_a_folder_is_evaluated_on_its_test_split(tmp_path: Path) -> None:
    for name, part in (("train", ALPACA_ROWS[:3]), ("test", ALPACA_ROWS[3:5])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    data = load_data([str(tmp_path)], eval_name=str(tmp_path))
    assert data.held_out is not None
    assert (len(data.held_out), data.notes) == (2, [])


@pytest.mark.parametrize("name", ["my[1].jsonl", "dir[1]/rows.jsonl"])
def test_a_name_may_look_like_a_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / name, ALPACA_ROWS[:2])
    assert len(load_data([str(tmp_path / name)]).train) == 2  # type: ignore[arg-type]


def test_an_empty_cell_is_no_text(tmp_path: Path) -> None:
    """Nor is NaN, as pandas writes it into JSON."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": NaN, "output": "b"}\n')
    assert "nan" not in next(iter(load_data([str(tmp_path / "rows.jsonl")]).train))["prompt"]


def test_a_text_files_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert load_data([str(tmp_path / "rows.txt")]).train["text"] == ["one", "two"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("header.csv", "prompt,completion\n", "is empty"),
        ("nothing.json", "[]", "is empty"),
        ("rows.tsv", "a\tb\n", r"ends in '\.tsv'; read are files that end in \.json, "),
    ],
)
def test_what_cannot_be_read_is_called_what_it_is(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=said):
        load_data([str(tmp_path / name)])


def test_the_text_column_that_was_asked_for_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(UsageError, match=r"has the columns text; needed: .*, or 'nope' as dataset_text_field says"):
        load_data([str(tmp_path / "rows.jsonl")], text_column="nope")
