"""The experiments and how each is run: a case is one row of a table."""

from __future__ import annotations

from dataclasses import dataclass

from to_finetune.paper.methods import METHODS

L2 = {
    "smallnorb": (0.001,),
    "covtype": (0.001,),
    "kdd": (0.970, 0.023, 0.210, 0.088, 0.390),
    "news20": (0.460, 1.100, 0.034, 0.078, 0.212),
    "mnist": (1.600, 1.400, 0.034, 0.680, 0.460),
}


@dataclass(frozen=True)
class Case:
    """A data set, a model and a regularisation; ``l2/2 ||w||^2`` is added to the loss."""

    name: str
    dataset: str
    l2: float = 0.0
    hidden: tuple[int, ...] = ()


STRONGLY_CONVEX = [Case(f"{name}-{l2:.3f}", name, l2) for name, l2s in L2.items() for l2 in l2s]
CONVEX = [Case(f"{name}-convex", name) for name in L2]
FFN = [Case(f"{name}-ffn", name, hidden=(10,)) for name in ("covtype", "kdd")]


@dataclass(frozen=True)
class Protocol:
    """How cases are run: the rates are chosen on seed 0 and judged on other seeds.

    epochs: for each data set; an incomplete batch at the end of an epoch is left out.
    screened: after this many evaluations over `screening_rows`, the tuning drops all but the best twelfth of each
        schedule's trials by each criterion.
    evaluations: the number of evenly spaced full training losses, besides one at the start.
    thinned: run only one in this many of each method's trials.
    """

    name: str
    epochs: dict[str, int]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    batch_size: int = 64
    evaluations: int = 20
    screened: int = 4
    screening_rows: int = 4096
    thinned: int = 1
    compiled: bool = True
    methods: tuple[str, ...] = tuple(METHODS)

    def steps(self, dataset: str, rows: int) -> int:
        return self.epochs[dataset] * (rows // self.batch_size)


FULL = Protocol("full", {"smallnorb": 2, "covtype": 2, "kdd": 1, "news20": 2, "mnist": 1})
# Digits that come with scikit-learn stand in for every data set.
QUICK = Protocol(
    "quick",
    dict.fromkeys(L2, 2),
    seeds=(1, 2, 3),
    evaluations=8,
    screened=2,
    screening_rows=512,
    thinned=37,
    compiled=False,
)
