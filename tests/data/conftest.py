"""A run's data, prepared, without the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import prepare_preview

from ..helpers import flags


@pytest.fixture
def prepare(llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """The trainer of `to-finetune preview` on a file, or on several: with the tokenized data, without the weights."""

    def prepare(data: Path | str | list[Any], **options: Any) -> Any:
        settings = {"model_name_or_path": llama, "dataset_name": data, "output_dir": tmp_path / "out", "use_cpu": True}
        return prepare_preview(*parse_arguments(flags(**{**settings, "report_to": "none", **options})))

    return prepare


@pytest.fixture(scope="session")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture
def with_tokenizer(llama: Path, tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """A model's folder with its tokenizer changed; without weights."""

    def with_tokenizer(change: Callable[[Any], None]) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        shutil.copy(llama / "config.json", folder)
        tokenizer = AutoTokenizer.from_pretrained(llama)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return with_tokenizer
