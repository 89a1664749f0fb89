"""One thread, no network, a throw-away cache; and a tiny Llama with a few instructions to teach it."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

_HOME = tempfile.TemporaryDirectory(prefix="to-finetune-tests-")
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HOME=_HOME.name, TOKENIZERS_PARALLELISM="false")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before our kernels, or DeepSpeed, import Triton


def pytest_collection_finish() -> None:
    """Every run of `finetune.py` collects garbage, which takes half a second with all that the tests import."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for libraries that look at the end whether all is freed


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with 4 layers, 39 tensors in all."""
    from .helpers import make_llama

    return make_llama(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head that is the embedding."""
    from .helpers import make_llama

    return make_llama(tmp_path_factory.mktemp("models") / "tied_llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 rows in Alpaca's form, of different lengths, half of them with an input."""
    from .helpers import ALPACA_ROWS, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "alpaca.jsonl", ALPACA_ROWS)


@pytest.fixture(scope="session")
def finetune(llama: Path, alpaca: Path) -> Callable[..., Any]:
    """`helpers.finetune` on the tiny Llama and the Alpaca rows."""
    from . import helpers

    return partial(helpers.finetune, model_name_or_path=llama, dataset_name=alpaca)


@pytest.fixture(scope="session")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Llama-7B's blueprint, from a folder that holds a config.json and nothing else."""
    from to_finetune.planning import load_blueprint

    from .helpers import LLAMA_7B

    folder = tmp_path_factory.mktemp("llama-7b")
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return load_blueprint(str(folder))
