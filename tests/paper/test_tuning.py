"""The best rates are found, beyond the grid too, and judged on other seeds; no training is made twice."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from to_finetune.errors import UsageError
from to_finetune.paper.ledger import Ledger
from to_finetune.paper.methods import Trial
from to_finetune.paper.tuning import CRITERIA, Losses, best, beyond, choose, rounded

INF, NAN = math.inf, math.nan
LRS = [0.5, 1.0, 2.0]


def trials_of(lrs: list[float]) -> list[Trial]:
    return [{"lr": lr, "schedule": schedule} for lr in lrs for schedule in ("constant", "linear")]


def bowl(trial: Trial, best_lr: float) -> Losses:
    """Least at an lr; "constant" is ahead at first, "linear" at the end; lr above 8 diverges."""
    off = abs(math.log2(trial["lr"] / best_lr))
    if trial["lr"] > 8:
        return [9.0, 0.0, INF]
    return [9.0, 1 + off, 1 + off] if trial["schedule"] == "constant" else [9.0, 3 + off, 0.5 + off]


@pytest.mark.parametrize(
    ("best_lr", "lrs"),
    [
        (1.0, LRS),
        (0.25, [0.125, 0.25, *LRS]),
        (8.0, [*LRS, 4.0, 8.0, 16.0, 32.0]),
        (0.01, [0.03125, 0.0625, 0.125, 0.25, *LRS]),
    ],
)
def test_the_grid_is_widened_until_the_winner_is_inside(best_lr: float, lrs: list[float]) -> None:
    found = choose(LRS, trials_of, lambda trials: [bowl(trial, best_lr) for trial in trials], widenings=2)
    winner = max(best_lr, lrs[0])
    assert (found["lrs"], found["widened"], found["trials"]) == (lrs, len(lrs) - 3, 2 * len(lrs))
    assert found["winners"] == {
        "minimum": {"lr": winner, "schedule": "linear"},
        "area": {"lr": winner, "schedule": "constant"},
    }
    assert found["diverged"] == 2 * sum(lr > 8 for lr in lrs)


def test_nothing_wins_where_all_diverge() -> None:
    found = choose(LRS, trials_of, lambda trials: [[9.0, 1.0, INF] for _ in trials], widenings=2)
    assert found["winners"] == {"minimum": None, "area": None}
    assert (found["trials"], found["diverged"]) == (14, 14)
    assert found["lrs"] == [0.03125, 0.0625, 0.125, 0.25, *LRS]  # downwards


def test_what_diverged_or_was_dropped_never_wins() -> None:
    trials: list[Trial] = [{"lr": lr} for lr in (1.0, 2.0, 3.0, 4.0)]
    assert best(trials, [[9, 1.0, INF], [9, 5.0, 4.0], [9, 6.0, 5.0], [9, 0.1, NAN]], min) == {"lr": 2.0}


def test_half_a_decade_is_added_at_each_end_where_a_winner_stands() -> None:
    assert beyond([0.1, 1.0, 10.0], [1.0]) == []
    assert beyond([1.0, 10**0.5], [1.0]) == pytest.approx([10**-0.5])
    fine = [10 ** (i / 4) for i in range(4)]
    assert beyond(fine, [fine[-1], 1.0]) == pytest.approx([10**-0.25, 10**-0.5, 10, 10**1.25])


def test_criteria_leave_the_start_out() -> None:
    assert CRITERIA["minimum"]([1.0, 3.0, 2.0, 4.0]) == 2.0
    assert CRITERIA["area"]([1.0, 3.0, 2.0, 4.0]) == 3.0


def test_numbers_keep_six_digits() -> None:
    assert rounded(0.123456789) == 0.123457
    assert rounded(INF) is rounded(NAN) is None
    assert rounded("constant") == "constant"


def test_a_ledger_repeats_nothing(tmp_path: Path) -> None:
    path, asked = tmp_path / "new" / "made.jsonl", []

    def train(method: str, trial: Trial, seed: int) -> Losses:
        asked.append((method, trial["lr"], trial["schedule"], seed))
        return [loss + seed for loss in bowl(trial, 1.0)]

    def compared() -> dict[str, Any]:
        return Ledger(path, {"steps": 2}, train, lambda line: None).compare("adam", LRS, trials_of, 2, [1, 2])

    found = compared()
    assert found["curves"] == {
        "minimum": [[10.0, 4.0, 1.5], [11.0, 5.0, 2.5]],
        "area": [[10.0, 2.0, 2.0], [11.0, 3.0, 3.0]],
    }
    assert len(asked) == len(set(asked)) == 6 + 2 * 2
    whole = path.read_text()
    asked.clear()
    assert compared() == found
    assert not asked
    path.write_text(whole[: whole[:-1].rfind("\n") + 20])
    assert compared() == found
    assert len(asked) == 1
    assert re.sub(r'"seconds": [\d.]+', "", path.read_text()) == re.sub(r'"seconds": [\d.]+', "", whole)
    lines = whole.splitlines(keepends=True)
    for damaged in (lines[1].replace('"seed"', '"seed'), '{"method": "adam"}\n', "null\n"):
        path.write_text("".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(UsageError, match=r"made\.jsonl is damaged in line 2: delete that line\."):
            compared()
    with pytest.raises(UsageError, match=r"made\.jsonl has trainings of another protocol: move it away\."):
        Ledger(path, {"steps": 3}, train, print)


def test_a_ledger_holds_what_diverged_as_null(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "made.jsonl", {}, lambda method, trial, seed: [9.0, INF], lambda line: None)
    assert ledger.losses("adam", {"lr": 1.0}, 0) == [9.0, None]
    assert json.loads((tmp_path / "made.jsonl").read_text().splitlines()[-1])["losses"] == [9.0, None]
    found = ledger.compare("adam", LRS, trials_of, 2, [1, 2])
    assert found["curves"] == {"minimum": [], "area": []}
