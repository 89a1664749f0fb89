"""Every layout ends where one process does, and goes on from what any other has saved."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
from filelock import FileLock

from .training import (
    LAYOUTS,
    OPTIMIZERS,
    OWN_FORMATS,
    RESUMED,
    RESUMED_LAYOUTS,
    STATES,
    STEPS,
    launch,
    refused,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
ROUNDING = 1e-7  # of weights about 0.2 in size that moved by about 0.04


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, dict[str, Any]]:
    """Of one process, two, four and one again; each goes on from what those before it have saved.

    Once for all of pytest's own processes.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    file = folder / "layouts.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            found: dict[str, dict[str, Any]] = {"trajectories": {}, "resumed": {}, "own_formats": {}}
            for world in (1, 2, 4, 1):
                parts = list(found) if world > 1 else ["resumed", "own_formats"]
                for part, values in launch(parts, world, folder / "layouts").items():
                    found[part] |= values
            file.write_text(json.dumps(found))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 4])
def test_ends_where_one_process_does(results: Any, world: int, layout: str, optimizer: str, state: str) -> None:
    """Diagonal to the bit, RankOne to rounding; or says what to change."""
    found = results["trajectories"][f"{world} {layout} {optimizer} {state}"]
    if reason := refused(layout, optimizer):
        assert reason in found["refused"]
        return
    live = {"diagonal": "DiagonalTO", "rank_one": "RankOneTO"}[optimizer.split("-")[0]]
    zero = {"zero1": "ZeroOptimizer", "zero2": "ZeroOptimizer", "zero3": "ZeroOptimizer_Stage3"}
    wrapper = zero.get(layout.split("-")[0])
    assert found["wrappers"] == ([f"DeepSpeed{wrapper}", live] if wrapper else [live])
    assert found["steps"] == [STEPS]
    assert found["deviation"] <= (0 if live == "DiagonalTO" else ROUNDING)
    same = results["trajectories"][f"{world} ddp {optimizer} {state}"]["error"]
    assert found["error"] == pytest.approx(same, rel=1e-6)


WAYS = [(1, 2), (1, 4), (2, 4), (2, 1)]


@pytest.mark.parametrize(("optimizer", "state"), RESUMED)
@pytest.mark.parametrize("index", range(len(RESUMED_LAYOUTS)), ids=RESUMED_LAYOUTS)
@pytest.mark.parametrize(("saved", "loaded"), WAYS)
def test_goes_on_with_other_processes(
    results: Any, saved: int, loaded: int, index: int, optimizer: str, state: str
) -> None:
    """In the same layout and in another one, as the uninterrupted run does."""
    layout = RESUMED_LAYOUTS[index]
    for before in (layout, RESUMED_LAYOUTS[index - 1]):
        key = f"{saved}-process {before} to {loaded}-process {layout} {optimizer} {state}"
        assert results["resumed"][key] <= (0 if optimizer.startswith("diagonal") else ROUNDING), key


@pytest.mark.parametrize(("optimizer", "state"), OWN_FORMATS)
@pytest.mark.parametrize("layout", RESUMED_LAYOUTS)
@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (4, 4), *WAYS])
def test_goes_on_from_accelerates_and_deepspeeds_own_formats(
    results: Any, saved: int, loaded: int, layout: str, optimizer: str, state: str
) -> None:
    """accelerate's save_state: under FSDP2 torch's distributed checkpoint; ZeRO's, and its universal one."""
    found = results["own_formats"][f"{saved}-process to {loaded}-process {layout} {optimizer} {state}"]
    assert found <= (0 if optimizer.startswith("diagonal") else ROUNDING)
