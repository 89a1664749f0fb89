"""Train ResNet-18 and -50 on CIFAR-10 with the project's real optimizers, each method at its own tuned rates.

Each method gets equally many trials on seed 0; its best rates are then judged on other seeds. Full TO is left out: its
slope is n x n, and n is 11 million. RankOne TO has one slope for all weights as one vector, as in the paper.

The networks are initialised as torchvision's. Their BatchNorm uses the statistics of the batch, in the criterion too:
in few steps running statistics lag so far behind that the loss with them is 22 instead of 2.5 (momentum, lr 1).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from to_finetune.errors import UsageError
from to_finetune.optim import DiagonalTO, RankOneTO
from to_finetune.paper import ledger
from to_finetune.paper.data import Images
from to_finetune.paper.members import DIVERGED, batch_order
from to_finetune.paper.methods import ALPHA_END, LR_END, SCHEDULES, Trial
from to_finetune.paper.tuning import Losses, points

WIDENINGS = 2  # of lr's values, at most
EVALUATED_TOGETHER = 512  # rows of a batch in the criterion
TO_VALUES = (0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Protocol:
    """How much is trained: the first `rows` images, averaged down to `size` x `size`, for `steps` steps.

    width: channels of the first stage; 64 is the whole network. At least 16: below, oneDNN's strided 1x1 convolutions
        write past their memory in channels_last (its issue 6035).
    trials: the number of each method's trials, a multiple of 6; seeds: those that judge the winners.
    evaluated_rows: the number of images, from the first on, whose loss is the criterion.
    evaluations: the number of evenly spaced evaluations of it, besides the one at the start.
    """

    name: str
    rows: int
    size: int
    width: int
    steps: int
    trials: int
    evaluations: int
    evaluated_rows: int
    batch: int = 64
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    @property
    def points(self) -> list[int]:
        """The steps after which the loss is taken."""
        return points(self.steps, self.evaluations)


PROTOCOLS = {
    "quick": Protocol(
        "quick", rows=32, size=8, width=16, steps=2, trials=6, evaluations=2, evaluated_rows=32, batch=16, seeds=(1,)
    ),
    "reduced": Protocol(
        "reduced", rows=2048, size=16, width=16, steps=128, trials=12, evaluations=8, evaluated_rows=2048
    ),
    "full": Protocol("full", rows=50_000, size=32, width=64, steps=781, trials=6, evaluations=8, evaluated_rows=5120),
}


@dataclass(frozen=True)
class Method:
    """A method to compare: an optimizer made from ``(weights, lr, alpha_decay, **own)``, and the values to try."""

    make: Callable[..., Optimizer]
    lrs: tuple[float, ...]  # a geometric series
    own: Mapping[str, tuple[float, ...]]

    def trials(self, each: int, lrs: Sequence[float]) -> list[Trial]:
        """Return `each` trials per lr; the other values take turns, in shuffled orders that all methods share.

        Momentum and the Trainable Optimizers thus have the same lr, schedule and beta in each trial.
        """
        columns: dict[str, list[Any]] = {"lr": [lr for lr in lrs for _ in range(each)]}
        count = len(columns["lr"])
        for name, values in {"schedule": SCHEDULES, **self.own}.items():
            shuffled = random.Random(name)
            rounds = range(math.ceil(count / len(values)))
            columns[name] = [value for _ in rounds for value in shuffled.sample(values, len(values))][:count]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _adam(weights: Iterable[Tensor], lr: float, alpha_decay: float) -> Optimizer:
    return torch.optim.Adam(weights, lr, fused=True)


def _trainable(optimizer: Callable[..., Optimizer], alphas: tuple[float, ...], **options: Any) -> Method:
    make = partial(optimizer, schedule="exponential", **options)  # its alpha_decay is 1 where rates are constant
    return Method(make, (0.1, 0.316, 1.0), {"alpha": alphas, "beta": TO_VALUES})


METHODS = {
    "adam": Method(_adam, (0.0003, 0.0006, 0.0012, 0.0024, 0.0048, 0.0096), {}),
    "momentum": _trainable(DiagonalTO, (0.0,), gamma_max=None),
    "diagonal_to": _trainable(DiagonalTO, TO_VALUES, gamma_max=None),
    "rank_one_to": _trainable(RankOneTO, TO_VALUES, gamma_max=None, scope="group"),
    "diagonal_to_ours": _trainable(DiagonalTO, TO_VALUES, gamma_max=1.0, relative_alpha=True),
    "rank_one_to_ours": _trainable(RankOneTO, TO_VALUES, gamma_max=1.0, relative_alpha=True, scope="group"),
}


def run(
    depth: int, train: Images, protocol: Protocol, device: torch.device, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Tune and judge every method.

    Each finished training is kept as a line of a file in the folder, so that an interrupted run does not repeat it.
    Returns JSON: `case`, `protocol`, `steps` (after which the losses are taken), and for each of the `methods` what
    `Ledger.compare` returns.

    Raises:
        UsageError: for too few images, and if the folder has trainings by another protocol of this name.
    """
    if len(train.y) < protocol.rows:
        raise UsageError(f"The {protocol.name} protocol takes {protocol.rows:,} images; there are {len(train.y):,}.")
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    case = f"resnet{depth}"
    x, y = _inputs(train, protocol, device)

    def losses(name: str, rates: Trial, seed: int) -> Losses:
        return train_once(depth, METHODS[name], rates, seed, x, y, protocol)

    trained = ledger.Ledger(folder / f"{case}-{protocol.name}.jsonl", asdict(protocol), losses, progress)
    methods = {}
    for name, method in METHODS.items():
        trials_of = partial(method.trials, protocol.trials // len(method.lrs))
        methods[name] = trained.compare(name, method.lrs, trials_of, WIDENINGS, protocol.seeds)
    return {
        "case": {"name": case, "dataset": "cifar10"},
        "protocol": asdict(protocol),
        "steps": protocol.points,
        "methods": methods,
        "seconds": trained.seconds,
    }


def train_once(depth: int, method: Method, rates: Trial, seed: int, x: Tensor, y: Tensor, protocol: Protocol) -> Losses:
    """Run one training; the seed sets the initial weights and the batches, the same for every method.

    Uses bfloat16 autocast on CUDA. Weights stay contiguous, as the fused optimizers want them; x in channels_last is
    enough to make the activations channels_last too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = resnet(depth, protocol.width).to(x.device)
    optimizer, scheduler = with_schedule(method, network.parameters(), rates, protocol.steps)
    first, taken_at = slice(protocol.evaluated_rows), protocol.points
    found = [training_loss(network, x[first], y[first])]
    for step, batch in enumerate(batch_order(len(y), protocol.batch, protocol.steps, seed).to(x.device), start=1):
        optimizer.zero_grad()
        _loss(network, x[batch], y[batch]).backward()
        optimizer.step()
        scheduler.step()
        if step in taken_at:
            found.append(training_loss(network, x[first], y[first]))
            if not found[-1] < DIVERGED * found[0]:
                found[-1] = math.inf
                break
    return found + [math.inf] * (len(taken_at) - len(found))


def with_schedule(
    method: Method, weights: Iterable[Tensor], rates: Trial, steps: int
) -> tuple[Optimizer, ExponentialLR]:
    """Return the optimizer and lr's scheduler; "exponential" leaves LR_END of lr, and ALPHA_END of alpha and beta."""
    decays = rates["schedule"] == "exponential"
    own = {name: rates[name] for name in method.own}
    optimizer = method.make(weights, lr=rates["lr"], alpha_decay=ALPHA_END ** (decays / steps), **own)
    return optimizer, ExponentialLR(optimizer, LR_END ** (decays / steps))


@torch.no_grad()
def training_loss(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Compute the mean loss over all rows."""
    parts = zip(x.split(EVALUATED_TOGETHER), y.split(EVALUATED_TOGETHER), strict=True)
    return float(sum(_loss(network, *part) * len(part[1]) for part in parts)) / len(y)


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return functional.cross_entropy(network(x), y)


def _inputs(train: Images, protocol: Protocol, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the protocol's images, of mean 0 and variance 1 in each colour, in channels_last, and their labels."""
    x = functional.avg_pool2d(train.x[: protocol.rows].float(), train.x.shape[-1] // protocol.size)
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True)
    x = ((x - mean) / variance.sqrt()).contiguous(memory_format=torch.channels_last)
    return x.to(device), train.y[: protocol.rows].to(device)


class Residual(nn.Module):
    """``relu(body(x) + skip(x))``."""

    def __init__(self, body: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.skip(x))


def resnet(depth: int, width: int = 64) -> nn.Sequential:
    """Build torchvision's ResNet-18 or -50 with CIFAR's usual stem: (rows, 3, height, width) to (rows, 10).

    The stem is a 3x3 convolution of stride 1, without pooling. Written out, because PyPI's torchvision cannot be
    imported with a CPU build of torch. The weights are in torchvision's order, and initialised like its own.
    """
    kernels, blocks, expansion = {18: ((3, 3), (2, 2, 2, 2), 1), 50: ((1, 3, 1), (3, 4, 6, 3), 4)}[depth]
    layers: list[nn.Module] = [*_convolution(3, width, 3, 1), nn.ReLU()]
    inputs = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        widths = [inner] * (len(kernels) - 1) + [inner * expansion]
        for block in range(count):
            layers.append(_block(inputs, widths, kernels, stride=2 if stage and not block else 1))
            inputs = widths[-1]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _block(inputs: int, widths: list[int], kernels: tuple[int, ...], stride: int) -> Residual:
    """Build a block of convolutions with ReLUs between them, the stride on the first 3x3 one, and a skip connection."""
    body: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise([inputs, *widths])):
        body += [*_convolution(before, after, kernels[i], stride if i == kernels.index(3) else 1), nn.ReLU()]
    same = stride == 1 and inputs == widths[-1]
    skip = nn.Identity() if same else nn.Sequential(*_convolution(inputs, widths[-1], 1, stride))
    return Residual(nn.Sequential(*body[:-1]), skip)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs, track_running_stats=False)]
