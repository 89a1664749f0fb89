"""Full TO: the slope of the gradient model is a whole matrix A, held densely or as its exact history."""

from __future__ import annotations

import torch
from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.blocks import Part
from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.schedules import decoupled_decay
from to_finetune.optim.state import random_bits, write_
from to_finetune.optim.stateful import compute_dtype


class FullTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = A w + b``, A an (n, n) matrix for each block of n weights.

    Since A starts at zero it is minus the sum of the t corrections so far, each ``alpha r w^T``. While ``2 t < n``,
    keeping those pairs of vectors is exact, and smaller and faster than the matrix; after that the block switches to
    the matrix by itself. State of a block, at its first tensor: ``corrections`` and ``weights`` (rows, n; the first
    ``pairs`` rows are in use), later ``A`` (n, n). State of each tensor: ``b`` of its shape, and a 0-dim ``step``.

    The shapes of this state change over the steps. `state_dict` and `load_state_dict` support that; torch's distributed
    checkpoint, which needs the saved shapes in place before it loads, cannot restore it from files.

    With ``scope="group"`` every weight of the group must have a gradient in every step.
    """

    state_names = ("b",)
    block_names = ("A", "corrections", "weights")
    state_dtypes = (torch.float32, torch.bfloat16)
    variant = "full"

    def _update(self, part: Part) -> None:
        if self._skip is not None and self._skip:
            return
        group, members = part.group, part.members
        blocks = [[i] for i in range(len(members))]
        if group["scope"] == "group":
            blocks = [list(range(len(members)))]
            if len(members) != sum(p.numel() > 0 for p in group["params"]):
                raise RuntimeError(
                    'FullTO with scope="group" needs a gradient for every weight of the group; freeze or leave out '
                    'those without one, or use scope="tensor".'
                )
        for block in blocks:
            self._update_block(part, block)

    def _update_block(self, part: Part, indices: list[int]) -> None:
        group, members = part.group, [part.members[i] for i in indices]
        block = [member.p for member in members]
        first = block[0]
        flat_dtype, device = compute_dtype(first), first.device
        rates = self._rates(group, members[0], flat_dtype)

        def flat(tensors: list[Tensor]) -> Tensor:
            return torch.cat([t.reshape(-1).to(device, flat_dtype) for t in tensors])

        offsets = [member.state["b"] for member in members]
        w, g, b = flat(block), flat([self._scaled_gradient(part, i) for i in indices]), flat(offsets)
        slope = members[0].state
        new_w, b, G, correction = rules.full(
            w,
            g,
            b,
            _slope_times(slope, w),
            **rates._asdict(),
            gamma_max=group["gamma_max"],
            relative_alpha=group["relative_alpha"],
        )
        if rates.alpha > 0:
            dtype = group["state_dtype"] or flat_dtype
            _learn(slope, correction, w, dtype, self._key(group, members[0], members[0].position))
        new_w = new_w - decoupled_decay(group, rates) * w
        sizes = [p.numel() for p in block]
        parts = (x.split(sizes) for x in (new_w, b, G - g, g))
        for i, p, w_part, b_part, error, g_part in zip(indices, block, *parts, strict=True):
            self._finish(part, i, w_part.view(p.shape), [b_part.view(p.shape)], error, g_part)


def history_is_smaller(n: int, pairs: int) -> bool:
    """Whether that many pairs of n-vectors hold fewer numbers than the (n, n) matrix."""
    return 2 * pairs < n


def more_rows(n: int, rows: int) -> int:
    """Return the room for pairs once `rows` are taken: doubled, but not beyond the switch to the matrix."""
    return min(max(8, 2 * rows), (n - 1) // 2)


def _slope_times(slope: dict[str, Tensor], w: Tensor) -> Tensor:
    """Return ``A w``, in whichever form the slope is held; zero before the first correction."""
    if "A" in slope:
        return rules.full_dense_product(slope["A"].to(w.dtype), w)
    if "pairs" in slope:
        corrections, weights = _history(slope)
        return rules.full_history_product(corrections.to(w.dtype), weights.to(w.dtype), w)
    return torch.zeros_like(w)


def _learn(slope: dict[str, Tensor], correction: Tensor, w: Tensor, dtype: torch.dtype, key: int | Tensor) -> None:
    """Subtract ``correction w^T`` from A: add a row to the history, or update the matrix once that is smaller.

    The key is that of the random bits that round a bfloat16 matrix.
    """
    n = w.numel()
    if "A" not in slope and "pairs" not in slope:
        slope["pairs"] = torch.tensor(0, device="cpu")
        slope["corrections"] = slope["weights"] = w.new_empty(0, n, dtype=dtype)
    if "A" not in slope and not history_is_smaller(n, int(slope["pairs"]) + 1):
        corrections, weights = _history(slope)
        slope["A"] = -(corrections.mT @ weights)
        for name in ("pairs", "corrections", "weights"):
            del slope[name]
    if "A" in slope:
        A = slope["A"]
        if dtype == torch.bfloat16:
            new = A.float().addr_(correction.float(), w.float(), alpha=-1)
            write_(A, new, random_bits(A, key), len(FullTO.state_names) + 1)
        else:
            A.addr_(correction.to(dtype), w.to(dtype), alpha=-1)
        return
    row = int(slope["pairs"])
    if row == len(slope["weights"]):
        rows = more_rows(n, row)
        for name in ("corrections", "weights"):
            slope[name] = torch.cat([slope[name], w.new_zeros(rows - row, n, dtype=dtype)])
    slope["corrections"][row], slope["weights"][row] = correction, w
    slope["pairs"] += 1


def _history(slope: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    rows = int(slope["pairs"])
    return slope["corrections"][:rows], slope["weights"][:rows]
