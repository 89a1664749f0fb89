"""`finetune.py` under every file of configs/accelerate ends where one process does, and is killed without loss."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from to_finetune.training.arguments import ArgumentsElsewhere
from to_finetune.training.parser import parse_arguments

from ..helpers import LAYER_WEIGHTS, Run, flags
from .on_cpu import ROOT, command, launch, settings

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
LAYOUTS = [path.stem for path in CONFIGS if path.stem != "multi_node"]
LAST_LAYER = {"unfrozen_parameters": [r"layers\.3\."]}
RUNS: dict[str, dict[str, Any]] = {
    "diagonal_to": {**LAST_LAYER, "optim": "diagonal_to"},
    "rank_one_to": {**LAST_LAYER, "optim": "rank_one_to"},
    "int8": {**LAST_LAYER, "optim": "diagonal_to", "optim_args": "state_dtype=int8"},
    "group": {**LAST_LAYER, "optim": "rank_one_to", "optim_args": "state_dtype=bfloat16,scope=group"},
    "lora": {"unfrozen_parameters": None, "use_peft": True, "lora_dropout": 0, "optim": "rank_one_to"},
}
STATE_BYTES = {"diagonal_to": 8, "rank_one_to": 12, "int8": 4, "group": 6}  # for a weight of the last layer
# A gradient that is rounded otherwise makes some numbers of 8 or 16 bits fall to the other side: a code more or less.
TOLERANCE = {"diagonal_to": 2e-5, "rank_one_to": 2e-5, "int8": 5e-4, "group": 5e-4, "lora": 2e-5}
STEPS, ROWS = 4, 4


def options(llama: Path, alpaca: Path, processes: int) -> dict[str, Any]:
    """Four rows a step on any number of processes."""
    return {
        "model_name_or_path": llama,
        "dataset_name": alpaca,
        "eval_dataset_name": alpaca,
        "use_cpu": True,
        "max_steps": STEPS,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": STEPS,  # before the last checkpoint, and before the proofs at the end
        "per_device_train_batch_size": ROWS // processes,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": "none",
    }


def runs(folder: Path, resumed: Path | None = None) -> str:
    """The flags of all runs, each with a folder of its own, and where it goes on from."""
    each = []
    for name, own in RUNS.items():
        going_on = {"resume_from_checkpoint": resumed / name / "checkpoint-2"} if resumed else {}
        each.append(flags(**own, output_dir=folder / name, **going_on))
    return json.dumps(each)


@pytest.fixture(scope="module")
def alone(
    finetune: Callable[..., Run], llama: Path, alpaca: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """One process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: finetune(folder / name, **own, **options(llama, alpaca, 1)) for name, own in RUNS.items()}


def assert_same_weights(found: Run, alone: Run, tolerance: float) -> None:
    assert found.weights.keys() == alone.weights.keys()
    for name, weights in alone.weights.items():
        torch.testing.assert_close(found.weights[name], weights, rtol=1e-4, atol=tolerance)


def assert_same_run(found: Run, alone: Run, tolerance: float = 2e-5) -> None:
    """Losses, held-out loss and weights, to the rounding of a batch's parts; and what was shown on the way."""
    assert found.losses == pytest.approx(alone.losses, rel=tolerance / 2)
    held_out = alone.record["results"]["eval_loss"]
    assert found.record["results"]["eval_loss"] == pytest.approx(held_out, rel=tolerance / 2)
    assert_same_weights(found, alone, tolerance)
    proofs = {key: value for key, value in found.record["proofs"].items() if key != "sharded_tensors"}
    assert proofs == alone.record["proofs"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ends_where_one_process_does(
    layout: str, alone: dict[str, Run], llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    """Two processes, and four (or one) that go on from the middle of their run."""
    config = ROOT / "configs" / "accelerate" / f"{layout}.yaml"
    two, others = tmp_path / "two", tmp_path / "others"
    done = launch(config, 2, *flags(**options(llama, alpaca, 2)), RUNS=runs(two))
    assert done.returncode == 0, done.stderr
    processes = 4 if layout in ("fsdp2", "zero3") else 1
    done = launch(config, processes, *flags(**options(llama, alpaca, processes)), RUNS=runs(others, two))
    assert done.returncode == 0, done.stderr
    for name, tolerance in TOLERANCE.items():
        run = Run(0, two / name, None)
        assert_same_run(run, alone[name], tolerance)
        assert (run.record["proofs"].get("sharded_tensors", 0) > 0) == (layout != "ddp")
        if name in STATE_BYTES:
            assert_only_the_trained_part_was_written(run.folder / "checkpoint-4", STATE_BYTES[name])
        assert_same_weights(Run(0, others / name, None), alone[name], tolerance)


@pytest.mark.parametrize("layout", ["fsdp2", "zero2", "zero3"])
def test_an_optimizer_of_hugging_faces_trains_a_part_as_well(
    layout: str, finetune: Callable[..., Run], llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    """As one process does, also after a resume; the base is not in what it leaves. FSDP2 recomputes activations."""
    adamw = {"optim": "adamw_torch", "learning_rate": 1e-3}
    parts = {
        "last": LAST_LAYER,
        **({"all": {"unfrozen_parameters": None}} if layout == "zero3" else {}),
        "lora": {"unfrozen_parameters": None, "use_peft": True, "lora_dropout": 0},
    }
    config = ROOT / "configs" / "accelerate" / f"{layout}.yaml"
    if layout == "fsdp2":
        values = yaml.safe_load(config.read_text())
        values["fsdp_config"]["fsdp_activation_checkpointing"] = True
        config = tmp_path / "fsdp2.yaml"
        config.write_text(yaml.safe_dump(values))
    for folder in ("whole", "resumed"):
        each = []
        for part, own in parts.items():
            going_on = {} if folder == "whole" else {"resume_from_checkpoint": tmp_path / f"whole/{part}/checkpoint-2"}
            each.append(flags(**own, **adamw, **going_on, output_dir=tmp_path / folder / part))
        if folder == "whole" and layout != "fsdp2":  # last: bfloat16 stays on in the environment
            each.append(flags(**LAST_LAYER, **adamw, bf16=True, output_dir=tmp_path / "sixteen"))
        done = launch(config, 2, *flags(**options(llama, alpaca, 2)), RUNS=json.dumps(each))
        assert done.returncode == 0, done.stderr
    if layout != "fsdp2":
        assert {p.dtype for p in Run(0, tmp_path / "sixteen", None).weights.values()} == {torch.float32}
    for part, own in parts.items():
        alone = finetune(tmp_path / "alone" / part, **own, **adamw, **options(llama, alpaca, 1))
        assert_same_run(Run(0, tmp_path / "whole" / part, None), alone)
        assert_same_weights(Run(0, tmp_path / "resumed" / part, None), alone, 2e-5)


def assert_only_the_trained_part_was_written(folder: Path, state_bytes: int) -> None:
    """4 bytes a trained weight and the state's, and 3 kB a tensor and process for names and places."""
    trained, tensors = LAYER_WEIGHTS, 9
    weights = (folder / "trained.safetensors").stat().st_size
    assert 4 * trained <= weights <= 4 * trained + 300 * tensors
    state = sum(file.stat().st_size for file in (folder / "to_state").iterdir())
    assert state_bytes * trained <= state <= state_bytes * trained + 2 * 3_000 * 4 * tensors
    known = {"trained.safetensors", "to_state", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    others = [file for file in folder.iterdir() if file.name not in known]
    assert sum(file.stat().st_size for file in others) < 100_000, others  # the tokenizer, and random states


def test_a_model_trained_whole_goes_from_one_process_to_zero_and_back(
    finetune: Callable[..., Run], llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    """Its weights are in the checkpoint's state too, where both read them, also the best ones, here the worst."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    whole = {**options(llama, alpaca, 1), "unfrozen_parameters": None, **every_step, **best}
    alone = finetune(tmp_path / "alone", **whole)
    words = flags(**{**whole, "per_device_train_batch_size": ROWS // 2}, output_dir=tmp_path / "zero")
    going_on = flags(resume_from_checkpoint=alone.folder / "checkpoint-2")
    done = launch(ROOT / "configs" / "accelerate" / "zero2.yaml", 2, *words, *going_on)
    assert done.returncode == 0, done.stderr
    back = finetune(tmp_path / "back", **whole, resume_from_checkpoint=tmp_path / "zero" / "checkpoint-3")
    last, first = (alone.folder / file for file in ("checkpoint-4/model.safetensors", "model.safetensors"))
    assert any((load_file(last)[name] != weights).any() for name, weights in load_file(first).items())
    for wanted in (last, first):
        for folder in (tmp_path / "zero", back.folder):
            found = load_file(folder / wanted.relative_to(alone.folder))
            assert found.keys() == load_file(wanted).keys()
            for name, weights in load_file(wanted).items():
                torch.testing.assert_close(found[name], weights, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["fsdp2", "zero3"])
def test_ones_own_trainer_saves_the_frozen_part_too(
    layout: str, alone: dict[str, Run], llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "accelerate" / f"{layout}.yaml"
    words = flags(**options(llama, alpaca, 2), **LAST_LAYER)
    each = [flags(optim=optim, learning_rate=1e-3, output_dir=tmp_path / optim) for optim in ("diagonal_to", "sgd")]
    done = launch(config, 2, *words, RUNS=json.dumps(each), SAVE_WHOLE="yes")
    assert done.returncode == 0, done.stderr
    base = load_file(llama / "model.safetensors")
    for optim in ("diagonal_to", "sgd"):
        for folder in (tmp_path / optim, tmp_path / optim / "checkpoint-4"):
            found = load_file(folder / "model.safetensors")
            assert found.keys() == base.keys()
            for name, weights in base.items():
                assert torch.equal(found[name], weights) == ("layers.3." not in name)
    assert not (tmp_path / "sgd" / "trained.safetensors").exists()


def test_two_machines(alone: dict[str, Run], llama: Path, alpaca: Path, tmp_path: Path) -> None:
    """Two launchers, as the file's comment says, with a process each."""
    config = ROOT / "configs" / "accelerate" / "multi_node.yaml"
    words = flags(**options(llama, alpaca, 2), **LAST_LAYER, output_dir=tmp_path / "run")
    nodes = [
        subprocess.Popen(
            command(1, *words, nnodes=2, node_rank=rank, master_addr="127.0.0.1", master_port=29_517),
            env=settings(config),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, error = node.communicate()
        assert node.returncode == 0, error
    assert_same_run(Run(0, tmp_path / "run", None), alone["diagonal_to"])


@pytest.mark.parametrize(("layout", "where"), [("ddp", "step"), ("fsdp2", "save"), ("zero2", "save")])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(
    layout: str, where: str, alone: dict[str, Run], llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    """torchrun starts all again, and they end where an undisturbed run does."""
    config = ROOT / "configs" / "accelerate" / f"{layout}.yaml"
    words = flags(**options(llama, alpaca, 2), **LAST_LAYER, output_dir=tmp_path / "run", ddp_timeout=40)
    done = subprocess.run(
        command(2, *words, max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0"),
        env=settings(config, KILL=f"1 {where}", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr
    run = Run(0, tmp_path / "run", None)
    assert run.losses == pytest.approx(alone["diagonal_to"].losses, rel=1e-5)
    assert_same_weights(run, alone["diagonal_to"], 2e-5)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_file_opens_with_the_command_that_takes_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    lines = re.findall(r"^#   (.*)$", text, flags=re.MULTILINE)
    words = shlex.split(" ".join(line.rstrip("\\") for line in lines))
    words = words[words.index("accelerate") :]
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert ROOT / words[3] == path
    for word in words[4:]:
        if word.endswith((".py", ".yaml")):
            assert (ROOT / word).is_file()
    script = words.index("scripts/finetune.py")
    monkeypatch.chdir(ROOT)
    _, data_args, args = parse_arguments(words[script + 1 :], ArgumentsElsewhere)
    assert (data_args.dataset_name, args.optim) == (["tatsu-lab/alpaca"], "diagonal_to")
    inner = yaml.safe_load(text).get("deepspeed_config", {}).get("deepspeed_config_file")
    assert inner is None or (ROOT / inner).is_file()
    assert os.environ.get("ACCELERATE_USE_FSDP") is None


def changed(layout: str, folder: Path, **settings_of_deepspeed: Any) -> Path:
    """A copy of a layout's two files, with other settings in DeepSpeed's."""
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{layout}.yaml").read_text())
    json_file = ROOT / config["deepspeed_config"]["deepspeed_config_file"]
    values = {**json.loads(json_file.read_text()), **settings_of_deepspeed}
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "deepspeed.json").write_text(json.dumps(values))
    config["deepspeed_config"]["deepspeed_config_file"] = str(folder / "deepspeed.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return folder / "accelerate.yaml"


@pytest.mark.parametrize(
    ("layout", "settings_of_deepspeed", "code", "message"),
    [
        (
            "zero2",
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}},
            1,
            "is AdamW, not DiagonalTO, which was asked for. Under DeepSpeed, remove the 'optimizer' block",
        ),
        ("zero2", {"gradient_clipping": None}, 2, "DeepSpeed clips gradients to norm 1.0, and max_grad_norm is 0.0"),
    ],
    ids=["own optimizer", "own clipping"],
)
def test_deepspeeds_own_ways_are_refused(
    layout: str,
    settings_of_deepspeed: dict[str, Any],
    code: int,
    message: str,
    llama: Path,
    alpaca: Path,
    tmp_path: Path,
) -> None:
    """Each would train, with something else than was asked for."""
    config = changed(layout, tmp_path, **settings_of_deepspeed)
    done = launch(config, 1, *flags(**options(llama, alpaca, 1), **LAST_LAYER, output_dir=tmp_path / "run"))
    assert done.returncode != 0
    assert message in done.stderr.replace("\n", " ")
    assert f"exitcode: {code} " in done.stderr.replace(" ", "").replace("exitcode:", "exitcode: ").replace(
        "(pid", " (pid"
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_fsdp_that_accelerate_does_without_is_refused(
    finetune: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert finetune(tmp_path / "run").code == 2
    assert "FSDP was asked for, and accelerate does without it on cpu" in capsys.readouterr().err
