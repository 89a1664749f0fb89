"""Several processes end where one does; a launcher that starts fewer than it was asked for is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset

from to_finetune.data.preview import IGNORED
from to_finetune.errors import UsageError
from to_finetune.training.layout import check_layout, check_processes, processes_asked_for
from to_finetune.training.parser import parse_arguments
from to_finetune.training.recipe import resolved_config
from to_finetune.training.sft import filled_up

from .helpers import Run, flags

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

RUNS: dict[str, dict[str, Any]] = {
    "diagonal_to": {"optim": "diagonal_to"},
    "rank_one_to": {"optim": "rank_one_to"},
    "packed": {"packing": True, "max_length": 400},  # the held-out rows in three
}

# All in one launch: the libraries take seconds to import.
SEVERAL_RUNS = """
import json, sys
from to_finetune.finetune import main
from to_finetune.training import traces

traces.NEW_TOKENS = 8  # as in `helpers.finetune`
for words in json.loads(sys.argv[1]):
    if main([*words, *sys.argv[2:]]):
        sys.exit(1)
"""


def launch(*command: Any) -> tuple[int, str]:
    """Run a command; returns its exit code and what it wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = [str(word) for word in command]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=300)
    finally:
        process.terminate()  # torchrun then ends its processes, which a kill would leave behind
    return process.returncode, error


def loss_at_start(run: Run) -> float:
    """Held out, of the base."""
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    return next(row["eval_loss"] for row in history if "eval_loss" in row)


def test_two_processes_give_the_losses_and_weights_of_one(
    finetune: Callable[..., Run], llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    """At equal global batch, to the rounding of another order of summation; without a flag where there is no GPU."""
    script = tmp_path / "several_runs.py"
    script.write_text(SEVERAL_RUNS)
    options = {
        "model_name_or_path": llama,
        "dataset_name": alpaca,
        "eval_dataset_name": alpaca,
        "dataset_test_split": "train[:5]",  # which do not divide evenly
        "per_device_eval_batch_size": 2,
        "eval_on_start": True,
        "unfrozen_parameters": [r"layers\.3\."],
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    words = json.dumps([flags(output_dir=tmp_path / "two" / name, **own) for name, own in RUNS.items()])
    code, error = launch(*torchrun, script, words, *flags(**options))
    assert code == 0, error
    for name, own in RUNS.items():
        one = finetune(tmp_path / "one" / name, **{**options, **own, "per_device_train_batch_size": 4})
        two = Run(0, tmp_path / "two" / name, None)
        assert two.record["results"]["processes"] == 2
        assert loss_at_start(two) == pytest.approx(loss_at_start(one), rel=1e-6)
        assert two.losses == pytest.approx(one.losses, rel=1e-5)
        assert two.record["results"]["eval_loss"] == pytest.approx(one.record["results"]["eval_loss"], rel=1e-5)
        for tensor, weights in one.weights.items():
            torch.testing.assert_close(two.weights[tensor], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "size", "filled"), [(3, 4, 4), (4, 4, 4), (5, 4, 8), (1, 6, 6)])
def test_held_out_rows_are_filled_up_with_rows_without_a_loss(count: int, size: int, filled: int) -> None:
    given = Dataset.from_list([{"input_ids": [i, i, i], "labels": [-100, i, i]} for i in range(count)])
    rows = filled_up(given, size)
    assert rows[:count] == given[:]
    assert len(rows) == filled
    assert rows.features == given.features
    assert all(label == IGNORED for labels in rows["labels"][count:] for label in labels)


def test_writing_the_config_leaves_the_processes_alone(llama: Path, alpaca: Path, tmp_path: Path) -> None:
    """Arguments for another device, as the defaults are, would set the devices up anew and part the processes."""
    options = flags(model_name_or_path=llama, dataset_name=alpaca, output_dir=tmp_path, use_cpu=True)
    arguments = parse_arguments(options)
    with mock.patch("accelerate.state.AcceleratorState._reset_state") as set_up_anew:
        assert resolved_config(*arguments)["model_name_or_path"] == str(llama)
    set_up_anew.assert_not_called()


def test_accelerate_on_the_cpu_is_refused_for_several_processes(llama: Path, alpaca: Path, tmp_path: Path) -> None:
    """It would start one, and say nothing."""
    options = flags(model_name_or_path=llama, dataset_name=alpaca, output_dir=tmp_path / "out", use_cpu=True)
    accelerate = [BIN / "accelerate", "launch", "--cpu", "--num_processes", 2]
    code, error = launch(*accelerate, ROOT / "scripts" / "finetune.py", *options)
    assert code != 0
    assert "asked for 2 processes, but 1 runs" in error
    assert "torchrun --nproc_per_node 2" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python /venv/bin/accelerate launch --num_processes 4 finetune.py", 4),
        ("python /venv/bin/accelerate launch --num_processes=4 finetune.py", 4),
        ("python /venv/bin/accelerate launch --num-processes 4 finetune.py", 4),
        ("python /venv/bin/accelerate-launch --cpu --num_processes 3 finetune.py", 3),
        ("python -m accelerate.commands.launch --num_processes 3 finetune.py", 3),
        ("python /venv/bin/accelerate launch --config_file FILE finetune.py", 5),
        ("python /venv/bin/accelerate launch --config_file=FILE --num_processes 2 finetune.py", 2),
        ("python /venv/bin/accelerate launch finetune.py", None),
        ("python /venv/bin/torchrun --nproc_per_node 4 finetune.py", None),
        ("python finetune.py --num_processes 4", None),
        ("bash launch.sh", None),
        ("", None),
    ],
)
def test_the_launchers_command_line_is_read(command: str, processes: int | None, tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 5\nmixed_precision: 'no'\n"
        "use_cpu: true\nnum_machines: 1\nmachine_rank: 0\ndebug: false\n"
    )
    assert processes_asked_for(command.replace("FILE", str(file)).split()) == processes


def test_fewer_processes_than_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parent:
        def parent(self) -> Parent:
            return self

        def cmdline(self) -> list[str]:
            return ["python", "accelerate", "launch", "--num_processes", "2"]

    monkeypatch.setattr("psutil.Process", Parent)
    check_processes(2)
    with pytest.raises(UsageError, match="asked for 2 processes, but 1 runs"):
        check_processes(1)


@pytest.mark.parametrize(
    ("state", "optimizer", "message"),
    [
        ({"deepspeed_plugin": object()}, object(), r"drops the optimizer of optimizers=\(...\)"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, None, "set fsdp_version: 2"),
    ],
)
def test_a_layout_that_would_not_step_as_asked_is_refused(state: dict[str, Any], optimizer: Any, message: str) -> None:
    args: Any = SimpleNamespace(optim="diagonal_to")
    with pytest.raises(UsageError, match=message):
        check_layout(args, SimpleNamespace(**state), True, optimizer)
    check_layout(args, SimpleNamespace(deepspeed_plugin=object()), True, None)
    check_layout(args, SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)), True, None)


def test_deepspeed_that_accelerate_does_without_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args: Any = SimpleNamespace(optim="diagonal_to", device=torch.device("cpu"))
    with pytest.raises(UsageError, match="DeepSpeed was asked for, and accelerate does without it on cpu"):
        check_layout(args, SimpleNamespace(), False, None)
