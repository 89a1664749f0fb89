"""What would fit: the nearest setting that does, and the largest number of last layers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from to_finetune.model.select import last_layers, layer_list
from to_finetune.optim import TrainableOptimizer
from to_finetune.planning.dry_run import dry_run
from to_finetune.planning.memory import Plan, plan
from to_finetune.planning.settings import Settings


@dataclass(frozen=True)
class Proposal:
    """Settings that fit.

    Attributes:
        changes: from those that were asked about, as flags.
        plan: with the changes.
    """

    changes: tuple[str, ...]
    plan: Plan


Level = tuple[str, Settings]  # a change in words, and the settings with it
Change = Callable[[Settings], list[Level]]  # its levels, from mild to strong; none where it does not apply


def proposals(settings: Settings, budget: int) -> list[Proposal]:
    """What fits in `budget` bytes a GPU: the nearest setting that trains the same weights, and one of fewer layers."""
    layers = pick_subset(settings, budget)
    if layers is not None and layers.plan.trained_weights >= plan(settings).trained_weights:
        layers = None
    found = [proposal for proposal in (nearest(settings, budget), layers) if proposal is not None]
    if not found and (last := pick_subset(_strongest(settings, CHANGES), budget)):
        words = [text for text, _ in _all_strongest(settings, CHANGES)]
        found = [Proposal((*words, *last.changes), last.plan)]
    return found


def nearest(settings: Settings, budget: int) -> Proposal | None:
    """What fits with the first few of `CHANGES` alone, each as mild as may be, or not at all."""
    for count in range(1, len(CHANGES) + 1):
        if plan(_strongest(settings, CHANGES[:count])).fits(budget):
            levels = _mildest(settings, CHANGES[:count], budget)
            return Proposal(tuple(text for text, _ in levels), plan(levels[-1][1] if levels else settings))
    return None


def pick_subset(settings: Settings, budget: int) -> Proposal | None:
    """Everything, or as many of the last layers as fit in `budget` bytes a GPU; None where not even one does.

    The plan's `settings.work.unfrozen_parameters` are the patterns.
    """

    def of(patterns: tuple[str, ...] | None) -> Plan:
        return plan(replace(settings, work=replace(settings.work, unfrozen_parameters=patterns)))

    everything = of(None)
    if everything.fits(budget):
        return Proposal(("no --unfrozen_parameters",), everything)
    run = dry_run(settings.work, settings.passes, settings.accumulation > 1)
    sizes = {w.name: w.numel for w in run.weights}
    fitting: Proposal | None = None
    low, high = 0, len(layer_list(sizes)[1])
    while low < high:
        count = (low + high + 1) // 2
        patterns = last_layers(sizes, count)
        candidate = of(tuple(patterns))
        if candidate.fits(budget):
            low, fitting = count, Proposal((f"--unfrozen_parameters {shlex.join(patterns)}",), candidate)
        else:
            high = count - 1
    return fitting


def _checkpointing(settings: Settings) -> list[Level]:
    if settings.work.checkpointing:
        return []
    return [
        ("--gradient_checkpointing true", replace(settings, work=replace(settings.work, checkpointing=True))),
    ]


def _smaller_batches(settings: Settings) -> list[Level]:
    """Of the same number of rows a step."""
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
    return [
        (
            f"state_dtype={name} in --optim_args",
            replace(settings, optimizer_options={**settings.optimizer_options, "state_dtype": name}),
        )
        for name in formats[formats.index(now) + 1 :]
    ]


def _quantized_base(settings: Settings) -> list[Level]:
    formats: tuple[Literal["8bit", "4bit"], ...] = ("8bit", "4bit")
    if settings.is_sharded or settings.work.unfrozen_parameters is None or settings.work.quantization == "4bit":
        return []
    return [
        (f"--load_in_{name} true", replace(settings, work=replace(settings.work, quantization=name)))
        for name in formats
        if name != settings.work.quantization
    ]


# In the order in which they are tried: what changes nothing of the trajectory first, what changes the base last.
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
    """Of changes that fit all together at their strongest, the levels that do; each as mild as may be, in turn."""
    if not changes:
        return []
    first, rest = changes[0], changes[1:]
    if plan(_strongest(settings, rest)).fits(budget):
        return _mildest(settings, rest, budget)
    level = next(level for level in first(settings) if plan(_strongest(level[1], rest)).fits(budget))
    return [level, *_mildest(level[1], rest, budget)]
