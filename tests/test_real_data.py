"""On real data, where there are any: Stanford Alpaca and a pretrained Llama of 260 k weights.

Set TO_FINETUNE_DATA to a folder with alpaca_data.json and stories260k/ (config.json, model.safetensors and tokenizer).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from to_finetune.model import load_finetuned, load_model, load_tokenizer

from .data.rows import PROMPT_NO_INPUT, PROMPT_WITH_INPUT
from .helpers import Run

DATA = Path(os.environ.get("TO_FINETUNE_DATA", ""))
BATCH, STEPS, LENGTH = 8, 20, 256

pytestmark = pytest.mark.skipif(
    "TO_FINETUNE_DATA" not in os.environ, reason="TO_FINETUNE_DATA does not name a folder with the data"
)


@pytest.fixture(scope="module")
def run(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On the first 500 rows, in their order; with the next few held out."""
    return finetune(
        tmp_path_factory.mktemp("runs") / "run",
        model_name_or_path=DATA / "stories260k",
        dataset_name=DATA / "alpaca_data.json",
        dataset_train_split="train[:500]",
        dataset_test_split=f"train[500:{500 + BATCH}]",
        unfrozen_parameters=[r"layers\.(3|4)\."],
        max_steps=STEPS,
        max_length=LENGTH,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
    )


def rows(start: int, end: int) -> list[dict[str, str]]:
    return json.loads((DATA / "alpaca_data.json").read_text(encoding="utf-8"))[start:end]


@torch.no_grad()
def reference_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """The mean loss on the responses of a float64 model, a row at a time."""
    total, count = 0.0, 0
    for row in rows:
        prompt = (PROMPT_WITH_INPUT if row["input"] else PROMPT_NO_INPUT).format(**row) + "\n"
        prompt_tokens = tokenizer(prompt).input_ids
        tokens = [*tokenizer(prompt + row["output"]).input_ids, tokenizer.eos_token_id][:LENGTH]
        start = len(prompt_tokens)
        assert tokens[:start] == prompt_tokens[:LENGTH]
        logits = model(torch.tensor([tokens])).logits[0, start - 1 : -1]
        learned = torch.tensor(tokens[start:], dtype=torch.long)
        total += cross_entropy(logits, learned, reduction="sum").item()
        count += len(learned)
    return total / count


def test_the_first_loss_is_the_base_models(run: Run) -> None:
    name = str(DATA / "stories260k")
    model = load_model(name, dtype=torch.float64, attn_implementation="eager")
    tokenizer = load_tokenizer(name)
    assert run.code == 0
    assert run.losses[0] == pytest.approx(reference_loss(model, tokenizer, rows(0, BATCH)), rel=1e-5)


def test_the_held_out_loss_is_the_saved_models(run: Run) -> None:
    assert run.record["proofs"]["moved_after_first_step"] == 18
    expected = reference_loss(*load_finetuned(run.folder, dtype=torch.float64), rows(500, 500 + BATCH))
    assert run.record["results"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
