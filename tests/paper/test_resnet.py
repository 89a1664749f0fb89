"""ResNets on images: the network, the steps of the six methods, equal grids, resuming, and what is recorded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from to_finetune.errors import UsageError
from to_finetune.optim import rules
from to_finetune.optim.schedules import rates_at
from to_finetune.paper import resnet
from to_finetune.paper.data import Images
from to_finetune.paper.methods import ALPHA_END, LR_END, SCHEDULES, Trial
from to_finetune.paper.resnet import METHODS, PROTOCOLS, Protocol

CPU = torch.device("cpu")
TINY = Protocol(
    "tiny", rows=32, size=8, width=16, steps=2, trials=6, seeds=(1, 2), evaluations=2, evaluated_rows=32, batch=16
)


@pytest.fixture
def images() -> Images:
    """Random images, a few more than are trained on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(x, torch.randint(10, (40,), generator=generator))


def rates_of(method: str, **changed: Any) -> Trial:
    """Trial that no method diverges at."""
    own = {"alpha": 0.0 if method == "momentum" else 0.1, "beta": 0.1} if METHODS[method].own else {}
    return {"lr": 0.05, "schedule": "constant", **own, **changed}


# The network


@pytest.mark.parametrize(("depth", "weights"), [(18, 11_173_962), (50, 23_520_842)])
def test_the_network_is_torchvisions_with_a_stem_for_small_images(depth: int, weights: int) -> None:
    network = resnet.resnet(depth)
    stem = network[0]
    assert isinstance(stem, nn.Conv2d)
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert not any(isinstance(module, nn.MaxPool2d) for module in network.modules())
    assert sum(p.numel() for p in network.parameters()) == weights  # as published for CIFAR's stem and 10 classes
    assert [m.stride for m in network.modules() if isinstance(m, nn.Conv2d)].count((2, 2)) == 6
    assert network[:3](torch.zeros(2, 3, 8, 8)).shape == (2, 64, 8, 8)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [18, 50])
def test_outputs_and_gradients_are_torchvisions(depth: int) -> None:
    try:
        from torchvision import models
    except (ImportError, RuntimeError):  # a torchvision that was built for another torch raises the latter
        pytest.skip("needs a torchvision that matches torch")
    theirs, ours = getattr(models, f"resnet{depth}")(num_classes=10), resnet.resnet(depth)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        q.data.copy_(p)
    x = torch.randn(4, 3, 16, 16)
    for network in (theirs, ours):
        network(x).square().sum().backward()
    assert torch.equal(theirs(x), ours(x))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_initial_weights_are_kaimings() -> None:
    for module in resnet.resnet(18).modules():
        if isinstance(module, nn.Conv2d):
            k, out = module.kernel_size[0], module.out_channels
            assert module.weight.std().item() == pytest.approx((2 / (k * k * out)) ** 0.5, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


# The steps


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class ByHand:
    """Two steps of a method on all weights as one vector, in float64."""

    def __init__(self, method: str, w: Tensor) -> None:
        self.method, self.w = method, w
        zeros = torch.zeros_like(w)
        v = torch.full_like(w, w.numel() ** -0.5)
        if method.endswith("ours"):
            v *= w != 0
        self.state = (zeros, v, zeros) if "rank_one" in method else (zeros, zeros)

    def step(self, g: Tensor, sizes: list[int], t: int, lr: float, alpha: float, beta: float) -> None:
        w = self.w
        if self.method == "adam":
            m, v = 0.9 * self.state[0] + 0.1 * g, 0.999 * self.state[1] + 0.001 * g * g
            self.w, self.state = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8), (m, v)
        elif self.method == "momentum":
            b = (1 - beta) * self.state[1] + beta * g
            self.w, self.state = w - lr * b, (self.state[0], b)
        else:
            ours = self.method.endswith("ours")
            rates: dict[str, Any] = {"lr": lr, "alpha": alpha, "beta": beta, "gamma_max": 1.0 if ours else None}
            if "rank_one" in self.method:  # one slope for all weights
                self.w, *state, _ = rules.rank_one(w, g, *self.state, **rates, relative_alpha=ours)
                self.state = tuple(state)
            else:
                parts = zip(*(x.split(sizes) for x in (w, g, *self.state)), strict=True)
                new = [rules.diagonal(*part, **rates, relative_alpha=ours) for part in parts]
                self.w, *state = (torch.cat(column) for column in list(zip(*new, strict=True))[:3])
                self.state = tuple(state)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_equal_the_rules_in_float64(method: str, schedule: str) -> None:
    torch.manual_seed(0)
    network = resnet.resnet(18, 16).double()
    weights = list(network.parameters())
    x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    rates, steps = rates_of(method, schedule=schedule), 4
    optimizer, scheduler = resnet.with_schedule(METHODS[method], weights, rates, steps)
    hand = ByHand(method, flat(weights))
    for t in (1, 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        left = [end ** ((t - 1) / steps) if schedule == "exponential" else 1.0 for end in (LR_END, ALPHA_END)]
        alpha, beta = (rates.get(name, 0.0) * left[1] for name in ("alpha", "beta"))
        hand.step(flat(p.grad for p in weights), [p.numel() for p in weights], t, rates["lr"] * left[0], alpha, beta)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(flat(weights), hand.w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_momentum_is_torchs(beta: float) -> None:
    ours, theirs = ([nn.Parameter(torch.arange(5.0).double())] for _ in range(2))
    mine, _ = resnet.with_schedule(METHODS["momentum"], ours, rates_of("momentum", beta=beta), 3)
    sgd = torch.optim.SGD(theirs, lr=0.05 * beta, momentum=1 - beta, dampening=0)
    for _ in range(3):
        ours[0].grad = theirs[0].grad = torch.randn(5, dtype=torch.float64)
        mine.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_the_exponential_scheme_ends_at_its_shares(method: str) -> None:
    rates = rates_of(method, schedule="exponential")
    optimizer, scheduler = resnet.with_schedule(METHODS[method], [nn.Parameter(torch.ones(3))], rates, 7)
    group = optimizer.param_groups[0]
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    assert group["lr"] == pytest.approx(rates["lr"] * LR_END)
    if method != "adam":
        _, alpha, beta = rates_at(7, group)
        assert (alpha, beta) == pytest.approx((rates["alpha"] * ALPHA_END, rates["beta"] * ALPHA_END))


def test_options_of_the_methods() -> None:
    groups = {
        name: resnet.with_schedule(method, [nn.Parameter(torch.ones(3))], rates_of(name), 1)[0].param_groups[0]
        for name, method in METHODS.items()
    }
    assert type(METHODS["adam"].make([nn.Parameter(torch.ones(1))], lr=0.1, alpha_decay=1.0)) is torch.optim.Adam
    assert [groups[name]["scope"] for name in ("rank_one_to", "rank_one_to_ours")] == ["group", "group"]
    for name in ("momentum", "diagonal_to", "rank_one_to"):  # the paper's exact update
        assert (groups[name]["gamma_max"], groups[name]["relative_alpha"]) == (None, False)
    for name in ("diagonal_to_ours", "rank_one_to_ours"):
        assert (groups[name]["gamma_max"], groups[name]["relative_alpha"]) == (1.0, True)
    assert groups["momentum"]["alpha"] == 0.0


# What is tried


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_methods_have_equally_many_different_trials(protocol: Protocol) -> None:
    for method in METHODS.values():
        trials = method.trials(protocol.trials // len(method.lrs), method.lrs)
        assert len({json.dumps(trial) for trial in trials}) == len(trials) == protocol.trials
        for lr in method.lrs:
            assert sum(trial["lr"] == lr for trial in trials) == protocol.trials // len(method.lrs)
        assert all(len({trial[name] for trial in trials}) == len(values) for name, values in method.own.items())
    momentum, diagonal = (
        METHODS[name].trials(protocol.trials // 3, METHODS[name].lrs) for name in ("momentum", "diagonal_to")
    )
    assert [{**trial, "alpha": 0.0} for trial in diagonal] == momentum
    assert protocol.width >= 16  # see Protocol
    assert protocol.batch == 64 or protocol.name == "quick"


# Runs


def test_a_diverged_training_stops_early_and_has_no_numbers(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = replace(TINY, steps=8, evaluations=4)
    x, y = resnet._inputs(images, protocol, CPU)
    taken = []
    full = resnet.training_loss
    monkeypatch.setattr(resnet, "training_loss", lambda *args: taken.append(0) or full(*args))
    losses = resnet.train_once(18, METHODS["momentum"], rates_of("momentum", lr=1e30), 0, x, y, protocol)
    assert math.isfinite(losses[0])
    assert losses[1:] == [math.inf] * 4
    assert len(taken) == 2


def test_the_criterion_is_taken_over_its_own_rows(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, int]] = []

    def loss(network: nn.Module, x: Tensor, y: Tensor) -> float:
        rows.append((len(x), len(y)))
        return 1.0

    monkeypatch.setattr(resnet, "training_loss", loss)
    protocol = replace(TINY, evaluated_rows=16)
    x, y = resnet._inputs(images, protocol, CPU)
    resnet.train_once(18, METHODS["adam"], rates_of("adam"), 0, x, y, protocol)
    assert rows == [(16, 16)] * 3


def test_inputs_are_the_first_images_averaged_and_standardised(images: Images) -> None:
    x, y = resnet._inputs(images, TINY, CPU)
    assert x.shape == (32, 3, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, images.y[:32])
    patch = images.x[:32].float().view(32, 3, 8, 4, 8, 4).mean((3, 5))
    expected = (patch - patch.mean((0, 2, 3), keepdim=True)) / patch.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(x.contiguous(), expected)


def test_trainings_repeat_and_start_alike_for_all_methods(images: Images) -> None:
    x, y = resnet._inputs(images, TINY, CPU)
    before = torch.random.get_rng_state()
    found = {
        name: [resnet.train_once(18, METHODS[name], rates_of(name), seed, x, y, TINY) for seed in (1, 1, 2)]
        for name in METHODS
    }
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(first == again != other for first, again, other in found.values())
    assert len({first[0] for first, _, _ in found.values()}) == 1
    assert len({tuple(first) for first, _, _ in found.values()}) == len(METHODS)


def test_a_resumed_run_repeats_nothing(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "METHODS", {name: METHODS[name] for name in ("adam", "diagonal_to_ours")})

    def run(protocol: Protocol = TINY) -> tuple[dict[str, Any], int]:
        told: list[str] = []
        result = resnet.run(18, images, protocol, CPU, tmp_path / "a", told.append)
        assert result.pop("seconds") > 0
        return result, len(told)

    whole, trained = run()
    file = tmp_path / "a" / "resnet18-tiny.jsonl"
    header, *lines = file.read_text().splitlines(keepends=True)
    assert json.loads(header) == json.loads(json.dumps(whole["protocol"]))
    assert len(lines) == len(set(lines)) == trained
    assert run() == (whole, 0)
    file.write_text(header + "".join(lines[:5]) + lines[5][:-9])
    assert run() == (whole, trained - 5)
    assert len(file.read_text().splitlines()) == 1 + trained
    with pytest.raises(UsageError, match="trainings of another protocol"):
        run(replace(TINY, steps=3))
    with pytest.raises(UsageError, match="takes 41 images; there are 40"):
        run(replace(TINY, rows=41))


def test_the_quick_protocol_of_all_methods(images: Images, tmp_path: Path) -> None:
    result = resnet.run(18, images, PROTOCOLS["quick"], CPU, tmp_path, lambda line: None)
    assert len(json.dumps(result, allow_nan=False)) < 30_000
    assert (result["case"]["name"], result["steps"], list(result["methods"])) == ("resnet18", [0, 1, 2], list(METHODS))
    for method in result["methods"].values():
        assert method["trials"] >= 6
        for name, winner in method["winners"].items():
            assert [len(curve) for curve in method["curves"][name]] == ([3] if winner else [])


def test_the_deeper_network_trains(images: Images) -> None:
    x, y = resnet._inputs(images, TINY, CPU)
    for name in ("adam", "rank_one_to_ours"):
        first, *_, last = resnet.train_once(50, METHODS[name], rates_of(name, lr=0.001), 0, x, y, TINY)
        assert last < first
