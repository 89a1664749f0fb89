"""Models of a few shapes, by their configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from to_finetune.planning import Blueprint

from ..helpers import LLAMA_7B


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("configs") / "llama-7b.json"
    file.write_text(json.dumps(LLAMA_7B))
    return file


@pytest.fixture(scope="session")
def small() -> Blueprint:
    """Six layers of 0.8 M weights, and 1 M in embedding and head."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=2000
    )
    return Blueprint("small", config)


@pytest.fixture(scope="session")
def tiny() -> Blueprint:
    """Grouped queries, biases, and a head that is the embedding."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        tie_word_embeddings=True,
    )
    return Blueprint("tiny", config)


@pytest.fixture(scope="session")
def gpt2() -> Blueprint:
    """Another architecture, dropout included."""
    return Blueprint("gpt2", GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=1000, n_positions=256))
