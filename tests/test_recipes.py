"""Each recipe does what its comments say: the commands, the batch, the trained weights, the planned memory."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from to_finetune.model import select_trainable
from to_finetune.planning import Blueprint, Plan, plan
from to_finetune.training.arguments import ArgumentsElsewhere
from to_finetune.training.parser import parse_arguments
from to_finetune.training.plan import settings_of

from .helpers import LLAMA_7B, WORDS, Run, write_jsonl

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
LLAMAS = [recipe for recipe in RECIPES if recipe.stem.startswith("llama-7b")]
MEASURED = json.loads((ROOT / "scripts" / "benchmarks" / "recipes-nvidia-h200.json").read_text())["recipes"]
TOTAL = 6_738_415_616  # of Llama-7B's weights
EXAMPLES = 128  # in a step


@dataclass
class Command:
    """A launch in the head of a recipe."""

    words: list[str]  # of finetune.py
    accelerate: str | None  # its configuration
    memory: str  # of each GPU, as it is written below the command

    @property
    def processes(self) -> int:
        return yaml.safe_load((ROOT / self.accelerate).read_text())["num_processes"] if self.accelerate else 1

    @property
    def layout(self) -> str:
        return Path(self.accelerate).stem if self.accelerate else "ddp"


def head(recipe: Path) -> str:
    """The comment that a recipe opens with, without its marks."""
    lines = recipe.read_text(encoding="utf-8").split("\n")
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])


def commands(recipe: Path) -> list[Command]:
    found = []
    for part in re.split(r"(?m)^(?=accelerate launch|python )", head(recipe).replace("\\\n", " "))[1:]:
        line, _, text = part.partition("\n")
        before, script, after = line.partition("scripts/finetune.py ")
        assert script
        launch = shlex.split(before.rpartition("accelerate launch")[2])
        assert launch[::2] in ([], ["--config_file"])
        memory = re.search(r"planned (.*?)\.?$", text, re.MULTILINE)
        found.append(Command(shlex.split(after), launch[1] if launch else None, memory[1] if memory else ""))
    return found


@pytest.fixture(scope="module")
def plan_of(llama_7b: Blueprint) -> Callable[..., Plan]:
    """The plan of a command of Llama-7B's; one blueprint for all, so that layouts share their dry runs."""

    def made(command: Command, *more: str) -> Plan:
        words = [*command.words, *more, "--model_name_or_path", llama_7b.name]
        model_args, _, args = parse_arguments(words, ArgumentsElsewhere)
        settings = settings_of(model_args, args, command.layout, command.processes)
        return plan(replace(settings, work=replace(settings.work, model=llama_7b)))

    return made


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_command_names_its_file_and_every_key_is_obeyed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    asked.pop("report_to", None)  # "none" becomes an empty list
    made = commands(recipe)
    assert made
    for command in made:
        assert ROOT / command.words[command.words.index("--config") + 1] == recipe
        assert command.words[-1] == f"runs/{recipe.stem}" or recipe not in LLAMAS
        arguments = parse_arguments(command.words, ArgumentsElsewhere)
        parsed = {key: value for group in arguments for key, value in vars(group).items()}
        given = {word[2:] for word in command.words if word.startswith("--")}
        assert {key: parsed[key] for key in asked if key not in given} == {
            key: value for key, value in asked.items() if key not in given
        }


@pytest.mark.parametrize("recipe", LLAMAS, ids=lambda path: path.stem)
def test_one_gpu_and_eight_take_the_same_step(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ in the launcher and in the accumulation alone."""
    monkeypatch.chdir(ROOT)
    one, eight = commands(recipe)
    assert (one.processes, eight.processes) == (1, 8)
    assert [word for word in eight.words if word not in ("--gradient_accumulation_steps", "2")] == one.words
    for command in (one, eight):
        _, _, args = parse_arguments(command.words, ArgumentsElsewhere)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * command.processes == EXAMPLES


@pytest.mark.parametrize("recipe", [r for r in LLAMAS if "lora" not in r.stem], ids=lambda path: path.stem)
def test_the_patterns_find_what_is_said_in_the_real_model(recipe: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    subset = select_trainable(model, yaml.safe_load(recipe.read_text(encoding="utf-8"))["unfrozen_parameters"])
    assert subset.total_weights == TOTAL
    assert f"{subset.weights:,} of {TOTAL:,} weights" in head(recipe).replace("\n", " ")
    layers = {int(name.split(".")[2]) for name in subset.names}
    expected = {"last2": range(30, 32), "last2-4bit": range(30, 32), "last8": range(24, 32), "qv": range(32)}
    assert layers == set(expected[recipe.stem.removeprefix("llama-7b-")])


@pytest.mark.parametrize("recipe", LLAMAS, ids=lambda path: path.stem)
def test_the_planned_memory_is_what_planning_says(
    recipe: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one GPU and on each of eight, with and without checkpointing; arithmetic and checkpoints as well."""
    monkeypatch.chdir(ROOT)
    text = recipe.read_text(encoding="utf-8")
    one, eight = commands(recipe)
    made = plan_of(one)
    for command, planned, measured in ((one, made, MEASURED.get(recipe.stem)), (eight, plan_of(eight), None)):
        words = (
            f"{measured['measured_bytes'] / 1e9:.1f} GB on an H200, beside CUDA's own 0.7" if measured else "not yet"
        )
        assert command.memory == f"{planned.total / 1e9:.1f} GB; measured: {words}"
        assert f"{planned.trained_weights:,} " in head(recipe)
    without = plan_of(one, "--gradient_checkpointing", "false")
    saved = 1 - without.flops_per_token / made.flops_per_token
    said = f"off saves {100 * saved:.0f} % of the arithmetic and takes {without.total / 1e9:.1f} GB on 1 GPU"
    assert said in text
    assert f"and their state alone: {(made.trained + made.state) / 1e9:.1f} GB" in text
    if recipe.stem == "llama-7b-last2":
        assert made.total <= 22e9
        assert made.flops_per_token == pytest.approx(1.25 * 2 * (TOTAL - 131_072_000), rel=0.05)  # "a quarter more"
    if recipe.stem == "llama-7b-last8":
        ddp = replace(eight, accelerate="configs/accelerate/ddp.yaml")
        assert f"where {plan_of(ddp).total / 1e9:.1f} GB fit on each" in text


def test_the_quick_start_trains_on_a_cpu_as_it_says(finetune: Callable[..., Run], tmp_path: Path) -> None:
    """On the tests' own model, which has four layers too, and for fewer steps."""
    recipe = ROOT / "configs" / "recipes" / "quickstart.yaml"
    rows = [{"prompt": f"{a} {b}? ", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    helpers_own = ("unfrozen_parameters", "per_device_train_batch_size", "logging_steps", "save_strategy", "report_to")
    run = finetune(
        tmp_path / "run",
        config=recipe,
        dataset_name=data,
        val_set_size=20,
        max_steps=80,
        **dict.fromkeys(helpers_own),
    )
    assert run.code == 0
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"max_steps": 80}
    at_their_defaults = {"per_device_train_batch_size": 8, "logging_steps": 10}
    assert {key: config.get(key, at_their_defaults.get(key)) for key in settings} == settings
    assert {name.split(".")[2] for name in run.weights} == {"2", "3"}
    history = run.trainer.state.log_history
    assert [row["step"] for row in history if "eval_loss" in row] == [40, 80]
    assert [row["step"] for row in history if "loss" in row] == list(range(10, 81, 10))
