"""Full's two forms of A, the history of its corrections and the matrix, are the same A; memory is the smaller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from to_finetune.optim import FullTO

from .helpers import assert_equals_textbook, make_weights, random_gradients, run, slope_matrix, step
from .textbook import Textbook

HISTORY, DENSE = {"pairs", "corrections", "weights"}, {"A"}


def form(state: dict[str, Any]) -> set[str]:
    """The state's names of the slope."""
    return state.keys() - {"step", "b"}


@pytest.mark.parametrize("options", [{"alpha": 0.1}, {"relative_alpha": True, "alpha": 0.5}, {"schedule": "theorem"}])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 40])
def test_both_forms_equal_the_matrix_across_the_switch(n: int, options: dict[str, Any]) -> None:
    """After t steps the history is kept while 2 t < n, and w, b and A are the textbook's before and after."""
    (w,) = make_weights([(n,)])
    optimizer, book = FullTO([w], **options), Textbook("full", [w], **options)
    for t in range(1, n // 2 + 6):
        grads = random_gradients([w])
        step(optimizer, [w], grads)
        book.step(grads)
        assert form(optimizer.state[w]) == (HISTORY if 2 * t < n else DENSE)
        assert_equals_textbook(optimizer, [w], book)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 17, 23, 40, 101])
def test_the_slope_never_takes_more_than_the_matrix(n: int) -> None:
    """Allocated rows included; and these are never more than twice those in use, 8 at the least."""
    (w,) = make_weights([(n,)])
    optimizer = FullTO([w])
    for _ in range(n // 2 + 2):
        run(optimizer, [w], 1)
        state = optimizer.state[w]
        assert sum(state[name].numel() for name in form(state) - {"pairs"}) <= n * n
        if "pairs" in state:
            assert int(state["pairs"]) <= len(state["corrections"]) <= max(8, 2 * int(state["pairs"]))
            assert state["corrections"].shape == state["weights"].shape == (len(state["weights"]), n)


def test_unused_rows_of_the_history_are_zeros() -> None:
    """So that a checkpoint holds no stray memory."""
    (w,) = make_weights([(100,)])
    optimizer = FullTO([w])
    for t in range(1, 30):
        run(optimizer, [w], 1)
        for name in ("corrections", "weights"):
            assert optimizer.state[w][name][:t].any(1).all()
            assert not optimizer.state[w][name][t:].any()


def test_without_slope_nothing_is_stored_for_it() -> None:
    """alpha = 0: step and b alone; the slope starts where alpha does."""
    (w,) = make_weights([(20,)])
    optimizer, book = FullTO([w], alpha=0.0), Textbook("full", [w], alpha=0.0)
    for t in range(8):
        if t == 4:
            optimizer.param_groups[0]["alpha"] = book.options.alpha = 0.1
        grads = random_gradients([w])
        step(optimizer, [w], grads)
        book.step(grads)
        assert form(optimizer.state[w]) == (HISTORY if t >= 4 else set())
    assert int(optimizer.state[w]["pairs"]) == 4
    assert_equals_textbook(optimizer, [w], book)


def test_a_group_is_one_block_with_one_slope_at_its_first_tensor() -> None:
    """An n x n matrix over all the weights, n = 12 + 5 + 1, in both forms."""
    empty, *params = make_weights([(0,), (3, 4), (5,), ()])
    optimizer, book = FullTO([empty, *params], scope="group"), Textbook("full", [empty, *params], scope="group")
    for t in range(1, 12):
        grads = random_gradients([empty, *params])
        step(optimizer, [empty, *params], grads)
        book.step(grads)
        assert form(optimizer.state[params[0]]) == (HISTORY if 2 * t < 18 else DENSE)
        assert slope_matrix(optimizer.state[params[0]]).shape == (18, 18)
        assert not any(form(optimizer.state[p]) for p in (empty, *params[1:]))
        assert_equals_textbook(optimizer, [empty, *params], book)
    off_diagonal = optimizer.state[params[0]]["A"][:12, 12:]
    assert off_diagonal.any()


@pytest.mark.parametrize(("shape", "steps"), [((100,), 20), ((10,), 20)])
def test_a_bfloat16_slope_is_the_slope_to_its_rounding(shape: tuple[int, ...], steps: int) -> None:
    """History and matrix alike: relative to the largest element of A, and within a few roundings."""
    (w,) = make_weights([shape], torch.float32)
    optimizer = FullTO([w], lr=1e-6, state_dtype=torch.bfloat16)
    book = Textbook("full", [w], lr=1e-6)
    for _ in range(steps):
        grads = random_gradients([w])
        step(optimizer, [w], grads)
        book.step(grads)
    state = optimizer.state[w]
    assert {state[name].dtype for name in (form(state) - {"pairs"}) | {"b"}} == {torch.bfloat16}
    torch.testing.assert_close(slope_matrix(state), book.state["A"], rtol=0.0, atol=0.05 * book.state["A"].abs().max())


def test_corrections_too_small_for_bfloat16_add_up() -> None:
    """In the matrix, which is rounded at random; to the nearest it would stop growing at 0.125, of 0.87."""
    slopes = {}
    for state_dtype in (torch.float32, torch.bfloat16):
        w = torch.nn.Parameter(torch.ones(8))
        optimizer = FullTO([w], lr=0.0, alpha=1e-4, beta=0.0, state_dtype=state_dtype)
        for _ in range(1500):
            step(optimizer, [w], [torch.full((8,), 5.0)])
        slopes[state_dtype] = optimizer.state[w]["A"].float().mean().item()
    assert slopes[torch.float32] > 0.4
    assert slopes[torch.bfloat16] == pytest.approx(slopes[torch.float32], rel=0.02)
