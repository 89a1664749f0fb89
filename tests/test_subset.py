"""Which weights train: patterns and names, counts and shares, and that the frozen bottom costs no backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from to_finetune.errors import UsageError
from to_finetune.model import select_trainable
from to_finetune.model.select import chosen_patterns, listed

from .helpers import LAYER_WEIGHTS, Run, assert_same_bits

PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
NORMS = ["input_layernorm", "post_attention_layernorm"]


def of_layers(*layers: int, parts: list[str] = PROJECTIONS + NORMS) -> set[str]:
    return {f"model.layers.{i}.{part}.weight" for i in layers for part in parts}


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture
def tied(tied_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tied_llama)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([r"layers\.(2|3)\."], of_layers(2, 3)),
        (["layers.3.mlp"], of_layers(3, parts=PROJECTIONS[4:])),
        (["q_proj", "layernorm"], of_layers(0, 1, 2, 3, parts=[PROJECTIONS[0], *NORMS])),
        ([r"self_attn\.[qk]_proj"], of_layers(0, 1, 2, 3, parts=PROJECTIONS[:2])),
        (["^model.layers.1.mlp.down_proj.weight$"], of_layers(1, parts=["mlp.down_proj"])),
        (
            ["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.0.self_attn.o_proj"],
            {"lm_head.weight", "model.embed_tokens.weight", *of_layers(0, parts=["self_attn.o_proj"])},
        ),
        ([r"norm\.weight$"], {"model.norm.weight", *of_layers(0, 1, 2, 3, parts=NORMS)}),
    ],
)
def test_a_pattern_selects_the_names_it_is_found_in(
    model: PreTrainedModel, patterns: list[str], names: set[str]
) -> None:
    """`re.search`, in the forms of axolotl and of Spectrum's YAML."""
    model.lm_head.requires_grad_(False)  # what trained before does not matter
    subset = select_trainable(model, patterns)
    assert set(subset.names) == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert subset.weights == sum(p.numel() for name, p in model.named_parameters() if name in names)


def test_without_patterns_everything_trains(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    subset = select_trainable(model, None)
    assert all(p.requires_grad for p in model.parameters())
    assert subset.weights == subset.total_weights == sum(p.numel() for p in model.parameters())


def test_the_table_counts_a_weight_once(model: PreTrainedModel) -> None:
    """Also where two patterns find it: each has its own row, the sum has it once."""
    total = sum(p.numel() for p in model.parameters())
    q = 64 * 64
    table = select_trainable(model, [r"layers\.3\.", r"[qx]_proj"]).table()
    rows = [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]
    assert rows == [
        [r"layers\.3\.", "9", f"{LAYER_WEIGHTS:,}", f"{100 * LAYER_WEIGHTS / total:.1f}%"],
        [r"[qx]_proj", "4", f"{4 * q:,}", f"{100 * 4 * q / total:.1f}%"],
        ["trained", "12", f"{LAYER_WEIGHTS + 3 * q:,}", f"{100 * (LAYER_WEIGHTS + 3 * q) / total:.1f}%"],
        ["all", "", f"{total:,}", ""],
    ]


def test_a_pattern_is_printed_as_it_is(
    finetune: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are no markup."""
    assert finetune(tmp_path / "out", unfrozen_parameters=["layers.3.self_attn.[qk]_proj"]).code == 0
    assert "│ layers.3.self_attn.[qk]_proj │" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_the_embedding(tied: PreTrainedModel, pattern: str) -> None:
    """Either name selects the one tensor, and it counts once."""
    subset = select_trainable(tied, [pattern])
    assert subset.names == ["model.embed_tokens.weight"]
    assert subset.weights == tied.get_input_embeddings().weight.numel()
    assert subset.total_weights == sum(p.numel() for p in tied.parameters())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.requires_grad


def test_a_tied_head_is_trained_and_loaded_again(
    finetune: Callable[..., Run], tied_llama: Path, tmp_path: Path
) -> None:
    from to_finetune.model import load_finetuned

    run = finetune(tmp_path / "out", model_name_or_path=tied_llama, unfrozen_parameters=["lm_head"])
    assert list(run.weights) == ["model.embed_tokens.weight"]
    model, _ = load_finetuned(run.folder)
    assert_same_bits(dict(model.named_parameters()), dict(run.trainer.model.named_parameters()))


def test_the_three_flags_come_to_patterns(model: PreTrainedModel, tmp_path: Path) -> None:
    """And those to the weights that are meant."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    file = tmp_path / "spectrum.yaml"
    file.write_text("unfrozen_parameters:\n- ^lm_head.weight$\n- model.layers.1.mlp.up_proj\n")
    up = of_layers(0, 1, 2, 3, parts=["mlp.up_proj"])
    for flags, names in (
        ((["layers.1."], None, None), of_layers(1)),
        (([str(file)], None, None), {"lm_head.weight", *of_layers(1, parts=["mlp.up_proj"])}),
        ((["norm.weight", str(file)], None, None), None),
        ((None, 2, None), of_layers(2, 3)),
        ((None, None, ["up_proj"]), up),
        ((None, 1, ["up_proj"]), of_layers(3, parts=["mlp.up_proj"])),
    ):
        patterns = chosen_patterns(sizes, *flags)
        assert patterns is not None
        subset = select_trainable(model, patterns)
        if names is None:
            assert patterns == ["norm.weight", "^lm_head.weight$", "model.layers.1.mlp.up_proj"]
        else:
            assert set(subset.names) == names
    assert chosen_patterns(sizes, None, None, None) is None


def test_a_file_of_patterns_may_end_in_yml(tmp_path: Path) -> None:
    (tmp_path / "subset.yml").write_text("unfrozen_parameters:\n- mlp\n")
    assert listed([str(tmp_path / "subset.yml")]) == ["mlp"]


@pytest.mark.parametrize(("last", "types"), [(1, None), (None, ["mlp"]), (1, ["mlp"])])
def test_two_ways_to_say_what_trains_are_one_too_many(last: int | None, types: list[str] | None) -> None:
    with pytest.raises(UsageError, match=r"unfrozen_parameters and unfrozen_\w+ both say what trains: use one way"):
        chosen_patterns({"model.layers.0.mlp.weight": 1}, ["mlp"], last, types)


def test_the_flags_train_what_they_say(finetune: Callable[..., Run], tmp_path: Path) -> None:
    """In a whole run, as one regular expression would, bit for bit; and config.yaml has them."""
    flags = {"unfrozen_parameters": None, "unfrozen_modules": ["up_proj", "self_attn"], "unfrozen_last_layers": 2}
    run = finetune(tmp_path / "flags", **flags)
    assert run.code == 0
    parts = [part for part in PROJECTIONS if part.startswith("self_attn") or part == "mlp.up_proj"]
    assert run.weights.keys() == of_layers(2, 3, parts=parts)
    same = finetune(tmp_path / "regex", unfrozen_parameters=[r"layers\.[23]\.(self_attn|mlp\.up_proj)"])
    assert_same_bits(run.weights, same.weights)
    config = (run.folder / "config.yaml").read_text()
    assert "unfrozen_last_layers: 2" in config


@pytest.mark.parametrize("patterns", [["layers.9"], ["layers.3", "layers.9"], ["("], []])
def test_a_pattern_that_cannot_be_is_refused(model: PreTrainedModel, patterns: list[str]) -> None:
    with pytest.raises(UsageError, match="unfrozen_parameters"):
        select_trainable(model, patterns)


def backward(model: PreTrainedModel) -> tuple[list[bool], dict[str, Tensor]]:
    """Which layers' outputs take part in the backward pass, and the gradients."""
    taking_part = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: taking_part.append(output.requires_grad))
        for layer in model.model.layers
    ]
    tokens = torch.arange(20, 40)[None]
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return taking_part[:4], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("patterns", [[r"layers\.2\."], [r"layers\.2\.mlp\.down", "lm_head"]])
def test_the_backward_pass_ends_at_the_lowest_trained_layer(model: PreTrainedModel, patterns: list[str]) -> None:
    subset = select_trainable(model, patterns)
    taking_part, gradients = backward(model)
    assert taking_part == [False, False, True, True]
    assert gradients.keys() == set(subset.names)


def test_gradient_checkpointing_changes_nothing_but_the_memory(finetune: Callable[..., Run], tmp_path: Path) -> None:
    """The same weights, bit for bit, and the backward pass ends as early: HF's would go down to the embedding."""
    options: dict[str, Any] = {"unfrozen_parameters": [r"layers\.2\."]}
    plain = finetune(tmp_path / "plain", **options)
    checkpointed = finetune(tmp_path / "checkpointed", gradient_checkpointing=True, **options)
    models = [run.trainer.model.train() for run in (plain, checkpointed)]
    assert [model.model.layers[0].gradient_checkpointing for model in models] == [False, True]
    assert_same_bits(checkpointed.weights, plain.weights)
    (_, gradients), (taking_part, checkpointed_gradients) = (backward(model) for model in models)
    assert taking_part == [False, False, True, True]
    assert_same_bits(checkpointed_gradients, gradients)


def test_reentrant_checkpoints_train_as_well(finetune: Callable[..., Run], tmp_path: Path) -> None:
    """They give no gradient unless their input requires one, which Hugging Face sees to."""
    plain = finetune(tmp_path / "plain", max_steps=2)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'}
    run = finetune(tmp_path / "run", max_steps=2, **reentrant)
    assert run.code == 0
    assert_same_bits(run.weights, plain.weights)
