"""The optimizers under Hugging Face's Trainer: by name, by class, by hand, all to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig

from to_finetune.errors import RunError, UsageError
from to_finetune.model import load_finetuned, select_trainable
from to_finetune.optim import DiagonalTO, FullTO, RankOneTO
from to_finetune.training import FinetuneArguments, TOTrainer, TOTrainingArguments
from to_finetune.training.arguments import TrainableOptimizerArguments
from to_finetune.training.layout import check_layout
from to_finetune.training.optimizers import (
    ADAPTER_RATE,
    RATE,
    RECOMMENDED_OPTIONS,
    recommended_learning_rate,
    unwrapped,
)

from .helpers import Run, assert_same_bits

STEPS = 5
OPTIONS = {"alpha": 0.3, "beta": 0.2, "relative_alpha": True, "grad_scale": "rms", "decoupled_weight_decay": True}
LR = 0.01


def arguments(cls: type[TrainingArguments], folder: Path, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return cls(**{**settings, **options})


def rows(count: int = 24, length: int = 10) -> list[dict[str, Tensor]]:
    """Rows of random tokens; the first half of each is not learned."""
    tokens = torch.randint(3, 290, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": t, "labels": t.masked_fill(torch.arange(length) < length // 2, -100)} for t in tokens]


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return partly_frozen(llama)


def partly_frozen(llama: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(llama)
    select_trainable(model, [r"layers\.3\."])
    return model


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """As the Trainer makes them: the norms do not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": weight_decay},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]


def by_name(model: PreTrainedModel, folder: Path, weight_decay: float) -> Trainer:
    options = ",".join(f"{key}={value}" for key, value in OPTIONS.items())
    named = {"optim": "diagonal_to", "optim_args": options, "learning_rate": LR, "weight_decay": weight_decay}
    return TOTrainer(model, arguments(TOTrainingArguments, folder, **named), train_dataset=rows())


def by_class(model: PreTrainedModel, folder: Path, weight_decay: float) -> Trainer:
    args = arguments(TrainingArguments, folder, weight_decay=weight_decay)
    door = (DiagonalTO, {"lr": LR, **OPTIONS})
    return Trainer(model, args, train_dataset=rows(), optimizer_cls_and_kwargs=door)


def by_instance(model: PreTrainedModel, folder: Path, weight_decay: float) -> Trainer:
    optimizer = DiagonalTO(groups(model, weight_decay), lr=LR, **OPTIONS)
    return Trainer(model, arguments(TrainingArguments, folder), train_dataset=rows(), optimizers=(optimizer, None))


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("door", [by_name, by_class, by_instance])
def test_every_door_equals_a_loop_by_hand_bit_for_bit(
    door: Callable[..., Trainer], weight_decay: float, model: PreTrainedModel, llama: Path, tmp_path: Path
) -> None:
    """The loop's loss is the sum over the learned tokens divided by their number, as the Trainer computes it."""
    trainer = door(model, tmp_path, weight_decay)
    batches: list[dict[str, Tensor]] = []
    collate = trainer.data_collator

    def recording(features: list[Any]) -> Any:
        batches.append(collate(features))
        return {key: value.clone() for key, value in batches[-1].items()}

    trainer.data_collator = recording
    trainer.train()

    by_hand = AutoModelForCausalLM.from_pretrained(llama).train()
    select_trainable(by_hand, [r"layers\.3\."])
    optimizer = DiagonalTO(groups(by_hand, weight_decay), lr=LR, **OPTIONS)
    history = []
    for batch in batches[:STEPS]:
        logits, labels = by_hand(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
        loss = loss / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), optimizer.estimate_error().item(), optimizer.gradient_peak().item()))
    assert_same_bits(trained(model), trained(by_hand))
    if isinstance(trainer, TOTrainer):
        logged = [
            (row["loss"], row["estimate_error"], row["gradient_peak"])
            for row in trainer.state.log_history
            if "loss" in row
        ]
        assert logged == [pytest.approx(row, rel=1e-6) for row in history]


@pytest.mark.parametrize(
    ("optim", "cls"), [("diagonal_to", DiagonalTO), ("rank_one_to", RankOneTO), ("full_to", FullTO)]
)
def test_a_name_gives_its_class_with_the_recommended_options(
    model: PreTrainedModel, tmp_path: Path, optim: str, cls: type[DiagonalTO]
) -> None:
    """But for those that are given."""
    args = arguments(TOTrainingArguments, tmp_path, optim=optim, optim_args="alpha=0.7", weight_decay=0.2)
    trainer = TOTrainer(model, args, train_dataset=rows())
    group = unwrapped(trainer.create_optimizer()).param_groups[0]
    assert type(unwrapped(trainer.optimizer)) is cls
    assert {key: group[key] for key in RECOMMENDED_OPTIONS} == {**RECOMMENDED_OPTIONS, "alpha": 0.7}
    assert (group["lr"], group["weight_decay"]) == (args.learning_rate, 0.2)
    assert args.learning_rate == recommended_learning_rate(model) == 3 * RATE  # one of four layers


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_the_head_are_scaled_by_their_own_size_alone(
    llama: Path, tied_llama: Path, tmp_path: Path, tied: bool
) -> None:
    """In a group of their own, with all the options of the one that they were in; nothing moves twice or not at all."""
    everything = AutoModelForCausalLM.from_pretrained(tied_llama if tied else llama)
    args = arguments(TOTrainingArguments, tmp_path, optim_args="alpha=0.7", weight_decay=0.2)
    optimizer = unwrapped(TOTrainer(everything, args, train_dataset=rows()).create_optimizer())
    decayed, apart, vectors = optimizer.param_groups
    embeddings = {everything.get_input_embeddings().weight, everything.get_output_embeddings().weight}
    assert set(apart["params"]) == embeddings
    assert len(embeddings) == (1 if tied else 2)
    options = [{key: value for key, value in group.items() if key != "params"} for group in (decayed, apart)]
    assert options[0] == {**options[1], "grad_scale": "factored"}
    assert (options[1]["grad_scale"], options[1]["alpha"], options[1]["weight_decay"]) == ("rms", 0.7, 0.2)
    assert all(p.dim() == 1 for p in vectors["params"])
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len(set(stepped)) == len(list(everything.parameters()))


def test_adapters_of_embeddings_and_the_head_are_apart_too(model: PreTrainedModel, tmp_path: Path) -> None:
    """And a copy of the head that peft trains whole."""
    model.requires_grad_(True)
    for own in ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        adapted = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **own}))  # type: ignore[arg-type]
        trainer = TOTrainer(adapted, arguments(TOTrainingArguments, tmp_path), train_dataset=rows())
        names = {p: name for name, p in adapted.named_parameters()}
        for group in unwrapped(trainer.create_optimizer()).param_groups:
            kinds = {"q_proj" not in names[p] for p in group["params"]}
            assert kinds <= {group["grad_scale"] == "rms"}
        assert sum("q_proj" not in name for p, name in names.items() if p.requires_grad) >= 1
        model = adapted.unload()


class OwnTO(RankOneTO):
    """With arguments of its own."""

    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, lr=rate, **{**OPTIONS, "grad_scale": "factored"})


def test_a_class_of_ones_own_is_the_one_that_is_proved(llama: Path, tmp_path: Path) -> None:
    """The way that is left under DeepSpeed, whatever `optim` says; embeddings train apart here too."""
    everything = AutoModelForCausalLM.from_pretrained(llama)
    args, door = arguments(TOTrainingArguments, tmp_path), (OwnTO, {"rate": LR})
    trainer = TOTrainer(everything, args, train_dataset=rows(), optimizer_cls_and_kwargs=door)
    trainer.train()
    assert trainer.engagement.proofs["live_optimizer"] == "OwnTO"
    groups = unwrapped(trainer.optimizer).param_groups
    assert [group["grad_scale"] for group in groups] == ["factored", "rms", "factored"]
    assert all(group["lr"] == LR for group in groups)


@pytest.mark.parametrize(("saved_by", "resumed_by"), [("diagonal_to", "adamw_torch"), ("adamw_torch", "diagonal_to")])
def test_another_optimizers_checkpoint_is_refused(
    model: PreTrainedModel, tmp_path: Path, saved_by: str, resumed_by: str
) -> None:
    """It would begin anew in the middle of the run."""
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": LR}
    TOTrainer(model, arguments(TOTrainingArguments, tmp_path, optim=saved_by, **options), train_dataset=rows()).train()
    args = arguments(TOTrainingArguments, tmp_path, optim=resumed_by, **options)
    with pytest.raises(
        (RunError, RuntimeError), match=r"holds no state of AdamW's|DiagonalTO's is a, b: it is another"
    ):
        TOTrainer(model, args, train_dataset=rows()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("part", [True, False])
def test_no_token_is_written(llama: Path, tmp_path: Path, part: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    if part:
        select_trainable(model, [r"layers\.3\."])
    saved = {"save_strategy": "steps", "save_steps": STEPS, "save_only_trained": part}
    args = arguments(TOTrainingArguments, tmp_path, hub_token="hf_secret", **saved)
    trainer = TOTrainer(model, args, train_dataset=rows())
    trainer.train()
    trainer.save_model()
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert any(b"hub_token" in content for content in written)
    assert not any(b"hf_secret" in content for content in written)
    assert args.hub_token == "hf_secret"


@pytest.mark.parametrize("optim_args", [None, "grad_scale=rms"])
def test_without_them_there_are_hugging_faces_groups(
    model: PreTrainedModel, tmp_path: Path, optim_args: str | None
) -> None:
    trainer = TOTrainer(model, arguments(TOTrainingArguments, tmp_path, optim_args=optim_args), train_dataset=rows())
    assert len(unwrapped(trainer.create_optimizer()).param_groups) == 2


def wide_llama(width: int) -> PreTrainedModel:
    """A Llama of this width, on no device."""
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, vocab_size=50)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(("width", "less"), [(64, 1), (256, 1), (1024, 8), (4096, 64)])
def test_the_default_rate_follows_the_width_and_what_trains(width: int, less: int) -> None:
    """Measured up to a width of 256; a third of the weights or less has three times the rate of all."""
    model = wide_llama(width)
    assert recommended_learning_rate(model) == pytest.approx(RATE / less, rel=0.03)
    select_trainable(model, [r"layers\."])
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / model.num_parameters()
    assert share > 1 / 3
    assert recommended_learning_rate(model) == pytest.approx(RATE / less / share, rel=0.03)
    select_trainable(model, [r"layers\.3\."])
    assert recommended_learning_rate(model) == pytest.approx(3 * RATE / less, rel=0.03)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert recommended_learning_rate(model) == pytest.approx(ADAPTER_RATE / less, rel=0.03)


def test_a_model_without_a_width_has_no_default_rate(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"learning_rate is not given, and Linear has no config\.hidden_size to go by"):
        TOTrainer(torch.nn.Linear(2, 2), arguments(TOTrainingArguments, tmp_path), train_dataset=rows())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_hugging_faces_names_pass_through(model: PreTrainedModel, llama: Path, tmp_path: Path, optim: str) -> None:
    """To the bits of a Trainer that does not know us."""
    options = {"optim": optim, "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.0}
    TOTrainer(model, arguments(TOTrainingArguments, tmp_path, **options), train_dataset=rows()).train()
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    select_trainable(theirs, [r"layers\.3\."])
    Trainer(theirs, arguments(TrainingArguments, tmp_path, **options), train_dataset=rows()).train()
    assert_same_bits(trained(model), trained(theirs))


@pytest.mark.parametrize(
    ("options", "learning_rate", "max_grad_norm"),
    [
        ({}, None, 0.0),
        ({"optim": "full_to"}, None, 0.0),
        ({"optim_args": "grad_scale=None"}, None, 1.0),
        ({"optim": "adamw_torch"}, 5e-5, 1.0),
        ({"max_grad_norm": 0.5, "learning_rate": 0.3}, 0.3, 0.5),
        ({"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.0}, 0.0, 0.0),
    ],
)
def test_rate_and_clipping_default_to_what_suits_the_optimizer(
    tmp_path: Path, options: dict[str, Any], learning_rate: float, max_grad_norm: float
) -> None:
    """No clipping where grad_scale undoes it; a TO's rate waits for the model."""
    for cls in (TOTrainingArguments, FinetuneArguments):
        args = cls(output_dir=str(tmp_path), use_cpu=True, **options)
        assert (args.learning_rate, args.max_grad_norm) == (learning_rate, max_grad_norm)


def test_other_arguments_rate_is_their_own(tmp_path: Path) -> None:
    """Of an optimizer of Hugging Face's: a DPO run's is fifty times lower than the Trainer's."""

    @dataclass
    class Arguments(TrainableOptimizerArguments, DPOConfig):
        pass

    args = Arguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, optim="adamw_torch")
    assert args.learning_rate == DPOConfig(str(tmp_path), use_cpu=True, bf16=False).learning_rate == 1e-6
    assert Arguments(output_dir=str(tmp_path), use_cpu=True, bf16=False).learning_rate is None  # of the model


def test_arguments_that_know_no_to_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """Else AdamW would train without a word."""
    with pytest.raises(UsageError, match=r"TOTrainer would train with adamw_torch\w*: give it TOTrainingArguments"):
        TOTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))


def test_adafactor_is_not_sharded(tmp_path: Path) -> None:
    """Its factors would be those of parts of the matrices."""
    args = arguments(TOTrainingArguments, tmp_path, optim="adafactor")
    check_layout(args, None, is_sharded=False, optimizer=None)
    with pytest.raises(UsageError, match="adafactor factors whole matrices"):
        check_layout(args, None, is_sharded=True, optimizer=None)


def test_options_come_as_text_or_as_a_mapping(tmp_path: Path) -> None:
    """With the same values, numbers in YAML's scientific notation (a text to YAML) included."""
    expected = {**RECOMMENDED_OPTIONS, "alpha": 0.05, "grad_scale": None, "state_dtype": torch.bfloat16}
    for given in (
        "alpha=5e-2, grad_scale=None, state_dtype=bfloat16",
        {"alpha": "5e-2", "grad_scale": None, "state_dtype": "torch.bfloat16"},
    ):
        assert TOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim_args=given).to_options == expected


@pytest.mark.parametrize("optim", ["diagonal_to", "rank_one_to"])
def test_accumulated_small_batches_equal_one_large_batch(
    finetune: Callable[..., Run], tmp_path: Path, optim: str
) -> None:
    """With rows of different lengths, where a mean of means would not."""
    options = {"optim": optim, "max_steps": 3}
    one = finetune(tmp_path / "one", per_device_train_batch_size=8, **options)
    many = finetune(tmp_path / "many", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    lengths = {sum(label != -100 for label in row["labels"]) for row in one.trainer.train_dataset}
    assert len(lengths) > 4
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    for name, weights in one.weights.items():
        torch.testing.assert_close(many.weights[name], weights, rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_is_loaded_at_the_end(finetune: Callable[..., Run], tmp_path: Path) -> None:
    """Of a subset; the worst by loss is asked for, so that it is not the last."""
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = finetune(
        tmp_path / "run",
        val_set_size=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        **every_step,
    )
    assert run.code == 0
    losses = {row["step"]: row["eval_loss"] for row in run.trainer.state.log_history if "eval_loss" in row}
    best = max(losses, key=losses.__getitem__)
    assert best < 4
    checkpoint = Run(0, run.folder / f"checkpoint-{best}", None)
    assert_same_bits(run.weights, checkpoint.weights)
    assert_same_bits(run.weights, trained(run.trainer.model))
    last = Run(0, run.folder / "checkpoint-4", None)
    assert any(not torch.equal(weights, last.weights[name]) for name, weights in run.weights.items())


class Net(nn.Module):
    """A module without a configuration, whose frozen body changes its running means."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def classifier(llama: Path) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2, pad_token_id=0)
    select_trainable(model, [r"layers\.3\.", "score"])
    return model


def prompts(llama: Path) -> PeftModel:
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )


def stages(llama: Path) -> PreTrainedModel:
    model = partly_frozen(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    return model


@pytest.mark.parametrize("kind", ["module", "classifier", "prompts", "stages"])
def test_the_frozen_part_is_saved_too_unless_asked_otherwise(kind: str, llama: Path, tmp_path: Path) -> None:
    """And a run that goes on from there ends in the same weights and buffers, bit for bit.

    They may be on no disk: "stages" freezes layers that trained before.
    """
    generator = torch.Generator().manual_seed(0)
    others = {"classifier": classifier, "prompts": prompts, "stages": stages}
    makers = {"module": Net, **{name: partial(maker, llama) for name, maker in others.items()}}
    data: list[dict[str, Any]] = rows()
    if kind in ("module", "classifier"):
        data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(data)]
    if kind == "module":
        data = [{"x": torch.randn(8, generator=generator), "labels": row["labels"]} for row in data]
    ended = []
    for going_on in (False, True):
        torch.manual_seed(0)
        model = makers[kind]()
        if kind == "stages" and going_on:  # only the checkpoint has them
            model = partly_frozen(llama)
        args = arguments(TOTrainingArguments, tmp_path, learning_rate=LR, save_strategy="steps", save_steps=3)
        trainer = TOTrainer(model, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if going_on else None)
        ended.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert_equal(*ended)
    trainer.save_model(str(tmp_path / "saved"))
    if kind != "prompts":  # peft's own file
        assert_equal(ended[0], load_file(tmp_path / "saved" / "model.safetensors"))


def test_only_what_trains_is_saved_if_asked_for(model: PreTrainedModel, tmp_path: Path) -> None:
    args = arguments(TOTrainingArguments, tmp_path, save_only_trained=True, save_strategy="steps", save_steps=STEPS)
    trainer = TOTrainer(model, args, train_dataset=rows())
    trainer.train()
    for folder in (tmp_path, tmp_path / f"checkpoint-{STEPS}"):
        trainer.save_model(str(tmp_path))
        assert_equal(load_file(folder / "trained.safetensors"), trained(model))
        assert not (folder / "model.safetensors").exists()
    assert_equal(load_finetuned(tmp_path)[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["module", "prompts"])
def test_a_part_that_could_not_be_put_back_is_not_saved_alone(kind: str, llama: Path, tmp_path: Path) -> None:
    args = arguments(TOTrainingArguments, tmp_path, learning_rate=LR, save_only_trained=True)
    with pytest.raises(UsageError, match=r"save_only_trained=True: what trains in this (Net|PeftModel\w*) could not"):
        TOTrainer(Net() if kind == "module" else prompts(llama), args, train_dataset=rows())


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_another_subsets_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    """Else what trained before would be lost, though it was loaded."""
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": LR, "save_only_trained": True}
    for patterns in ([r"layers\.[23]\."], [r"layers\.3\."]):
        model = AutoModelForCausalLM.from_pretrained(llama)
        select_trainable(model, patterns)
        trainer = TOTrainer(model, arguments(TOTrainingArguments, tmp_path, **options), train_dataset=rows())
        if len(patterns[0]) > len(r"layers\.3\."):
            trainer.train()
    with pytest.raises(RunError, match=r"checkpoint-2 holds 18 trained tensors, not the 9 that train here\."):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_plain_trainers_checkpoint_is_gone_on_from(model: PreTrainedModel, tmp_path: Path) -> None:
    """Its optimizer.pt is the class's own state."""
    saved = {"save_strategy": "steps", "save_steps": 2}
    door = (DiagonalTO, {"lr": LR, **OPTIONS})
    plain = arguments(TrainingArguments, tmp_path / "plain", **saved)
    Trainer(model, plain, train_dataset=rows(), optimizer_cls_and_kwargs=door).train()
    wanted = trained(model)
    options = ",".join(f"{key}={value}" for key, value in OPTIONS.items())
    args = arguments(TOTrainingArguments, tmp_path / "ours", optim_args=options, learning_rate=LR)
    ours = TOTrainer(model, args, train_dataset=rows())
    ours.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert_same_bits(trained(model), wanted)
