"""The study's own parts: how it tunes, its Muon, its tables, and that its committed results are what they say."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STUDY = Path(__file__).parent.parent / "scripts" / "study"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


class Losses:
    """Stands for `study.Runs`: the loss is a function of the exponent, infinite from `diverges` on."""

    cell = "a/cell"

    def __init__(self, best: float, diverges: float = math.inf) -> None:
        self.best, self.diverges = best, diverges
        self.asked: list[tuple[int, int]] = []

    def loss(self, method: str, exponent: int, seed: int = 0) -> float:
        if (exponent, seed) not in self.asked:
            self.asked.append((exponent, seed))
        return abs(exponent - self.best) if exponent < self.diverges else math.inf


@pytest.mark.parametrize("best", [-7.2, -3, -1, 0, 1.4, 2, 5])
def test_the_best_rate_is_found_wherever_it_is(best: float) -> None:
    from study import tune

    runs = Losses(best)
    found = tune(runs, "adamw")  # type: ignore[arg-type]
    assert found == round(best)
    tried = [exponent for exponent, _ in runs.asked]
    assert min(tried) < found < max(tried)


def test_rates_that_diverge_are_left() -> None:
    from study import tune

    for diverges in (-3, -5, -7):
        assert tune(Losses(best=-9, diverges=diverges), "adamw") == -9  # type: ignore[arg-type]
    assert tune(Losses(best=0, diverges=-100), "adamw") is None  # type: ignore[arg-type]


def test_the_best_rate_is_judged_on_the_other_seeds_and_its_neighbours_are_known() -> None:
    from study import SEEDS, compare

    runs = Losses(best=1)
    compare(runs, "adamw")  # type: ignore[arg-type]
    assert {(1, seed) for seed in SEEDS} | {(-1, 0), (3, 0)} <= set(runs.asked)


def test_a_line_that_was_not_written_to_its_end_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill: its run is done again, and the next line stands by itself."""
    import study

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(study.base_models, "make", lambda model, data_dir: tmp_path)
    study.Runs("1M/qv", tmp_path, results=tmp_path)
    path = tmp_path / "1M-qv.jsonl"
    run = json.dumps({"method": "adamw", "lr": 0.1, "seed": 0, "alpaca": 2.0}) + "\n"
    path.write_text(path.read_text() + run + run[:20])
    assert list(study.Runs("1M/qv", tmp_path, results=tmp_path).done) == [("adamw", 0.1, 0)]
    assert path.read_text().endswith("\n" + run)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch's Muon came with 2.9")
def test_muon_is_torchs_on_the_layers_matrices_and_adamw_on_the_rest() -> None:
    from optimizers import MuonAndAdamW

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 4)
        return torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})})

    ours, theirs = model(), model()
    optimizer = MuonAndAdamW(ours, lr=0.1)
    layer: Any = theirs.get_submodule("model.layers.0")
    parts = [
        torch.optim.Muon([layer.weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([layer.bias], lr=0.1, weight_decay=0.0),
    ]
    for lr in (0.1, 0.05, 0.02):  # as a scheduler sets them
        for group in [*optimizer.param_groups, *(part.param_groups[0] for part in parts)]:
            group["lr"] = lr
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        optimizer.step()
        for part in parts:
            part.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("ideas", [{}, {"momentum": 0.0, "clip": 1e9}], ids=["none", "idle"])
def test_a_to_without_ideas_is_diagonal_to(ideas: dict[str, float]) -> None:
    from optimizers import IdeaTO

    from to_finetune import DiagonalTO

    torch.manual_seed(0)
    start = torch.randn(5, 7, dtype=torch.float64)
    start[0, 0] = 0
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"alpha": 0.3, "beta": 0.1, "relative_alpha": True, "grad_scale": "rms"}
    pair = IdeaTO([ours], lr=0.05, **ideas), DiagonalTO([theirs], lr=0.05, **options)  # type: ignore[arg-type]
    for _ in range(20):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours.detach(), start)


def test_a_table_compares_with_adamw_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tables

    def run(method: str, lr: float, seed: int, loss: float | None) -> dict[str, Any]:
        curve = [5.0, 4.0, 3.0, 3.0, 3.0]
        return {"method": method, "lr": lr, "seed": seed, "alpaca": loss, "user": loss, "curve": curve} | {
            "seconds_a_step": 0.1,
            "state_bytes_a_weight": 8.0,
        }

    rows = [run("adamw", lr, 0, loss) for lr, loss in ((0.1, 2.2), (0.3, 2.0), (0.9, None))]
    rows += [run("adamw", 0.3, seed, 2.0 + seed / 100) for seed in (1, 2, 3)]
    rows += [run("diagonal_to", lr, 0, loss) for lr, loss in ((1.0, 2.0), (3.0, 1.9), (9.0, 2.1))]
    rows += [run("diagonal_to", 3.0, seed, 1.8 + 2 * seed / 100) for seed in (1, 2, 3)]
    rows += [run("sgd", lr, 0, None) for lr in (0.1, 0.3, 0.9, 0.03, 0.01)]
    begun = [run("adamw", lr, 0, loss) for lr, loss in ((0.1, 2.0), (0.3, 1.5))] + [run("sgd", 0.1, 0, None)]
    for cell, runs in (("1M-qv", rows), ("1M-all", begun)):
        lines = [{"cell": cell.replace("-", "/")}, *runs]
        (tmp_path / f"{cell}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "AGAIN", ())
    tables.main()
    text = (tmp_path / "tables.md").read_text()
    # 1.84 / 2.02 - 1; the paired differences are -0.19, -0.18, -0.17: t = -31.2, p = 0.001
    assert "| AdamW | 2.020 |\n| Diagonal TO, rms | -8.91\\*\\* |\n| SGD with momentum | diverged |\n" in text
    assert "| SGD with momentum | all 5 | diverged | diverged | diverged | diverged |  |  |  | 8.0 |" in text
    losses = "2.020 ± 0.010 | 2.020 ± 0.010 | 3.600 ± 0.000 | 5.000 ± 0.000"
    assert f"| AdamW | 0.3 | {losses} | +0.200 | diverged | 100 | 8.0 |" in text
    assert "| AdamW | 2 | 0.3 | 1.500 | 1.500 | 3.600 | 5.000 | 100 |\n| SGD with momentum | 1 | | diverged |" in text
    assert (tmp_path / "curves.svg").stat().st_size > 1000


RESULTS = sorted((STUDY / "results").rglob("*.jsonl"))


@pytest.mark.parametrize("path", RESULTS, ids=[f"{path.parent.stem}/{path.stem}" for path in RESULTS])
def test_no_winner_of_the_committed_results_stands_at_an_edge(path: Path) -> None:
    from study import METHODS
    from tables import judged

    for method, one in judged(path.stem.replace("-", "/"), path.parent).items():
        if one.runs and METHODS[method].lr is not None:
            assert min(one.tuning) < one.lr < max(one.tuning), method
        assert len({run["seed"] for run in one.runs}) == (3 if one.runs else 0)


def test_the_readmes_show_the_tables_of_the_results() -> None:
    import tables

    pages = {tables.RESULTS: STUDY.parents[1] / "README.md", **dict.fromkeys(tables.AGAIN, STUDY / "README.md")}
    for results, page in pages.items():
        cells = {cell: methods for cell in tables.CELLS if (methods := tables.judged(cell, results))}
        summary = tables.tables(cells)[0]
        assert (results / "tables.md").read_text(encoding="utf-8").startswith(summary)
        assert summary in page.read_text(encoding="utf-8")
