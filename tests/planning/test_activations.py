"""The planned activations beside what real training steps allocate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from to_finetune.planning import Blueprint, Lora, Settings, Workload, plan
from to_finetune.planning.dry_run import dry_run
from to_finetune.planning.state import state_bytes
from to_finetune.training.optimizers import unwrapped
from to_finetune.training.plan import parse_for_plan, settings_of

from ..helpers import flags
from .measured import (
    allocated_at_most,
    base_bytes,
    bytes_of,
    loss_of,
    quantize,
    real_model,
    take_gradients,
    trained_parameters,
)

PROMISED = 0.15  # of the measured peak; what is asserted is tighter
SUBSETS = {"last two": (r"layers\.(4|5)\.",), "q and v": (r"[qv]_proj",), "all": None}


@pytest.fixture
def narrow_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's head in tiles of 512 tokens, not 32,768 words wide, which would be most of a small model's activations."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 512)
    dry_run.cache_clear()


def planned_and_measured(work: Workload, accumulation: int = 1) -> tuple[int, int]:
    """Activations and gradients at the peak of a micro-batch, bytes beyond weights and what was there before."""
    model = real_model(work)
    if work.quantization:
        quantize(model, work.quantization)
    step = take_gradients(model, work)
    step()  # whatever is made once
    model.zero_grad(set_to_none=accumulation == 1)
    measured = allocated_at_most(step)
    run = dry_run(work, "ddp", accumulation > 1)
    there = sum(p.nbytes for p in trained_parameters(model)) if accumulation > 1 else 0
    batch = 3 * 8 * work.rows * work.length  # which the run counts, and the measured step was given
    return run.peak - there - batch, measured


def assert_close(planned: int, measured: int, tolerance: float = 0.02) -> None:
    print(f"planned {planned:,} measured {measured:,} error {planned / measured - 1:+.2%}")
    assert tolerance <= PROMISED
    assert abs(planned / measured - 1) < tolerance


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_is_what_a_step_of_a_llama_allocates(
    small: Blueprint, narrow_head: None, subset: str, checkpointing: bool
) -> None:
    work = Workload(small, SUBSETS[subset], rows=2, length=256, checkpointing=checkpointing, device="cpu")
    assert_close(*planned_and_measured(work))


@pytest.mark.parametrize(
    "changed",
    [
        {"attention": "eager"},
        {"rows": 1, "length": 100},
        {"mixed_precision": "bfloat16", "rows": 1},  # slow on CPUs
        {"mixed_precision": "bfloat16", "rows": 1, "checkpointing": True},
        {"dtype": "bfloat16", "rows": 1},
    ],
    ids=str,
)
def test_holds_for_other_settings(small: Blueprint, narrow_head: None, changed: dict[str, Any]) -> None:
    work = Workload(small, (r"layers\.[3-5]\.", "lm_head"), rows=2, length=64, device="cpu")
    assert_close(*planned_and_measured(replace(work, **changed)))


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_holds_for_other_architectures(name: str, request: pytest.FixtureRequest, narrow_head: None) -> None:
    work = Workload(request.getfixturevalue(name), None, rows=4, length=128, device="cpu")
    assert_close(*planned_and_measured(work))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_holds_for_a_quantized_base(
    small: Blueprint, narrow_head: None, quantization: Literal["8bit", "4bit"], checkpointing: bool
) -> None:
    """Of which the layers above the trained ones hand gradients down."""
    pytest.importorskip("bitsandbytes")
    work = Workload(small, (r"layers\.[01]\.",), rows=2, length=64, checkpointing=checkpointing, device="cpu")
    assert_close(*planned_and_measured(replace(work, quantization=quantization)))


@pytest.mark.parametrize(
    "changed",
    [
        {"mixed_precision": "bfloat16", "rows": 1},
        {"dtype": "bfloat16", "rows": 1, "checkpointing": True},
        {"lora": Lora(8, ("all-linear",))},
    ],
    ids=str,
)
def test_holds_for_adapters(small: Blueprint, narrow_head: None, changed: dict[str, Any]) -> None:
    work = Workload(small, rows=2, length=64, lora=Lora(16, ("q_proj", "v_proj"), dropout=0.05), device="cpu")
    assert_close(*planned_and_measured(replace(work, **changed)))


def test_counts_the_gradients_of_earlier_micro_batches(small: Blueprint, narrow_head: None) -> None:
    work = Workload(small, None, rows=1, length=64, checkpointing=True, device="cpu")
    assert_close(*planned_and_measured(work, accumulation=4))
    first, accumulating = (plan(Settings(work, accumulation=count)) for count in (1, 4))
    assert first.gradients == accumulating.gradients
    assert first.activations < accumulating.activations  # without, both are not there at the same time


def test_a_frozen_bottom_keeps_nothing(small: Blueprint) -> None:
    """The lower layers of the same subset cost no activations, and no backward pass."""
    deep = Blueprint("deep", type(small.config)(**{**small.config.to_dict(), "num_hidden_layers": 12}))
    runs = [
        dry_run(Workload(base, patterns, rows=4, length=256), "ddp", False)
        for base, patterns in ((small, (r"layers\.[45]\.",)), (deep, (r"layers\.1[01]\.",)))
    ]
    assert runs[1].peak == runs[0].peak
    layer = sum(w.numel for w in runs[0].weights if w.name.startswith("model.layers.0.") and len(w.shape) == 2)
    more = (runs[1].flops - runs[0].flops) / (4 * 256)
    assert more == pytest.approx(6 * (2 * layer + 4 * 256 * 256))  # forward: weights, and attention over 256 tokens


@pytest.mark.parametrize(
    "options",
    [
        {"unfrozen_last_layers": 1},
        {"load_in_4bit": True, "unfrozen_last_layers": 1},
        {"load_in_4bit": True, "use_peft": True, "lora_r": 4},
        {"packing": True, "unfrozen_last_layers": 1},
        {"load_in_8bit": True, "use_peft": True, "lora_r": 4},
    ],
    ids=str,
)
def test_is_what_a_run_takes(
    finetune: Any, llama: Path, tmp_path: Path, narrow_head: None, options: dict[str, Any]
) -> None:
    """Weights and state to the byte; and the Trainer's whole step, forward to optimizer."""
    options = {"unfrozen_parameters": None, "gradient_accumulation_steps": 1, **options}
    trainer = finetune(tmp_path, max_steps=2, **options).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    optimizer = trainer.optimizer
    optimizer.zero_grad()

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch), torch.tensor(100))
        optimizer.step()

    measured = allocated_at_most(step)
    rows, length = batch["input_ids"].shape
    shape = {"use_cpu": True, "per_device_train_batch_size": rows, "max_length": length}
    settings = settings_of(*parse_for_plan(flags(model_name_or_path=llama, **shape, **options)))
    planned = plan(settings)
    assert_close(planned.activations + planned.gradients, measured, tolerance=0.05)
    trained = trained_parameters(trainer.model)
    assert planned.trained_weights == sum(p.numel() for p in trained)
    assert planned.trained == planned.gradients == planned.saved == sum(p.nbytes for p in trained)
    assert planned.frozen == base_bytes(trainer.model)
    assert planned.state == bytes_of(unwrapped(optimizer))


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_counts_what_an_optimizer_needs_for_a_moment(small: Blueprint, options: dict[str, Any]) -> None:
    work = Workload(small, (r"layers\.5\.",), rows=1, length=8, device="cpu")
    model = real_model(work)
    optimizer = torch.optim.AdamW(trained_parameters(model), **options)
    for p in trained_parameters(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    measured = allocated_at_most(optimizer.step)
    settings = Settings(work, optimizer=torch.optim.AdamW, optimizer_options=options)
    shapes = [tuple(p.shape) for p in trained_parameters(model)]
    planned = state_bytes(settings, shapes, torch.float32).in_step
    assert abs(planned - measured) < max(0.02 * measured, 4096)


def test_the_optimizers_own_step_may_be_the_peak(small: Blueprint) -> None:
    """On a GPU torch's AdamW takes copies of all weights at once."""
    work = Workload(small, None, rows=1, length=8)
    ours, adam = plan(Settings(work)), plan(Settings(work, optimizer=torch.optim.AdamW))
    assert adam.activations == 4 * adam.trained_weights > 2 * ours.activations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
def test_is_what_a_step_on_a_gpu_allocates(small: Blueprint, subset: str, checkpointing: bool) -> None:
    config = type(small.config)(**{**small.config.to_dict(), "hidden_size": 1024, "intermediate_size": 2752})
    work = Workload(
        Blueprint("wide", config),
        SUBSETS[subset],
        rows=8,
        length=512,
        checkpointing=checkpointing,
        mixed_precision="bfloat16",
    )
    model = real_model(work).cuda()
    ids = torch.randint(0, config.vocab_size, (work.rows, work.length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, ids, mask)
        loss.backward()

    step()
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert_close(dry_run(work, "ddp", False).peak, torch.cuda.max_memory_allocated() - before, PROMISED)
