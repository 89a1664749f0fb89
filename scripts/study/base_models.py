"""The study's base models: stories260k, and two Llamas pretrained here on 20 Newsgroups.

    python scripts/study/base_models.py DATA_DIR [MODELS_DIR]

Trains a tokenizer of 4,096 tokens on the training posts, then pretrains a Llama of 1 million weights and one of 5
million by `finetune.py`, and says their loss on posts that were held out, beside that of guessing each token by its
frequency. What is there already is kept. DATA_DIR has `20news-bydate` and `stories260k`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from to_finetune import finetune

MODELS_DIR = Path(__file__).parents[2] / "runs" / "study" / "models"
VOCABULARY = 4096
SIZES = {  # hidden size, layers, heads; pretraining steps of 4 x 128 tokens
    "1M": (96, 6, 6, 3000),
    "5M": (224, 7, 7, 1500),
}
HELD_OUT = 200  # posts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("models_dir", type=Path, nargs="?", default=MODELS_DIR)
    arguments = parser.parse_args()
    for name in SIZES:
        print(name, made(name, arguments.data_dir, arguments.models_dir))


def made(name: str, data_dir: Path, models_dir: Path = MODELS_DIR) -> Path:
    """The folder of a base model, pretrained if it is not there."""
    if name == "stories260k":
        return data_dir / name
    folder = models_dir / name
    if not (folder / "pretrained" / "run.json").exists():
        texts, held_out = posts(data_dir), models_dir / "held_out.jsonl"
        models_dir.mkdir(parents=True, exist_ok=True)
        write(models_dir / "posts.jsonl", texts[HELD_OUT:])
        write(held_out, texts[:HELD_OUT])
        hidden, layers, heads, steps = SIZES[name]
        start(data_dir, texts[HELD_OUT:], folder / "start", hidden, layers, heads)
        flags = f"""--model_name_or_path {folder / "start"} --output_dir {folder / "pretrained"}
            --dataset_name {models_dir / "posts.jsonl"} --eval_dataset_name {held_out}
            --optim adamw_torch --learning_rate 3e-3 --adam_beta2 0.95 --lr_scheduler_type cosine --warmup_steps 20
            --packing true --packing_strategy wrapped --max_length 128 --per_device_train_batch_size 4
            --max_steps {steps} --logging_steps 100 --save_strategy no --report_to none --use_cpu true"""
        code = finetune.main(flags.split())
        if code:
            raise SystemExit(code)
        print("held-out loss of guessing each token by its frequency:", frequency_loss(folder / "start", texts))
    return folder / "pretrained"


def posts(data_dir: Path) -> list[str]:
    """The training posts without their headers, in the order of their numbers."""
    files = sorted((data_dir / "20news-bydate" / "20news-bydate-train").glob("*/*"), key=lambda file: file.name)
    bodies = (file.read_text(encoding="latin-1").partition("\n\n")[2].strip() for file in files)
    return [body for body in bodies if len(body) > 100]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def start(data_dir: Path, texts: list[str], folder: Path, hidden: int, layers: int, heads: int) -> None:
    """A tokenizer like stories260k's, trained on the texts, and a Llama with random weights."""
    small = AutoTokenizer.from_pretrained(data_dir / "stories260k")
    tokenizer = small.train_new_from_iterator(texts, vocab_size=VOCABULARY)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,  # transformers' 0.02 is that of a width of 2,500, and learns slowly here
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def frequency_loss(folder: Path, texts: list[str]) -> float:
    """Nats a token of the held-out posts, from the tokens' frequencies in the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = Counter(token for row in tokenizer(texts[HELD_OUT:]).input_ids for token in row)
    asked = Counter(token for row in tokenizer(texts[:HELD_OUT]).input_ids for token in row)
    total = seen.total() + len(tokenizer)
    return sum(-math.log((seen[token] + 1) / total) * count for token, count in asked.items()) / asked.total()


if __name__ == "__main__":
    main()
