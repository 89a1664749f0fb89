"""`to-finetune plan`: its numbers, advice, exit codes, and what it refuses; and a run's plan beside its peak."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from to_finetune.cli import main
from to_finetune.optim import DiagonalTO, FullTO, RankOneTO
from to_finetune.planning import GPUS, UTILISATION, CannotSay, Lora, load_blueprint, plan, plan_line
from to_finetune.training import memory
from to_finetune.training.plan import _live_layout, parse_for_plan, settings_of, steps
from to_finetune.units import format_size, parse_size

from .helpers import Run, flags

LAYER = 787_968  # weights, in nine tensors
OUTSIDE = 1_024_256
RECIPE = """
unfrozen_parameters:
  - layers\\.[23]\\.
optim: diagonal_to
bf16: true
max_length: 128
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers by its configuration alone."""
    folder = tmp_path_factory.mktemp("configs") / "small"
    LlamaConfig(
        hidden_size=256, intermediate_size=684, num_hidden_layers=4, num_attention_heads=8, vocab_size=2000
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _remember_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same step is run once."""
    monkeypatch.setattr("to_finetune.training.plan.load_blueprint", remembered)


remembered = lru_cache(load_blueprint)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def ask(model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Call the verb with --json; its exit code, and what it prints."""

    def call(*words: Any) -> tuple[int, Any]:
        code = main(["plan", "--model_name_or_path", str(model), "--json", *map(str, words)])
        shown = capsys.readouterr()
        return code, json.loads(shown.out) if shown.out else shown.err

    return call


def settings(model: Path, *words: str, **options: Any) -> Any:
    return settings_of(*parse_for_plan([*flags(model_name_or_path=model), *words, *flags(**options)]))


# What is planned


def test_a_recipe_needs_no_data_and_no_weights(ask: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    code, said = ask("--config", recipe)
    assert code == 0
    assert said["trained_weights"] == 2 * LAYER
    assert said["total_weights"] == 4 * LAYER + OUTSIDE
    parts = said["bytes"]
    assert parts["frozen"] == 2 * (2 * LAYER + OUTSIDE)
    assert parts["trained"] == parts["gradients"] == parts["saved"] == 4 * 2 * LAYER
    assert parts["state"] == 8 * 2 * LAYER + 4 * 18
    assert parts["total"] == sum(parts[name] for name in parts if name not in ("total", "host", "saved"))
    assert set(said) == {"model", "layout", "processes", "trained_weights", "total_weights", "bytes"}


def test_flags_win_over_the_recipe(ask: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    _, said = ask("--config", recipe, "--optim", "sgd", "--unfrozen_parameters", "layers.3.")
    assert (said["trained_weights"], said["bytes"]["state"]) == (LAYER, 0)


def test_a_layout_and_its_processes(ask: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    _, one = ask("--config", recipe)
    _, eight = ask("--config", recipe, "--layout", "fsdp2", "--num_processes", 8)
    assert (eight["layout"], eight["processes"]) == ("fsdp2", 8)
    assert eight["bytes"]["state"] == pytest.approx(one["bytes"]["state"] / 8, rel=0.01)


@pytest.mark.parametrize(
    ("options", "precision", "device"),
    [
        ({}, "bfloat16", "cuda"),  # whatever there is here
        ({"bf16": False}, None, "cuda"),
        ({"fp16": True}, "float16", "cuda"),
        ({"use_cpu": True}, None, "cpu"),
        ({"use_cpu": True, "bf16": True}, "bfloat16", "cpu"),
        ({"bf16": True, "tf32": True}, "bfloat16", "cuda"),
    ],
)
def test_the_run_is_elsewhere(model: Path, options: dict[str, Any], precision: str | None, device: str) -> None:
    """No GPU is looked at, and no process state is made."""
    fail = mock.Mock(side_effect=AssertionError("looks at the GPU"))
    with (
        mock.patch("torch.cuda.is_bf16_supported", fail),
        mock.patch("torch.cuda.get_device_properties", fail),
        mock.patch("torch.cuda._lazy_init", fail),
        mock.patch("transformers.training_args.PartialState", fail),
    ):
        work = settings(model, **options).work
    assert (work.mixed_precision, work.device) == (precision, device)


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        ({}, {"unfrozen_parameters": None, "rows": 8, "length": 1024, "joined": False, "checkpointing": False}),
        (
            {"gradient_checkpointing": True, "attn_implementation": "eager"},
            {"checkpointing": True, "attention": "eager"},
        ),
        ({"per_device_train_batch_size": 2, "max_length": 64}, {"rows": 2, "length": 64}),
        ({"packing": True}, {"joined": True}),
        ({"packing": True, "packing_strategy": "wrapped"}, {"joined": False}),
        ({"padding_free": True}, {"joined": True}),
        ({"unfrozen_last_layers": 2}, {"unfrozen_parameters": (r"^model\.layers\.(2|3)\.",)}),
        ({"unfrozen_modules": ["lm_head"]}, {"unfrozen_parameters": (r"\blm_head(\.weight|\.bias)?$",)}),
        (
            {"load_in_4bit": True, "unfrozen_last_layers": 1, "dtype": "float32"},
            {"quantization": "4bit", "dtype": "float32"},
        ),
        (
            {"load_in_8bit": True, "use_peft": True, "lora_r": 4, "lora_dropout": 0, "lora_target_modules": ["q_proj"]},
            {"quantization": "8bit", "lora": Lora(4, ("q_proj",), 0.0), "unfrozen_parameters": None},
        ),
    ],
    ids=str,
)
def test_each_flag_is_planned(model: Path, options: dict[str, Any], planned: dict[str, Any]) -> None:
    work = settings(model, **options).work
    assert {name: getattr(work, name) for name in planned} == planned


@pytest.mark.parametrize(
    ("optim", "state"),
    [
        ("diagonal_to", 8 * LAYER + 4 * 9),
        ("rank_one_to", 12 * LAYER + 4 * 9),
        ("adamw_torch", 8 * LAYER + 4 * 9),
        ("adamw_torch_fused", 8 * LAYER + 4 * 9),
        ("sgd", 0),
        ("adagrad", 4 * LAYER + 4 * 9),
        ("rmsprop", 4 * LAYER + 4 * 9),
        # a row and a column of each matrix, the norms, and an RMS for each tensor
        ("adafactor", 4 * (4 * (256 + 256) + 3 * (684 + 256) + 2 * 256 + 9)),
    ],
)
def test_the_state_of_every_optimizer(model: Path, optim: str, state: int) -> None:
    assert plan(settings(model, optim=optim, unfrozen_last_layers=1, max_length=8)).state == state


@pytest.mark.parametrize(("optim", "per_weight"), [("adamw_8bit", 2), ("lion_8bit", 1), ("lion_32bit", 4)])
def test_the_state_of_bitsandbytes(model: Path, optim: str, per_weight: int) -> None:
    pytest.importorskip("bitsandbytes")
    state = plan(settings(model, optim=optim, unfrozen_last_layers=1, max_length=8)).state
    assert state == pytest.approx(per_weight * LAYER, rel=0.03)  # and scales for blocks


def test_the_options_of_the_optimizer(model: Path) -> None:
    made = settings(model, optim="full_to", optim_args="alpha=0.2,scope=group,state_dtype=bfloat16", max_steps=7)
    assert made.optimizer is FullTO
    assert made.max_steps == 7
    assert {key: made.optimizer_options[key] for key in ("alpha", "scope", "state_dtype")} == {
        "alpha": 0.2,
        "scope": "group",
        "state_dtype": torch.bfloat16,
    }
    assert settings(model, optim="rank_one_to").optimizer is RankOneTO
    assert settings(model).optimizer is DiagonalTO


# What fits, and what would


def test_whether_it_fits_is_the_exit_code(ask: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    _, said = ask("--config", recipe)
    total = said["bytes"]["total"]
    for megabytes, fits in ((total / 1e6 + 1, True), (total / 1e6 - 1, False)):
        code, said = ask("--config", recipe, "--memory", f"{megabytes:.3f}MB")
        assert (code, said["fits"]) == (0 if fits else 1, fits)
        assert said["budget"] == parse_size(f"{megabytes:.3f}MB")
        assert ("proposals" in said) != fits


@pytest.mark.parametrize("missing", [2, 15])
def test_what_is_proposed_can_be_typed_and_fits(
    ask: Callable[..., tuple[int, Any]], recipe: Path, missing: int
) -> None:
    """Megabytes that are missing: in state, in weights, ...; each proposal is planned again, from its flags."""
    _, before = ask("--config", recipe)
    budget = f"{(before['bytes']['total'] / 1e6) - missing:.2f}MB"
    code, said = ask("--config", recipe, "--memory", budget)
    assert code == 1
    assert said["proposals"]
    for proposal in said["proposals"]:
        code, after = ask("--config", recipe, "--memory", budget, *shlex.split(" ".join(proposal["flags"])))
        assert code == 0
        assert (after["bytes"]["total"], after["trained_weights"]) == (proposal["bytes"], proposal["trained_weights"])


def test_nothing_would_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags(model_name_or_path=model, unfrozen_last_layers=1, max_length=16)
    assert main(["plan", *words, "--memory", "1MB"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit in 1.00 MB" in shown
    assert "Nothing that a plan knows of would fit." in shown


def test_adapters_are_made_to_fit_as_well(ask: Callable[..., tuple[int, Any]]) -> None:
    words = ["--use_peft", "true", "--max_length", "256"]
    _, said = ask(*words)
    code, said = ask(*words, "--memory", f"{said['bytes']['total'] / 1e6 - 1:.2f}MB")
    assert code == 1
    assert [proposal["flags"] for proposal in said["proposals"]] == [["--gradient_checkpointing true"]]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_layers_that_fit(ask: Callable[..., tuple[int, Any]], layers: int) -> None:
    words = ["--max_length", "16", "--per_device_train_batch_size", "1", "--unfrozen_last_layers"]
    (_, these), (_, more) = (ask(*words, count) for count in (layers, layers + 1))
    between = (these["bytes"]["total"] + more["bytes"]["total"]) / 2e6
    code, said = ask(*words[:-1], "--fit", f"{between:.3f}MB")
    assert (code, said["fits"], said["flags"]) == (0, True, [f"--unfrozen_last_layers {layers}"])
    assert said["bytes"] == these["bytes"]


def test_of_a_recipe_with_patterns_they_are_replaced(ask: Callable[..., tuple[int, Any]], recipe: Path) -> None:
    _, one = ask("--config", recipe, "--unfrozen_parameters", "layers.3.")
    code, said = ask("--config", recipe, "--fit", f"{one['bytes']['total'] / 1e6 + 1:.3f}MB")
    assert (code, said["flags"]) == (0, [r"--unfrozen_parameters '^model\.layers\.(3)\.'"])
    _, everything = ask("--config", recipe, "--fit", "10GB")
    assert everything["flags"] == ["--unfrozen_parameters .*"]
    assert everything["trained_weights"] == everything["total_weights"]


def test_what_a_plan_answers_means_the_same_beside_the_recipe(
    ask: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    """Whose modules are then those of the layers that fit."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("unfrozen_modules: [q_proj]\nmax_length: 16\n")
    _, two = ask("--config", recipe, "--unfrozen_last_layers", 2)
    assert two["trained_weights"] == 2 * 256 * 256
    _, said = ask("--config", recipe, "--fit", f"{two['bytes']['total'] / 1e6 + 0.1:.3f}MB")
    assert said["flags"] == ["--unfrozen_last_layers 2"]
    assert said["bytes"] == two["bytes"]


def test_rows_are_planned_as_a_run_cuts_them(tmp_path: Path) -> None:
    LlamaConfig(max_position_embeddings=160, num_hidden_layers=1, vocab_size=8).save_pretrained(tmp_path)
    assert settings(tmp_path, unfrozen_last_layers=1).work.length == 160


def test_modules_within_the_last_layers(ask: Callable[..., tuple[int, Any]]) -> None:
    words = ["--max_length", "16", "--unfrozen_modules", "q_proj", "v_proj"]
    _, two = ask(*words, "--unfrozen_last_layers", 2)
    code, said = ask(*words, "--fit", f"{two['bytes']['total'] / 1e6 + 0.1:.3f}MB")
    assert (code, said["flags"]) == (0, ["--unfrozen_last_layers 2"])
    assert said["trained_weights"] == 2 * 2 * 256 * 256


def test_not_even_the_last_layer_fits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags(model_name_or_path=model, max_length=16), "--fit", "700MB"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("Not even the last layer fits with these flags.\n")
    assert "Memory of each GPU" not in shown


# Time and cost


def test_time_and_cost(ask: Callable[..., tuple[int, Any]], recipe: Path, model: Path) -> None:
    words = ["--config", recipe, "--num_processes", 4, "--num_train_epochs", 3, "--gpu", "A100"]
    _, said = ask(*words, "--rows", 1000, "--price_per_hour", 1.5)
    expected = plan(settings(model, "--config", str(recipe)))
    speed = said["speed"]
    assert speed["steps"] == 3 * 32  # 63 batches of 4 x 4 rows, in twos
    assert speed["tokens_per_second"] == pytest.approx(4 * GPUS["A100"] * 1e12 * UTILISATION / expected.flops_per_token)
    assert speed["seconds"] == pytest.approx(3 * 32 * 4 * 128 * 2 * 4 / speed["tokens_per_second"])
    assert speed["cost"] == pytest.approx(4 * 1.5 * speed["seconds"] / 3600)

    _, said = ask(*words)
    assert (said["speed"]["steps"], said["speed"]["seconds"], said["speed"]["cost"]) == (None, None, None)
    _, said = ask(*words, "--max_steps", 10)
    assert said["speed"]["seconds"] == pytest.approx(10 * 4 * 128 * 2 * 4 / speed["tokens_per_second"])


def test_without_a_number_of_steps_it_says_what_is_missing(
    recipe: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(recipe), "--model_name_or_path", str(model), "--gpu", "A100"]) == 0
    assert "tokens/s; with --max_steps or --rows also the time" in capsys.readouterr().out


def test_the_parts_in_the_line_are_all_of_the_total(model: Path) -> None:
    planned = plan(settings(model, "--use_peft", "true", lora_r=1))
    small = sum(size for size in planned.parts().values() if size <= 0.005 * planned.total)
    assert small > 0
    assert f"rest {format_size(small)})" in plan_line(planned).plain


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "drop"),
    [(24, 5, 2, 2.0, False), (24, 5, 2, 2.0, True), (3, 4, 8, 1.0, False)],
)
def test_steps_are_counted_as_the_trainer_does(
    finetune: Callable[..., Run], tmp_path: Path, rows: int, batch: int, accumulation: int, epochs: float, drop: bool
) -> None:
    options: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
        "dataloader_drop_last": drop,
    }
    with (  # it is only made
        mock.patch("to_finetune.training.sft.TOSFTTrainer.train"),
        mock.patch("to_finetune.finetune.finish", return_value={}),
    ):
        run = finetune(tmp_path / "run", max_steps=None, dataset_train_split=f"train[:{rows}]", **options)
    loader = run.trainer.get_train_dataloader()
    expected = run.trainer.set_initial_training_values(run.trainer.args, loader)
    assert steps(run.trainer.args, 1, rows) in expected


# Print


@pytest.mark.parametrize("columns", [80, 140])
def test_what_is_printed_is_whole(
    model: Path, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    words = [
        *flags(model_name_or_path=model, config=recipe),
        "--gpu",
        "H100",
        "--rows",
        "1000",
        "--price_per_hour",
        "2",
    ]
    assert main(["plan", *words, "--memory", "10GB"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "2,600,192 weights",
        "1,575,936 weights, 37.7 %",
        "DiagonalTO, float32",
        "4 x 128 tokens, without gradient checkpointing",
        "at the peak",
        "fits in 10.00 GB: ",
        "375 steps of 1,024 tokens take",
    ):
        assert text in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= columns


# What is refused

BAD: dict[str, tuple[list[str], list[str]]] = {
    "no model": ([], ["required", "--model_name_or_path"]),
    "model that is not there": (["--model_name_or_path", "./no_modle"], ["./no_modle", "no such folder", "'no_model'"]),
    "folder without a model": (["--model_name_or_path", "no_model"], ["no_model", "config.json"]),
    "file that is no configuration": (
        ["--model_name_or_path", "list.json"],
        ["list.json", "cannot be loaded as a causal"],
    ),
    "size without a unit": (["MODEL", "--memory", "24"], ["'24'", "24GB"]),
    "size of nothing": (["MODEL", "--fit", "0GB"], ["'0GB'", "24GB"]),
    "empty size": (["MODEL", "--memory", ""], ["''", "24GB"]),
    "unknown flag": (["MODEL", "--memry", "24GB"], ["'memry'", "'memory'"]),
    "unknown flag of a run": (["MODEL", "--learning_rte", "1"], ["'learning_rte'", "'learning_rate'"]),
    "word": (["MODEL", "24GB"], ["'24GB'", "'--'"]),
    "layout": (["MODEL", "--layout", "zerro2"], ["layout='zerro2'", "'zero2'"]),
    "processes": (["MODEL", "--num_processes", "0"], ["num_processes=0", "at least 1"]),
    "GPU": (["MODEL", "--gpu", "H10O"], ["gpu='H10O'", "'H100'"]),
    "price without a GPU": (["MODEL", "--price_per_hour", "2"], ["--price_per_hour", "--gpu"]),
    "negative price": (["MODEL", "--gpu", "H100", "--price_per_hour", "-2"], ["--price_per_hour -2", "at least 0"]),
    "price that is none": (["MODEL", "--gpu", "H100", "--price_per_hour", "nan"], ["--price_per_hour nan"]),
    "rows": (["MODEL", "--rows", "0"], ["rows=0", "at least 1"]),
    "fit of adapters": (["MODEL", "--use_peft", "true", "--fit", "1GB"], ["--fit", "use_peft", "--memory"]),
    "fit of a module outside": (["MODEL", "--unfrozen_modules", "lm_head", "--fit", "1GB"], ["'lm_head'", "last"]),
    "adapters and layers": (
        ["MODEL", "--use_peft", "true", "--unfrozen_last_layers", "1"],
        ["use_peft", "unfrozen_last_layers"],
    ),
    "adapters nowhere": (["MODEL", "--use_peft", "true", "--lora_target_modules", "q_porj"], ["'q_porj'", "'q_proj'"]),
    "rank": (["MODEL", "--use_peft", "true", "--lora_r", "0"], ["lora_r=0"]),
    "pattern that finds nothing": (["MODEL", "--unfrozen_parameters", "layers.9"], ["'layers.9'", "is found in none"]),
    "too many layers": (["MODEL", "--unfrozen_last_layers", "5"], ["5 layers", "1 to 4"]),
    "layout by DeepSpeed's file": (["MODEL", "--deepspeed", "zero.json"], ["deepspeed", "--layout"]),
    "layout by --fsdp": (["MODEL", "--fsdp", "full_shard"], ["fsdp", "--layout"]),
    # what cannot be said
    "rows of any length": (["MODEL", "--max_length", "none"], ["max_length is not set"]),
    "optimizer that is not there": (["MODEL", "--optim", "galore_adamw"], ["optim=galore_adamw", "not known"]),
    "compiled step": (["MODEL", "--torch_compile", "true"], ["torch_compile=True", "not known"]),
    "other kernels": (["MODEL", "--use_liger_kernel", "true"], ["use_liger_kernel=True", "not known"]),
    "offloaded activations": (
        ["MODEL", "--activation_offloading", "true"],
        ["activation_offloading=True", "not known"],
    ),
    "smoothed labels": (["MODEL", "--label_smoothing_factor", "0.1"], ["label_smoothing_factor=0.1", "not known"]),
    "quantised and sharded": (
        ["MODEL", "--load_in_4bit", "true", "--unfrozen_last_layers", "1", "--layout", "zero3"],
        ["4bit", "zero3", "cannot be planned"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_named_in_one_sentence(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no_model").mkdir()
    Path("list.json").write_text("[]")
    Path("zero.json").write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}')
    words, named = BAD[case]
    given = [part for word in words for part in (flags(model_name_or_path=model) if word == "MODEL" else [word])]
    assert main(["plan", *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert [words for words in named if words not in errors[0]] == []
    assert "Traceback" not in shown.err


def test_memory_and_fit_are_one_question(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *flags(model_name_or_path=model), "--memory", "1GB", "--fit", "1GB"])
    assert end.value.code == 2
    assert "not allowed with argument --memory" in capsys.readouterr().err


# A run and its plan


def test_a_run_records_its_plan_and_its_peak(
    finetune: Callable[..., Run],
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = iter([1000, 10**12])
    monkeypatch.setattr(memory, "_peak_resident", lambda: next(peaks))
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: mock.Mock(rss=500))
    run = finetune(tmp_path / "run", max_length=512)
    words = flags(use_cpu=True, unfrozen_parameters=[r"layers\.3\."], per_device_train_batch_size=4, max_length=512)
    planned = plan(settings(llama, *words))
    assert run.record["memory"] == {
        "planned": planned.parts(),
        "not_planned": None,
        "measured": 10**12 - 500,
        "kind": "resident",
    }
    shown = " ".join(capsys.readouterr().out.split())
    assert f"planned: {format_size(planned.total)}, if every row has 512 tokens" in shown
    assert f"memory {format_size(planned.total)} planned, {format_size(10**12 - 500)} measured" in shown


def test_a_run_that_cannot_be_planned_goes_on(
    finetune: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("to_finetune.training.plan.plan", mock.Mock(side_effect=CannotSay("It would be a guess.")))
    run = finetune(tmp_path / "run", max_steps=1)
    assert run.code == 0
    assert run.record["memory"]["planned"] is None
    assert run.record["memory"]["not_planned"] == "It would be a guess."
    assert "Memory: not planned. It would be a guess." in capsys.readouterr().out


def test_the_layout_of_a_live_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(stage: int, offload: bool) -> Any:
        return SimpleNamespace(zero_stage=stage, hf_ds_config=SimpleNamespace(is_offload=lambda: offload))

    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    args: Any = SimpleNamespace(n_gpu=1, device=torch.device("cuda"), deepspeed_plugin=None, fsdp=False)
    found = [_live_layout(args)]
    for args.deepspeed_plugin in (zero(2, False), zero(3, True)):
        found.append(_live_layout(args))
    args.deepspeed_plugin = None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert [*found, _live_layout(args)] == ["ddp", "zero2", "zero3_offload", "fsdp2"]
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    with pytest.raises(CannotSay, match="FSDP2 is planned with FSDP_RESHARD_AFTER_FORWARD=true alone"):
        _live_layout(args)
    args.n_gpu = 2
    with pytest.raises(CannotSay, match="One process drives 2 GPUs"):
        _live_layout(args)


def test_a_peak_of_an_earlier_run_is_not_taken_for_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_peak_resident", lambda: 10**12)
    watch = memory.RunMemory(torch.device("cpu"))
    watch.on_train_end(None, None, None)  # type: ignore[arg-type]
    assert watch.values["measured"] is None


def test_the_peak_is_this_processs_own() -> None:
    """In bytes: at least what is resident now."""
    now = Path("/proc/self/status")
    if not now.exists():
        pytest.skip("needs /proc")
    high = next(line for line in now.read_text().splitlines() if line.startswith("VmHWM"))
    assert memory._peak_resident() == pytest.approx(1024 * int(high.split()[1]), rel=0.05)


def test_a_file_is_as_good_as_a_folder(model: Path) -> None:
    assert load_blueprint(str(model / "config.json")).config.hidden_size == 256
