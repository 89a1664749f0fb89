"""Planned weights, gradients and state beside the real ones: equal to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

from to_finetune.model import select_trainable
from to_finetune.model.load import load_model
from to_finetune.model.quantized import quantize_frozen
from to_finetune.optim import DiagonalTO, FullTO, RankOneTO
from to_finetune.planning import Blueprint, CannotSay, Settings, Workload, plan
from to_finetune.planning.dry_run import dry_run
from to_finetune.planning.memory import _quantized_bytes
from to_finetune.planning.state import state_bytes

from .measured import base_bytes, bytes_of, real_model, trained_parameters

SUBSET = (r"layers\.2\.",)


def work_of(base: Blueprint, **changed: Any) -> Workload:
    return Workload(base, **{"unfrozen_parameters": SUBSET, "rows": 1, "length": 8, "device": "cpu", **changed})


def real_state_bytes(parameters: Sequence[Tensor], optimizer: type[Any], options: dict[str, Any], steps: int) -> int:
    made = optimizer(parameters, **options)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p)
        made.step()
    return bytes_of(made)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("optimizer", [DiagonalTO, RankOneTO])
@pytest.mark.parametrize("patterns", [SUBSET, None], ids=["layer", "all"])
def test_state_of_a_trainable_optimizer(
    tiny: Blueprint, optimizer: type[Any], state_dtype: str, patterns: tuple[str, ...] | None
) -> None:
    work = work_of(tiny, unfrozen_parameters=patterns)
    options = {"state_dtype": state_dtype, "fused": False}
    real = real_state_bytes(trained_parameters(real_model(work)), optimizer, options, steps=1)
    assert plan(Settings(work, optimizer=optimizer, optimizer_options=options)).state == real


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.Adagrad, {}),
        (Adafactor, {"scale_parameter": False, "relative_step": False, "lr": 1e-3}),
        (DiagonalTO, {"skip_nonfinite": True, "fused": False}),
    ],
)
def test_state_of_other_optimizers(tiny: Blueprint, optimizer: type[Any], options: dict[str, Any]) -> None:
    work = work_of(tiny)
    real = real_state_bytes(trained_parameters(real_model(work)), optimizer, options, steps=1)
    assert plan(Settings(work, optimizer=optimizer, optimizer_options=options)).state == real


def test_state_of_adam_is_eight_bytes_a_weight(tiny: Blueprint) -> None:
    made = plan(Settings(work_of(tiny), optimizer=torch.optim.AdamW))
    assert made.state == 8 * made.trained_weights + 4 * 12  # and a step count a tensor


@pytest.mark.parametrize("bits", [8, 32])
def test_state_of_bitsandbytes(tiny: Blueprint, bits: int) -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    work, options = work_of(tiny), {"optim_bits": bits}
    real = real_state_bytes(trained_parameters(real_model(work)), optim.AdamW, options, steps=1)
    assert plan(Settings(work, optimizer=optim.AdamW, optimizer_options=options)).state == real


def test_paged_state_is_not_counted_on_the_gpu(small: Blueprint) -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    work = Workload(small, (r"layers\.5\.",), rows=1, length=8)
    whole, paged = (
        plan(Settings(work, optimizer=optim.AdamW, optimizer_options={"optim_bits": 8, "is_paged": is_paged}))
        for is_paged in (False, True)
    )
    assert paged.state + paged.host == whole.state
    assert paged.host == 2 * (
        3 * 256 * 688
    )  # of the MLP's matrices; bitsandbytes leaves smaller tensors where they are


@pytest.mark.parametrize("scope", ["tensor", "group"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 9, 20, 40])
def test_state_of_full_to_grows_with_the_steps(scope: str, state_dtype: str, steps: int) -> None:
    shapes = [(7, 4), (5,), (30,)]
    options = {"scope": scope, "state_dtype": state_dtype}
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    real = real_state_bytes(parameters, FullTO, options, steps)
    settings = Settings(
        work_of(Blueprint("none", None)),  # type: ignore[arg-type]
        optimizer=FullTO,
        optimizer_options=options,
        max_steps=steps,
    )
    assert state_bytes(settings, shapes, torch.float32).held == real


def test_state_of_full_to_without_a_number_of_steps_is_the_matrix(tiny: Blueprint) -> None:
    made = plan(Settings(work_of(tiny, unfrozen_parameters=(r"2\.self_attn\.q_proj\.weight",)), optimizer=FullTO))
    n = 64 * 64
    assert made.state == 4 * n * n + 4 * n + 4


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mixed_precision": "bfloat16"},
        {"mixed_precision": "float16", "dtype": "float32"},
        {"dtype": "bfloat16"},
        {"unfrozen_parameters": None},
        {"unfrozen_parameters": ("embed_tokens",), "mixed_precision": "bfloat16"},  # with the tied head
    ],
    ids=str,
)
def test_weights_and_gradients(tiny: Blueprint, changed: dict[str, Any]) -> None:
    work = work_of(tiny, **changed)
    model = real_model(work)
    for p in trained_parameters(model):
        p.grad = torch.zeros_like(p)
    made = plan(Settings(work))
    parameters = list(model.parameters())
    assert made.trained == sum(p.nbytes for p in parameters if p.requires_grad)
    assert made.frozen == sum(p.nbytes for p in parameters if not p.requires_grad)
    assert made.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert made.buffers == sum(b.nbytes for b in model.buffers())
    assert made.total_weights == sum(p.numel() for p in parameters)
    assert made.trained_weights == sum(p.numel() for p in parameters if p.requires_grad)


def test_quantized_weights_of_the_base(small: Blueprint) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weights = [w for w in dry_run(work_of(small), "ddp", False).weights if w.quantized_rows]
    assert len(weights) == 5 * 7  # of the frozen layers; not the head
    for w in {w.shape: w for w in weights}.values():
        matrix = torch.randn(w.shape)
        nf4 = bnb.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
        state = nf4.quant_state
        assert _quantized_bytes(w, "4bit") == nf4.data.nbytes + state.absmax.nbytes + state.code.nbytes
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(w.shape, dtype=torch.float16))
        assert _quantized_bytes(w, "8bit") == codes.nbytes + scales.nbytes


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base_of_conv1d(gpt2: Blueprint, tmp_path: Path, quantization: Literal["8bit", "4bit"]) -> None:
    """GPT-2's linear layers, whose weights are (inputs, outputs)."""
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_config(gpt2.config)
    model.save_pretrained(tmp_path)
    select_trainable(model, [r"h\.2\."])
    config = quantize_frozen(quantization, model, torch.float32)
    loaded = load_model(str(tmp_path), quantization_config=config)
    select_trainable(loaded, [r"h\.2\."])
    made = plan(Settings(work_of(gpt2, unfrozen_parameters=(r"h\.2\.",), quantization=quantization)))
    assert made.frozen == base_bytes(loaded)


def test_a_quantized_base_leaves_the_rest_as_it_is(small: Blueprint) -> None:
    whole, quantized = (plan(Settings(work_of(small, quantization=q))) for q in (None, "4bit"))
    weights = dry_run(work_of(small), "ddp", False).weights
    linear = [w for w in weights if w.quantized_rows]
    assert whole.frozen - quantized.frozen == sum(4 * w.numel - _quantized_bytes(w, "4bit") for w in linear)
    assert (whole.trained, whole.gradients, whole.state) == (quantized.trained, quantized.gradients, quantized.state)


class Peculiar(torch.optim.Optimizer):
    """Its state depends on the gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = p.grad[: int(p.grad.abs().sum().item())]


@pytest.mark.parametrize("optimizer", [Peculiar, lambda params: None], ids=["class", "factory"])
def test_an_optimizer_that_cannot_be_planned_is_not_guessed(tiny: Blueprint, optimizer: Any) -> None:
    with pytest.raises(CannotSay, match="The state of"):
        plan(Settings(work_of(tiny), optimizer=optimizer))


def test_leaves_no_trace(tiny: Blueprint) -> None:
    """A run that plans first must draw the same random numbers, and use TRL's own kernels."""
    from trl.kernels import chunked_logprob

    before, kernels = torch.get_rng_state(), dict(vars(chunked_logprob))
    dry_run.cache_clear()
    plan(Settings(work_of(tiny, device="cuda")))
    assert torch.equal(before, torch.get_rng_state())
    assert dict(vars(chunked_logprob)) == kernels
    assert type(torch.zeros(1)) is Tensor
