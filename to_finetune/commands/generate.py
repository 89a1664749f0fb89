"""`to-finetune generate`: answers of a run, beside its base's, or a chat in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from to_finetune.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer prompts, put as the run's data put them: under Alpaca's headings, through the chat template, or as "
        "they stand. Without --prompt, each line that is piped in is one; in a terminal it is a chat."
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, one of its checkpoints, or any model")
    parser.add_argument("--prompt", action="append", help="a question; may be given several times")
    parser.add_argument("--compare", action="store_true", help="show what the run's base answers beside it")
    parser.add_argument(
        "--template", choices=["alpaca", "chat", "raw"], help="how a prompt is put (default: as the run's data did)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="an answer is cut there (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_p", type=float, help="draw only from the likeliest tokens that add up to this")
    parser.add_argument("--seed", type=int, help="makes drawn answers repeatable")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU, if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="how the weights are held (default: bfloat16 on a GPU that has it, else float32)",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch
    import transformers
    from rich.console import Console

    from to_finetune.model.generate import Decoding
    from to_finetune.model.opened import choose_device, open_model
    from to_finetune.model.terminal import chat, show

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    decoding = Decoding(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    device = choose_device(arguments.device)
    prompts = read_prompts(arguments.prompt)
    opened = open_model(
        arguments.model,
        device,
        getattr(torch, arguments.dtype) if arguments.dtype else None,
        with_base=arguments.compare,
        form=arguments.template,
    )
    console = Console(highlight=False)
    if prompts is None:
        chat(opened, decoding, console, arguments.compare)
    else:
        for prompt in prompts:
            show(opened, prompt, decoding, console, arguments.compare)
    return 0


def read_prompts(given: Sequence[str] | None) -> list[str] | None:
    """Return the given prompts, or the lines that are piped in; None for a chat.

    Raises:
        UsageError: for an empty prompt, or if there is nothing to read.
    """
    if given is None and sys.stdin.isatty():
        return None
    prompts = list(given) if given is not None else [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise UsageError("There is nothing to answer: give a --prompt, or pipe in a line for each.")
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("A --prompt is empty.")
    return prompts
