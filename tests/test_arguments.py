"""The flags of a run: a file's are checked as if they were typed, and config.yaml is a file that repeats the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from to_finetune.errors import UsageError
from to_finetune.training.flags import without_effect
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import settle_length
from to_finetune.training.recipe import resolved_config

from .helpers import Run, flags

NEEDED = {"model_name_or_path": "model", "dataset_name": ["rows.jsonl"], "output_dir": "run", "use_cpu": True}
WRITTEN = {
    "accelerator config": ["--accelerator_config", '{"split_batches": true}'],
    "FSDP": ["--fsdp"],
    "FSDP in words": ["--fsdp", "full_shard", "--fsdp_config", '{"version": 2}'],
    "enums": ["--lr_scheduler_type", "cosine", "--eval_strategy", "steps", "--hub_strategy", "all_checkpoints"],
    "list of enums": ["--debug", "underflow_overflow"],
    "mapping": ["--lr_scheduler_kwargs", '{"min_lr": 1e-5}', "--model_init_kwargs", '{"a": null}'],
    "options": ["--optim_args", "alpha=7e-1,state_dtype=bfloat16"],
    "options of another": ["--optim", "sgd", "--optim_args", "momentum=0.9"],
    "numbers": ["--dataset_weights", "7e-1", "3e-1", "--eval_steps", "0.5", "--pad_to_multiple_of", "8"],
    "none": ["--report_to", "none", "--max_length", "none"],
    "words like numbers": ["--run_name", "1e3", "--unfrozen_parameters", "1.5", "null", "--dataset_config=-x"],
}


def parsed(folder: Path, config: dict[str, Any]) -> Any:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    return parse_arguments(["--config", str(recipe)])


@pytest.mark.parametrize("case", WRITTEN)
def test_a_configuration_that_is_written_is_read_again(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which Hugging Face sets
    flags = ["--model_name_or_path=model", "--dataset_name", "a", "b", "--output_dir=run", "--use_cpu=true"]
    first = resolved_config(*parse_arguments(flags + WRITTEN[case]))
    again = parsed(tmp_path, first)
    assert resolved_config(*again) == first
    assert {word[2:].split("=")[0] for word in WRITTEN[case] if word.startswith("--")} <= set(first)


def test_a_files_lists_are_of_the_flags_types(tmp_path: Path) -> None:
    """YAML takes 7e-1 for a word, and names may look like numbers."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndataset_name: [a, 2024]\ndataset_weights: [7e-1, 3e-1]\nunfrozen_parameters: [1.5]\n"
    )
    model, data, _ = parse_arguments(["--config", str(recipe), "--use_cpu", "true"])
    assert data.dataset_name == ["a", "2024"]
    assert data.dataset_weights == [0.7, 0.3]
    assert model.unfrozen_parameters == ["1.5"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dataset_weights": [0.5, "much"]}, "--dataset_weights.*: invalid float value: 'much'"),
        ({"debug": ["all"]}, "--debug: invalid DebugOption value: 'all'"),
        ({"dataset_name": []}, "--config: dataset_name is an empty list; leave it out"),
    ],
    ids=["no number", "no choice", "empty"],
)
def test_a_list_that_cannot_be_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(tmp_path, {**NEEDED, **config})


def test_a_switch_needs_no_word() -> None:
    """Also where its default is None."""
    switches = ["gradient_checkpointing", "assistant_only_loss", "bf16", "packing"]
    model, _, args = parse_arguments(flags(**NEEDED) + [f"--{name}" for name in (*switches, "use_peft")])
    assert model.use_peft is True
    assert all(getattr(args, name) is True for name in switches)


def test_a_warm_up_may_be_given_as_a_ratio(tmp_path: Path) -> None:
    """As recipes of older transformers do; a flag wins over the file."""
    assert parsed(tmp_path, {**NEEDED, "warmup_ratio": 0.03})[2].warmup_steps == 0.03
    _, _, args = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), "--warmup_ratio", "0.1"])
    assert args.warmup_steps == 0.1


@pytest.mark.parametrize(
    ("recipe", "flags", "left"),
    [
        ({"unfrozen_parameters": ["a"]}, "--unfrozen-modules=q_proj", (None, None, ["q_proj"])),
        ({"unfrozen_parameters": ["a"]}, "--unfrozen_last_layers=1", (None, 1, None)),
        ({"unfrozen_last_layers": 2}, "--unfrozen_modules=q_proj", (None, 2, ["q_proj"])),  # of these layers
        ({"unfrozen_modules": ["q_proj"]}, "--unfrozen_last_layers=1", (None, 1, ["q_proj"])),
        ({"unfrozen_last_layers": 2, "unfrozen_modules": ["q"]}, "--unfrozen_parameters=b", (["b"], None, None)),
    ],
)
def test_a_flag_of_what_trains_replaces_the_recipes(
    tmp_path: Path, recipe: dict[str, Any], flags: str, left: tuple[Any, ...]
) -> None:
    parsed(tmp_path, {**NEEDED, **recipe})
    model, *_ = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), flags])
    assert (model.unfrozen_parameters, model.unfrozen_last_layers, model.unfrozen_modules) == left


@pytest.mark.parametrize(
    ("config", "given", "length"),
    [
        (LlamaConfig, None, 64),
        (LlamaConfig, 32, 32),
        (LlamaConfig, 65, 65),  # rotary positions go on
        (GPT2Config, None, 64),
        (GPT2Config, 64, 64),
        (GPT2Config, 65, "max_length=65 is not valid: at most 64"),
    ],
)
def test_rows_are_cut_to_the_models_context(config: Any, given: int | None, length: Any) -> None:
    """By default; a length beyond it is refused only where positions are learned."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=64)
        )
    _, _, args = parse_arguments([*flags(**NEEDED), *([] if given is None else [f"--max_length={given}"])])
    if isinstance(length, str):
        with pytest.raises(UsageError, match=length):
            settle_length(model, args)
    else:
        settle_length(model, args)
        assert args.max_length == length


@pytest.mark.parametrize(("name", "ours"), [("lr", "learning_rate"), ("model", "model_name_or_path")])
def test_other_tools_names_are_known(name: str, ours: str) -> None:
    with pytest.raises(UsageError, match=f"Unknown flag '{name}'. Did you mean '{ours}'"):
        parse_arguments([*flags(**NEEDED), f"--{name}=1"])


IDLE = {
    "eval_steps=2": {"eval_strategy": "steps"},
    "eval_delay=3": {"eval_strategy": "epoch"},
    "save_steps=2": {"save_strategy": "steps"},
    "save_total_limit=1": {"save_strategy": "epoch"},
    "save_only_model=True": {"save_strategy": "best", "metric_for_best_model": "loss"},
    "logging_steps=4": {"logging_strategy": "steps"},
    "warmup_steps=0.1": {"lr_scheduler_type": "linear"},
    "metric_for_best_model=loss": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    "hub_model_id=me/1.0": {"push_to_hub": True},
    "hub_private_repo=True": {"push_to_hub": True},
    "packing_strategy=bfd_split": {"packing": True},
    "length_column_name=words": {"train_sampling_strategy": "group_by_length"},
    "label_smoothing_factor=0.1": {"loss_type": "nll"},
}
OFF = {"save_strategy": "no", "logging_strategy": "epoch", "lr_scheduler_type": "constant", "loss_type": "dft"}


@pytest.mark.parametrize("given", IDLE)
def test_a_flag_that_does_nothing_is_named_until_it_does(given: str) -> None:
    def said(**others: Any) -> list[str]:
        return without_effect(parse_arguments([*flags(**NEEDED, **{**OFF, **others}), f"--{given}"])[2])

    (sentence,) = said()
    assert sentence.startswith(f"{given} does nothing: it needs ")
    assert said(**IDLE[given]) == []


def test_a_run_says_what_does_nothing(
    finetune: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tmp_path / "run", dataset_name="nowhere.jsonl", eval_steps=2)
    assert "eval_steps=2 does nothing: it needs --eval_strategy steps." in capsys.readouterr().out


@pytest.mark.parametrize(("word", "on"), [("true", True), ("True", True), ("false", False)])
def test_fsdp_is_a_switch(word: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    _, _, args = parse_arguments(["--model_name_or_path=m", "--dataset_name=d", "--use_cpu=true", "--fsdp", word])
    assert args.fsdp is on
