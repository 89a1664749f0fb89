"""A sweep's search space, ``learning_rate=1e-3..1e-1`` or ``alpha=0,0.1,0.3``: its Optuna distributions and flags."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.optimizers import OPTIMIZERS, parse_optim_args

Space = dict[str, BaseDistribution]


def search_texts(search: Sequence[str], args: FinetuneArguments) -> dict[str, str]:
    """Return each searched key with its text as written; by default the learning rate, a decade to each side.

    Raises:
        UsageError: for a word that is not ``key=...``, and for a key that is given twice.
    """
    rate = args.learning_rate or 0.0
    if not search and rate <= 0:
        raise UsageError(f"learning_rate={rate} has no range around it; give one: --search learning_rate=1e-4..1e-2.")
    texts = dict[str, str]()
    for word in search or [f"learning_rate={rate / 10:g}..{rate * 10:g}"]:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise UsageError(f"search: {word!r} is neither a range, key=low..high, nor a list, key=a,b,c.")
        key = key.replace("-", "_")
        if key in texts:
            raise UsageError(f"search: {key} is given twice.")
        texts[key] = text
    return texts


def distribution(key: str, text: str, args: FinetuneArguments) -> BaseDistribution:
    """Return the distribution of `key` that `text` describes.

    Raises:
        UsageError: for a key that cannot be searched, and for invalid values.
    """
    kind = _kind(key, args)
    if ".." in text:
        return _range(key, text, kind)
    values = list(dict.fromkeys(parse_optim_args({"value": word.strip()})["value"] for word in text.split(",")))
    for value in values:
        if kind is not str and not _is_number(value, kind):
            wanted = "a number" if kind is float else "a whole number"
            raise UsageError(f"search: {key}={text} is not valid: {value!r} is not {wanted}.")
    if len(values) < 2:
        raise UsageError(f"search: {key}={text} is one value: a range, {key}=low..high, or a list, {key}=a,b,c.")
    return CategoricalDistribution(values)


def _range(key: str, text: str, kind: type) -> BaseDistribution:
    ends = range_ends(text)
    if kind is str:
        raise UsageError(f"search: {key} is no number, so it has no range; list its values, {key}=a,b,c.")
    if ends is None or not all(map(math.isfinite, ends)):
        raise UsageError(f"search: {key}={text} is not a range: two numbers, {key}=low..high.")
    low, high = ends
    if min(low, high) <= 0:
        raise UsageError(
            f"search: {key}={text} is in log scale, so both ends must be above 0; or list the values, {key}=0,0.1,1."
        )
    if low >= high:
        hint = f" Did you mean '{key}={high:g}..{low:g}'?" if low > high else ""
        raise UsageError(f"search: {key}={text}: the low end must be below the high one.{hint}")
    if kind is float:
        return FloatDistribution(low, high, log=True)
    if low % 1 or high % 1:
        raise UsageError(f"search: {key}={text} is not valid: {key} takes whole numbers.")
    return IntDistribution(int(low), int(high), log=True)


def range_ends(text: str) -> tuple[float, float] | None:
    """Return the two numbers of ``low..high``; None for anything else."""
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        return None
    return low, high


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(key: str, args: FinetuneArguments) -> type:
    """Return int or float for a flag or optimizer option that is a number, str for another option.

    Raises:
        UsageError: for anything else.
    """
    kinds = {**_options(args), **_number_flags()}
    if key in ("seed", "data_seed"):
        raise UsageError(f"search: {key} is not searched, the best would be a lucky one; --seeds judges the best.")
    if key == "val_set_size":
        raise UsageError("search: val_set_size is not searched: each trial would be judged on other rows.")
    if key not in kinds:
        near = did_you_mean("learning_rate" if key == "lr" else key, kinds)
        options = f"the options of {args.optim}: {', '.join(_options(args))}" if _options(args) else "no options here"
        raise UsageError(f"search: {key!r} is not known.{near} It takes every flag that is a number, and {options}.")
    return kinds[key]


def _number_flags() -> dict[str, type]:
    """Return the flags that are one number, with their type: int or float."""
    found = dict[str, type]()
    for cls in (ModelArguments, DataArguments, FinetuneArguments):
        hints = get_type_hints(cls)
        for f in fields(cls):
            kinds = set(get_args(hints[f.name]) or (hints[f.name],)) - {NoneType}
            if kinds and kinds <= {int, float}:
                found[f.name] = float if float in kinds else int
    return found


def _options(args: FinetuneArguments) -> dict[str, type]:
    """Return the TO's own options with their type: int, float, or str for one that is not a number."""
    if args.optim not in OPTIMIZERS:
        return {}
    parameters = inspect.signature(OPTIMIZERS[args.optim]).parameters
    kinds = {"int": int, "float": float, "float | None": float}
    elsewhere = ("params", "lr", "weight_decay", "seed")
    return {key: kinds.get(str(p.annotation), str) for key, p in parameters.items() if key not in elsewhere}


def as_flags(values: Mapping[str, Any], args: FinetuneArguments) -> list[str]:
    """Return the flags that set `values`; options of the optimizer are added to those in `args`."""
    flags = _number_flags()
    words = [word for key, value in values.items() if key in flags for word in (f"--{key}", str(value))]
    options = {key: value for key, value in values.items() if key not in flags}
    if options:
        options = {**parse_optim_args(args.optim_args), **options}
        words += ["--optim_args", ",".join(f"{key}={value}" for key, value in options.items())]
    return words


def extremes(d: BaseDistribution) -> list[Any]:
    """Return the ends of a range, or all values of a list."""
    return list(d.choices) if isinstance(d, CategoricalDistribution) else [d.low, d.high]


def combinations(space: Space) -> float:
    """Return the number of different trials; infinite with a range of floats."""
    return math.prod(math.inf if isinstance(d, FloatDistribution) else len(_all(d)) for d in space.values())


def _all(d: BaseDistribution) -> Sequence[Any]:
    """The values of a list, or of a range of whole numbers."""
    return d.choices if isinstance(d, CategoricalDistribution) else range(d.low, d.high + 1)


def design(space: Space, trials: int) -> list[dict[str, Any]]:
    """Return the trials that do not depend on the results of others.

    With lists alone, or at most `trials` combinations, every combination, shuffled; with a single range an even grid,
    ends included; else half of the trials, spread over the space by a Sobol sequence.
    """
    if combinations(space) <= trials or all(isinstance(d, CategoricalDistribution) for d in space.values()):
        rows = list(itertools.product(*map(_all, space.values())))
        random.Random(0).shuffle(rows)
        return [dict(zip(space, row, strict=True)) for row in rows]
    if len(space) == 1:
        points = [[i / max(1, trials - 1)] for i in range(trials)]
    else:
        points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw((trials + 1) // 2).tolist()
    return [{key: _at(d, u) for (key, d), u in zip(space.items(), point, strict=True)} for point in points]


def _at(d: BaseDistribution, u: float) -> Any:
    """Return the value at `u`, from 0 to 1; from a range in few digits, as one would type it."""
    if isinstance(d, CategoricalDistribution):
        return d.choices[min(int(u * len(d.choices)), len(d.choices) - 1)]
    value = d.low * (d.high / d.low) ** u
    return round(value) if isinstance(d, IntDistribution) else min(max(float(f"{value:.3g}"), d.low), d.high)
