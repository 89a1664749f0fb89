"""Make the study's base models: stories260k, and Llamas pretrained here on 20 Newsgroups.

    python scripts/study/base_models.py DATA_DIR [--models 1M 5M]

Trains a tokenizer of 4,096 tokens on the training posts, then pretrains Llamas of 1 and 5 million weights (and, if
named, one of 102 million, which needs a GPU) with `finetune.py`, and prints their loss on held-out posts beside that of
guessing each token by its frequency. Existing models are kept. DATA_DIR has `20news-bydate` and `stories260k`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from to_finetune import finetune
from to_finetune.runs import last_checkpoint

MODELS_DIR = Path(__file__).parents[2] / "runs" / "study" / "models"
VOCABULARY = 4096


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    steps: int  # of pretraining
    rows: int = 4  # of 128 tokens a step
    learning_rate: float = 3e-3


SIZES = {"1M": Size(96, 6, 6, 3000), "5M": Size(224, 7, 7, 1500), "100M": Size(768, 14, 12, 1000, 32, 6e-4)}
HELD_OUT = 200  # posts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["1M", "5M"])
    arguments = parser.parse_args()
    for name in arguments.models:
        print(name, make(name, arguments.data_dir))


def check_data(folder: Path, *needed: str) -> None:
    """Exit with an error message if something is missing."""
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise SystemExit(f"error: {folder} has no {', '.join(missing)}.")


def make(name: str, data_dir: Path) -> Path:
    """Return the folder of a base model, pretrained first if it does not exist."""
    if name == "stories260k":
        return data_dir / name
    folder = MODELS_DIR / name
    pretrained = folder / "pretrained"
    if not (pretrained / "model.safetensors").exists():
        check_data(data_dir, "20news-bydate", "stories260k")
        texts, held_out = posts(data_dir), MODELS_DIR / "held_out.jsonl"
        MODELS_DIR.mkdir(parents=True, exist_ok=True)
        write(MODELS_DIR / "posts.jsonl", texts[HELD_OUT:])
        write(held_out, texts[:HELD_OUT])
        size = SIZES[name]
        start(data_dir, texts[HELD_OUT:], folder / "start", size)
        go_on = "--resume_from_checkpoint true" if last_checkpoint(pretrained) else ""
        if not go_on:
            shutil.rmtree(pretrained, ignore_errors=True)  # left by a run that was killed
        flags = f"""--model_name_or_path {folder / "start"} --output_dir {pretrained}
            --dataset_name {MODELS_DIR / "posts.jsonl"} --eval_dataset_name {held_out} --optim adamw_torch
            --learning_rate {size.learning_rate} --adam_beta2 0.95 --lr_scheduler_type cosine --warmup_steps 20
            --packing true --packing_strategy wrapped --max_length 128 --per_device_train_batch_size {size.rows}
            --max_steps {size.steps} --logging_steps 100 --save_strategy no --report_to none --dtype float32
            {"--bf16 true" if name == "100M" else "--use_cpu true"} {go_on}"""
        code = finetune.main(flags.split())
        if code:
            raise SystemExit(code)
        print("held-out loss of guessing each token by its frequency:", frequency_loss(folder / "start", texts))
    return pretrained


def posts(data_dir: Path) -> list[str]:
    """Return the training posts of more than 100 characters, without their headers, sorted by file name."""
    files = sorted((data_dir / "20news-bydate" / "20news-bydate-train").glob("*/*"), key=lambda file: file.name)
    bodies = (file.read_text(encoding="latin-1").partition("\n\n")[2].strip() for file in files)
    return [body for body in bodies if len(body) > 100]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def start(data_dir: Path, texts: list[str], folder: Path, size: Size) -> None:
    """Write a tokenizer like stories260k's, trained on the texts, and a Llama with random weights."""
    small = AutoTokenizer.from_pretrained(data_dir / "stories260k")
    tokenizer = small.train_new_from_iterator(texts, vocab_size=VOCABULARY)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=size.hidden**-0.5,  # transformers' 0.02 suits a width of 2,500, and learns slowly here
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def frequency_loss(folder: Path, texts: list[str]) -> float:
    """Return the loss in nats per token of the held-out posts, given the tokens' frequencies in the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = Counter(token for row in tokenizer(texts[HELD_OUT:]).input_ids for token in row)
    asked = Counter(token for row in tokenizer(texts[:HELD_OUT]).input_ids for token in row)
    total = seen.total() + len(tokenizer)
    return sum(-math.log((seen[token] + 1) / total) * count for token, count in asked.items()) / asked.total()


if __name__ == "__main__":
    main()
