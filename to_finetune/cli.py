"""`to-finetune VERB ...`: each verb is a module of `to_finetune.commands`, imported when called: --help is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from to_finetune import __version__
from to_finetune.errors import RunError, UsageError, did_you_mean
from to_finetune.signals import signal_of

VERBS = {
    "train": "fine-tune a model, through accelerate, with the right number of processes",
    "plan": "memory, time and cost of a run, before it starts",
    "select": "choose what trains, and see it",
    "preview": "see prepared examples, token by token",
    "sweep": "find the rates, one run a trial",
    "report": "a page of one run, or of several side by side",
    "merge": "a run's trained part and its base as an ordinary model",
    "generate": "answers before and after, or a chat in the terminal",
    "evaluate": "held-out loss and perplexity, or lm-evaluation-harness's tasks",
    "push": "a run to the hub, with its model card",
    "reproduce": "run the paper's experiments, draw its tables and figures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code: 0 done, 1 failed run, 2 bad usage, 128 + n stopped by signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        return 128 + signal_of(interrupt)
    except BrokenPipeError:  # its reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        if str(error.name).startswith("to_finetune"):
            raise
        package = str(error.name).partition(".")[0]
        extra = "sweep" if package == "optuna" else "paper" if argv[0] == "reproduce" else "hf"
        print(f'error: {argv[0]} needs {package}: pip install "to-finetune[{extra}]"', file=sys.stderr)
        return 2
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the verb's arguments, with its function as ``run`` and the flags meant for finetune.py as ``flags``."""
    parser = argparse.ArgumentParser(prog="to-finetune", description="Fine-tune with the Trainable Optimizer.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    asked = argv[0] if argv else ""
    if asked not in VERBS and asked[:1] not in ("", "-"):
        raise UsageError(f"{asked!r} is no verb.{did_you_mean(asked, VERBS)} There are {', '.join(VERBS)}.")
    known = list[str]()
    for verb, about in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=about, allow_abbrev=False)
        if verb == asked:
            module = import_module(f"to_finetune.commands.{verb}")
            module.add_arguments(verb_parser)
            known = list(verb_parser._option_string_actions)
            argv = [_as_defined(word, known) for word in argv]
            verb_parser.set_defaults(run=module.run, takes_flags=getattr(module, "TAKES_FLAGS", False))
    arguments, flags = parser.parse_known_args(argv)
    if flags and not arguments.takes_flags:
        parser.error(f"{asked}: unknown {flags[0]!r}.{did_you_mean(flags[0], known)}")
    arguments.flags = flags
    return arguments


def _as_defined(word: str, known: Sequence[str]) -> str:
    """Rewrite a known flag such as --output-dir to --output_dir; a run's flags accept both spellings too."""
    flag, equals, value = word.partition("=")
    name = f"--{flag[2:].replace('-', '_')}"
    return name + equals + value if flag.startswith("--") and name in known else word


if __name__ == "__main__":
    sys.exit(main())
