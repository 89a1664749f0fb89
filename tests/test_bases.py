"""What the trained part stands on: a base in 8 or 4 bits, adapters on any base, and how it attends."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from to_finetune.errors import UsageError
from to_finetune.model import load_finetuned, load_trained, quantized, save_trained
from to_finetune.model.adapters import lora_config, with_adapters
from to_finetune.model.load import load_model, load_tokenizer, without_weights
from to_finetune.model.trained import read_trained, trained_tensors
from to_finetune.optim import DiagonalTO, RankOneTO, TrainableOptimizer
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import prepare_model, prepare_trainer
from to_finetune.training.proofs import fingerprints

from .helpers import Run, assert_same_bits, flags
from .layouts.on_cpu import ROOT, launch
from .test_subset import backward

bnb = pytest.importorskip("bitsandbytes")

Finetune = Callable[..., Run]
BITS = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
LORA: dict[str, Any] = {"use_peft": True, "unfrozen_parameters": None}
RUNS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
    "lora": LORA,
    "rank_one_lora": {**LORA, "optim": "rank_one_to"},
    "qlora": {**LORA, "load_in_4bit": True, "bf16": True, "lora_target_modules": ["all-linear"]},
    "8bit_lora": {**LORA, "load_in_8bit": True},
}

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "val_set_size": 4, "lr_scheduler_type": "constant"}


def prepared(model: Path, **options: Any) -> tuple[Any, Any]:
    """The model and the subset that a run with these flags would begin with."""
    given = {"model_name_or_path": model, "dataset_name": "-", "use_cpu": True, "bf16": False, **options}
    model_args, _, args = parse_arguments(flags(**given))
    return prepare_model(model_args, args)


def dequantised(module: nn.Module) -> Tensor:
    """What a quantised layer's weights stand for, (out, in) float32."""
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scale = weight.SCB if weight.SCB is not None else module.state.SCB
    return weight.data.float() * scale[:, None] / 127


def quantised(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(finetune: Finetune, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A whole run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: finetune(folder / name, **OPTIONS, **own) for name, own in RUNS.items()}


@pytest.fixture(scope="module")
def tall(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of twelve layers: 1 is the beginning of 10 and 11."""
    folder = tmp_path_factory.mktemp("models") / "tall"
    config = LlamaConfig.from_pretrained(llama, num_hidden_layers=12)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose projections have biases, which are not zero."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    shape = LlamaConfig.from_pretrained(llama).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**{name: shape[name] for name in names}, num_key_value_heads=4))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


# A base in 8 or 4 bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({"unfrozen_parameters": [r"layers\.1\."]}, {f"layers.1.{m}" for m in ("self_attn", "mlp")}),
        ({"unfrozen_last_layers": 1}, {f"layers.11.{m}" for m in ("self_attn", "mlp")}),
        ({"unfrozen_modules": ["up_proj"], "unfrozen_last_layers": 2}, {"layers.10.mlp.up", "layers.11.mlp.up"}),
        ({"unfrozen_modules": ["lm_head"]}, set()),
    ],
    ids=["layer", "last", "modules", "head"],
)
def test_only_linear_layers_that_do_not_train_are_quantised(
    tall: Path, bits: str, chosen: dict[str, Any], kept: set[str]
) -> None:
    model, subset = prepared(tall, **BITS[bits], **chosen)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name != "lm_head" and not any(f".{part}" in name for part in kept)}
    assert set(quantised(model)) == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(subset.names)
    assert subset.total_weights == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tall).parameters())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"bf16": True, "dtype": "float32"}, torch.float32),
    ],
    ids=["float32", "mixed", "bfloat16", "mixed on float32"],
)
def test_what_trains_begins_as_the_bases_own_bits(
    llama: Path, tmp_path: Path, bits: str, precision: dict[str, Any], dtype: torch.dtype
) -> None:
    """In the dtype asked for, also when TRL has made its trainer of it, which would round it to bfloat16."""
    options = {**BITS[bits], **precision, "unfrozen_last_layers": 1}
    given = {"model_name_or_path": llama, "dataset_name": "-", "use_cpu": True, "output_dir": tmp_path, **options}
    model_args, _, args = parse_arguments(flags(**given))
    model, subset = prepare_model(model_args, args)
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "red", "completion": "tree"}])
    model = prepare_trainer(model, load_tokenizer(str(llama)), args, rows, None).model
    loaded = torch.bfloat16 if precision and precision.get("dtype") != "float32" else torch.float32
    base = dict(LlamaForCausalLM.from_pretrained(llama, dtype=loaded).named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(subset.names) == len(trained) == 9
    assert_same_bits(trained, {name: base[name].to(dtype) for name in subset.names})
    assert {p.dtype for p in trained.values()} == {dtype}
    assert model.lm_head.weight.dtype == loaded
    if bits == "4bit":
        compute = torch.bfloat16 if precision else torch.float32
        assert {module.compute_dtype for module in quantised(model).values()} == {compute}


@pytest.mark.parametrize("bits", BITS)
def test_the_frozen_layers_are_the_bases_to_a_step_of_the_format(llama: Path, bits: str) -> None:
    """nf4: in blocks of 64 half the widest gap of its values, 0.152 of the largest; int8: half a 127th of a row's."""
    model, _ = prepared(llama, **BITS[bits], unfrozen_last_layers=1)
    base = dict(LlamaForCausalLM.from_pretrained(llama).named_parameters())
    for name, module in quantised(model).items():
        weight, found = base[f"{name}.weight"], dequantised(module)
        blocks = weight.reshape(-1, 64) if bits == "4bit" else weight
        step = blocks.abs().amax(1, keepdim=True) * (0.1520 if bits == "4bit" else 0.5 / 127)
        difference = (found - weight).abs().reshape(blocks.shape)
        assert (difference <= 1.001 * step + 2**-11 * blocks.abs()).all(), name  # int8 is rounded from float16
        assert difference.max() > 0
    if bits == "4bit":
        assert {module.weight.quant_state.quant_type for module in quantised(model).values()} == {"nf4"}


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_dequantised_model(llama: Path, bits: str) -> None:
    """Of the same model with ordinary weights of the same values, through the quantised layers above the trained."""
    model, _ = prepared(llama, **BITS[bits], unfrozen_parameters=[r"layers\.1\."])
    reference = LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for name, module in quantised(model).items():
            reference.get_submodule(name).weight.copy_(dequantised(module))
    for name, p in reference.named_parameters():
        p.requires_grad_("layers.1." in name)
    (_, found), (_, expected) = backward(model.train()), backward(reference.train())
    assert found.keys() == expected.keys()
    assert len(found) == 9
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("optimizer", [DiagonalTO, RankOneTO])
def test_a_step_is_the_optimizers_on_the_same_gradients(
    llama: Path, bits: str, optimizer: type[TrainableOptimizer]
) -> None:
    model, _ = prepared(llama, **BITS[bits], unfrozen_parameters=[r"layers\.1\."])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = [Parameter(p.detach().clone()) for p in trained]
    options: dict[str, Any] = {"lr": 0.01, "alpha": 0.3, "beta": 0.1, "grad_scale": "rms", "relative_alpha": True}
    ours, theirs = optimizer(trained, **options), optimizer(alone, **options)
    for _ in range(3):
        backward(model.train())
        for p, q in zip(trained, alone, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(trained, alone, strict=True))
    assert_same_bits({name: p for name, p in model.named_parameters() if not p.requires_grad}, frozen)


@pytest.mark.parametrize("bits", BITS)
def test_checkpointing_changes_no_bit_on_a_quantised_base(finetune: Finetune, tmp_path: Path, bits: str) -> None:
    """And the backward pass ends at the lowest trained layer, with it and without."""
    options = {**BITS[bits], "unfrozen_parameters": [r"layers\.2\."]}
    plain = finetune(tmp_path / "plain", **options)
    checkpointed = finetune(tmp_path / "checkpointed", gradient_checkpointing=True, **options)
    assert checkpointed.trainer.model.model.layers[0].gradient_checkpointing
    assert_same_bits(checkpointed.weights, plain.weights)
    models = [run.trainer.model.train() for run in (plain, checkpointed)]
    (taking_part, gradients), (taking_part_again, gradients_again) = (backward(model) for model in models)
    assert taking_part == taking_part_again == [False, False, True, True]
    assert_same_bits(gradients_again, gradients)


@pytest.mark.parametrize(
    ("bits", "chosen", "precision"),
    [
        ("8bit", "embed_tokens", {}),  # float32 comes in, on bfloat16 biases
        ("4bit", "norm", {"dtype": "float32"}),  # bfloat16, on float32 ones
        ("8bit", r"layers\.2\..*bias", {"dtype": "float32"}),
    ],
)
def test_biases_that_bitsandbytes_casts_do_not_count_as_moved(
    finetune: Finetune, qwen: Path, tmp_path: Path, bits: str, chosen: str, precision: dict[str, Any]
) -> None:
    """It casts them where they are, to the dtype of whatever comes in; those that train stay as they are."""
    options = {"model_name_or_path": qwen, "unfrozen_parameters": [chosen], "bf16": True, "max_steps": 2}
    run = finetune(tmp_path / "run", **options, **BITS[bits], **precision)
    assert run.code == 0
    assert {weight.dtype for weight in run.weights.values()} == {torch.float32}
    assert run.record["proofs"]["moved_after_first_step"] >= 1


def test_an_evaluation_does_not_pack_the_weights_anew(llama: Path) -> None:
    """As bitsandbytes does on CPUs with bfloat16 instructions: after it, no gradient came through."""
    with mock.patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=True):
        model, _ = prepared(llama, load_in_4bit=True, unfrozen_parameters=[r"layers\.1\."])
    before = bits_of(model)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        model.eval()(tokens)
    assert_same_bits(bits_of(model), before)
    assert len(backward(model.train())[1]) == 9


@pytest.mark.parametrize("bits", BITS)
def test_a_fingerprint_changes_with_a_bit_of_a_quantised_weight(llama: Path, bits: str) -> None:
    model, _ = prepared(llama, **BITS[bits], unfrozen_last_layers=1)
    before = fingerprints(model)
    weight = model.model.layers[2].self_attn.k_proj.weight
    weight.data.view(torch.uint8).view(-1)[5] ^= 1
    after = fingerprints(model)
    assert {name for name in before if before[name] != after[name]} == {"model.layers.2.self_attn.k_proj.weight"}


def test_a_base_that_is_stored_quantised_trains_no_quantised_weight(llama: Path, tmp_path: Path) -> None:
    """Its norms it may."""
    model, _ = prepared(llama, load_in_4bit=True, unfrozen_modules=["lm_head"])
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"'model\.layers\.3\.self_attn\.q_proj\.weight', which is quantised"):
        prepared(tmp_path, unfrozen_last_layers=1)
    model, subset = prepared(tmp_path, unfrozen_parameters=["layernorm"])
    assert len(subset.names) == 8
    assert len(quantised(model)) == 28
    assert len(backward(model)[1]) == 8


@pytest.mark.parametrize("columns", [32, 64, 100])
def test_rows_that_bitsandbytes_misreads_are_known(columns: int) -> None:
    """On a CPU that misreads none, none are."""
    codes, state = bnb.functional.quantize_4bit(torch.randn(64, columns), quant_type="nf4", compress_statistics=False)
    halves = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), dim=1).int()
    meant = state.code[halves].view(-1, state.blocksize) * state.absmax[:, None]
    found = bnb.functional.dequantize_4bit(codes, state)
    assert quantized._reads_rows_of(columns) == torch.allclose(found.flatten(), meant.flatten())


def test_a_base_that_bitsandbytes_misreads_is_refused(llama: Path) -> None:
    with (
        mock.patch.object(quantized, "_reads_rows_of", side_effect=lambda columns: columns != 64),
        pytest.raises(UsageError, match=r"misreads 'model\.layers\.0\.self_attn\.q_proj' on this CPU, .* rows of 64,"),
    ):
        prepared(llama, load_in_4bit=True, unfrozen_last_layers=1)


def test_without_bitsandbytes_the_extra_is_named(llama: Path) -> None:
    with (
        mock.patch("to_finetune.model.quantized.find_spec", return_value=None),
        pytest.raises(UsageError, match=r"load_in_4bit needs bitsandbytes: pip install 'to-finetune\[quantized\]'"),
    ):
        prepared(llama, load_in_4bit=True, unfrozen_last_layers=1)


# Adapters


def test_adapters_of_the_rank_asked_for_are_all_that_trains(llama: Path) -> None:
    model, subset = prepared(llama, use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "down_proj"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = {"q_proj": 4 * (64 + 64), "down_proj": 4 * (64 + 64)}
    assert [(m.pattern, m.tensors, m.weights) for m in subset.matches] == [
        ("q_proj: LoRA of rank 4", 8, 4 * sizes["q_proj"]),
        ("down_proj: LoRA of rank 4", 8, 4 * sizes["down_proj"]),
    ]
    assert subset.names == list(trained)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert subset.weights == sum(p.numel() for p in trained.values()) == 4 * sum(sizes.values())
    base = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(llama).parameters())
    assert subset.total_weights == base + subset.weights
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 2.0}


@pytest.mark.parametrize("base", [{}, *BITS.values()], ids=["full", *BITS])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"dtype": "bfloat16"}], ids=str)
def test_adapters_are_float32_on_any_base(llama: Path, base: dict[str, Any], precision: dict[str, Any]) -> None:
    model, _ = prepared(llama, use_peft=True, **base, **precision)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert len(quantised(model)) == (28 if base else 0)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_proves_itself(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert run.code == 0
    proofs = run.record["proofs"]
    adapters = {"lora": 16, "rank_one_lora": 16, "8bit_lora": 16, "qlora": 56}.get(name)
    assert proofs["trained_tensors"] == (adapters or 9)
    assert proofs["moved_after_first_step"] == (adapters // 2 if adapters else 9)  # B is zero, so A has no gradient yet
    assert proofs["never_moved"] == []
    assert proofs["frozen_tensors_unmoved"] == (39 if adapters else 30)
    saved = run.weights
    assert proofs["saved_bytes_read_back"] == sum(4 * tensor.numel() for tensor in saved.values())
    assert_same_bits(saved, trained_tensors(run.trainer.model))


@pytest.mark.parametrize("name", RUNS)
def test_every_frozen_tensor_ends_as_it_began(runs: dict[str, Run], llama: Path, name: str) -> None:
    options = {"unfrozen_parameters": [r"layers\.3\."], **RUNS[name]}
    options.pop("optim", None)
    before, _ = prepared(llama, **options)
    after = runs[name].trainer.model
    frozen = {name for name, p in before.named_parameters() if not p.requires_grad}
    assert_same_bits(
        {name: p for name, p in after.named_parameters() if name in frozen},
        {name: p for name, p in before.named_parameters() if name in frozen},
    )
    assert frozen == {name for name, p in after.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("folder", [".", "checkpoint-4"])
def test_load_finetuned_on_the_base_it_had_gives_the_live_models_logits(
    runs: dict[str, Run], name: str, folder: str
) -> None:
    run, own = runs[name], RUNS[name]
    bits: Any = "4bit" if "load_in_4bit" in own else "8bit" if "load_in_8bit" in own else None
    tokens = torch.arange(40)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        live = run.trainer.model.eval()
        if own.get("bf16"):  # whose loaded weights are bfloat16: the quantised ones are others than float32's
            model, _ = load_finetuned(run.folder / folder, torch.bfloat16, bits)
            assert_same_bits(trained_tensors(live), read_trained(run.folder / folder)[0])
        else:
            model, _ = load_finetuned(run.folder / folder, quantization=bits)
            assert torch.equal(model.eval()(tokens).logits, live(tokens).logits)
        assert bool(quantised(model)) == bool(bits)
        full, _ = load_finetuned(run.folder / folder)
        assert not quantised(full)
        for module_name, module in quantised(live).items():  # all else is the same
            full.get_submodule(module_name).weight.copy_(dequantised(module))
        is_coarse = bits == "8bit" or own.get("bf16")  # inputs are rounded to int8, or products to bfloat16
        assert (full.eval()(tokens).logits - live(tokens).logits).abs().max() < (0.1 if is_coarse else 1e-5)


def test_adapters_are_saved_as_peft_saves_them(runs: dict[str, Run], llama: Path, tmp_path: Path) -> None:
    """The same bytes, and peft reads them."""
    run = runs["lora"]
    run.trainer.model.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    assert (run.folder / name).read_bytes() == (tmp_path / name).read_bytes()
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (run.folder, tmp_path))
    assert {**ours, "target_modules": None} == {**theirs, "target_modules": None}
    assert set(ours["target_modules"]) == set(theirs["target_modules"]) == {"q_proj", "v_proj"}
    assert ours["base_model_name_or_path"] == str(llama)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), run.folder)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, run.trainer.model.eval()(tokens).logits)
    assert not (run.folder / "trained.safetensors").exists()
    assert not list(run.folder.rglob("*.partial"))


def test_a_checkpoint_of_adapters_holds_them_and_their_state_alone(runs: dict[str, Run]) -> None:
    folder = runs["lora"].folder / "checkpoint-4"
    weights = sum(tensor.numel() for tensor in read_trained(folder)[0].values())
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    state = sum(file.stat().st_size for file in (folder / "to_state").iterdir())
    assert 8 * weights < state < 8 * weights + 48 * 2_000


@pytest.mark.parametrize("name", ["4bit", "rank_one_lora", "qlora"])
def test_a_resumed_run_ends_in_the_same_bits(
    runs: dict[str, Run], finetune: Finetune, tmp_path: Path, name: str
) -> None:
    """Dropout and all."""
    options = {**OPTIONS, **RUNS[name]}
    assert finetune(tmp_path, **options, max_steps=2).code == 0
    resumed = finetune(tmp_path, **options, resume_from_checkpoint=True)
    assert resumed.code == 0
    assert resumed.losses == runs[name].losses
    assert_same_bits(resumed.weights, runs[name].weights)


def test_its_config_repeats_a_run_of_adapters(runs: dict[str, Run], tmp_path: Path) -> None:
    """They begin at random: with the run's seed, whatever was drawn before."""
    from to_finetune.finetune import main

    torch.rand(3)
    assert main(["--config", str(runs["qlora"].folder / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same_bits(read_trained(tmp_path / "again")[0], runs["qlora"].weights)


@pytest.mark.parametrize("name", ["lora", "4bit"])
def test_the_best_model_is_loaded_at_the_end(finetune: Finetune, tmp_path: Path, name: str) -> None:
    """At a rate that makes it worse again before the end."""
    run = finetune(
        tmp_path / "run",
        **RUNS[name],
        learning_rate=10.0,
        val_set_size=6,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    assert run.code == 0
    best = Path(run.trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    assert_same_bits(run.weights, read_trained(best)[0])
    assert_same_bits(trained_tensors(run.trainer.model), read_trained(best)[0])


@pytest.mark.parametrize("layout", ["ddp", "zero2"])
def test_two_processes_end_where_one_does(
    layout: str, finetune: Finetune, llama: Path, alpaca: Path, tmp_path: Path
) -> None:
    """On a quantised base. `tests/layouts` has adapters on an ordinary one."""
    if layout == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    own: dict[str, dict[str, Any]] = {
        "4bit": {"load_in_4bit": True, "unfrozen_last_layers": 1},
        "8bit": {"load_in_8bit": True, "unfrozen_last_layers": 1},
        "qlora": {"load_in_4bit": True, "use_peft": True, "lora_dropout": 0},
    }
    options = {"model_name_or_path": llama, "dataset_name": alpaca, "use_cpu": True, "max_steps": 4, "save_steps": 2}
    each = [flags(**own[name], output_dir=tmp_path / "two" / name) for name in own]
    config = ROOT / "configs" / "accelerate" / f"{layout}.yaml"
    done = launch(config, 2, *flags(**options, per_device_train_batch_size=2, report_to="none"), RUNS=json.dumps(each))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in own:
        one = finetune(tmp_path / "one" / name, **options, **{"unfrozen_parameters": None, **own[name]})
        two = Run(0, tmp_path / "two" / name, None)
        assert two.weights.keys() == one.weights.keys()
        for key, tensor in one.weights.items():
            torch.testing.assert_close(two.weights[key], tensor, rtol=1e-4, atol=2e-6)


def test_adapters_of_another_model_do_not_load(runs: dict[str, Run], llama: Path, qwen: Path, tmp_path: Path) -> None:
    model = with_adapters(AutoModelForCausalLM.from_pretrained(llama), lora_config(4, 8, 0.0, None))
    with pytest.raises(UsageError, match=r"lora_A\.weight' has shape \(16, 64\), the model's \(4, 64\)"):
        load_trained(model, runs["lora"].folder)
    model = with_adapters(AutoModelForCausalLM.from_pretrained(llama), lora_config(16, 8, 0.0, ["up_proj"]))
    with pytest.raises(UsageError, match=r"q_proj.* is no parameter of this PeftModelForCausalLM"):
        load_trained(model, runs["lora"].folder)
    damaged = tmp_path / "damaged"
    save_trained(model, damaged)
    (damaged / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"adapter_config\.json is damaged"):
        load_finetuned(damaged)
    (damaged / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json"):
        load_finetuned(damaged)


# What is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": (
        {"load_in_8bit": True, "load_in_4bit": True, "unfrozen_last_layers": 1},
        "load_in_8bit and load_in_4bit exclude each other: choose one.",
    ),
    "quantised and all trains": ({"load_in_4bit": True}, "load_in_4bit holds what is frozen, and everything would"),
    "no layers": ({"load_in_4bit": True, "unfrozen_last_layers": 0}, "The last 0 layers cannot be trained"),
    "adapters and weights": (
        {"use_peft": True, "unfrozen_parameters": ["layers"]},
        "use_peft trains adapters and freezes all weights, so leave unfrozen_parameters out.",
    ),
    "adapters and layers": ({"use_peft": True, "unfrozen_last_layers": 1}, "leave unfrozen_last_layers out."),
    "adapters and modules": ({"use_peft": True, "unfrozen_modules": ["mlp"]}, "leave unfrozen_modules out."),
    "rank without adapters": ({"lora_r": 4}, "lora_r=4 needs --use_peft true."),
    "dropout without adapters": ({"lora_dropout": 0.1}, "lora_dropout=0.1 needs --use_peft true."),
    "no rank": ({"use_peft": True, "lora_r": 0}, "lora_r=0 is not valid: at least 1."),
    "no scale": ({"use_peft": True, "lora_alpha": 0}, "lora_alpha=0 is not valid: above 0."),
    "all dropped": ({"use_peft": True, "lora_dropout": 1}, "lora_dropout=1.0 is not valid: at least 0 and below 1."),
    "target that is none": (
        {"use_peft": True, "lora_target_modules": ["q_proj", "v_prj"]},
        "lora_target_modules: no linear layer or embedding is called 'v_prj'. Did you mean 'v_proj'",
    ),
    "target far from any": (
        {"use_peft": True, "lora_target_modules": ["xyz"]},
        "is called 'xyz'. There are down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_pr",
    ),
    "target that is a block": ({"use_peft": True, "lora_target_modules": ["mlp"]}, "is called 'mlp'."),
    "all and some": (
        {"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]},
        "lora_target_modules: all-linear stands for all of them, so leave the others out.",
    ),
    "two ways": (
        {"unfrozen_parameters": ["mlp"], "unfrozen_last_layers": 1},
        "unfrozen_parameters and unfrozen_last_layers both say what trains: use one way.",
    ),
    "module that is none": ({"unfrozen_modules": ["q_prj"]}, "is called 'q_prj'. Did you mean 'q_proj'"),
    "attention that is none": (
        {"attn_implementation": "sdap"},
        "attn_implementation='sdap' is not available. Did you mean 'sdpa'?",
    ),
    "attention that is not installed": (
        {"attn_implementation": "flash_attention_2"},
        "attn_implementation='flash_attention_2' is not available.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_said_in_a_sentence_before_anything_is_loaded(
    case: str, finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, sentence = REFUSED[case]
    if case == "attention that is not installed" and find_spec("flash_attn"):
        pytest.skip("it is installed")
    with mock.patch("to_finetune.training.prepare.load_model") as loaded:
        run = finetune(tmp_path / "out", **{"unfrozen_parameters": None, **options})
    assert run.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert len(error) < 600
    loaded.assert_not_called()
    assert not any(run.folder.rglob("*"))


@pytest.mark.parametrize("case", ["FSDP", "ZeRO-3"])
def test_quantised_weights_are_not_shared_out(llama: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model_name_or_path": llama, "dataset_name": "-", "use_cpu": True, "load_in_8bit": True}
    model_args, _, args = parse_arguments(flags(**options, unfrozen_last_layers=1))
    if case == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        args.deepspeed_plugin = mock.Mock(zero_stage=3)
    with pytest.raises(UsageError, match=rf"load_in_8bit under {case}: quantised weights cannot be shared out"):
        prepare_model(model_args, args)
    if case == "ZeRO-3":
        args.deepspeed_plugin.zero_stage = 2
        assert quantised(prepare_model(model_args, args)[0])


def test_where_deepspeed_shares_models_out_the_one_without_weights_stays_whole(llama: Path) -> None:
    """Else what trains would be chosen among, and counted in, parameters of no weights."""
    pytest.importorskip("deepspeed")
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    model = without_weights(str(llama))
    assert sum(p.numel() for p in model.parameters()) == 153_408
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert is_deepspeed_zero3_enabled()
    del config  # which turns it off


# Attention


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_is_the_one_that_was_asked_for(llama: Path, name: str) -> None:
    model, _ = prepared(llama, attn_implementation=name, unfrozen_last_layers=1)
    assert model.config._attn_implementation == name
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        other = load_model(str(llama))
        torch.testing.assert_close(model.eval()(tokens).logits, other.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
