"""The kernels that make rows and columns weigh alike, beside the plain path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from to_finetune.optim import DiagonalTO, factored
from to_finetune.optim.kernels.batch import Piece, Pieces
from to_finetune.optim.sharding import Member

from .test_fast_paths import cpu, needs_compiler, triton


def pieces(dtype: torch.dtype) -> tuple[list[Piece], int]:
    """Of a matrix that takes several chunks, one that is a run with cut rows, one column, one row, an empty one."""
    big = torch.randn(700, 1201).to(dtype)
    run = torch.randn(7 + 3 * 11 + 4).to(dtype)
    cut = [Piece(run[:7].view(1, 7), 1904, 1913), Piece(run[7:40].view(3, 11), 1905, 1909, turn=1)]
    cut.append(Piece(run[40:].view(1, 4), 1908, 1909, turn=2))
    small = [Piece(torch.randn(5, 1).to(dtype), 1920, 1925), Piece(torch.randn(1, 2, 3).to(dtype), 1926, 1927)]
    return [Piece(big, 0, 700), *cut, *small, Piece(torch.zeros(0, 3, dtype=dtype), 1933, 1933)], 1936


def clones(of: list[Piece]) -> list[Piece]:
    return [replace(piece, grad=piece.grad.clone()) for piece in of]


@pytest.fixture(params=[pytest.param(cpu, marks=needs_compiler), triton], ids=["cpp", "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """Both sets of kernels, for CPU tensors."""
    return request.param()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_equal_the_plain_path(
    dtype: torch.dtype, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums to float64's rounding, the same for any number of threads; scaled gradients to the bit."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    plain, size = pieces(dtype)
    fused = clones(plain)
    plain_sums, fused_sums, again = (torch.ones(size, dtype=torch.float64) for _ in range(3))
    factored._add_squares(plain, plain_sums)
    kernels.add_squares(Pieces(fused), fused_sums)
    torch.testing.assert_close(fused_sums, plain_sums, rtol=1e-13, atol=0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(kernels, "AT_ONCE", 30, raising=False)  # several launches on a GPU, one within the cut rows
    kernels.add_squares(Pieces(fused), again)
    assert torch.equal(fused_sums, again)

    factors = (plain_sums + 0.1).rsqrt().to(dtype)
    factored._scale(plain, factors)
    kernels.scale(Pieces(fused), factors)
    for one, other in zip(plain, fused, strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(("first", "count"), [(0, 77), (3, 4), (3, 8), (3, 30), (3, 41), (11, 22), (9, 12)])
def test_the_pieces_of_a_run_are_its_weights_and_those_of_one_turn_share_no_column(first: int, count: int) -> None:
    """Of a matrix with 7 rows and 11 columns."""
    grad = torch.arange(first, first + count, dtype=torch.float32)
    weight = torch.zeros(count)
    found = list(factored._pieces(Member(0, weight, grad, {}, weight, 77, first), 11, 100, 200))
    whole = torch.full((7, 11), -1.0)
    for piece in found:
        row, column = piece.row - 100, piece.column - 200
        assert (whole[row : row + piece.rows, column : column + piece.columns] == -1).all()
        whole[row : row + piece.rows, column : column + piece.columns] = piece.grad
    assert torch.equal(whole.flatten()[first : first + count], grad)
    assert (whole >= 0).sum() == count
    assert len({piece.turn for piece in found}) == len(found)
    rows = [row for piece in found for row in range(piece.row, piece.row + piece.rows)]
    assert len(set(rows)) == len(rows)


def test_matrices_that_are_measured_apart_end_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped(measured_together: int) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, 3)) for n in (2, 5, 1, 4)]
        for p in params:
            p.grad = torch.randn_like(p)
        monkeypatch.setattr(factored, "LARGEST", measured_together)
        with mock.patch.object(factored, "_factors_", wraps=factored._factors_) as made:
            DiagonalTO(params, grad_scale="factored", fused=False).step()
        assert made.call_count == (2 if measured_together == 7 else 1)
        return [p.detach() for p in params]

    for one, other in zip(stepped(7), stepped(1000), strict=True):
        assert torch.equal(one, other)


@needs_compiler
def test_wide_pieces_equal_the_plain_path() -> None:
    """Their columns are too many to be held for all of them."""
    wide = [Piece(torch.randn(2, 600_000), 600_002 * i, 600_002 * i + 2) for i in range(3)]
    plain, fused = torch.zeros(2, 3 * 600_002, dtype=torch.float64)
    factored._add_squares(wide, plain)
    cpu().add_squares(Pieces(wide), fused)
    torch.testing.assert_close(fused, plain, rtol=1e-13, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float, kernels: ModuleType) -> None:
    """Its row and column have no size, and NaN says so to the guard."""

    def equalized(grad: Tensor, add_squares: Callable[..., None], scale: Callable[..., None]) -> Tensor:
        sums = torch.zeros(9, dtype=torch.float64)
        add_squares([Piece(grad, 0, 4)], sums)
        scale([Piece(grad, 0, 4)], factored._factors_(sums, torch.tensor([4, 5])).to(dtype))
        return grad

    grad = torch.randn(4, 5).to(dtype)
    grad[1, 2] = value
    plain = equalized(grad.clone(), factored._add_squares, factored._scale)
    fused = equalized(
        grad.clone(),
        lambda pieces, sums: kernels.add_squares(Pieces(pieces), sums),
        lambda pieces, factors: kernels.scale(Pieces(pieces), factors),
    )
    assert plain[1, 2].isnan()
    assert torch.equal(plain.isnan(), fused.isnan())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_matrices_in_one_call_equal_the_plain_path(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large, small, rows of zeros, one row, one column, three dimensions, empty, all zeros, and not finite."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    shapes = [(700, 1201), (33, 65), (1, 9), (9, 1), (4, 3, 2), (0, 3), (3, 0), (5, 6), (5, 6)]
    plain, sizes = [], []
    for shape in shapes:
        grad = torch.randn(shape).to(dtype)
        grad[1::2] *= 1e-6
        at = sum(sizes)
        sizes += [shape[0], grad.shape[1:].numel()]
        plain.append(Piece(grad, at, at + shape[0]))
    plain[1].grad[3] = 0
    plain[7].grad.zero_()
    plain[8].grad[2, 4] = torch.inf
    fused = clones(plain)
    squares = torch.zeros(sum(sizes), dtype=torch.float64)
    factored._add_squares(plain, squares)
    factored._scale(plain, factored._factors_(squares, torch.tensor(sizes)).to(dtype))
    cpu().equalize(Pieces(fused))
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
