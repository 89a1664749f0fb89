"""One fine-tuning run, from flags to report: `accelerate launch -m to_finetune.finetune --config recipe.yaml`."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback

from to_finetune.data import check_labels, preview
from to_finetune.data.prompts import prompt_form
from to_finetune.errors import RunError, UsageError
from to_finetune.model.trained import TRAINED_WEIGHTS_NAME
from to_finetune.report.page import write_report
from to_finetune.report.plot import plot_losses
from to_finetune.report.push import check_push, push
from to_finetune.runs import CONFIG, LOSS_CURVE, RECORD, REPORT, last_checkpoint, step_of
from to_finetune.signals import signal_of, sigterm_interrupts
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.callbacks import (
    LogBeforeSave,
    SaveOnSignal,
    StopOnNonFinite,
    TerminalLines,
    TerminalProgress,
    WholeRuntime,
)
from to_finetune.training.flags import check_flags, check_rows, without_effect
from to_finetune.training.layout import check_processes
from to_finetune.training.memory import RunMemory
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import data_report, prepare_data, prepare_model, prepare_trainer, say, settle
from to_finetune.training.proofs import check_saved
from to_finetune.training.recipe import resolved_config
from to_finetune.training.record import RunRecord, resume_point, summarise
from to_finetune.training.sft import TOSFTTrainer
from to_finetune.training.traces import SampleAnswers, SlopeTrace, write_parameters

OUT_OF_MEMORY = (
    "The GPU is out of memory. Lower --per_device_train_batch_size or --max_length, train less, or set "
    "--gradient_checkpointing true; `to-finetune plan --memory SIZE` with the run's flags says what fits."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetune.py` and return its exit code: 0 done, 1 failed run, 2 bad usage, 128 + n stopped by signal n."""
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0  # on this machine, which has its own files and errors
    try:
        with sigterm_interrupts():
            return finetune(*parse_arguments(argv))
    except KeyboardInterrupt as interrupt:
        number = signal_of(interrupt)
        if is_first:
            print(f"{number.name}: stopped at once; checkpoints that are there are kept.", file=sys.stderr)
        return 128 + number
    except (UsageError, RunError) as error:
        if is_first:
            Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), f" {error}"))
        return 2 if isinstance(error, UsageError) else 1


def finetune(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments) -> int:
    """Fine-tune, write the trained weights, the record and the plot to ``args.output_dir``, and return the exit code.

    Raises:
        UsageError: for an invalid request.
        RunError: when the run does not do what was asked, or diverges.
    """
    console = Console(quiet=not args.should_log)
    datasets.disable_progress_bars()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    record, resume = check(model_args, data_args, args)
    console.rule(f"to_finetune  {args.optim}  {args.world_size} process(es) on {args.device.type}", align="left")
    console.print(Syntax(yaml.safe_dump(record.config, sort_keys=False), "yaml", background_color="default"))
    say(without_effect(args), args)

    memory = RunMemory(args.device)
    record.values["memory"] = memory.values
    if args.should_save:
        console.print(memory.plan(model_args, args))
    args.distributed_state.wait_for_everyone()  # until process 0 has planned: only its errors are shown
    tokenizer, train_dataset, eval_dataset = prepare_data(model_args, data_args, args)
    model, subset = prepare_model(model_args, args)
    console.print(subset.table())
    record.values.update(
        prompt_form=prompt_form(next(iter(train_dataset))),
        subset={"tensors": len(subset.names), "weights": subset.weights, "total_weights": subset.total_weights},
    )
    pushes, args.push_to_hub = args.push_to_hub, False  # the Trainer's own push uploads local paths and the token
    trainer = prepare_trainer(model, tokenizer, args, train_dataset, eval_dataset)
    check_rows(trainer.train_dataset, args)
    check_labels(trainer.train_dataset, args.max_length)
    if trainer.eval_dataset is not None:
        check_labels(trainer.eval_dataset, args.max_length, "held-out")
    console.print(data_report(trainer), preview(trainer.train_dataset, tokenizer))

    signals, samples = SaveOnSignal(), SampleAnswers(trainer, record.folder)
    for hf_callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(hf_callback)
    progress = TerminalProgress() if sys.stderr.isatty() and not args.disable_tqdm else TerminalLines()
    for callback in (progress, StopOnNonFinite(), signals, LogBeforeSave(), memory, WholeRuntime()):
        trainer.add_callback(callback)
    trainer.add_callback(SlopeTrace(record.folder))
    if args.should_save:
        record.begin()
        write_parameters(trainer.model, record.folder)
    with closing(signals), recorded(trainer, record):  # torchrun's SIGTERM must not cut the record short
        samples.take("before")
        trainer.train(resume_from_checkpoint=resume)
        if signals.stopped:
            return interrupted(trainer, record, signals, console)
        results = finish(trainer, args)
        samples.take("after")
    conclude(trainer, record, status="done", results=results)
    if pushes and args.should_save:
        repo_id = args.hub_model_id or record.folder.name
        console.print(push(args.output_dir, repo_id, bool(args.hub_private_repo), token=args.hub_token).where)
    console.print(summary({**results, "memory": memory.in_words()}, record))
    atexit.register(args.distributed_state.destroy_process_group)
    return 0


def check(
    model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments
) -> tuple[RunRecord, str | None]:
    """Check the arguments before anything is loaded; return the run's record and the checkpoint to resume from.

    Raises:
        UsageError: for an invalid number of processes, repository, model, folder, checkpoint or flag.
    """
    check_processes(args.world_size)
    if args.push_to_hub:
        check_push(args.hub_model_id or Path(args.output_dir).name, args.hub_token)
    settle(model_args, args)
    check_flags(args)
    resume = resume_point(args.resume_from_checkpoint, args.output_dir)
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    record = RunRecord(args.output_dir, resolved_config(model_args, data_args, args), rows_a_step)
    record.check_folder(resume)
    args.distributed_state.wait_for_everyone()  # every process has checked the folder before one writes to it
    return record, resume


@contextmanager
def recorded(trainer: TOSFTTrainer, record: RunRecord) -> Iterator[None]:
    """Record the interrupt or the error that ends the training early."""
    try:
        yield
    except KeyboardInterrupt:
        conclude(trainer, record, status="interrupted", checkpoint=last_checkpoint(record.folder))
        raise
    except BaseException as error:
        conclude(trainer, record, status="failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError(OUT_OF_MEMORY) from error
        if isinstance(error, KeyError) and "metric_for_best_model" in str(error):  # known at the first evaluation
            raise UsageError(str(error.args[0])) from error
        raise


def finish(trainer: TOSFTTrainer, args: FinetuneArguments) -> dict[str, Any]:
    """Evaluate and save; read a partly frozen model's trained tensors back; return the run's results."""
    history, step = trainer.state.log_history, trainer.state.global_step
    if trainer.eval_dataset is not None and not any("eval_loss" in row and row["step"] == step for row in history):
        trainer.evaluate()
    trainer.save_model()
    if trainer.saves_part():
        trained = trainer.trained_tensors()
        if args.should_save:
            proofs = trainer.engagement.proofs
            proofs["saved_bytes_read_back"] = check_saved(trained, args.output_dir, proofs["trained_tensors"])
    was_loaded = args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    saved_step = step_of(str(trainer.state.best_model_checkpoint)) if was_loaded else None
    return summarise(history, saved_step)


def conclude(trainer: TOSFTTrainer, record: RunRecord, **outcome: Any) -> None:
    """Record how the run ended, and draw its curves and its page; on process 0 only."""
    if not trainer.args.should_save:
        return
    history = trainer.state.log_history
    trainer.save_state()
    results = {**outcome.pop("results", summarise(history)), "processes": trainer.args.world_size}
    record.update(results=results, proofs=trainer.engagement.proofs, **outcome)
    plot_losses({trainer.args.optim: history}, record.folder / LOSS_CURVE, title=str(record.folder))
    write_report([record.folder], record.folder / REPORT)


def interrupted(trainer: TOSFTTrainer, record: RunRecord, signals: SaveOnSignal, console: Console) -> int:
    """Record and print the checkpoint to resume from; return the shell's exit code for the signal."""
    assert signals.stopped is not None
    last = last_checkpoint(record.folder)
    conclude(trainer, record, status="interrupted", checkpoint=last)
    console.print(f"{signals.stopped.name}: saved {last}. Go on with --resume_from_checkpoint true.", markup=False)
    console.print(f"The run so far: {record.folder / REPORT}", markup=False)
    trainer.args.distributed_state.wait_for_everyone()  # torchrun ends all others when the first one exits
    return 128 + signals.stopped


def summary(results: dict[str, Any], record: RunRecord) -> Table:
    """Return a table of the run's results and its files."""
    table = Table(show_header=False, box=None, title="Done", title_justify="left", title_style="bold")
    table.add_column()
    table.add_column(overflow="fold")  # a path must not be cut
    for name, value in results.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    if still := record.values.get("proofs", {}).get("never_moved"):
        table.add_row("never moved", Text(f"{len(still)} trained tensors, {still[0]} first", "yellow"))
    weights = (TRAINED_WEIGHTS_NAME, "adapter_model.safetensors")
    for file in (*weights, RECORD, CONFIG, LOSS_CURVE, REPORT):
        if (record.folder / file).exists():
            table.add_row(file.split(".")[0], Text(str(record.folder / file)))
    return table


if __name__ == "__main__":
    sys.exit(main())
