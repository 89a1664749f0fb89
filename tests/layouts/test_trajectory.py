"""Every layout ends where one process does, and goes on from what any other has saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from .training import (
    LAYOUTS,
    OPTIMIZERS,
    RESUMED,
    RESUMED_LAYOUTS,
    STATES,
    STEPS,
    launch,
    own_formats,
    refused,
    resumed,
    trajectories,
)

pytest.importorskip("deepspeed")
ROUNDING = 1e-7  # of weights about 0.1 in size that moved by about 0.04


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Any]:
    """Calls a function once for all of pytest's processes, and gives its JSON result to each."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent

    def call(name: str, function: Callable[[Path], Any]) -> Any:
        file = folder / f"{name}.json"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                file.write_text(json.dumps(function(folder / name)))
        return json.loads(file.read_text())

    return call


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 4])
def test_ends_where_one_process_does(once: Any, world: int, layout: str, optimizer: str, state: str) -> None:
    """Diagonal to the bit, RankOne to rounding; or says what to change."""
    results = once(f"trajectories-{world}", lambda folder: launch(trajectories, world, folder))
    found = results[f"{layout} {optimizer} {state}"]
    if reason := refused(layout, optimizer):
        assert reason in found["refused"]
        return
    live = {"diagonal": "DiagonalTO", "rank_one": "RankOneTO"}[optimizer.split("-")[0]]
    zero = {"zero1": "ZeroOptimizer", "zero2": "ZeroOptimizer", "zero3": "ZeroOptimizer_Stage3"}
    wrapper = zero.get(layout.split("-")[0])
    assert found["wrappers"] == ([f"DeepSpeed{wrapper}", live] if wrapper else [live])
    assert found["steps"] == [STEPS]
    assert found["deviation"] <= (0 if live == "DiagonalTO" else ROUNDING)
    same = results[f"ddp {optimizer} {state}"]["error"]
    assert found["error"] == pytest.approx(same, rel=1e-6)


WAYS = [(1, 2), (1, 4), (2, 4), (2, 1)]


def launches(folder: Path, function: Callable[..., None]) -> dict[str, float]:
    """One process, two, four and one again; each goes on from what those before it have saved."""
    found: dict[str, float] = {}
    for world in (1, 2, 4, 1):
        found |= launch(function, world, folder)
    return found


@pytest.mark.parametrize(("optimizer", "state"), RESUMED)
@pytest.mark.parametrize("index", range(len(RESUMED_LAYOUTS)), ids=RESUMED_LAYOUTS)
@pytest.mark.parametrize(("saved", "loaded"), WAYS)
def test_goes_on_with_other_processes(
    once: Any, saved: int, loaded: int, index: int, optimizer: str, state: str
) -> None:
    """In the same layout and in another one, as the uninterrupted run does."""
    results = once("resumed", lambda folder: launches(folder, resumed))
    layout = RESUMED_LAYOUTS[index]
    for before in (layout, RESUMED_LAYOUTS[index - 1]):
        key = f"{saved}-process {before} to {loaded}-process {layout} {optimizer} {state}"
        assert results[key] <= (0 if optimizer.startswith("diagonal") else ROUNDING), key


@pytest.mark.parametrize(("optimizer", "state"), RESUMED)
@pytest.mark.parametrize("layout", RESUMED_LAYOUTS)
@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (4, 4), *WAYS])
def test_goes_on_from_accelerates_and_deepspeeds_own_formats(
    once: Any, saved: int, loaded: int, layout: str, optimizer: str, state: str
) -> None:
    """accelerate's save_state: under FSDP2 torch's distributed checkpoint; ZeRO's, and its universal one."""
    results = once("own_formats", lambda folder: launches(folder, own_formats))
    found = results[f"{saved}-process to {loaded}-process {layout} {optimizer} {state}"]
    assert found <= (0 if optimizer.startswith("diagonal") else ROUNDING)
