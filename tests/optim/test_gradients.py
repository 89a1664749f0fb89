"""Gradients as training loops produce them: missing, zero, strided, accumulated, scaled, from a closure, sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from .helpers import OPTIMIZERS, assert_equals_textbook, copies, flat, make_weights, random_gradients, run, step
from .textbook import Textbook


@pytest.mark.parametrize("options", [{}, {"schedule": "theorem"}, {"grad_scale": "rms", "relative_alpha": True}])
def test_a_weight_without_gradient_stays_and_keeps_its_step(variant: str, options: dict[str, Any]) -> None:
    """Each tensor counts its own steps, and its schedule goes by them."""
    params = make_weights()
    optimizer, book = OPTIMIZERS[variant](params, **options), Textbook(variant, params, **options)
    for t in range(8):
        grads = [None if t % (k + 2) == 0 else g for k, g in enumerate(random_gradients(params))]
        step(optimizer, params, grads)
        book.step(grads)
    assert_equals_textbook(optimizer, params, book)
    assert [int(optimizer.state[p]["step"]) for p in params] == book.taken == [4, 5, 6, 6, 6]


def test_a_missing_gradient_leaves_a_rank_one_block_of_the_rest() -> None:
    """With scope="group" the scalar products run over the weights that have a gradient."""
    params = make_weights()
    optimizer = OPTIMIZERS["rank_one"](params, scope="group")
    book = Textbook("rank_one", params, scope="group")
    for t in range(8):
        grads = [None if (t + k) % 4 == 0 else g for k, g in enumerate(random_gradients(params))]
        step(optimizer, params, grads)
        book.step(grads)
    torch.testing.assert_close(flat(params), book.w, rtol=1e-10, atol=1e-11)


def test_full_refuses_a_block_with_a_missing_gradient() -> None:
    """With scope="group" A is one matrix; a part of it cannot step alone. Nothing moves."""
    params = make_weights()
    optimizer = OPTIMIZERS["full"](params, scope="group")
    run(optimizer, params, 2)
    before = copies(params)
    with pytest.raises(RuntimeError, match='scope="group" needs a gradient for every weight'):
        step(optimizer, params, [None, *random_gradients(params)[1:]])
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"grad_scale": "rms", "relative_alpha": True}])
def test_gradients_of_zeros_are_gradients(variant: str, options: dict[str, Any]) -> None:
    """They step like any other: momentum and slope go on working, and nothing is 0/0."""
    params = make_weights()
    optimizer, book = OPTIMIZERS[variant](params, **options), Textbook(variant, params, **options)
    for t in range(6):
        grads = random_gradients(params) if t in (1, 3) else [torch.zeros_like(p) for p in params]
        step(optimizer, params, grads)
        book.step(grads)
    assert_equals_textbook(optimizer, params, book)


def test_strided_weights_and_gradients_are_values_like_others(variant: str) -> None:
    """Transposed, sliced and expanded tensors."""
    base = make_weights([(4, 3), (6, 5), (2, 3, 2)])
    params = [Parameter(base[0].detach().t()), Parameter(base[1].detach()[::2, 1::2]), base[2]]
    assert not params[0].is_contiguous()
    assert not params[1].is_contiguous()
    optimizer, book = OPTIMIZERS[variant](params, alpha=0.3), Textbook(variant, params, alpha=0.3)
    for _ in range(5):
        x, y, z = torch.randn(3, 4), torch.randn(2, 6), torch.randn(2, 1, 2)
        grads = [x.double(), y.double().t()[::2], z.double().expand(2, 3, 2)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        book.step(grads)
    assert_equals_textbook(optimizer, params, book)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"grad_scale": "rms"}, {"maximize": True}])
def test_no_gradient_is_written_to(variant: str, options: dict[str, Any]) -> None:
    """The optimizer works on a copy."""
    params = make_weights()
    grads = random_gradients(params)
    step(OPTIMIZERS[variant](params, **options), params, grads)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


def quadratic(w: Tensor, rows: Tensor) -> Tensor:
    """A loss with a gradient of its own for every batch of rows."""
    return (rows @ w).square().mean()


def test_accumulated_gradients_step_like_one_batch(variant: str) -> None:
    """Two backward passes over half a batch each, and zero_grad in both its forms."""
    (w,), rows = make_weights([(6,)]), torch.randn(5, 8, 6, dtype=torch.float64)
    (whole,) = copies([w])
    accumulating, direct = OPTIMIZERS[variant]([w], alpha=0.01), OPTIMIZERS[variant]([whole], alpha=0.01)
    for t, batch in enumerate(rows):
        accumulating.zero_grad(set_to_none=t % 2 == 0)
        for half in batch.chunk(2):
            (quadratic(w, half) / 2).backward()
        accumulating.step()
        direct.zero_grad()
        quadratic(whole, batch).backward()
        direct.step()
    torch.testing.assert_close(w, whole, rtol=1e-10, atol=1e-12)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(variant: str) -> None:
    """Also inside no_grad, as torch's optimizers do."""
    (w,), rows = make_weights([(6,)]), torch.randn(8, 6, dtype=torch.float64)
    optimizer, book = OPTIMIZERS[variant]([w], alpha=0.01), Textbook(variant, [w], alpha=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(w, rows)
        loss.backward()
        return loss

    for _ in range(3):
        expected = quadratic(w.detach(), rows)
        with torch.no_grad():
            assert torch.equal(optimizer.step(closure), expected)
        book.step([w.grad])
    assert_equals_textbook(optimizer, [w], book)


def test_grad_scaler_unscales_and_skips_the_steps_with_infinities(variant: str) -> None:
    """A scaled run equals the textbook without scaling; a skipped step changes nothing and is not counted."""
    params = make_weights([(3, 4), (5,)], torch.float32)
    optimizer, book = OPTIMIZERS[variant](params), Textbook(variant, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        grads = random_gradients(params)
        if t in (0, 3):
            grads[1][2] = torch.inf
        before = copies(params)
        optimizer.zero_grad()
        scaler.scale(sum((p * g).sum() for p, g in zip(params, grads, strict=True))).backward()
        scaler.step(optimizer)
        scaler.update()
        if t in (0, 3):
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        else:
            book.step(grads)
    assert_equals_textbook(optimizer, params, book, rtol=1e-4, atol=1e-5)
    assert book.taken == [int(optimizer.state[p]["step"]) for p in params] == [4, 4]


def test_sparse_gradients_are_refused(variant: str) -> None:
    """With a sentence, and before any weight moves."""
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = OPTIMIZERS[variant](embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="TO does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state[embedding.weight]
