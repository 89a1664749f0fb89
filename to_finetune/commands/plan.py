"""`to-finetune plan`: memory, time and cost of a run before it starts."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from to_finetune.errors import UsageError, at_least_one

if TYPE_CHECKING:
    from rich.console import Console

    from to_finetune.planning import Plan, Proposal, Speed

TAKES_FLAGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "to-finetune plan [--memory 24GB | --fit 24GB] [options] FLAGS_OF_A_RUN"
    parser.description = (
        "What a run would take on each GPU, found without weights or data: a model's config.json is enough. Takes all "
        "flags of a run, --config among them; bf16 is on unless --fp16 true, --bf16 false or --use_cpu true. "
        "Exit code: 0, or 1 where it does not fit, or 2 where that cannot be said."
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--memory", metavar="24GB", help="say whether it fits (24GiB is more), and what would")
    budget.add_argument("--fit", metavar="24GB", help="find as many last layers as fit, and their flags")
    parser.add_argument("--layout", default="ddp", help="ddp, fsdp2, zero3, ...: configs/accelerate (%(default)s)")
    parser.add_argument("--num_processes", type=int, default=1, metavar="N", help="GPUs, of all machines (%(default)s)")
    parser.add_argument("--gpu", metavar="H100", help="its speed, and the time where the number of steps is known")
    parser.add_argument("--price_per_hour", type=float, metavar="2.5", help="of one such GPU: what the run costs")
    parser.add_argument("--rows", type=int, metavar="N", help="of the training data: the steps of its epochs")
    parser.add_argument("--json", action="store_true", help="bytes and seconds, as JSON")


@dataclass
class Answer:
    """The plan, and whatever else was asked for."""

    plan: Plan
    budget: int | None = None
    fit: bool = False
    picked: Proposal | None = None
    proposals: list[Proposal] | None = None
    gpu: str | None = None
    speed: Speed | None = None

    @property
    def code(self) -> int:
        return int(self.budget is not None and not self.plan.fits(self.budget))


def run(arguments: argparse.Namespace) -> int:
    import transformers
    from rich.console import Console

    transformers.logging.set_verbosity_error()
    with Console(stderr=True).status("runs a training step without weights"):
        answer = find(arguments)
    if arguments.json:
        print(json.dumps(as_json(answer), indent=2))
    else:
        show(answer, Console(highlight=False))
    return answer.code


def find(arguments: argparse.Namespace) -> Answer:
    """Plan the run, and find whatever else was asked for.

    Raises:
        UsageError: for invalid flags, a model that does not exist, and a run that cannot be planned.
    """
    from to_finetune.planning import check_gpu, pick_subset, plan, proposals, speed
    from to_finetune.training.plan import choice_of, parse_for_plan, settings_of
    from to_finetune.units import parse_size

    _check(arguments)
    if arguments.gpu is not None:
        check_gpu(arguments.gpu)
    size = arguments.memory if arguments.memory is not None else arguments.fit
    budget = None if size is None else parse_size(size)
    model_args, args = parse_for_plan(arguments.flags, vars(arguments))
    if arguments.rows is not None and args.packing and args.max_steps < 0:
        raise UsageError("--rows says nothing of the steps of packed rows, several of which are one: give --max_steps.")
    settings = settings_of(model_args, args, arguments.layout, arguments.num_processes, arguments.rows)
    choice = choice_of(model_args)
    picked = None
    if arguments.fit is not None and budget is not None:
        if model_args.use_peft:
            raise UsageError("--fit chooses the last layers, and use_peft trains adapters; --memory plans those.")
        picked = pick_subset(settings, budget, choice)
    fit = arguments.fit is not None
    answer = Answer(picked.plan if picked else plan(settings), budget, fit, picked, gpu=arguments.gpu)
    if answer.code:
        assert budget is not None
        answer.proposals = proposals(settings, budget, choice)
    if arguments.gpu is not None:
        steps = settings.max_steps
        tokens = None if steps is None else steps * settings.tokens_per_step
        answer.speed = speed(answer.plan, arguments.gpu, tokens, arguments.price_per_hour)
    return answer


def _check(arguments: argparse.Namespace) -> None:
    if arguments.price_per_hour is not None and arguments.gpu is None:
        raise UsageError("--price_per_hour needs --gpu: without its speed there is no time to pay for.")
    if arguments.price_per_hour is not None and not arguments.price_per_hour >= 0:
        raise UsageError(f"--price_per_hour {arguments.price_per_hour} is not valid: at least 0.")
    at_least_one(rows=arguments.rows)


def show(answer: Answer, console: Console) -> None:
    from rich.text import Text

    from to_finetune.planning import plan_table, proposals_text, speed_text, verdict

    if answer.fit and not answer.picked:
        console.print("Not even the last layer fits with these flags.")
    else:
        console.print(plan_table(answer.plan))
        if answer.picked:
            flags = " ".join(answer.picked.changes)
            said = ("As many last layers as fit: ", (flags, "bold")) if flags else ("All weights fit.",)
            console.print(Text.assemble(*said), soft_wrap=True)
        if answer.budget is not None:
            console.print(verdict(answer.plan, answer.budget))
    if answer.proposals is not None:
        console.print(proposals_text(answer.proposals), soft_wrap=True)
    if answer.speed and answer.gpu:
        console.print(speed_text(answer.speed, answer.plan, answer.gpu))


def as_json(answer: Answer) -> dict[str, Any]:
    plan = answer.plan
    values: dict[str, Any] = {
        "model": plan.settings.work.model.name,
        "layout": plan.settings.layout,
        "processes": plan.settings.processes,
        "trained_weights": plan.trained_weights,
        "total_weights": plan.total_weights,
        "bytes": plan.parts() | {name: getattr(plan, name) for name in ("total", "host", "saved")},
    }
    if answer.budget is not None:
        values |= {"budget": answer.budget, "fits": plan.fits(answer.budget)}
    if answer.picked:
        values["flags"] = list(answer.picked.changes)
    if answer.proposals is not None:
        values["proposals"] = [
            {"flags": list(p.changes), "bytes": p.plan.total, "trained_weights": p.plan.trained_weights}
            for p in answer.proposals
        ]
    if answer.speed:
        values["speed"] = {"gpu": answer.gpu, "steps": plan.settings.max_steps, **vars(answer.speed)}
    return values
