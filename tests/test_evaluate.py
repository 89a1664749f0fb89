"""`to-finetune evaluate`: what a run says of itself, again, and of any model; lm-evaluation-harness's tasks."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from to_finetune.cli import main
from to_finetune.data.alpaca import alpaca_prompt
from to_finetune.training.prepare import prepare_trainer

from .helpers import ALPACA_ROWS, Run, write_jsonl

ON_CPU = ("--use_cpu", "true")


@pytest.fixture(scope="module")
def run(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "first"
    run = finetune(
        folder,
        val_set_size=6,
        per_device_eval_batch_size=4,
        learning_rate=0.05,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
    )
    assert run.code == 0
    return run


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The command's JSON, which is all that it prints."""

    def evaluate(model: Path, *flags: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["evaluate", str(model), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return evaluate


def completions_loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> tuple[float, int]:
    """The mean loss in float64 over the completions' tokens and their end, a row at a time; and their number."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(alpaca_prompt(row["instruction"], row["input"]))["input_ids"]
        tokens = torch.tensor(
            [*tokenizer(alpaca_prompt(row["instruction"], row["input"]) + row["output"])["input_ids"], 1]
        )
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        learned = tokens[len(prompt) :]
        total += cross_entropy(logits[len(prompt) - 1 : -1], learned, reduction="sum").item()
        count += len(learned)
    return total / count, count


def in_float64(base: Path, run: Run | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if run is not None:
        model.load_state_dict(run.weights, strict=False)
    return model


def test_a_run_is_evaluated_as_it_evaluated_itself(run: Run, evaluate: Callable[..., Any]) -> None:
    """On the rows that it held out, which its config.yaml says, to the last bit; the base as before its first step."""
    result = evaluate(run.folder, "--compare")
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    at_start = next(row["eval_loss"] for row in history if "eval_loss" in row)
    assert result["loss"] == run.record["results"]["eval_loss"]
    assert result["base"]["loss"] == at_start != result["loss"]
    assert result["difference"]["loss"] == result["loss"] - at_start
    assert result["rows"] == 6
    assert result["model"] == str(run.folder)
    assert result["perplexity"] == math.exp(result["loss"])
    assert result["base"]["perplexity"] == math.exp(at_start)


def test_a_checkpoint_is_evaluated_with_its_runs_data(run: Run, evaluate: Callable[..., Any]) -> None:
    last = evaluate(run.folder / "checkpoint-4")
    assert last["loss"] == run.record["results"]["eval_loss"]
    assert evaluate(run.folder / "checkpoint-2")["loss"] != last["loss"]


def test_the_loss_is_the_mean_over_the_completions_tokens(
    run: Run, llama: Path, alpaca: Path, evaluate: Callable[..., Any]
) -> None:
    """Against a float64 loss of tokens put together by hand; the size of a batch plays no part."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    base, count = completions_loss(in_float64(llama), tokenizer, ALPACA_ROWS)
    tuned, _ = completions_loss(in_float64(llama, run), tokenizer, ALPACA_ROWS)
    for batch_size in ("1", "5"):
        result = evaluate(run.folder, "--dataset_name", str(alpaca), "--compare", "--batch_size", batch_size)
        assert (result["rows"], result["tokens"]) == (24, count)
        assert result["loss"] == pytest.approx(tuned, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(tuned), rel=1e-5)
        assert result["base"]["loss"] == pytest.approx(base, rel=1e-5)


def test_an_ordinary_model_is_evaluated_in_the_same_way(
    llama: Path, alpaca: Path, evaluate: Callable[..., Any]
) -> None:
    """And on the split that is asked for."""
    expected, count = completions_loss(in_float64(llama), AutoTokenizer.from_pretrained(llama), ALPACA_ROWS[:7])
    result = evaluate(llama, "--dataset_name", str(alpaca), "--split", "train[:7]", *ON_CPU)
    assert (result["rows"], result["tokens"]) == (7, count)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert "base" not in result


def test_an_ordinary_model_is_held_as_it_is_asked_for(
    llama: Path, alpaca: Path, evaluate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed precision widens what trains, and of it nothing does."""
    dtypes = set()

    def look(model: Any, *rest: Any) -> Any:
        dtypes.update(p.dtype for p in model.parameters())
        return prepare_trainer(model, *rest)

    monkeypatch.setattr("to_finetune.training.evaluate.prepare_trainer", look)
    evaluate(llama, "--dataset_name", str(alpaca), "--dtype", "bfloat16", "--bf16", "true", *ON_CPU)
    assert dtypes == {torch.bfloat16}


def test_plain_text_counts_from_its_second_token(llama: Path, tmp_path: Path, evaluate: Callable[..., Any]) -> None:
    """The rows have a column that is not read, which the command says, and not among its JSON."""
    texts = [f"red {row['output']}" for row in ALPACA_ROWS[:5]]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)])
    model, tokenizer = in_float64(llama), AutoTokenizer.from_pretrained(llama)
    total, count = 0.0, 0
    for text in texts:
        tokens = torch.tensor([*tokenizer(text)["input_ids"], 1])
        with torch.no_grad():
            total += cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum").item()
        count += len(tokens) - 1
    result = evaluate(llama, "--dataset_name", str(data), *ON_CPU)
    assert (result["rows"], result["tokens"]) == (5, count)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_texts_count_each_from_its_second_token(
    strategy: str, llama: Path, tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    """Those in a row of their own, as they are wrapped, but for the first of a row."""
    texts = [f"red {row['output']}" for row in ALPACA_ROWS[:5]]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    count = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    packed = ("--packing", "true", "--packing_strategy", strategy)
    result = evaluate(llama, "--dataset_name", str(data), "--max_length", str(count), *packed, *ON_CPU)
    assert result["rows"] == 1
    assert result["tokens"] == count - (1 if strategy == "wrapped" else 5)
    if strategy == "bfd":
        alone = evaluate(llama, "--dataset_name", str(data), *ON_CPU)
        assert (result["tokens"], result["loss"]) == (alone["tokens"], pytest.approx(alone["loss"], rel=1e-6))


def test_no_held_out_row_is_dropped(
    run: Run, finetune: Callable[..., Run], tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    """With `dataloader_drop_last`, which is meant for the training."""
    wanted = evaluate(run.folder)
    dropping = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4, "val_set_size": 6}
    found = finetune(tmp_path / "run", **dropping, learning_rate=0.05)
    assert found.record["results"]["eval_loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert evaluate(found.folder)["tokens"] == wanted["tokens"]


def test_the_loss_of_a_run_that_loads_its_best_model_is_that_models(
    finetune: Callable[..., Run], tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    """Here the first, which has the highest."""
    saved = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "val_set_size": 6}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = finetune(tmp_path / "run", **saved, **best, learning_rate=0.05)
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    first, last = (row["eval_loss"] for row in history if "eval_loss" in row)
    assert first > last
    assert run.record["results"]["eval_loss"] == first == evaluate(run.folder)["loss"]


def test_a_run_that_trained_everything(
    finetune: Callable[..., Run], tmp_path: Path, llama: Path, evaluate: Callable[..., Any]
) -> None:
    run = finetune(tmp_path / "run", unfrozen_parameters=None, max_steps=1, val_set_size=6, learning_rate=0.05)
    result = evaluate(run.folder, "--compare")
    assert result["loss"] == run.record["results"]["eval_loss"]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [tokenizer.decode(row["input_ids"][1:-1]) for row in run.trainer.eval_dataset]
    held_out = [row for row in ALPACA_ROWS if alpaca_prompt(row["instruction"], row["input"]) + row["output"] in texts]
    assert len(held_out) == 6
    assert result["base"]["loss"] == pytest.approx(
        completions_loss(in_float64(llama), tokenizer, held_out)[0], rel=1e-5
    )


def test_a_run_with_adapters(finetune: Callable[..., Run], tmp_path: Path, evaluate: Callable[..., Any]) -> None:
    run = finetune(
        tmp_path / "run",
        unfrozen_parameters=None,
        use_peft=True,
        lora_r=4,
        lora_target_modules=["q_proj", "down_proj"],
        val_set_size=6,
        eval_on_start=True,
        learning_rate=0.05,
    )
    result = evaluate(run.folder, "--compare")
    assert result["loss"] == run.record["results"]["eval_loss"] != result["base"]["loss"]
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    assert result["base"]["loss"] == next(row["eval_loss"] for row in history if "eval_loss" in row)


def test_rows_are_cut_to_the_length_that_is_asked_for(
    run: Run, llama: Path, alpaca: Path, evaluate: Callable[..., Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = []  # of each prompt, and of it with its completion and the end
    for row in ALPACA_ROWS:
        prompt = alpaca_prompt(row["instruction"], row["input"])
        sizes.append((len(tokenizer(prompt)["input_ids"]), len(tokenizer(prompt + row["output"])["input_ids"]) + 1))
    length = sorted(whole for _, whole in sizes)[12]
    left = [min(whole, length) - prompt for prompt, whole in sizes if min(whole, length) > prompt]
    result = evaluate(run.folder, "--dataset_name", str(alpaca), "--max_length", str(length))
    assert (result["rows"], result["tokens"]) == (len(left), sum(left))
    assert len(left) < 24


def test_flags_of_finetune_go_over_the_runs_own(run: Run, evaluate: Callable[..., Any]) -> None:
    """--eval_dataset_name or another size of what is held out: the first of the same shuffled rows."""
    assert evaluate(run.folder, "--val_set_size", "4")["rows"] == 4


def test_a_runs_layout_and_its_push_to_the_hub_play_no_part(
    run: Run, tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"push_to_hub": True, "deepspeed": "nowhere.json", "fsdp": "full_shard", "fsdp_config": {"version": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate(folder)["loss"] == run.record["results"]["eval_loss"]


def test_a_run_whose_rate_followed_its_losses(
    finetune: Callable[..., Run], tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    held_out = {"val_set_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    run = finetune(tmp_path / "run", lr_scheduler_type="reduce_lr_on_plateau", learning_rate=0.01, **held_out)
    assert run.code == 0
    assert evaluate(run.folder)["rows"] == 4


def test_the_table_shows_the_same_numbers(
    run: Run, capsys: pytest.CaptureFixture[str], evaluate: Callable[..., Any]
) -> None:
    result = evaluate(run.folder, "--compare")
    assert main(["evaluate", str(run.folder), "--compare"]) == 0
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]
    change = result["difference"]["loss"]
    assert rows == [
        ["base", f"{result['base']['loss']:.4f}", f"{result['base']['perplexity']:.2f}"],
        ["tuned", f"{result['loss']:.4f}", f"{result['perplexity']:.2f}"],
        ["change", f"{change:+.4f}", f"× {math.exp(change):.3f}"],
    ]
    assert f"6 rows, {result['tokens']:,} tokens with a loss" in shown


def test_nothing_is_written_to_the_run(run: Run, evaluate: Callable[..., Any]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.folder.rglob("*"))
    evaluate(run.folder)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.folder.rglob("*")) == before


@pytest.fixture(scope="module")
def unevaluated(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that held nothing out."""
    return finetune(tmp_path_factory.mktemp("runs") / "second", max_steps=1)


REFUSED = {
    "no such folder": (["/no/such/run", "--dataset_name", "{data}"], "'/no/such/run': no such folder."),
    "no run, no data": (["{llama}"], "is no run, which would know its held-out data: give --dataset_name."),
    "nothing held out": (["{unevaluated}"], "has held nothing out: name what to evaluate on with --dataset_name."),
    "no base": (["{llama}", "--compare", "--dataset_name", "{data}"], "is no run, so that its base is not known"),
    "no such data": (["{run}", "--dataset_name", "{data}x.jsonl"], "alpaca.jsonlx.jsonl'"),
    "batch size": (["{run}", "--batch_size", "0"], "batch_size=0 is not valid: at least 1."),
    "a split of nothing": (["{run}", "--split", "train"], "split='train' is of --dataset_name, which is not given."),
    "unknown flag": (["{run}", "--max_lenth", "9"], "Unknown flag 'max_lenth'. Did you mean 'max_length'"),
    "a length of none": (["{run}", "--max_length", "-3"], "max_length=-3 is not valid: at least 1."),
    "another recipe": (["{run}", "--config", "mine.yaml"], "--config is given twice"),
    "all cut away": (["{run}", "--max_length", "3"], "max_length=3"),
    "empty tasks": (["{run}", "--tasks", " ,"], "names none, for example --tasks hellaswag,arc_easy."),
    "tasks and data": (["{run}", "--tasks", "x", "--dataset_name", "y"], "it does not go with --dataset_name."),
    "tasks and flags": (["{run}", "--tasks", "x", "--bf16", "true"], "it does not go with --bf16."),
    "no harness": (["{run}", "--tasks", "hellaswag"], 'not installed: pip install "to-finetune[evaluate]"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_sentence(
    case: str,
    run: Run,
    unevaluated: Run,
    llama: Path,
    alpaca: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # not installed, also where it is
    words, sentence = REFUSED[case]
    names = {"run": run.folder, "unevaluated": unevaluated.folder, "llama": llama, "data": alpaca}
    assert main(["evaluate", *(word.format(**names) for word in words)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_a_run_without_its_recipe_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trained.safetensors").write_bytes((run.folder / "trained.safetensors").read_bytes())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "has no config.yaml, which says how its data are prepared." in capsys.readouterr().err


class Harness:
    """Stands in for lm-evaluation-harness: records how it is called, and answers with what the model's head sums to."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def simple_evaluate(self, **call: Any) -> dict[str, Any]:
        if self.error:
            raise self.error
        model = call["model"]["pretrained"]
        norm = next(p for name, p in model.named_parameters() if name.endswith("layers.3.mlp.up_proj.weight"))
        self.calls.append(call)
        score = norm.double().sum().item()
        return {"results": {t: {"alias": t, "acc,none": score, "acc_stderr,none": 0.5} for t in call["tasks"]}}

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
        modules["lm_eval.tasks"] = ModuleType("lm_eval.tasks")
        modules["lm_eval"].simple_evaluate = self.simple_evaluate  # type: ignore[attr-defined]
        modules["lm_eval.models.huggingface"].HFLM = lambda **settings: settings  # type: ignore[attr-defined]
        manager = type("TaskManager", (), {"all_tasks": ["hellaswag", "arc_easy"]})
        modules["lm_eval.tasks"].TaskManager = manager  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        yield


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    harness = Harness()
    with harness.installed(monkeypatch):
        yield harness


def test_tasks_are_measured_on_the_base_and_the_tuned_model(
    run: Run, llama: Path, harness: Harness, evaluate: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks", "hellaswag, arc_easy", "--compare", "--batch_size", "3", "--max_length", "99"]
    result = evaluate(run.folder, *flags)
    name = "model.layers.3.mlp.up_proj.weight"
    base = AutoModelForCausalLM.from_pretrained(llama).state_dict()[name].double().sum().item()
    tuned = run.weights[name].double().sum().item()
    assert base != tuned
    measured = {"acc": tuned, "acc_stderr": 0.5}
    assert result["tasks"] == {"hellaswag": measured, "arc_easy": measured}
    assert result["base"]["hellaswag"]["acc"] == base
    for call in harness.calls:
        assert call["tasks"] == ["hellaswag", "arc_easy"]
        assert (call["model"]["batch_size"], call["model"]["max_length"]) == (3, 99)
        assert call["model"]["tokenizer"]("red").input_ids == AutoTokenizer.from_pretrained(llama)("red").input_ids
        assert not call["model"]["pretrained"].training

    assert main(["evaluate", str(run.folder), *flags]) == 0
    shown = capsys.readouterr().out
    assert f"{base:.4f}" in shown
    assert f"{tuned - base:+.4f}" in shown


def test_tasks_of_an_ordinary_model(llama: Path, harness: Harness, evaluate: Callable[..., Any]) -> None:
    result = evaluate(llama, "--tasks", "arc_easy")
    assert list(result) == ["model", "tasks"]
    assert harness.calls[0]["model"]["batch_size"] == 8


@pytest.mark.usefixtures("harness")
def test_an_unknown_task_is_refused_with_the_nearest(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.folder), "--tasks", "helaswag"]) == 2
    assert "has no task 'helaswag'. Did you mean 'hellaswag'?" in capsys.readouterr().err


def test_a_harness_that_fails_is_a_failed_run(run: Run, harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    harness.error = ConnectionError("no network")
    assert main(["evaluate", str(run.folder), "--tasks", "hellaswag"]) == 1
    assert "lm-evaluation-harness failed: no network" in capsys.readouterr().err
