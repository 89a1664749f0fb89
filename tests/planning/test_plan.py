"""Whole plans: Llama-7B's, the layouts', what fits and what would, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from to_finetune.errors import UsageError
from to_finetune.planning import (
    GPUS,
    LAYOUTS,
    Blueprint,
    CannotSay,
    Lora,
    Settings,
    Workload,
    load_blueprint,
    pick_subset,
    plan,
    plan_table,
    proposals,
    proposals_text,
    speed,
    verdict,
)
from to_finetune.planning.dry_run import dry_run
from to_finetune.planning.fit import _quantized_base, _smaller_batches, _smaller_state
from to_finetune.units import parse_size

LAST_TWO = (r"model\.layers\.(30|31)\.",)
TRAINED = 404_766_720


@pytest.fixture(scope="module")
def six_layers(llama_7b: Blueprint) -> Blueprint:
    return Blueprint("six layers", type(llama_7b.config)(**{**llama_7b.config.to_dict(), "num_hidden_layers": 6}))


@pytest.fixture(scope="module")
def recipe(llama_7b: Blueprint) -> Settings:
    """configs/recipes/llama-7b-last2.yaml."""
    work = Workload(
        llama_7b, LAST_TWO, rows=8, length=512, mixed_precision="bfloat16", checkpointing=True, attention=None
    )
    return Settings(work, accumulation=16)


def test_llama_7b_from_its_configuration_alone(recipe: Settings) -> None:
    made = plan(recipe)
    assert made.total_weights == 6_738_415_616
    assert made.trained_weights == TRAINED
    assert made.frozen == 2 * (6_738_415_616 - TRAINED)
    assert made.trained == made.gradients == 4 * TRAINED
    assert made.state == 8 * TRAINED + 4 * 18
    assert made.frozen + made.trained + made.gradients + made.state == pytest.approx(19.1e9, abs=5e7)  # the README's
    assert made.fits(parse_size("24GB"))
    assert not made.fits(parse_size("20GB"))
    # The head and the backward pass of two layers; attention and what is recomputed add a little.
    assert made.flops_per_token == pytest.approx(2 * 6.607e9 + 4 * TRAINED, rel=0.1)


def test_checkpointing_and_smaller_batches_need_less(six_layers: Blueprint) -> None:
    work = Workload(six_layers, (r"layers\.[45]\.",), rows=8, length=512, mixed_precision="bfloat16")
    lean = replace(work, checkpointing=True)
    tried = (work, lean, replace(lean, rows=4), replace(lean, rows=1))
    activations = [plan(Settings(w, accumulation=16)).activations for w in tried]
    assert activations == sorted(activations, reverse=True)
    assert len(set(activations)) == 4


def test_a_file_is_as_good_as_a_folder(config_file: Path, llama_7b: Blueprint) -> None:
    ours, theirs = load_blueprint(str(config_file)).config.to_dict(), llama_7b.config.to_dict()
    assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        load_blueprint(str(tmp_path))
    with pytest.raises(UsageError, match=r"nobody/nothing.*cannot be loaded"):
        load_blueprint("nobody/nothing")


def test_what_the_layouts_hold(recipe: Settings) -> None:
    """The README's table: 8 GPUs, without activations and buffers."""
    made = {name: plan(replace(recipe, layout=name, processes=8)) for name in LAYOUTS}
    held = {name: m.frozen + m.trained + m.gradients + m.state for name, m in made.items()}
    assert held["ddp"] == held["multi_node"] == pytest.approx(19.1e9, abs=5e7)
    assert held["zero1"] == pytest.approx(14.9e9, abs=5e7)
    assert held["zero2"] == pytest.approx(14.2e9, abs=5e7)
    assert held["fsdp2"] == pytest.approx(2.4e9, abs=5e7)
    assert held["zero3"] == pytest.approx(2.4e9, abs=5e7)
    assert made["ddp"].buffers - plan(recipe).buffers == 4 * TRAINED
    for name in ("zero2_offload", "zero3_offload"):
        assert made[name].state == made[name].gradients == 0
        assert made[name].host > 12 * TRAINED / 8
        assert made[name].total < made[name.removesuffix("_offload")].total


def test_shares_add_up(tiny: Blueprint) -> None:
    """What four processes hold is what one holds, and padding."""
    work = Workload(tiny, (r"layers\.2\.",), rows=1, length=8, device="cpu")
    for layout in ("fsdp2", "zero1", "zero2"):
        one, four = (plan(Settings(work, layout=layout, processes=count)) for count in (1, 4))
        assert one.state <= 4 * four.state < 1.02 * one.state


def test_gradients_are_counted_once_in_every_layout(small: Blueprint) -> None:
    """Where they are kept they are in the run's peak; where each is shared out at once they are not."""
    work = Workload(small, None, rows=1, length=8)
    made = {name: plan(Settings(work, layout=name, processes=2)) for name in LAYOUTS}
    assert made["zero1"].activations == made["ddp"].activations
    for name in ("fsdp2", "zero2", "zero3"):
        assert made[name].activations < made["ddp"].activations + made["ddp"].gradients / 2


def test_what_fsdp2_has_whole_at_once(small: Blueprint) -> None:
    """Two layers and the buffer they arrive in, the gradients of one and the buffer they leave in; and the head."""
    made = plan(Settings(Workload(small, (r"layers\.5\.",), rows=1, length=8), layout="fsdp2", processes=2))
    alone = plan(replace(made.settings, processes=1))
    assert made.buffers - alone.buffers == 4 * (5 * made.trained_weights + 2000 * 256)


def test_what_zero3_gathers(small: Blueprint) -> None:
    work = Workload(small, (r"layers\.5\.",), rows=1, length=8)
    two, three = (plan(Settings(work, layout=layout, processes=2)) for layout in ("zero2", "zero3"))
    assert three.buffers - two.buffers == 4 * three.total_weights


def test_what_lies_in_the_cpus_memory_and_on_disk(small: Blueprint) -> None:
    """State, 32-bit weights and gradients, 16-bit ones on their way; a TO saves DeepSpeed's 32-bit weights."""
    work = Workload(small, None, rows=1, length=8, mixed_precision="bfloat16")
    made = plan(Settings(work, layout="zero2_offload", processes=2))
    assert made.host * 2 / made.trained_weights - (8 + 2 * 4 + 2) < 0.01
    assert made.host * 2 / made.trained_weights >= 8 + 2 * 4 + 2
    assert made.saved == 4 * made.trained_weights
    adapters = Workload(small, rows=1, length=8, dtype="bfloat16", lora=Lora(4))
    made = plan(Settings(adapters, layout="fsdp2", processes=2))
    assert made.saved == 4 * made.trained_weights  # float32 on any base


def test_proposes_the_mildest_change_that_fits(small: Blueprint) -> None:
    work = Workload(small, (r"layers\.[3-5]\.",), rows=8, length=128, device="cpu")
    settings = Settings(work)
    with_checkpointing = plan(replace(settings, work=replace(work, checkpointing=True))).total
    one_layer = plan(replace(settings, work=replace(work, unfrozen_parameters=(r"layers\.5\.",))))

    nearest, fewer = proposals(settings, max(with_checkpointing, one_layer.total))
    assert nearest.changes == ("--gradient_checkpointing true",)
    assert nearest.plan.total == with_checkpointing
    assert fewer.changes == ("--unfrozen_last_layers 1",)
    assert fewer.plan.total == one_layer.total

    (nearest,) = proposals(settings, with_checkpointing - 1)
    assert nearest.changes == ("--per_device_train_batch_size 4 --gradient_accumulation_steps 2",)


def test_proposes_several_changes_where_one_is_not_enough(small: Blueprint) -> None:
    work = Workload(small, (r"layers\.[3-5]\.",), rows=8, length=128, device="cpu")
    settings = Settings(work)
    lean = replace(settings, work=replace(work, rows=1, checkpointing=True), accumulation=8)
    lean = replace(lean, optimizer_options={"state_dtype": "bfloat16"})
    nearest = proposals(settings, plan(lean).total)[0]
    assert len(nearest.changes) > 1
    assert nearest.plan.total <= plan(lean).total
    assert nearest.plan.trained_weights == plan(settings).trained_weights
    assert nearest.plan.settings.tokens_per_step == settings.tokens_per_step


def test_the_last_resort_is_fewer_layers_with_all_that_helps(small: Blueprint) -> None:
    work = Workload(small, (r"layers\.[3-5]\.",), rows=8, length=128, device="cpu")
    lean = replace(work, unfrozen_parameters=(r"layers\.5\.",), rows=1, checkpointing=True, quantization="4bit")
    least = plan(Settings(lean, accumulation=8, optimizer_options={"state_dtype": "int8"})).total
    (only,) = proposals(Settings(work), least)
    assert only.plan.total == least
    assert only.changes[-2:] == ("--load_in_4bit true", "--unfrozen_last_layers 1")


def test_proposes_nothing_where_nothing_fits(tiny: Blueprint) -> None:
    assert proposals(Settings(Workload(tiny, (r"layers\.2\.",), rows=1, length=8)), 1000) == []


def test_advice_in_print(small: Blueprint) -> None:
    """How much is missing, and the flags, one a line."""
    settings = Settings(Workload(small, (r"layers\.[3-5]\.",), rows=8, length=128, device="cpu"))
    made = plan(settings)
    assert verdict(made, made.total - 2_000_000).plain.endswith(": 2.00 MB too much")
    assert "\n    --gradient_checkpointing true" in proposals_text(proposals(settings, made.total - 1)).plain


def test_of_joined_rows_flash_attention_reads_each_alone(small: Blueprint) -> None:
    """The others compute what they mask."""
    apart = Workload(small, rows=4, length=64)

    def flops(**options: Any) -> int:
        return dry_run(replace(apart, **options), "ddp", False).flops

    tokens, width, layers = 4 * 64, small.config.hidden_size, small.config.num_hidden_layers
    product = 2 * tokens * tokens * width  # of queries with keys, or of what they weigh
    seen = layers * (2 + 5) * product  # forward; and backward, which makes the first again
    assert flops(joined=True, attention="flash_attention_2") == flops(attention="flash_attention_2") == flops()
    assert flops(joined=True) - flops() == pytest.approx(seen * 3 / 4, rel=0.02)  # and the head: 3 tokens more


def test_proposes_smaller_batches_of_joined_rows(small: Blueprint) -> None:
    work = Workload(small, rows=8, length=64, joined=True, checkpointing=True)
    budget = plan(Settings(replace(work, rows=4), accumulation=2)).total
    proposal = proposals(Settings(work), budget)[0]
    assert proposal.changes == ("--per_device_train_batch_size 4 --gradient_accumulation_steps 2",)
    assert proposal.plan.settings.work.joined


def test_smaller_batches_keep_the_rows_of_a_step(small: Blueprint) -> None:
    settings = Settings(Workload(small, rows=4, length=8), accumulation=3)
    levels = _smaller_batches(settings)
    assert levels[0][0] == "--per_device_train_batch_size 2 --gradient_accumulation_steps 6"
    assert {level.tokens_per_step for _, level in levels} == {settings.tokens_per_step}


def test_picks_as_many_last_layers_as_fit(six_layers: Blueprint) -> None:
    work = Workload(six_layers, rows=1, length=512, mixed_precision="bfloat16", checkpointing=True)
    picked = pick_subset(Settings(work), parse_size("14GB"))
    assert picked is not None
    patterns = picked.plan.settings.work.unfrozen_parameters
    assert patterns is not None
    assert patterns[0].startswith(r"^model\.layers\.(")
    layers = patterns[0].count("|") + 1
    assert 1 < layers < 6
    assert picked.plan.trained_weights == layers * TRAINED // 2
    assert picked.plan.total < 14e9 < picked.plan.total + 14 * TRAINED // 2  # another layer would not
    assert picked.changes[0] == f"--unfrozen_last_layers {layers}"


def test_picks_everything_or_nothing(tiny: Blueprint) -> None:
    settings = Settings(Workload(tiny, (r"layers\.2\.",), rows=1, length=8, device="cpu"))
    everything = pick_subset(settings, parse_size("1GB"))
    assert everything is not None
    assert everything.plan.trained_weights == everything.plan.total_weights
    assert pick_subset(settings, 1000) is None


def test_time_and_cost(recipe: Settings) -> None:
    made = plan(recipe)
    tokens = 100 * recipe.tokens_per_step
    one = speed(made, "A100", tokens, price_per_hour=2.0)
    assert one.seconds is not None
    assert one.cost is not None
    assert one.tokens_per_second == pytest.approx(312e12 * 0.4 / made.flops_per_token)
    assert one.seconds == pytest.approx(tokens / one.tokens_per_second)
    assert one.cost == pytest.approx(2.0 * one.seconds / 3600)
    eight = speed(replace(made, settings=replace(recipe, processes=8)), "A100", tokens, price_per_hour=2.0)
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert eight.cost == pytest.approx(one.cost)
    assert speed(made, "H100").seconds is None
    with pytest.raises(UsageError, match="Did you mean 'A100'"):
        speed(made, "A10O")
    assert len(GPUS) > 5


def test_recomputing_costs_arithmetic(six_layers: Blueprint) -> None:
    work = Workload(six_layers, (r"layers\.[45]\.",), rows=1, length=512, mixed_precision="bfloat16")
    kept, again = (plan(Settings(replace(work, checkpointing=c))).flops_per_token for c in (False, True))
    assert again - kept == pytest.approx(2 * TRAINED, rel=0.3)  # of the trained layers alone, and their attention


def test_the_table_names_every_part(recipe: Settings) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(plan(recipe)))
    text = console.export_text()
    for part in ("frozen weights", "12.67 GB", "gradients", "1.62 GB", "DiagonalTO", "8 x 512 tokens", "at the peak"):
        assert part in text


def test_what_is_refused(tiny: Blueprint) -> None:
    work = Workload(tiny, (r"layers\.2\.",), rows=1, length=8)
    with pytest.raises(UsageError, match="Did you mean 'zero2'"):
        Settings(work, layout="zerro2")
    with pytest.raises(CannotSay, match="fsdp2"):
        Settings(replace(work, quantization="4bit"), layout="fsdp2", processes=2)
    with pytest.raises(UsageError, match="per_device_train_batch_size=0"):
        Settings(replace(work, rows=0))
    with pytest.raises(UsageError, match="is found in none"):
        plan(Settings(replace(work, unfrozen_parameters=("layers.9",))))


def test_plans_in_a_process_that_zero3_trains_in(tiny: Blueprint) -> None:
    settings = Settings(Workload(tiny, (r"layers\.2\.",), rows=2, length=16), layout="zero3", processes=2)
    before = plan(settings)
    dry_run.cache_clear()
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert plan(settings) == before
    assert is_deepspeed_zero3_enabled()
    assert live.is_zero3()


def test_a_model_that_cannot_run_without_data_is_not_guessed(tiny: Blueprint, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()

    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.Qwen2MLP.forward", looks)
    with pytest.raises(CannotSay, match="cannot be run without data"):
        plan(Settings(Workload(tiny, (r"layers\.2\.",), rows=3, length=8)))


def test_a_proposal_of_fewer_bits_can_be_copied_behind_the_flags(small: Blueprint) -> None:
    """A base in 8 bits and in 4 is refused."""
    work = Workload(small, (r"layers\.[3-5]\.",), rows=1, length=8, device="cpu")
    for quantization, words in ((None, "--load_in_4bit true"), ("8bit", "--load_in_8bit false --load_in_4bit true")):
        settings = Settings(replace(work, quantization=quantization))
        text, lean = _quantized_base(settings)[-1]
        assert (text, lean.work.quantization) == (words, "4bit")


def test_no_bits_are_proposed_that_a_run_would_refuse(small: Blueprint) -> None:
    """Of a base that is shared out, or that trains whole."""
    work = Workload(small, (r"layers\.5\.",), rows=1, length=8)
    assert _quantized_base(Settings(work))
    assert _quantized_base(Settings(work, layout="fsdp2", processes=2)) == []
    assert _quantized_base(Settings(replace(work, unfrozen_parameters=None))) == []


def test_a_proposal_of_smaller_state_can_be_copied_behind_the_flags(small: Blueprint) -> None:
    """Among the options the rate is refused: it is a flag of its own."""
    settings = Settings(Workload(small, rows=1, length=8), optimizer_options={"lr": 0.1, "alpha": 0.3})
    texts = [text for text, _ in _smaller_state(settings)]
    assert texts == [f"--optim_args alpha=0.3,state_dtype={name}" for name in ("bfloat16", "int8")]
