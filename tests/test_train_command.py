"""`to-finetune train`: what it launches, after it has looked at the flags, and whose exit code it ends with."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from to_finetune.cli import main
from to_finetune.training.launch import launch

from .helpers import flags

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"
ZERO2 = CONFIGS.parent / "deepspeed" / "zero2.json"
RUN = ["-m", "to_finetune.finetune"]
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


class Launches:
    """In the place of the launcher: what it was given, with which environment, and the exit code that it says."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.code = 0

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command)
        self.environments.append(dict(os.environ))
        return self.code


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launches:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launches = Launches()
    monkeypatch.setattr("to_finetune.training.launch.launch", launches)
    # A run of one process is the command's own process.
    monkeypatch.setattr("sys.argv", ["to-finetune"])
    monkeypatch.setattr("to_finetune.finetune.main", lambda: launches([sys.executable, *RUN, *sys.argv[1:]]))
    return launches


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr("torch.accelerator.device_count", lambda: count)


@pytest.fixture
def words(llama: Path, alpaca: Path) -> list[str]:
    return flags(model_name_or_path=llama, dataset_name=alpaca, output_dir="runs/new")


@pytest.mark.parametrize(
    ("gpus", "given", "launcher"),
    [
        (0, [], [sys.executable]),
        (0, ["--num_processes", "1"], [sys.executable]),
        (0, ["--num_processes", "2"], ["torchrun", "--standalone", "--nproc_per_node", "2"]),
        (1, [], [sys.executable]),
        (4, [], ["accelerate", "launch", "--multi_gpu", "--num_processes", "4", *PLAIN]),
        (4, ["--num_processes", "2"], ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", *PLAIN]),
        (4, ["--num_processes", "1"], ["env", "CUDA_VISIBLE_DEVICES=0", sys.executable]),
        (
            4,
            ["--accelerate_config", str(CONFIGS / "zero2.yaml")],
            ["accelerate", "launch", "--config_file", str(CONFIGS / "zero2.yaml"), "--num_processes", "4"],
        ),
        (
            4,
            ["--accelerate_config", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "3"],
            ["accelerate", "launch", "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "3"],
        ),
        (  # the file says how many, of all machines
            4,
            ["--accelerate_config", str(CONFIGS / "multi_node.yaml")],
            ["accelerate", "launch", "--config_file", str(CONFIGS / "multi_node.yaml")],
        ),
        (
            4,
            ["--accelerate_config", str(CONFIGS / "multi_node.yaml"), "--num_processes", "16"],
            ["accelerate", "launch", "--config_file", str(CONFIGS / "multi_node.yaml"), "--num_processes", "16"],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) and len(value) > 4 else str(value),
)
def test_what_is_launched(
    gpus: int,
    given: list[str],
    launcher: list[str],
    launches: Launches,
    with_gpus: Callable[[int], None],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And shown before; the run gets its own flags, and those alone."""
    with_gpus(gpus)
    assert main(["train", *given, *words]) == 0
    assert launches.commands == [[*launcher, *RUN, *words]]
    assert capsys.readouterr().out == f"$ {shlex.join(launches.commands[0])}\n"


@pytest.mark.parametrize(
    ("gpus", "given"), [(0, ["--deepspeed", str(ZERO2)]), (1, ["--deepspeed", str(ZERO2)]), (4, ["--fsdp", "true"])]
)
def test_what_shards_is_launched_in_a_process_group(
    gpus: int, given: list[str], launches: Launches, with_gpus: Callable[[int], None], words: list[str]
) -> None:
    with_gpus(gpus)
    assert main(["train", *words, *given]) == 0
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(max(gpus, 1))]
    assert launches.commands == [[*launcher, *RUN, *words, *given]]


def test_a_token_is_not_shown(
    launches: Launches, with_gpus: Callable[[int], None], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with_gpus(0)
    assert main(["train", *words, "--hub_token", "hf_secret"]) == 0
    assert launches.commands[0][-2:] == ["--hub_token", "hf_secret"]
    shown = capsys.readouterr().out
    assert shown.endswith("--hub_token '***'\n")
    assert "hf_secret" not in shown


def test_on_the_cpu_the_gpus_are_not_counted(
    launches: Launches, with_gpus: Callable[[int], None], words: list[str]
) -> None:
    with_gpus(4)
    assert main(["train", *words, "--use_cpu", "true"]) == 0
    assert main(["train", *words, "--use_cpu", "true", "--num_processes", "2"]) == 0
    assert [command[0] for command in launches.commands] == [sys.executable, "torchrun"]


def test_one_process_takes_the_first_visible_gpu(
    launches: Launches, with_gpus: Callable[[int], None], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert main(["train", *words, "--num_processes", "1"]) == 0
    assert launches.commands[0][:3] == ["env", "CUDA_VISIBLE_DEVICES=3", sys.executable]


def test_looking_at_the_flags_leaves_the_environment_as_it_was(launches: Launches, words: list[str]) -> None:
    """Hugging Face writes some of them there, where the processes would find them."""
    before = dict(os.environ)
    noting = ["--bf16", "true", "--torch_compile", "true", "--fsdp", "full_shard"]
    assert main(["train", *words, *noting]) == 0
    assert launches.environments == [before]


def test_a_recipe_is_read(launches: Launches, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("use_cpu: true\noptim: rank_one_to\n")
    assert main(["train", "--config", "recipe.yaml", *words]) == 0
    assert launches.commands == [[sys.executable, *RUN, "--config", "recipe.yaml", *words]]
    Path("recipe.yaml").write_text("optim: rank_on_to\n")
    assert main(["train", "--config", "recipe.yaml", *words]) == 2
    assert "optim='rank_on_to' is not known. Did you mean 'rank_one_to'" in capsys.readouterr().err
    assert len(launches.commands) == 1


REFUSED: dict[str, tuple[int, list[str], str]] = {
    "unknown flag": (0, ["--learning_rte", "1"], "Unknown flag 'learning_rte'. Did you mean 'learning_rate'"),
    "unknown flag of its own": (0, ["--num_proceses", "2"], "'num_proceses'. Did you mean 'num_processes'"),
    "bad value": (0, ["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "no recipe": (0, ["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory."),
    "two recipes": (0, ["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
    "stray word": (0, ["--seed", "1", "stray"], "Cannot make sense of 'stray'"),
    "unknown optimizer": (0, ["--optim", "diagonel_to"], "optim='diagonel_to' is not known."),
    "option out of range": (0, ["--optim_args", "beta=2"], "beta=2"),
    "no batch": (0, ["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 is not valid: at least 1."),
    "no length": (0, ["--max_length", "0"], "max_length=0 is not valid: at least 1."),
    "nothing frozen in 4 bits": (0, ["--load_in_4bit", "true"], "load_in_4bit holds what is frozen"),
    "adapters and weights": (
        0,
        ["--use_peft", "true", "--unfrozen_last_layers", "1"],
        "leave unfrozen_last_layers",
    ),
    "no process": (0, ["--num_processes", "0"], "num_processes=0 is not valid: at least 1."),
    "fewer than none": (2, ["--num_processes", "-1"], "num_processes=-1 is not valid: at least 1."),
    "more than the GPUs": (
        2,
        ["--num_processes", "3"],
        "--num_processes 3 is not valid: at most 2, one for each GPU.",
    ),
    "a layout on the CPU": (
        0,
        ["--accelerate_config", str(CONFIGS / "zero2.yaml")],
        "zero2.yaml spreads a run over GPUs, and this one is on the CPU.",
    ),
    "no layout": (2, ["--accelerate_config", "nowhere.yaml"], "--accelerate_config nowhere.yaml: no such file."),
    "another file": (2, ["--accelerate_config", "{data}"], "is no configuration of accelerate's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_sentence_before_anything_starts(
    case: str,
    launches: Launches,
    with_gpus: Callable[[int], None],
    words: list[str],
    alpaca: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus, given, sentence = REFUSED[case]
    with_gpus(gpus)
    assert main(["train", *words, *(word.format(data=alpaca) for word in given)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert sentence in shown.err
    assert "Traceback" not in shown.err
    assert launches.commands == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name"])
def test_what_a_run_cannot_do_without(
    launches: Launches, llama: Path, alpaca: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    given = {"model_name_or_path": llama, "dataset_name": alpaca, missing: None}
    assert main(["train", *flags(**given)]) == 2
    assert f"the following arguments are required: --{missing}" in capsys.readouterr().err
    assert launches.commands == []


def test_a_number_of_processes_that_is_none(
    launches: Launches, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words, "--num_processes", "all"])
    assert stopped.value.code == 2
    assert "argument --num_processes: invalid int value: 'all'" in capsys.readouterr().err
    assert launches.commands == []


# The exit code


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_it_ends_as_the_run_does(launches: Launches, words: list[str], code: int) -> None:
    launches.code = code
    assert main(["train", *words]) == code


def test_a_single_process_in_another_environment_takes_its_place() -> None:
    with mock.patch("os.execvp") as become:
        launch(["env", "A=1", sys.executable, "-c", "pass"])
    become.assert_called_once_with("env", ["env", "A=1", sys.executable, "-c", "pass"])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", 0),
        ("sys.exit(3 * int(os.environ['RANK']))", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
    ],
    ids=["done", "one fails", "killed"],
)
def test_of_several_processes_it_is_the_code_of_the_one_that_failed(tmp_path: Path, body: str, code: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, signal, sys\n{body}\n")
    assert launch(["torchrun", "--standalone", "--nproc_per_node", "2", str(script)]) == code


def test_a_signal_goes_on_to_the_processes_and_not_to_their_launcher(tmp_path: Path) -> None:
    """Which would kill them after half a minute; they end by themselves, and it waits for that."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "here, rank = pathlib.Path(__file__).parent, os.environ['RANK']\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((here / f'saved-{rank}').touch(), sys.exit(0)))\n"
        "(here / f'ready-{rank}').touch()\n"
        "while len(list(here.glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "if rank == '0': os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    assert launch(["torchrun", "--standalone", "--nproc_per_node", "2", str(script)]) == 0
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_accelerate_is_given_the_words_after_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("to_finetune.training.launch.launch_command", seen.append)
    words = ["--multi_gpu", "--num_processes", "2", *PLAIN, *RUN, "--seed", "3"]
    assert launch(["accelerate", "launch", *words]) == 0
    (parsed,) = seen
    assert (parsed.multi_gpu, parsed.num_processes, parsed.module) == (True, 2, True)
    assert (parsed.training_script, parsed.training_script_args) == ("to_finetune.finetune", ["--seed", "3"])
