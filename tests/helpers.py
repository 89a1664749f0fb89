"""What the tests of the fine-tuning side share: a model and data made on the spot, and a run of `finetune.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from to_finetune.finetune import main
from to_finetune.model.trained import holds_trained, read_trained
from to_finetune.training import TOSFTTrainer

WORDS = ["red", "blue", "green", "tree", "house", "river", "stone", "bird", "cloud", "song"]
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LAYER_WEIGHTS = 28_800  # of each of the tiny Llama's four layers, in nine tensors


def _alpaca_rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)

    def some(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [
        {"instruction": f"Say {some(2, 5)}.", "input": some(3, 3) if i % 2 else "", "output": some(1, 12)}
        for i in range(count)
    ]


ALPACA_ROWS = _alpaca_rows(24)


def make_llama(folder: Path, tie_word_embeddings: bool) -> Path:
    """Write a byte-level tokenizer and a random model."""
    special = ["<s>", "</s>", "<pad>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [" ".join(row.values()) for row in ALPACA_ROWS],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.07,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(**options: Any) -> list[str]:
    """``learning_rate=1.0`` as ``--learning_rate 1.0``; a list as several words, None as no flag."""
    words = []
    for key, value in options.items():
        if value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@dataclass
class Run:
    """A run of `finetune.py` that has ended."""

    code: int
    folder: Path
    trainer: Any  # None where it ended before there was one

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def losses(self) -> list[float]:
        """The training losses of all the run's steps, those before a resume included."""
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [row["loss"] for row in history if "loss" in row]

    @property
    def weights(self) -> dict[str, Tensor]:
        """What it trained, adapters and whole models too, as saved."""
        if holds_trained(self.folder):
            return read_trained(self.folder)[0]
        return load_file(self.folder / "model.safetensors")


def finetune(output_dir: Path, *more: str, answer_tokens: int = 8, **options: Any) -> Run:
    """Run `finetune.py` in this process on the last layer, 4 steps of 4 rows, unless `options` say otherwise.

    Its sample answers are of a few tokens: it takes longer to write them than to train.
    """
    made: list[TOSFTTrainer] = []

    class Recorded(TOSFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    defaults = {
        "use_cpu": True,
        "unfrozen_parameters": [r"layers\.3\."],
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    answers = mock.patch("to_finetune.training.traces.NEW_TOKENS", answer_tokens)
    with mock.patch("to_finetune.training.prepare.TOSFTTrainer", Recorded), answers:
        code = main([*flags(output_dir=output_dir, **{**defaults, **options}), *more])
    return Run(code, output_dir, made[0] if made else None)


def assert_same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same tensors under the same names, bit for bit."""
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, f"differ: {differing}"
