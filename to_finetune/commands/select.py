"""`to-finetune select`: choose what trains, see it, and keep it as a file."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from to_finetune.errors import UsageError
from to_finetune.files import check_place

if TYPE_CHECKING:
    from to_finetune.model.spectrum import ScoredTensor

WAYS = ("last_layers", "modules", "snr", "parameters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what of a model trains, in one way, and see it layer by layer; the model's config.json is enough, but for "
        "--snr. The file is Spectrum's and axolotl's form, for --unfrozen_parameters FILE."
    )
    parser.add_argument("--model_name_or_path", required=True, metavar="MODEL", help="a folder or a hub name")
    ways = parser.add_argument_group("what trains")
    ways.add_argument(
        "--last_layers", "--unfrozen_last_layers", type=int, metavar="N", help="the last so many decoder layers"
    )
    ways.add_argument(
        "--modules",
        "--unfrozen_modules",
        nargs="+",
        metavar="NAME",
        help="modules by name: q_proj v_proj; in the last layers",
    )
    ways.add_argument("--snr", type=float, metavar="SHARE", help="the best share of matrices, by signal-to-noise ratio")
    ways.add_argument(
        "--parameters",
        "--unfrozen_parameters",
        nargs="+",
        metavar="REGEX",
        help="regular expressions, or a .yaml file of them",
    )
    parser.add_argument("--output_file", metavar="FILE.yaml", help="write the choice here")
    parser.add_argument("--picture", metavar="FILE.png", help="draw it here (or .svg, .pdf)")


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    import transformers
    from rich.console import Console
    from rich.text import Text

    from to_finetune.model.load import without_weights
    from to_finetune.model.select import chosen_patterns, write_names
    from to_finetune.model.spectrum import write_yaml
    from to_finetune.model.subset import select_trainable
    from to_finetune.report.subset_map import plot_subset, subset_table

    transformers.logging.set_verbosity_error()
    model = without_weights(arguments.model_name_or_path)
    scored = None if arguments.snr is None else score(arguments)
    if scored is not None:
        trained = [tensor.name for tensor in scored if tensor.chosen]
    else:
        every = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
        patterns = chosen_patterns(every, arguments.parameters, arguments.last_layers, arguments.modules)
        trained = select_trainable(model, patterns).names
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    console = Console(highlight=False, soft_wrap=True)
    console.print(subset_table(sizes, trained))
    if arguments.output_file:
        if scored is not None:
            write_yaml(arguments.output_file, scored, arguments.snr)
        else:
            write_names(arguments.output_file, trained, "to-finetune " + shlex.join(_words(arguments)))
        console.print(Text.assemble("To train it: ", (f"--unfrozen_parameters {arguments.output_file}", "bold")))
    if arguments.picture:
        Path(arguments.picture).parent.mkdir(parents=True, exist_ok=True)
        plot_subset(sizes, trained, arguments.picture, Path(arguments.model_name_or_path).name)
        console.print(f"Drawn: {arguments.picture}", markup=False)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise if the ways exclude each other, or a file is of the wrong kind, before an hour of scoring.

    Raises:
        UsageError: naming the flags.
    """
    given = [way for way in WAYS if getattr(arguments, way) is not None]
    if not given:
        raise UsageError(f"Nothing says what trains: use {', '.join(f'--{way}' for way in WAYS)}.")
    if len(given) > 1 and set(given) not in ({"last_layers", "modules"}, {"snr", "modules"}):
        raise UsageError(
            f"--{given[0]} and --{given[1]} both say what trains: use one way; --modules can go with --last_layers or "
            "with --snr."
        )
    for flag, endings in (("output_file", (".yaml", ".yml")), ("picture", (".png", ".svg", ".pdf"))):
        path = getattr(arguments, flag)
        if path is not None and (Path(path).suffix not in endings or Path(path).is_dir()):
            raise UsageError(f"--{flag} {path} is not valid: a file that ends in {', '.join(endings)}.")
        if path is not None:
            check_place(flag, Path(path))


def score(arguments: argparse.Namespace) -> list[ScoredTensor]:
    """Score the matrices by their signal-to-noise ratio, with a progress bar."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from to_finetune.model.spectrum import select_by_snr

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def scored(done: int, total: int, name: str) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task("", total=total)
            bar.update(task, completed=done, description=name)

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return select_by_snr(arguments.model_name_or_path, arguments.snr, arguments.modules, scored, device)


def _words(arguments: argparse.Namespace) -> list[str]:
    """Return the part of the command that says what trains."""
    words = ["select", "--model_name_or_path", arguments.model_name_or_path]
    for way in WAYS:
        value = getattr(arguments, way)
        if value is not None:
            words += [f"--{way}", *(value if isinstance(value, list) else [str(value)])]
    return words
