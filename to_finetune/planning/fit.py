"""Find settings that fit a memory budget: the nearest ones, and the largest number of last layers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import get_args

from to_finetune.errors import UsageError
from to_finetune.layers import layer_list
from to_finetune.model.quantized import Quantization
from to_finetune.model.select import last_layers, modules
from to_finetune.optim import TrainableOptimizer
from to_finetune.planning.dry_run import dry_run
from to_finetune.planning.memory import Plan, plan
from to_finetune.planning.settings import Settings


@dataclass(frozen=True)
class Proposal:
    """Settings that fit.

    Attributes:
        changes: the changes to the original settings, as flags.
        plan: the plan with these changes.
    """

    changes: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Choice:
    """How to train a number of last layers, and with which flag.

    Attributes:
        modules: train only these modules of each layer, named as in `unfrozen_modules`; None for whole layers.
        as_patterns: use `--unfrozen_parameters`, which replaces a recipe's; else `--unfrozen_last_layers`.
    """

    modules: tuple[str, ...] | None = None
    as_patterns: bool = False

    def last(self, sizes: Mapping[str, int], count: int) -> list[str]:
        """Return the patterns of the last `count` layers."""
        return last_layers(sizes, count) if self.modules is None else modules(sizes, self.modules, count)


WHOLE_LAYERS = Choice()

Level = tuple[str, Settings]  # a change as flags, and the settings with it
Change = Callable[[Settings], list[Level]]  # returns its levels, from mild to strong; none if it does not apply


def proposals(settings: Settings, budget: int, choice: Choice = WHOLE_LAYERS) -> list[Proposal]:
    """Propose what fits in `budget` bytes per GPU: the nearest settings with the same weights, and fewer layers."""
    found = [nearest(settings, budget)]
    if settings.work.lora is None:
        with suppress(UsageError):  # for modules outside of the layers
            layers = pick_subset(settings, budget, choice)
            if layers and layers.plan.trained_weights < plan(settings).trained_weights:
                found.append(layers)
            elif found == [None]:
                found.append(_last_resort(settings, budget, choice))
    return [proposal for proposal in found if proposal is not None]


def nearest(settings: Settings, budget: int) -> Proposal | None:
    """Return what fits with as few of the first `CHANGES` as possible, each at its mildest or skipped."""
    for count in range(1, len(CHANGES) + 1):
        if plan(_strongest(settings, CHANGES[:count])).fits(budget):
            levels = _mildest(settings, CHANGES[:count], budget)
            return Proposal(tuple(text for text, _ in levels), plan(levels[-1][1] if levels else settings))
    return None


def pick_subset(settings: Settings, budget: int, choice: Choice = WHOLE_LAYERS) -> Proposal | None:
    """Pick everything, or as many last layers as fit in `budget` bytes per GPU; None if not even one fits.

    The chosen patterns are the plan's `settings.work.unfrozen_parameters`.

    Raises:
        UsageError: for a choice of modules that the last layers do not have.
    """
    if choice.modules is None and settings.work.quantization is None:  # else some weights must stay frozen
        everything = plan(_training(settings, None))
        if everything.fits(budget):
            return Proposal(("--unfrozen_parameters .*",) if choice.as_patterns else (), everything)
    sizes = _sizes(settings)
    fitting: Proposal | None = None
    low, high = 0, len(layer_list(sizes)[1])
    while low < high:
        count = (low + high + 1) // 2
        patterns = choice.last(sizes, count)
        candidate = plan(_training(settings, patterns))
        if candidate.fits(budget):
            flag = f"parameters {shlex.join(patterns)}" if choice.as_patterns else f"last_layers {count}"
            low, fitting = count, Proposal((f"--unfrozen_{flag}",), candidate)
        else:
            high = count - 1
    return fitting


def _last_resort(settings: Settings, budget: int, choice: Choice) -> Proposal | None:
    """Pick the last layers that fit with all `CHANGES` at their strongest."""
    few = _training(settings, choice.last(_sizes(settings), 1))
    last = pick_subset(_strongest(few, CHANGES), budget, choice)
    words = [text for text, _ in _all_strongest(few, CHANGES)]
    return last and Proposal((*words, *last.changes), last.plan)


def _training(settings: Settings, patterns: Sequence[str] | None) -> Settings:
    unfrozen = None if patterns is None else tuple(patterns)
    return replace(settings, work=replace(settings.work, unfrozen_parameters=unfrozen))


def _sizes(settings: Settings) -> dict[str, int]:
    run = dry_run(settings.work, settings.passes, settings.accumulation > 1)
    return {w.name: w.numel for w in run.weights}


def _checkpointing(settings: Settings) -> list[Level]:
    if settings.work.checkpointing:
        return []
    return [
        ("--gradient_checkpointing true", replace(settings, work=replace(settings.work, checkpointing=True))),
    ]


def _smaller_batches(settings: Settings) -> list[Level]:
    """Return smaller micro-batches with the same number of rows per step."""
    rows, levels = settings.work.rows, list[Level]()
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0:
            accumulation = settings.accumulation * rows // fewer
            changed = replace(settings, work=replace(settings.work, rows=fewer), accumulation=accumulation)
            text = f"--per_device_train_batch_size {fewer} --gradient_accumulation_steps {accumulation}"
            levels.append((text, changed))
    return levels


def _smaller_state(settings: Settings) -> list[Level]:
    if not issubclass(settings.optimizer, TrainableOptimizer):
        return []
    formats = [str(dtype).removeprefix("torch.") for dtype in settings.optimizer.state_dtypes]
    now = str(settings.optimizer_options.get("state_dtype") or "float32").removeprefix("torch.")
    levels = list[Level]()
    for name in formats[formats.index(now) + 1 :]:
        options = {**settings.optimizer_options, "state_dtype": name}
        said = ",".join(f"{key}={value}" for key, value in options.items() if key != "lr")
        levels.append((f"--optim_args {said}", replace(settings, optimizer_options=options)))
    return levels


def _quantized_base(settings: Settings) -> list[Level]:
    work = settings.work
    everything_trains = work.unfrozen_parameters is None and work.lora is None
    if settings.is_sharded or everything_trains or work.quantization == "4bit":
        return []
    instead = "" if work.quantization is None else f"--load_in_{work.quantization} false "
    return [
        (f"{instead}--load_in_{name} true", replace(settings, work=replace(work, quantization=name)))
        for name in get_args(Quantization)
        if name != work.quantization
    ]


# In the order in which they are tried: first those that keep the trajectory, last the one that changes the base.
CHANGES: tuple[Change, ...] = (_checkpointing, _smaller_batches, _smaller_state, _quantized_base)


def _all_strongest(settings: Settings, changes: Sequence[Change]) -> list[Level]:
    levels = list[Level]()
    for change in changes:
        levels += change(levels[-1][1] if levels else settings)[-1:]
    return levels


def _strongest(settings: Settings, changes: Sequence[Change]) -> Settings:
    levels = _all_strongest(settings, changes)
    return levels[-1][1] if levels else settings


def _mildest(settings: Settings, changes: Sequence[Change], budget: int) -> list[Level]:
    """Choose the mildest level of each change in turn that still fits; all at their strongest must fit."""
    if not changes:
        return []
    first, rest = changes[0], changes[1:]
    if plan(_strongest(settings, rest)).fits(budget):
        return _mildest(settings, rest, budget)
    level = next(level for level in first(settings) if plan(_strongest(level[1], rest)).fits(budget))
    return [level, *_mildest(level[1], rest, budget)]
