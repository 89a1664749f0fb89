"""Fine-tune two layers of a small pretrained Llama on Alpaca with `finetune.py`, each method at its own tuned rates.

Each method gets equally many trials on seed 0: values of lr under Hugging Face's schedules "constant" and "linear" (to
zero), with all else fixed. Its best trials are judged on other seeds, which reorder the data. The criterion is the
training loss, taken at evenly spaced steps on the same rows of the training data.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from to_finetune.errors import RunError, UsageError
from to_finetune.paper.ledger import Ledger
from to_finetune.paper.methods import Trial
from to_finetune.paper.tuning import TUNING_SEED, Losses, points

Finetune = Callable[[list[str]], str | None]  # takes flags; returns the error message if the training failed

MODEL, DATA = "stories260k", "alpaca_data.json"  # below data_dir
FACTOR = 2.0  # between neighbouring values of lr
# Reads flags, one JSON list per line, and answers with exit codes; all that finetune.py prints goes to stderr.
WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from to_finetune.finetune import main
from to_finetune.paper.llm import make_stand_ins
for folder in sys.argv[1:]:
    make_stand_ins(folder)
for line in sys.stdin:
    print(main(json.loads(line)), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Protocol:
    """How much is trained: the parameters that match the regular expression `subset`, once over the first `rows`.

    evaluated_rows: the number of these, from the first on, whose loss is the criterion.
    evaluations: the number of evenly spaced evaluations of it, besides the one at the start.
    lrs: the number of values of lr, around the method's own, that are tried under each schedule.
    widenings: how often the values are extended at most, by half a decade, if the best is the lowest or the highest.
    """

    name: str
    subset: str = r"layers\.(3|4)\."
    rows: int = 640
    evaluated_rows: int = 64
    steps: int = 80
    batch_size: int = 8
    max_length: int = 256
    evaluations: int = 5
    lrs: int = 3
    schedules: tuple[str, ...] = ("constant", "linear")
    widenings: int = 2
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    @property
    def points(self) -> list[int]:
        """The steps after which the loss is taken."""
        return points(self.steps, self.evaluations)


FULL = Protocol("full")
QUICK = Protocol(
    "quick",
    subset=r"layers\.1\.",
    rows=8,
    evaluated_rows=4,
    steps=2,
    batch_size=2,
    evaluations=2,
    lrs=1,
    schedules=("constant",),
    widenings=0,
    seeds=(TUNING_SEED,),  # judging is free: the tuning has done its trainings
)


@dataclass(frozen=True)
class Method:
    """A method to compare: its optimizer's name in `finetune.py`, the middle of its values of lr, and fixed options."""

    optim: str
    lr: float
    own: dict[str, float]
    options: str = ""


_EXACT = "gamma_max=None,relative_alpha=False,grad_scale=None"
_OURS = "relative_alpha=True,grad_scale=rms"
METHODS = {
    "adam": Method("adamw_torch", 0.004, {}),  # Hugging Face's betas, and no weight decay
    "momentum": Method("diagonal_to", 1.0, {"alpha": 0.0, "beta": 0.1}, _EXACT),
    "diagonal_to": Method("diagonal_to", 1.0, {"alpha": 0.1, "beta": 0.1}, _EXACT),
    # alpha = 0.1 diverges at once: the group's weights have ||w||^2 = 2028
    "rank_one_to": Method("rank_one_to", 1.0, {"alpha": 0.01, "beta": 0.1}, f"{_EXACT},scope=group"),
    "momentum_ours": Method("diagonal_to", 0.008, {"alpha": 0.0, "beta": 0.1}, _OURS),
    "diagonal_to_ours": Method("diagonal_to", 0.008, {"alpha": 0.3, "beta": 0.1}, _OURS),
    "rank_one_to_ours": Method("rank_one_to", 0.008, {"alpha": 0.3, "beta": 0.1}, f"{_OURS},scope=group"),
}


def run(data_dir: Path | None, folder: Path, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Tune and judge every method; return JSON with losses rounded to nine digits, all null if a training diverged.

    Each finished training is a line of llm.jsonl in the folder, so that an interrupted run can resume; what finetune.py
    prints goes to llm.log. Runs on the CPU with one thread, unless OMP_NUM_THREADS says otherwise.

    Raises:
        UsageError: for missing data, and if the folder has trainings of another protocol.
        RunError: with finetune.py's message, if a training fails.
    """
    protocol = QUICK if quick else FULL
    with ExitStack() as stack:
        source = Path(stack.enter_context(TemporaryDirectory())) if quick else checked(data_dir)

        @cache
        def finetune() -> Finetune:
            return stack.enter_context(finetune_process(folder / "llm.log", stand_ins=source if quick else None))

        def losses(name: str, trial: Trial, seed: int) -> Losses:
            return train(finetune(), flags(METHODS[name], trial, seed, protocol, source), protocol.points)

        trained = Ledger(folder / "llm.jsonl", described(protocol), losses, progress)
        methods = {}
        for name, method in METHODS.items():
            trials_of = partial(trials, method, protocol.schedules)
            lrs = [method.lr * FACTOR ** (i - protocol.lrs // 2) for i in range(protocol.lrs)]
            methods[name] = trained.compare(name, lrs, trials_of, protocol.widenings, protocol.seeds)
    return {
        "case": {"name": "llm", "dataset": "alpaca", "model": "random: a trial, not a result" if quick else MODEL},
        "protocol": described(protocol),
        "steps": protocol.points,
        "methods": methods,
        "seconds": trained.seconds,
    }


def described(protocol: Protocol) -> dict[str, Any]:
    return asdict(protocol) | {"options": {name: method.options for name, method in METHODS.items()}}


def trials(method: Method, schedules: tuple[str, ...], lrs: list[float]) -> list[Trial]:
    return [{"lr": lr, "schedule": schedule, **method.own} for lr in lrs for schedule in schedules]


def checked(data_dir: Path | None) -> Path:
    """Return the folder if it has both the model and the data."""
    if data_dir is None or not ((data_dir / MODEL / "config.json").exists() and (data_dir / DATA).exists()):
        raise UsageError(
            f"The Llama's row needs --data_dir with a folder {MODEL} (the pretrained Llama of 260 thousand weights, "
            f"in Hugging Face's format) and {DATA} (Stanford Alpaca's); it is {data_dir or 'not given'}."
        )
    return data_dir


def flags(method: Method, trial: Trial, seed: int, protocol: Protocol, source: Path) -> list[str]:
    """Return the flags of `finetune.py`, except the output folder."""
    every = protocol.steps // protocol.evaluations
    words = f"""
        --dtype float32 --use_cpu true --unfrozen_parameters {protocol.subset} --max_length {protocol.max_length}
        --dataset_train_split train[:{protocol.rows}] --dataset_test_split train[:{protocol.evaluated_rows}]
        --max_steps {protocol.steps} --per_device_train_batch_size {protocol.batch_size}
        --optim {method.optim} --learning_rate {trial["lr"]} --lr_scheduler_type {trial["schedule"]} --max_grad_norm 0
        --eval_on_start true --eval_strategy steps --eval_steps {every} --per_device_eval_batch_size 32
        --logging_steps {every} --save_strategy no --report_to none --seed {seed}
    """.split()
    words += ["--model_name_or_path", str(source / MODEL), "--dataset_name", str(source / DATA)]
    options = [f"{name}={trial[name]}" for name in method.own]
    return words + (["--optim_args", ",".join([*options, method.options])] if options else [])


def train(finetune: Finetune, flags: list[str], points: list[int]) -> Losses:
    """Run one training and return its losses at the points."""
    with TemporaryDirectory() as folder:
        failure = finetune([*flags, "--output_dir", folder])
        if failure and "the run has diverged" in failure:
            return [math.inf] * len(points)  # finetune.py stops there and leaves no losses
        if failure:
            raise RunError(f"finetune.py failed, llm.log has the whole of it: {failure}")
        history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    return [losses[point] for point in points]


@contextmanager
def finetune_process(log: Path, stand_ins: Path | None) -> Iterator[Finetune]:
    """Start one `finetune.py` process for all trainings in turn, since starting it takes long."""
    command = [sys.executable, "-u", "-c", WORKER, *([str(stand_ins)] if stand_ins else [])]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    pipe = subprocess.PIPE
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=environment) as process,
    ):

        def finetune(flags: list[str]) -> str | None:
            with suppress(BrokenPipeError):  # the process has died
                print(json.dumps(flags), file=process.stdin, flush=True)
            code = cast(IO[str], process.stdout).readline().strip()
            last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            if not code:  # as when memory runs out
                raise RunError(f"finetune.py's process has died, its last line in {log.name} is: {last}")
            return None if code == "0" else last

        try:
            yield finetune
        finally:
            process.kill()  # its finished trainings are in the ledger
            with suppress(BrokenPipeError):
                cast(IO[str], process.stdin).close()


def make_stand_ins(folder: str) -> None:
    """Write a random byte-level Llama of two layers and eight instructions; called in `finetune.py`'s process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    symbols = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(Path(folder, MODEL))
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(symbols)}
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(Path(folder, MODEL))
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join("12345678"[:i])} for i in range(1, 9)]
    Path(folder, DATA).write_text(json.dumps(rows), encoding="utf-8")
