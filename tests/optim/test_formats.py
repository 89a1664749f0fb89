"""Weights and state in few bits: the formats as they are documented, and what rounding at random is for."""

from __future__ import annotations

import copy
import math
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.nn import Parameter

from to_finetune.optim import FullTO
from to_finetune.optim.state import decode, encode, random16, random_bits, read, round_to_bfloat16, state_key

from .helpers import OPTIMIZERS, STATE_NAMES, flat, run, step
from .test_state import assert_same_bits, small_model, through_a_file, through_dcp

SIGMAS = 6.0  # how far a mean may be from its expectation; the seeds are fixed
BFLOAT16 = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)  # all of them
NAN = torch.cat([BFLOAT16[BFLOAT16.isnan()].float(), torch.tensor([-1], dtype=torch.int32).view(torch.float32)])
few_bits = pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
weight_dtypes = pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=["diagonal", "rank_one"])
def variant(request: pytest.FixtureRequest) -> str:
    """Those of the optimizers that have all formats."""
    return str(request.param)


@pytest.fixture(params=[None, False], ids=["fused", "plain"])
def fused(request: pytest.FixtureRequest) -> bool | None:
    """The default on the CPU, and the plain path."""
    return request.param


def store(variant: str, fused: bool | None, x: Tensor, state_dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of an optimizer whose offset ``b`` has become x in one step, which stores it in its format."""
    w = Parameter(torch.zeros_like(x))
    optimizer = OPTIMIZERS[variant]([w], lr=0.0, alpha=0.0, beta=1.0, fused=fused, state_dtype=state_dtype)
    step(optimizer, [w], [x])
    return optimizer.state[w]


def reference_mix(x: int) -> int:
    """The hash "lowbias32" of C. Wellons, with a remainder for each overflow."""
    x = (x ^ x // 2**16) * 0x7FEB352D % 2**32
    x = (x ^ x // 2**15) * 0x846CA68B % 2**32
    return x ^ x // 2**16


def reference_bits(seed: int, steps: int, position: int, index: int) -> int:
    """32 bits from the seed, then the step, then the parameter, then the element."""
    bits = reference_mix((reference_mix(seed % 2**32) + seed // 2**32) % 2**32)
    for number in (steps, position * 0x9E3779B1, index):
        bits = reference_mix((bits + number) % 2**32)
    return bits


def test_the_random_bits_are_those_of_the_hash() -> None:
    """Of whole numbers as of tensors; with other bits a resumed run would not be the interrupted one."""
    assert [reference_bits(0, 0, 0, 1), reference_bits(2**40 + 3, 7, 2, 5)] == [1753845952, 2284791191]
    steps, positions, p = [0, 1, 7, 2**24], [0, 1, 2, ~2], torch.zeros(3, 2)
    for seed in (0, 3, 2**32 - 1, 2**40 + 3, 2**63 - 1):
        keys = state_key(seed, torch.tensor(steps), torch.tensor(positions))
        for taken, position, key in zip(steps, positions, keys, strict=True):
            assert state_key(seed, taken, position) == key
            bits = [reference_bits(seed, taken, position, j) for j in range(6)]
            for found in (random_bits(p, key), random_bits(p, int(key))):
                assert found.tolist() == [bits[:2], bits[2:4], bits[4:]]
                for stream, factor, skipped in ((0, 1, 16), (1, 1, 0), (2, 0x9E3779B1, 16), (3, 0x85EBCA77, 16)):
                    expected = [x * factor // 2**skipped % 2**16 for x in bits]
                    assert random16(found, stream).flatten().tolist() == expected


def test_the_random_bits_are_uniform_and_those_of_two_streams_steps_parameters_or_seeds_unlike() -> None:
    """Chi-square of the upper and of the lower byte; no correlation."""
    n = 1 << 16
    sources = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0), (2**40, 0, 0)]
    bits = (random_bits(torch.zeros(n), state_key(*source)) for source in sources)
    draws = torch.stack([random16(x, stream) for x in bits for stream in range(4)])
    for byte in (*(draws >> 8), *(draws & 0xFF)):
        chi_square = (torch.bincount(byte, minlength=256) - n / 256).square().sum().item() / (n / 256)
        assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)
    assert torch.corrcoef(draws.double()).fill_diagonal_(0.0).abs().max() < SIGMAS / math.sqrt(n)


def test_rounding_to_bfloat16_takes_a_neighbour_is_symmetric_and_changes_no_bfloat16_number() -> None:
    """Up just where the bits that are cut off and the random ones add up to more than 16 bits. NaN stays NaN."""
    x = torch.cat([torch.randn(1 << 14) * torch.logspace(-40, 38, 1 << 14), BFLOAT16[~BFLOAT16.isnan()].float()])
    bits, cut = x.view(torch.int32), x.view(torch.int32) & 0xFFFF
    for random in (torch.zeros_like(bits), torch.full_like(bits, 0xFFFF), torch.randint_like(bits, 1 << 16)):
        expected = torch.where(cut + random > 0xFFFF, bits - cut + 0x10000, bits - cut)
        assert torch.equal(round_to_bfloat16(x, random).float().view(torch.int32), expected)
        assert torch.equal(round_to_bfloat16(-x, random), -round_to_bfloat16(x, random))
        assert round_to_bfloat16(NAN, random[: len(NAN)]).isnan().all()


@weight_dtypes
def test_the_optimizers_store_a_bfloat16_number_as_is(variant: str, fused: bool | None, weights: torch.dtype) -> None:
    """Each, as an element of one tensor; NaN is in a tensor of its own, as a RankOne's whole block would have it."""
    real = BFLOAT16[BFLOAT16.isfinite()]
    assert torch.equal(store(variant, fused, real.to(weights), torch.bfloat16)["b"], real)
    assert store(variant, fused, NAN.to(weights), torch.bfloat16)["b"].isnan().all()


@few_bits
def test_the_mean_of_many_roundings_is_the_number(variant: str, fused: bool | None, state_dtype: torch.dtype) -> None:
    """4096 roundings of each of 32 numbers, one block of int8, to two neighbours."""
    x = torch.cat([torch.logspace(-5, 1, 31), torch.tensor([-math.pi])])
    stored = read(store(variant, fused, x.repeat(4096, 1), state_dtype), "b", torch.float64)
    low, high = stored.amin(0), stored.amax(0)
    assert ((stored == low) | (stored == high)).all()
    assert (low < x).logical_and(x < high).sum() > 16
    deviation = ((x - low) * (high - x)).clamp(min=0.0).sqrt()  # of a number that is one of the two, if x is its mean
    assert ((stored.mean(0) - x).abs() <= SIGMAS * deviation / 64 + 2**-16 * (high - low)).all()


def reference_encode(x: list[float], random: list[int]) -> tuple[list[int], int]:
    """A block's codes and exponent by their definition, in float64."""
    exponent = next(e for e in range(1, 256) if max(map(abs, x)) <= math.ldexp(127**2, e - 127))
    codes = []
    for value, bits in zip(x, random, strict=True):
        y = math.ldexp(abs(value), 127 - exponent)
        low = math.floor(math.sqrt(y))
        code = low + ((bits + 0.5) / 2**16 < (y - low**2) / (2 * low + 1))
        codes.append(-code if value < 0 else code)
    return codes, exponent


@pytest.mark.parametrize("n", [1, 31, 32, 33, 77, 224])
def test_int8_blocks_are_as_documented(variant: str, fused: bool | None, n: int) -> None:
    """Common numbers, small ones, exact codes, all magnitudes, one huge, the largest at an edge; a short last block."""
    x = torch.randn(7, 32)
    x[1] *= 1e-20
    x[2] = torch.arange(-16, 16) ** 2 * 2.0**-9
    x[3] *= torch.logspace(-12, 3, 32)
    x[4, 7], x[5, 31], x[6, 0] = 1e30, 127.0**2 * 2**-9, -(127.0**2 * 2**-9 + 2**-18)
    x = x.flatten()[:n]
    state = store(variant, fused, x, torch.int8)
    codes, exponents = state["b"], state["b_exponent"]
    random = random16(random_bits(x, state_key(0, 0, 0)), len(STATE_NAMES[variant]))
    assert all(map(torch.equal, encode(x, random), (codes, exponents)))
    for block, e in enumerate(exponents.tolist()):
        part = slice(32 * block, 32 * block + 32)
        assert (codes[part].tolist(), e) == reference_encode(x[part].tolist(), random[part].tolist())
        numbers = [math.copysign(math.ldexp(c * c, e - 127), c) for c in codes[part].tolist()]
        assert decode(codes, exponents)[part].tolist() == numbers


def test_int8_blocks_of_zeros_of_next_to_nothing_and_of_infinities(fused: bool | None) -> None:
    """0 is 0, a subnormal nearly so, and an infinity or NaN is not lost, nor in the way of another block."""
    x = torch.ones(6, 32)
    x[0], x[1], x[2] = 0.0, torch.randn(32) * 1e-39, torch.randn(32) * 1e-44
    x[3, 3], x[4, 4] = -math.inf, math.nan
    y = read(store("diagonal", fused, x, torch.int8), "b", torch.float32)
    assert torch.equal(y[0], x[0])
    assert (y[1:3].abs() <= 1e-34).all()
    assert not y[3:5].isfinite().any()
    assert ((y[5] - 1).abs() < 0.03).all()


@pytest.mark.parametrize("random", [0, 1 << 15, 0xFFFF])
@pytest.mark.parametrize("largest", [127, 90])
def test_a_decoded_block_has_the_same_codes_again(largest: int, random: int) -> None:
    """So a value that does not change stays as it is, whatever the random bits, while the exponent stays."""
    codes = torch.randint(-largest, largest + 1, (64, 32)).to(torch.int8)
    codes[:, 5] = -largest
    exponents = torch.arange(10, 202, 3).to(torch.uint8)
    again = encode(decode(codes, exponents), torch.full(codes.shape, random))
    assert all(map(torch.equal, again, (codes, exponents)))


@pytest.mark.parametrize("shape", [(4096, 16), (1000,)])
def test_state_takes_the_documented_bytes_a_weight(variant: str, shape: tuple[int, ...]) -> None:
    """All of its tensors but the counters."""
    for state_dtype, least, most in ((None, 4, 4), (torch.bfloat16, 2, 2), (torch.int8, 1.03, 1.05)):
        w = Parameter(torch.randn(shape))
        optimizer = OPTIMIZERS[variant]([w], state_dtype=state_dtype)
        run(optimizer, [w], 2)
        taken = sum(x.nbytes for x in optimizer.state[w].values() if x.dim() > 0) / w.numel()
        assert least <= taken / len(STATE_NAMES[variant]) <= most


@few_bits
def test_a_weight_without_gradient_does_not_drift(variant: str, fused: bool | None, state_dtype: torch.dtype) -> None:
    """Not by a bit in 500 steps, though its neighbours' gradients set the scale of its block's codes."""
    w = Parameter(torch.randn(20, 16).to(torch.float32 if state_dtype == torch.int8 else torch.bfloat16))
    before, still = w.detach().clone(), torch.rand(w.shape) < 0.5
    optimizer = OPTIMIZERS[variant]([w], state_dtype=state_dtype, fused=fused)
    for _ in range(500):
        step(optimizer, [w], [torch.randn_like(w).masked_fill(still, 0.0)])
    assert torch.equal(w[still], before[still])
    assert not read(optimizer.state[w], "b", torch.float32)[still].any()
    assert (w != before)[~still].float().mean() > 0.9


def test_an_int8_momentum_without_new_gradients_decays_to_zero(variant: str, fused: bool | None) -> None:
    """Half of the weights have gradients for 20 steps and then none; their neighbours in the blocks go on.

    Rounded to nearest, a code c with ``c^2 / 10 < (2 c - 1) / 2``, up to 9, would stay, and the weights move for ever.
    """
    w, stops = Parameter(torch.zeros(32, 32)), torch.arange(32) % 2 == 0
    optimizer = OPTIMIZERS[variant]([w], lr=1.0, alpha=0.0, beta=0.1, state_dtype=torch.int8, fused=fused)
    run(optimizer, [w], 20)
    state, largest, ws = optimizer.state[w], 0, [w.detach().clone()]
    b = read(state, "b", torch.float32)
    for _ in range(500):
        step(optimizer, [w], [torch.randn_like(w).masked_fill(stops, 0.0)])
        largest = max(largest, int(state["b_exponent"].max()))
        ws.append(w.detach().clone())
    assert not read(state, "b", torch.float32)[:, stops].any()
    assert torch.equal(ws[400][:, stops], w[:, stops])
    # A step goes 0.9 b and stores 0.9 b + e, so the whole path is 9 b + 9 (the sum of the rounding errors e). With the
    # number u of code 1, y = 0.9 |b| / u and c = floor(sqrt(y)), the variance of e / u is
    # (y - c^2) ((c + 1)^2 - y) <= 2.25 y, and the expected |b| of all steps add up to 10 |b|.
    error = (ws[0] - w.detach() - 9 * b)[:, stops]
    variance = 81 * 2.25 * 0.9 * 10 * b.abs()[:, stops] * 2.0 ** (largest - 127)
    assert error.mean().abs() < SIGMAS * variance.sum().sqrt() / error.numel()
    assert (error * b.sign()[:, stops]).mean().abs() < SIGMAS * variance.sum().sqrt() / error.numel()


def test_a_bfloat16_momentum_decays_by_less_than_half_a_unit(variant: str, fused: bool | None) -> None:
    """By 1/1024 a step: rounded to nearest it would never change. And by a tenth to nothing."""
    w = Parameter(torch.zeros(2048))
    optimizer = OPTIMIZERS[variant]([w], lr=1.0, alpha=0.0, beta=1.0, state_dtype=torch.bfloat16, fused=fused)
    step(optimizer, [w], [1 + torch.rand(2048)])
    bs, ws = [optimizer.state[w]["b"].float()], [w.detach().clone()]
    for beta in (2.0**-10, 0.1):
        optimizer.param_groups[0]["beta"] = beta
        for _ in range(300):
            step(optimizer, [w], [torch.zeros(2048)])
        bs.append(optimizer.state[w]["b"].float())
        ws.append(w.detach().clone())
    deviation = math.sqrt(300 * 2.0**-17 / 2048)  # an error's variance is at most |change| unit <= 2^-10 2^-7 b^2
    assert (bs[1] / bs[0]).mean().item() == pytest.approx((1 - 2.0**-10) ** 300, abs=SIGMAS * deviation)
    # It is at most unit^2 / 4 <= 2^-16 b^2, which adds up to 2^-16 b^2 / 0.19; as above, the path is 9 b + 9 (the sum).
    assert ((ws[1] - ws[2] - 9 * bs[1]).abs() < SIGMAS * 9 * 2**-8 / math.sqrt(0.19) * bs[1] + 0.01).all()
    assert bs[2].abs().max() < 1e-12


def test_updates_far_below_half_a_unit_add_up_in_bfloat16_weights(variant: str, fused: bool | None) -> None:
    """Steps of 1/50 of a unit in the last place: rounded to nearest, not one of 200 would change a weight."""
    w = [Parameter((1.25 + torch.rand(20000) / 2).bfloat16())]
    masters, start = [Parameter(w[0].detach().float())], flat(w)
    for params in (masters, w):
        optimizer = OPTIMIZERS[variant](params, lr=2.0**-7 / 50, alpha=0.0, fused=fused)
        for _ in range(200):
            step(optimizer, params, [torch.ones_like(params[0])])
    # A rounding's variance is at most the step's share of a unit, 1/50 unit^2, so 4 unit^2 in all.
    expected = (flat(masters) - start).mean().item()
    assert (flat(w) - start).mean().item() == pytest.approx(expected, abs=SIGMAS * 2**-7 * math.sqrt(4 / 20000))
    assert expected == pytest.approx(-(200 - 9) / 50 * 2**-7, rel=1e-3)


@weight_dtypes
@pytest.mark.parametrize("name", [None, "bfloat16", "int8"])
def test_replicas_agree_and_a_resumed_run_repeats_the_interrupted_one(
    variant: str, fused: bool | None, weights: torch.dtype, name: str | None
) -> None:
    """To the bit; a format given by name, a file, a deep copy change nothing, another seed does."""
    state_dtype = getattr(torch, name) if name else None
    runs = []
    for kind, seed in ((state_dtype, 5), (name, 5), (state_dtype, 6)):
        params = [Parameter(torch.linspace(-1, 2, n).view(-1, n // 2).to(weights)) for n in (70, 60, 2)]
        runs.append((OPTIMIZERS[variant](params, seed=seed, state_dtype=kind, fused=fused, alpha=0.3), params))
        run(*runs[-1], 3)
    (optimizer, params), replica, (other, others) = runs
    assert_same_bits(optimizer, params, *replica)
    same = torch.equal(optimizer.state[params[0]]["b"], other.state[others[0]]["b"])
    assert same == (weights == torch.float32 and name is None)
    saved = through_a_file({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    loaded = [Parameter(w) for w in saved["weights"]]
    resumed = OPTIMIZERS[variant](loaded)
    resumed.load_state_dict(saved["optimizer"])
    kinds = {x.dtype for key, x in resumed.state[loaded[0]].items() if key != "step"}
    assert kinds == ({torch.int8, torch.uint8} if name == "int8" else {state_dtype or torch.float32})
    for one in ((optimizer, params), replica, (resumed, loaded), copy.deepcopy((optimizer, params))):
        run(*one, 4, seed=2)
        assert_same_bits(optimizer, params, *one)


@few_bits
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_torchs_distributed_checkpoint_restores_the_run(variant: str, state_dtype: torch.dtype, tmp_path: Path) -> None:
    """Saved by it, and read into the state dicts of a fresh optimizer of the same formats."""
    init = partialmethod(OPTIMIZERS[variant].__init__, alpha=0.3, state_dtype=state_dtype)
    kind = type("Kind", (OPTIMIZERS[variant],), {"__init__": init})
    model, other = small_model(), small_model()
    params, others = list(model.parameters()), list(other.parameters())
    optimizer, restored = kind(params), kind(others)
    run(optimizer, params, 8)
    weights, state = through_dcp(model, optimizer, tmp_path)
    set_state_dict(other, restored, model_state_dict=weights, optim_state_dict=state)
    run(optimizer, params, 3, seed=2)
    run(restored, others, 3, seed=2)
    assert_same_bits(optimizer, params, restored, others)


def test_what_has_no_meaning_is_refused() -> None:
    """int8 of FullTO, whose matrix has no blocks; a seed below 0."""
    with pytest.raises(ValueError, match=r"^state_dtype=torch\.int8 is not valid: None, torch\.float32, torch\.bf"):
        FullTO([torch.zeros(3)], state_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^seed=-1 is not valid: a whole number of at least 0\.$"):
        FullTO([torch.zeros(3)], seed=-1)


def test_training_ends_at_the_same_loss_in_every_format(variant: str) -> None:
    """Ridge-logistic regression with mini-batches: within 1 % of float32 state's loss."""
    features, batches = torch.randn(200, 64), torch.randint(200, (400, 20))
    rows = features * (torch.randn(200) + features.sum(1)).sign().unsqueeze(1)

    def loss(w: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(rows @ w)).mean() + 0.05 * w.square().sum()

    def final(state_dtype: torch.dtype | None) -> float:
        w = Parameter(torch.zeros(64))
        optimizer = OPTIMIZERS[variant]([w], lr=0.5, state_dtype=state_dtype)
        for batch in batches:
            step(optimizer, [w], torch.autograd.grad(loss(w, rows[batch]), w))
        return loss(w.detach(), rows).item()

    assert [final(torch.bfloat16), final(torch.int8)] == pytest.approx([final(None)] * 2, rel=0.01)
