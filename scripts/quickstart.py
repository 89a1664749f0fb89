"""Try the toolkit on a CPU in a few minutes: `python scripts/quickstart.py`.

Makes a small Llama and pretrains it on the spot, then fine-tunes its last two layers on instructions with Diagonal TO,
RankOne TO and AdamW, and compares. Every training is the toolkit's own finetune.py with a recipe of configs/recipes.
"""

import os

import environment

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine two threads wait for each other at every small tensor
environment.enter("hf")

import json
import shlex
import sys
import time
from itertools import count
from pathlib import Path
from textwrap import shorten

import tiny_llama
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from to_finetune import finetune
from to_finetune.data import alpaca_prompt
from to_finetune.model import load_finetuned
from to_finetune.report.plot import plot_losses

RECIPES = environment.ROOT / "configs" / "recipes"
OPTIMIZERS = {"Diagonal TO": "diagonal_to", "RankOne TO": "rank_one_to", "AdamW": "adamw_torch"}
SHOWN = 4  # generations


def main() -> None:
    started = time.perf_counter()
    console = Console()
    folder = new_folder()
    tiny_llama.make(folder)
    run("quickstart-pretrain.yaml", folder / "base", folder / "model", dataset_name=folder / "pretrain.jsonl")
    data = {
        "dataset_name": folder / "instructions_train.jsonl",
        "eval_dataset_name": folder / "instructions_test.jsonl",
    }
    for optim in OPTIMIZERS.values():
        run("quickstart.yaml", folder / optim, folder / "base", optim=optim, **data)

    rows = [json.loads(line) for line in (folder / "instructions_test.jsonl").read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")
    answers = {"before": generate(*base, rows)}
    for label, optim in OPTIMIZERS.items():
        answers[label] = generate(*load_finetuned(folder / optim), rows)

    histories = {
        label: read(folder / optim / "trainer_state.json")["log_history"] for label, optim in OPTIMIZERS.items()
    }
    plot_losses(histories, folder / "comparison.png", "Fine-tuning the last two layers: training and held-out loss")
    console.rule("The same model, the same data, three optimizers", align="left")
    console.print(comparison(folder, answers, rows))
    console.print(generations(answers, rows))
    where = folder.relative_to(environment.ROOT)
    console.print(
        f"\n{where}/comparison.png is the picture;\n{where}/<optimizer>/ has the weights, run.json and loss.png."
    )
    console.print(f"{time.perf_counter() - started:.0f} s in all.")


def new_folder() -> Path:
    """Make runs/quickstart, or the first of runs/quickstart-2, -3, ... that does not exist yet."""
    names = (f"quickstart-{i}" if i > 1 else "quickstart" for i in count(1))
    folder = next(path for name in names if not (path := environment.ROOT / "runs" / name).exists())
    folder.mkdir(parents=True)
    return folder


def run(recipe: str, output_dir: Path, model: Path, **flags: object) -> None:
    """Run `finetune.py` with a recipe in this process, which saves importing the libraries again."""
    flags = {"config": RECIPES / recipe, "model_name_or_path": model, **flags, "output_dir": output_dir}
    arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    print(f"\n$ accelerate launch scripts/finetune.py {shlex.join(arguments)}", flush=True)
    code = finetune.main(arguments)
    if code:
        sys.exit(code)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> list[str]:
    """Return the model's greedy answers to the rows' instructions."""
    tokenizer.padding_side = "left"
    prompts = [alpaca_prompt(row["instruction"], row["input"]) for row in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output: torch.Tensor = model.generate(
        **batch,  # type: ignore[operator]
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def comparison(folder: Path, answers: dict[str, list[str]], rows: list[dict[str, str]]) -> Table:
    """Tabulate each optimizer's losses, right answers to the held-out questions, and time."""
    table = Table(header_style="bold")
    columns = (
        "optimizer",
        "held-out\nloss",
        "training\nloss, mean",
        "first\nfifth",
        "right\nanswers",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    right = {
        label: sum(a.strip() == row["output"] for a, row in zip(given, rows, strict=True))
        for label, given in answers.items()
    }
    table.add_row("(before)", "", "", "", f"{right['before']} of {len(rows)}", "", style="dim")
    for label, optim in OPTIMIZERS.items():
        result = read(folder / optim / "run.json")["results"]
        losses = [f"{result[key]:.3f}" for key in ("eval_loss", "train_loss_mean", "train_loss_first_fifth")]
        table.add_row(label, *losses, f"{right[label]} of {len(rows)}", f"{result['train_seconds']:.0f}")
    return table


def generations(answers: dict[str, list[str]], rows: list[dict[str, str]]) -> Table:
    """Tabulate a few held-out questions with the answers before and after."""
    table = Table(title="Held-out questions", title_justify="left", header_style="bold", show_lines=True)
    for column in ("question", "right answer", "before", "Diagonal TO"):
        table.add_column(column, style="dim" if column == "before" else "")
    for i in range(0, len(rows), len(rows) // SHOWN + 1):
        question = " ".join(filter(None, (rows[i]["instruction"], rows[i]["input"])))
        table.add_row(
            question,
            rows[i]["output"],
            shorten(answers["before"][i], 60, placeholder=" …"),
            answers["Diagonal TO"][i].strip(),
        )
    return table


if __name__ == "__main__":
    main()
