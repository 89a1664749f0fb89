"""A run that does not train what was asked, with what was asked, stops: every proof can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from to_finetune.errors import RunError
from to_finetune.model import save_trained, select_trainable
from to_finetune.model.trained import trained_tensors
from to_finetune.optim import DiagonalTO
from to_finetune.training import TOTrainer, TOTrainingArguments
from to_finetune.training.proofs import check_optimizer, check_saved, fingerprints

from .helpers import Run, write_jsonl


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(llama)
    select_trainable(model, [r"layers\.3\."])
    return model


def trained(model: PreTrainedModel) -> list[Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def trainer(model: PreTrainedModel, folder: Path, optimizer: Optimizer | None = None, **options: Any) -> TOTrainer:
    """A trainer of 4 steps, by default with the optimizer that its arguments name."""
    tokens = torch.arange(3, 23).view(4, 5)
    settings = {"optim": "diagonal_to", "max_steps": 4, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return TOTrainer(
        model,
        TOTrainingArguments(output_dir=str(folder), **{**settings, **options}),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizers=(optimizer, None),
    )


class Meddler(TrainerCallback):
    """Changes one element of a weight after step `step`."""

    def __init__(self, weight: Tensor, step: int) -> None:
        self.weight, self.step = weight, step

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.weight.view(-1)[0] += 1


def test_a_run_that_does_what_was_asked_is_proven(model: PreTrainedModel, tmp_path: Path) -> None:
    run = trainer(model, tmp_path)
    run.train()
    assert run.engagement.proofs == {
        "live_optimizer": "DiagonalTO",
        "trained_tensors": 9,
        "moved_after_first_step": 9,
        "frozen_tensors_unmoved": 30,
        "never_moved": [],
    }


def test_another_optimizer_is_found_out(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="live optimizer is AdamW, not DiagonalTO"):
        trainer(model, tmp_path, AdamW(trained(model))).train()


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda tensors: tensors[1:], r"misses 1 that do, model\.layers\.3\.self_attn\.q_proj\.weight"),
        (lambda tensors: [*tensors, Parameter(torch.zeros(3))], "holds 1 tensors that do not train and misses 0"),
        (lambda tensors: [Parameter(p.detach().clone()) for p in tensors], "holds 9 .* and misses 9"),
    ],
    ids=["missing", "extra", "copies"],
)
def test_an_optimizer_of_other_tensors_is_found_out(
    model: PreTrainedModel, tmp_path: Path, choose: Callable[[list[Parameter]], Iterable[Parameter]], message: str
) -> None:
    optimizer = DiagonalTO(choose(trained(model)), lr=0.01)
    with pytest.raises(RunError, match=message):
        trainer(model, tmp_path, optimizer).train()


def test_a_frozen_model_is_found_out(model: PreTrainedModel, tmp_path: Path) -> None:
    model.requires_grad_(False)
    with pytest.raises(RunError, match="Nothing trains"):
        trainer(model, tmp_path).train()


@pytest.mark.parametrize("step", [1, 4])
def test_a_frozen_weight_that_changes_is_found_out(model: PreTrainedModel, tmp_path: Path, step: int) -> None:
    """In the first step or later."""
    run = trainer(model, tmp_path)
    run.add_callback(Meddler(model.model.layers[1].mlp.up_proj.weight, step))
    with pytest.raises(RunError, match=r"1 frozen tensors changed, model\.layers\.1\.mlp\.up_proj\.weight"):
        run.train()


def test_adapted_weights_may_be_rounded_for_vllm(llama: Path, tmp_path: Path) -> None:
    """TRL merges adapters into them and takes them out again; no other frozen weight may change."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[1]
    adapted, other = layer.self_attn.q_proj.base_layer.weight, layer.self_attn.k_proj.weight
    for weight, use_vllm, stops in ((adapted, True, False), (other, True, True), (adapted, False, True)):
        run = trainer(model, tmp_path, max_steps=2)
        run.args.use_vllm = use_vllm
        run.add_callback(Meddler(weight, 1))
        with pytest.raises(RunError, match="1 frozen tensors changed") if stops else nullcontext():
            run.train()


@pytest.mark.parametrize("max_steps", [1, 2, 4])
def test_a_run_that_moves_nothing_is_found_out(model: PreTrainedModel, tmp_path: Path, max_steps: int) -> None:
    """After two steps at the latest."""
    run = trainer(model, tmp_path, learning_rate=0.0, max_steps=max_steps)
    with pytest.raises(RunError, match="No trained weight moved"):
        run.train()
    assert run.state.global_step == min(max_steps, 2)


def test_a_run_without_a_step_is_found_out(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No trained weight moved"):
        trainer(model, tmp_path, num_train_epochs=0, max_steps=-1).train()


def test_a_weight_that_never_moves_is_recorded(model: PreTrainedModel, tmp_path: Path) -> None:
    """As an expert that no token is sent to: no error, but it is said."""
    model.model.layers[3].mlp.down_proj.weight.register_hook(torch.zeros_like)
    run = trainer(model, tmp_path)
    run.train()
    assert run.engagement.proofs["moved_after_first_step"] == 8
    assert run.engagement.proofs["never_moved"] == ["model.layers.3.mlp.down_proj.weight"]


def test_the_first_step_of_a_warm_up_may_move_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    """Its rate is 0."""
    run = trainer(model, tmp_path, warmup_steps=2)
    run.train()
    assert run.engagement.proofs["moved_after_first_step"] == 9


def test_steps_that_were_skipped_are_not_held_against_a_run(model: PreTrainedModel, tmp_path: Path) -> None:
    """A gradient that was not finite moves nothing, and says nothing of the rate."""
    run = trainer(model, tmp_path, optim_args="skip_nonfinite=True", max_steps=6)
    weight, calls = model.model.layers[3].mlp.down_proj.weight, iter(range(100))
    weight.register_hook(lambda g: g * torch.nan if next(calls) < 3 else g)
    run.train()
    assert run.engagement.proofs["moved_after_first_step"] == 9


def test_steps_without_a_gradient_are_not_held_against_a_run(model: PreTrainedModel, tmp_path: Path) -> None:
    """As of answers that all got the same reward."""
    run = trainer(model, tmp_path, max_steps=5)
    calls = iter(range(100))
    model.model.layers[3].register_full_backward_pre_hook(
        lambda module, grads: tuple(g * 0 for g in grads) if next(calls) < 3 else None
    )
    run.train()
    assert run.engagement.proofs["moved_after_first_step"] == 9


def test_steps_that_a_loss_scaler_skips_are_not_held_against_a_run(model: PreTrainedModel, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, learning_rate=0.0, max_steps=6)
    with (
        mock.patch("accelerate.optimizer.AcceleratedOptimizer.step_was_skipped", property(lambda self: True)),
        pytest.raises(RunError, match="No trained weight moved"),
    ):
        run.train()
    assert run.state.global_step == 6  # at the end, and not after two steps


def test_what_never_moved_is_said_of_whole_runs_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    """After a resume it is not known what had moved before."""
    trainer(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    resumed = trainer(model, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert "never_moved" not in resumed.engagement.proofs


def test_a_whole_model_that_is_not_finite_is_not_saved(
    finetune: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no loss was logged in between."""
    run = finetune(
        tmp_path / "run", unfrozen_parameters=None, optim="adamw_torch", learning_rate=1e25, logging_steps=10
    )
    assert run.code == 1
    assert run.record["status"] == "failed"
    assert not list(run.folder.rglob("model.safetensors"))
    assert "the run has diverged" in capsys.readouterr().err


def test_held_out_rows_without_a_label_are_found_out(
    finetune: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"instruction": "red " * 1100, "input": "", "output": "blue"}
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [long] * 3)
    assert finetune(tmp_path / "run", eval_dataset_name=held_out).code == 2
    assert "All labels of the held-out rows are masked" in capsys.readouterr().err


def test_a_file_that_does_not_read_back_fails_the_run(
    finetune: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_badly(model: PreTrainedModel, *where: Any) -> None:
        path = save_trained(model, *where)
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1e-6
        save_file(tensors, path, metadata={"base_model_name_or_path": "x"})

    with mock.patch("to_finetune.training.trainer.save_trained", save_badly):
        run = finetune(tmp_path / "run")
    assert run.code == 1
    assert "does not read back" in capsys.readouterr().err
    assert run.record["status"] == "failed"
    assert "moved_after_first_step" in run.record["proofs"]


def test_a_file_with_other_tensors_does_not_read_back(model: PreTrainedModel, tmp_path: Path) -> None:
    save_trained(model, tmp_path)
    live = trained_tensors(model)
    assert check_saved(live, tmp_path, trained=9) == 4 * sum(p.numel() for p in trained(model))
    with pytest.raises(RunError, match="9 tensors were saved where 10 train"):  # what is saved by name lacks one
        check_saved(live, tmp_path, trained=10)
    model.lm_head.requires_grad_(True)
    with pytest.raises(RunError, match="9 tensors were saved where 9 train"):
        check_saved(trained_tensors(model), tmp_path, trained=9)


def test_deepspeeds_own_cpu_adam_is_refused() -> None:
    """accelerate puts it in the place of an offloaded optimizer, unless DeepSpeed's file forbids it."""

    class DeepSpeedCPUAdam(torch.optim.Adam):
        pass

    with pytest.raises(RunError, match=r"is DeepSpeedCPUAdam, not DiagonalTO.*zero_force_ds_cpu_optimizer"):
        check_optimizer(DeepSpeedCPUAdam([torch.zeros(2)]), DiagonalTO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_changes_with_a_single_bit(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.to(dtype)
    before = fingerprints(model)
    weight = model.model.layers[2].self_attn.k_proj.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0, dtype=dtype))
    after = fingerprints(model)
    assert {name for name in before if before[name] != after[name]} == {"model.layers.2.self_attn.k_proj.weight"}
