"""Which weights train: the parameters whose names match a list of regular expressions; all others are frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table
from rich.text import Text
from torch import nn

from to_finetune.errors import UsageError, did_you_mean


class Match(NamedTuple):
    """What one pattern selected."""

    pattern: str
    tensors: int
    weights: int


@dataclass
class Subset:
    """The trained parameters of a model."""

    names: list[str]
    weights: int
    total_weights: int
    matches: list[Match]

    def table(self) -> Table:
        """Return a table with one row per pattern, and the sum, in which a parameter of two patterns counts once."""
        table = Table(title="Trained weights", title_justify="left", header_style="bold")
        table.add_column("pattern")
        for column in ("tensors", "weights", "share"):
            table.add_column(column, justify="right")
        for match in self.matches:
            table.add_row(Text(match.pattern), f"{match.tensors:,}", f"{match.weights:,}", self._share(match.weights))
        table.add_section()
        table.add_row("trained", f"{len(self.names):,}", f"{self.weights:,}", self._share(self.weights), style="bold")
        table.add_row("all", "", f"{self.total_weights:,}", "", style="dim")
        return table

    def _share(self, weights: int) -> str:
        return f"{weights / self.total_weights:.1%}"


def select_trainable(model: nn.Module, patterns: Sequence[str] | None) -> Subset:
    """Freeze all parameters of `model` except those whose name matches one of `patterns` (`re.search`).

    The patterns are those of axolotl's `unfrozen_parameters` and of Spectrum's YAML. A name that is tied to another one
    selects the shared tensor. None trains everything.

    Raises:
        UsageError: for a pattern that is not a regular expression, matches nothing (with the nearest names), or matches
            a quantised weight.
    """
    # Tied names (an output head that shares the embedding) lead to one tensor, counted once.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = {id(p): p.numel() for p in parameters.values()}
    patterns = list(patterns) if patterns is not None else [".*"]
    if not patterns:
        raise UsageError("unfrozen_parameters is empty, so nothing would train; leave it out to train everything.")

    trained: set[int] = set()
    matches = []
    for pattern in patterns:
        found = {id(p) for name, p in parameters.items() if _compiled(pattern).search(name)}
        if not found:
            plain = re.sub(r"[\\^$()|?*+]", "", pattern)
            raise UsageError(
                f"unfrozen_parameters: {pattern!r} is found in none of the {len(parameters)} parameter names."
                f"{did_you_mean(plain, parameters)} The names run from {next(iter(parameters))!r} "
                f"to {list(parameters)[-1]!r}."
            )
        quantised = [n for n, p in parameters.items() if id(p) in found and not p.is_floating_point()]
        if quantised:
            raise UsageError(
                f"unfrozen_parameters: {pattern!r} finds {quantised[0]!r}, which is quantised and cannot be trained; "
                "take a base in full precision."
            )
        matches.append(Match(pattern, len(found), sum(sizes[i] for i in found)))
        trained |= found
    for p in parameters.values():
        p.requires_grad_(id(p) in trained)
    return Subset(
        names=[name for name, p in model.named_parameters() if p.requires_grad],
        weights=sum(sizes[i] for i in trained),
        total_weights=sum(sizes.values()),
        matches=matches,
    )


def keep_trained_in_float32(model: nn.Module) -> None:
    """Cast what trains to float32 for mixed precision, in which autocast casts it for each use.

    Small updates of 16-bit weights would round to nothing.
    """
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"unfrozen_parameters: {pattern!r} is not a regular expression: {error}.") from None
