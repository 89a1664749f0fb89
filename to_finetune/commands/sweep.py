"""`to-finetune sweep`: search the learning rate, or other numbers and options, with one run per trial."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from to_finetune.training.sweep import Sweep

TAKES_FLAGS = True
PAGE = 5  # runs side by side on sweep.html, the best first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "to-finetune sweep [--trials 12] [--search KEY=VALUES ...] [--seeds SEED ...] FLAGS_OF_A_RUN"
    parser.description = (
        "Train once a trial, each with other rates, and say which ends in the lowest held-out loss (without held-out "
        "data: mean training loss). All other flags are finetune.py's. A sweep that was stopped goes on when the same "
        "command is given again, and one that is done when --trials is raised."
    )
    parser.add_argument("--trials", type=int, default=12, help="how many runs (%(default)s)")
    parser.add_argument(
        "--search",
        nargs="+",
        default=[],
        metavar="KEY=VALUES",
        help="ranges in log scale, learning_rate=1e-3..1e-1, or lists, alpha=0,0.1,0.3; of flags that are numbers and "
        "of the optimizer's options (the learning rate alone, from a tenth to ten times the one that the flags give)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="SEED", help="then train the best on each of these seeds"
    )
    parser.add_argument("--output_dir", default="runs/sweep", help="the folder of all its runs (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from to_finetune.training.sweep import sweep

    console = Console(highlight=False)
    with console.status("") as status:
        made = sweep(
            arguments.flags,
            arguments.search,
            arguments.trials,
            arguments.output_dir,
            arguments.seeds,
            on_line=lambda run, line: status.update(escape(f"{run}  {line}")),
            on_trial=_Lines(console),
        )
    return _summarise(made, console)


class _Lines:
    """Prints a line for each run that has ended, and keeps the picture up to date."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown: int | None = None

    def __call__(self, made: Sweep) -> None:
        from rich.text import Text

        from to_finetune.report.sweep import LOSSES, plot_sweep, words_of

        runs = [*made.trials, *made.judged]
        if self.shown is None:
            space = "  ".join(f"{key}={text}" for key, text in made.search.items())
            self.console.rule(Text(f"sweep  {made.args.optim}  {space}  {made.planned} trials"), align="left")
            if runs:
                self.console.print(f"{len(runs)} of them are there.")
        else:
            for trial in runs[self.shown :]:
                about = f"{trial.folder}  {words_of(trial.values)}  "
                if trial.loss is None:
                    self.console.print(Text.assemble(about, (f"{trial.status}: {trial.error}", "red")))
                else:
                    best = ("  best so far", "bold green") if trial is made.best and not made.judged else ""
                    self.console.print(Text.assemble(f"{about}{LOSSES[made.objective]} {trial.loss:.4f}", best))
        self.shown = len(runs)
        if made.trials:
            for ending in ("png", "svg"):
                plot_sweep(made, made.folder / f"sweep.{ending}")


def _summarise(made: Sweep, console: Console) -> int:
    """Write the page, print the results, and return the exit code: 1 if a failed run is left to be retried."""
    import shlex

    from rich.text import Text

    from to_finetune.report.page import write_report
    from to_finetune.report.sweep import findings, sweep_table
    from to_finetune.training.recipe import without_secrets

    best = [made.folder / trial.folder for trial in made.ranking if trial.loss is not None][:PAGE]
    write_report(best, made.folder / "sweep.html")
    console.print(sweep_table(made))
    for sentence in findings(made):
        console.print(sentence)
    flags = without_secrets(made.best_flags)
    command = shlex.join(["to-finetune", "train", *flags, "--output_dir", f"{made.folder}-best"])
    console.print(Text.assemble(("Train with the best: ", "bold"), command), soft_wrap=True)
    console.print(Text(f"{made.folder}/: sweep.json has all of it, sweep.png the picture, sweep.html the best runs."))
    return int(any(trial.status == "failed" for trial in (*made.trials, *made.judged)))
