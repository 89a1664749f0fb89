"""Files that a run writes for its report: its parameters, the growth of its slopes, and answers before and after.

Each is one small JSON file beside the record: parameters.json, slopes.json, samples.json.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from to_finetune.data.preview import IGNORED
from to_finetune.files import write_json
from to_finetune.model.generate import context_length, end_tokens
from to_finetune.optim import DiagonalTO, RankOneTO
from to_finetune.optim.checkpoint import named
from to_finetune.optim.slopes import QUANTILES, SAMPLE, Slope, slopes
from to_finetune.runs import PARAMETERS, SAMPLES, SLOPES
from to_finetune.training.optimizers import unwrapped
from to_finetune.training.sft import TOSFTTrainer

MOMENTS = 20  # slopes are recorded at this many steps at most
ROWS, NEW_TOKENS = 3, 64  # of the sample answers
LONGEST_BEGINNING = 32  # tokens at most that serve as the prompt of a text without one

logger = logging.getLogger(__name__)


def write_parameters(model: nn.Module, folder: Path) -> None:
    """Write parameters.json: each parameter's number of weights, in the model's order, and which parameters train."""
    parameters = dict(model.named_parameters())
    sizes = {name: _whole_shape(p).numel() for name, p in parameters.items()}
    trained = [name for name, p in parameters.items() if p.requires_grad]
    write_json(folder / PARAMETERS, {"sizes": sizes, "trained": trained}, indent=None)


def _whole_shape(p: Any) -> torch.Size:
    """Return a parameter's full shape, even if bitsandbytes has packed it or ZeRO-3 has sharded it."""
    packed = getattr(p, "quant_state", None)
    return torch.Size(packed.shape if packed is not None else getattr(p, "ds_shape", p.shape))


class SlopeTrace(TrainerCallback):
    """Writes slopes.json: the size of each tensor's learned slope at up to twenty steps, and its last distribution.

    For DiagonalTO and RankOneTO with an alpha above 0; does nothing for other optimizers. All processes must have it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SLOPES

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.optimizer: DiagonalTO | RankOneTO | None = None
        optimizer = unwrapped(kwargs["optimizer"])
        if isinstance(optimizer, (DiagonalTO, RankOneTO)) and any(group["alpha"] for group in optimizer.param_groups):
            self.optimizer = optimizer
        self.every = max(1, math.ceil(state.max_steps / MOMENTS))
        self.seen = state.global_step
        self.steps: list[int] = []
        self.sizes: dict[str, list[float | None]] = {}
        if state.is_world_process_zero and state.global_step and self.path.is_file():
            self._go_on(json.loads(self.path.read_text(encoding="utf-8")), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._look(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self.seen:
            self._look(state, kwargs["model"])

    def _look(self, state: TrainerState, model: nn.Module) -> None:
        if self.optimizer is None:
            return
        self.seen = state.global_step
        found = slopes(self.optimizer)
        if not state.is_world_process_zero:
            return
        names = self.optimizer.names(named(model))
        by_name = {names[position]: slope for position, slope in found.items()}
        self.steps.append(state.global_step)
        for name, slope in by_name.items():
            self.sizes.setdefault(name, []).append(_short(slope.size))
        self._save(by_name)

    def _save(self, now: Mapping[str, Slope]) -> None:
        assert self.optimizer is not None
        tensors = {
            name: {
                "sizes": self.sizes[name],
                "weight": _short(slope.weight),
                "quantiles": [_short(x) for x in slope.quantiles],
            }
            for name, slope in now.items()
        }
        found = {
            "form": self.optimizer.variant,
            "grad_scale": self.optimizer.param_groups[0]["grad_scale"],
            "sample": SAMPLE,
            "steps": self.steps,
            "quantiles_at": QUANTILES,
            "tensors": tensors,
        }
        write_json(self.path, found, indent=None)

    def _go_on(self, before: Mapping[str, Any], step: int) -> None:
        """Keep what was recorded up to the step that the run is resumed from."""
        self.steps = [seen for seen in before["steps"] if seen <= step]
        self.sizes = {name: tensor["sizes"][: len(self.steps)] for name, tensor in before["tensors"].items()}


def _short(x: float) -> float | None:
    """Round to five digits; None if not finite, which JSON cannot hold."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


class SampleAnswers:
    """Greedy answers to the first three held-out rows (or training rows), for samples.json.

    Takes none if weights are sharded or the model cannot generate; a failure to generate must not stop a run.
    """

    def __init__(self, trainer: TOSFTTrainer, folder: Path) -> None:
        self.trainer, self.path = trainer, folder / SAMPLES
        self.tokenizer: Any = trainer.processing_class
        self.held_out = trainer.eval_dataset is not None
        rows: Any = trainer.eval_dataset if self.held_out else trainer.train_dataset
        possible = not trainer.is_sharded() and trainer.model.can_generate()
        pairs = list(islice(_prompts(rows), ROWS)) if possible else []
        self.prompts = [prompt for prompt, _ in pairs]
        self.rows = [{"prompt": self._text(prompt), "reference": self._cut(learned)} for prompt, learned in pairs]

    def take(self, when: Literal["before", "after"]) -> None:
        """Write the answers of the model as it is now; on process 0 only."""
        if not self.prompts or not self.trainer.args.should_save:
            return
        try:
            answers = self._answers()
        except Exception as error:
            logger.warning("No sample answers: %s: %s", type(error).__name__, error)
            self.prompts = []
            return
        for row, answer in zip(self.rows, answers, strict=True):
            row[when] = answer
        write_json(self.path, {"held_out": self.held_out, "rows": self.rows}, indent=None)

    def _answers(self) -> list[str]:
        model, pad = self.trainer.model, self.tokenizer.pad_token_id
        batch = self.tokenizer.pad({"input_ids": self.prompts}, padding_side="left", return_tensors="pt")
        room = context_length(model, self.tokenizer) - batch["input_ids"].shape[1]
        config = GenerationConfig(
            max_new_tokens=min(NEW_TOKENS, room), do_sample=False, eos_token_id=self._ends(), pad_token_id=pad
        )
        was_training = model.training
        model.eval()
        try:
            with self.trainer.accelerator.autocast():
                output = model.generate(**batch.to(model.device), generation_config=config)
        finally:
            model.train(was_training)
        return [self._cut(new) for new in output[:, batch["input_ids"].shape[1] :].tolist()]

    def _ends(self) -> list[int]:
        return end_tokens(self.trainer.model, self.tokenizer)

    def _cut(self, tokens: list[int]) -> str:
        """Return the text of the first `NEW_TOKENS` tokens, and an ellipsis unless an end token is among them."""
        kept = tokens[:NEW_TOKENS]
        return self._text(kept) + ("" if set(kept) & set(self._ends()) else " …")

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _prompts(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens before the first learned one, and the learned ones after them, of each prepared row.

    A text that is learned from its first token is split after its beginning. Rows have `input_ids` and `labels`.
    """
    for row in rows:
        tokens, learned = row["input_ids"], [label != IGNORED for label in row["labels"]]
        if True not in learned:
            continue
        begin = learned.index(True) or min(LONGEST_BEGINNING, max(1, len(tokens) // 2))
        end = learned.index(False, begin) if False in learned[begin:] else len(tokens)
        yield tokens[:begin], tokens[begin:end]
