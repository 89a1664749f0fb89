"""`to-finetune`: one verb a job. Each verb is imported when it is called, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from to_finetune.errors import RunError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit code: 0 done, 1 a failed run, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="to-finetune", description="Fine-tune with the Trainable Optimizer.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    reproduce_arguments(verbs.add_parser("reproduce", help="run the paper's experiments, draw its tables and figures"))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        return 130
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    from to_finetune.paper import targets

    parser.description = "Run experiments of the paper and draw its tables and figures. What is finished is kept."
    parser.epilog = "\n".join(f"  {name:12} {about}" for name, about in targets.ABOUT.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="what to reproduce, of those listed below")
    parser.add_argument("--data_dir", help="a folder with upstream's files; without it the sets are downloaded")
    parser.add_argument("--output_dir", default="runs/paper", help="where results, tables and figures go (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute's trial of the command on stand-in data")
    parser.add_argument("--device", default="cpu", help="where the members of a case are trained (%(default)s)")
    parser.set_defaults(run=reproduce)


def reproduce(arguments: argparse.Namespace) -> int:
    from to_finetune.paper.reproduce import reproduce

    return reproduce(
        arguments.targets, arguments.data_dir, arguments.output_dir, quick=arguments.quick, device=arguments.device
    )


if __name__ == "__main__":
    sys.exit(main())
