"""State: made lazily, saved and loaded bit for bit in its own dtype, copied, and sized as documented."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import Parameter

from to_finetune.optim import DiagonalTO, RankOneTO, TrainableOptimizer
from to_finetune.optim.checkpoint import load_state, load_weights, named, save_state, whole_weights

from .helpers import OPTIMIZERS, STATE_NAMES, copies, flat, make_weights, run, step

DTYPES = {
    "float64": (torch.float64, None, torch.float64),
    "float32": (torch.float32, None, torch.float32),
    "bfloat16 weights": (torch.bfloat16, None, torch.float32),
    "bfloat16 state": (torch.float32, torch.bfloat16, torch.bfloat16),
    "all bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float32 state of float64": (torch.float64, torch.float32, torch.float32),
}


def through_a_file(value: Any) -> Any:
    """Saved, and loaded as torch.load does by default: no code in the file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_bits(a: TrainableOptimizer, ps: list[Parameter], b: TrainableOptimizer, qs: list[Parameter]) -> None:
    """Weights and state: the same keys, dtypes and values."""
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert value.dtype == b.state[q][name].dtype
            assert torch.equal(value, b.state[q][name]), name


def test_there_is_no_state_before_the_first_step(variant: str) -> None:
    """So the optimizer may be built before the weights are moved or cast; state is made from them as they are then."""
    params = make_weights(dtype=torch.float64)
    optimizer = OPTIMIZERS[variant](params)
    assert not optimizer.state
    for p in params:
        p.data = p.data.float()
    run(optimizer, params, 1)
    for p in params:
        assert {x.dtype for name, x in optimizer.state[p].items() if name != "pairs"} == {torch.float32}


@pytest.mark.parametrize("dtypes", DTYPES)
def test_state_has_its_own_dtype_and_the_documented_size(variant: str, dtypes: str) -> None:
    """2, 3 and n + 1 numbers a weight, float32 at the least unless state_dtype says otherwise."""
    weights, state_dtype, expected = DTYPES[dtypes]
    params = make_weights([(3, 4), (5,)], weights)
    optimizer = OPTIMIZERS[variant](params, state_dtype=state_dtype)
    run(optimizer, params, 10)
    for p in params:
        state = dict(optimizer.state[p])
        assert state.pop("step") == 10
        assert state.keys() == set(STATE_NAMES[variant])
        assert {x.dtype for x in state.values()} == {expected}
        numbers_a_weight = {"diagonal": 2, "rank_one": 3, "full": p.numel() + 1}[variant]
        assert sum(x.nbytes for x in state.values()) == numbers_a_weight * p.numel() * expected.itemsize


@pytest.mark.parametrize("scope", ["tensor", "group"])
@pytest.mark.parametrize("before", [3, 12])  # FullTO: a history, a matrix
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(variant: str, dtypes: str, before: int, scope: str) -> None:
    """State and weights through a file into a fresh optimizer, under a schedule, and on."""
    weights, state_dtype, _ = DTYPES[dtypes]
    options: dict[str, Any] = {"schedule": "theorem", "state_dtype": state_dtype, "scope": scope, "alpha": 0.3}
    params = make_weights([(3, 4), (10,), ()], weights)
    optimizer = OPTIMIZERS[variant](params, **options)
    run(optimizer, params, before, seed=1)

    saved = through_a_file({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    resumed = [Parameter(w) for w in saved["weights"]]
    fresh = OPTIMIZERS[variant](resumed)
    fresh.load_state_dict(saved["optimizer"])
    assert_same_bits(optimizer, params, fresh, resumed)
    assert fresh.estimate_error().isnan()
    for one, ps in ((optimizer, params), (fresh, resumed)):
        run(one, ps, 4, seed=2)
    assert_same_bits(optimizer, params, fresh, resumed)


def test_what_a_version_with_fewer_options_has_saved_goes_on(variant: str) -> None:
    params = make_weights()
    optimizer = OPTIMIZERS[variant](params)
    run(optimizer, params, 2)
    old, resumed = copy.deepcopy(optimizer.state_dict()), copies(params)
    for group in old["param_groups"]:
        del group["skip_nonfinite"], group["capturable"], group["seed"]
    fresh = OPTIMIZERS[variant](resumed)
    fresh.load_state_dict(old)
    for one, weights in ((optimizer, params), (fresh, resumed)):
        run(one, weights, 1, seed=1)
    assert torch.equal(flat(params), flat(resumed))


def test_the_dtype_of_saved_state_outlives_a_cast_of_the_weights(variant: str) -> None:
    """float32 state, loaded over bfloat16 weights."""
    params = make_weights(dtype=torch.float32)
    optimizer = OPTIMIZERS[variant](params)
    run(optimizer, params, 3)
    cast = [Parameter(p.detach().bfloat16()) for p in params]
    loaded = OPTIMIZERS[variant](cast)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, cast, strict=True):
        for name, value in optimizer.state[p].items():
            assert value.dtype == loaded.state[q][name].dtype
            assert torch.equal(value, loaded.state[q][name])


@pytest.mark.parametrize("steps", [0, 3, 12])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_like_the_original(variant: str, duplicate: Callable[[Any], Any], steps: int) -> None:
    """deepcopy and pickle of an optimizer with its weights, before the first step and later."""
    params = make_weights()
    optimizer = OPTIMIZERS[variant](params, schedule="theorem")
    run(optimizer, params, steps)
    twin, twins = duplicate((optimizer, params))
    assert twin.estimate_error().isnan()
    assert twin.gradient_peak().isnan()
    for one, ps in ((optimizer, params), (twin, twins)):
        run(one, ps, 3, seed=5)
    assert_same_bits(optimizer, params, twin, twins)
    torch.testing.assert_close(optimizer.estimate_error(), twin.estimate_error(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_scale": "rms", "relative_alpha": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"max_norm": 0.5},
        {"scope": "group", "state_dtype": torch.bfloat16},
        {"lr": torch.tensor(0.0), "maximize": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_nothing_creates_every_key_and_changes_no_weight(
    variant: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Zero gradients and lr 0, as torch's distributed checkpoint makes its first step."""
    params = make_weights(dtype=dtype)
    before, worked = copies(params), copies(params)
    idle, working = OPTIMIZERS[variant](params, **{"lr": 0.0, **options}), OPTIMIZERS[variant](worked, **options)
    step(idle, params, [torch.zeros_like(p) for p in params])
    run(working, worked, 1)
    for p, q, w in zip(params, before, worked, strict=True):
        assert torch.equal(p, q)
        assert idle.state[p].keys() == working.state[w].keys()
        assert {n: (x.shape, x.dtype) for n, x in idle.state[p].items()} == {
            n: (x.shape, x.dtype) for n, x in working.state[w].items()
        }


def small_model() -> nn.Module:
    """Two layers, the same ones each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def through_memory(model: nn.Module, optimizer: TrainableOptimizer, directory: Path) -> tuple[Any, Any]:
    """State dicts that share no memory with the model."""
    return copy.deepcopy(get_state_dict(model, optimizer))


def through_dcp(model: nn.Module, optimizer: TrainableOptimizer, directory: Path) -> tuple[Any, Any]:
    """Saved by torch's distributed checkpoint, and read into the state dicts of a fresh optimizer."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=directory, no_dist=True)
    fresh = small_model()
    options = {"state_dtype": optimizer.param_groups[0]["state_dtype"]}
    weights, state = get_state_dict(fresh, type(optimizer)(fresh.parameters(), **options))
    loaded = {"weights": weights, "state": state}
    dcp.load(loaded, checkpoint_id=directory, no_dist=True)
    return loaded["weights"], loaded["state"]


def flattened(model: nn.Module, optimizer: TrainableOptimizer, directory: Path) -> tuple[Any, Any]:
    """With the optimizer's state as one flat mapping."""
    return copy.deepcopy(get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "through", "state_dtype"),
    [
        ("diagonal", through_memory, None),
        ("rank_one", through_memory, torch.int8),
        ("full", through_memory, None),
        ("diagonal", through_dcp, torch.int8),
        ("rank_one", through_dcp, None),
        ("diagonal", flattened, None),
        ("rank_one", flattened, torch.int8),
    ],
)
def test_torchs_distributed_state_dicts_restore_the_run(
    name: str, through: Callable[..., tuple[Any, Any]], state_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """get_state_dict and set_state_dict, by parameter names, in one process; then the runs go on as one."""
    x = torch.randn(8, 4)

    def train(model: nn.Module, optimizer: TrainableOptimizer, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        return flat(list(model.parameters()))

    model, other = small_model(), small_model()
    kind, options = OPTIMIZERS[name], {"alpha": 0.3, "state_dtype": state_dtype}
    optimizer, restored = (kind(m.parameters(), **options) for m in (model, other))
    train(model, optimizer, 8)
    weights, state = through(model, optimizer, tmp_path)
    how = StateDictOptions(flatten_optimizer_state_dict=through is flattened)
    set_state_dict(other, restored, model_state_dict=weights, optim_state_dict=state, options=how)
    assert torch.equal(train(model, optimizer, 3), train(other, restored, 3))


@pytest.mark.parametrize("saved_by", ["AdamW", "SGD", "diagonal", "rank_one", "full"])
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(variant: str, saved_by: str) -> None:
    if saved_by == variant:
        return
    others: dict[str, Any] = {"AdamW": torch.optim.AdamW, "SGD": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)}
    theirs = make_weights([(3, 4)])
    other = {**OPTIMIZERS, **others}[saved_by](theirs)
    params = make_weights([(3, 4)])
    optimizer = OPTIMIZERS[variant](params)
    run(optimizer, params, 2)
    for p in theirs:
        p.grad = torch.ones_like(p)
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=rf"parameter 0 is .*, but {type(optimizer).__name__}'s is .*another optimi"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("shape", [(3, 3), (300, 300), (12,)])
def test_the_state_of_weights_of_another_shape_is_refused(variant: str, shape: tuple[int, ...]) -> None:
    theirs, params = make_weights([(2,), (4, 3)]), make_weights([(2,), shape])
    other, optimizer = OPTIMIZERS[variant](theirs), OPTIMIZERS[variant](params)
    run(other, theirs, 2)
    with pytest.raises(RuntimeError, match=r"of parameter 1 has the shape \(4, 3\), the parameter .*another model's"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state


def test_state_in_another_format_than_it_says_is_refused() -> None:
    params = make_weights([(4, 3)], torch.float32)
    optimizer = DiagonalTO(params)
    run(optimizer, params, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "int8"
    with pytest.raises(ValueError, match=r"'a' to load is torch\.float32, not int8"):
        DiagonalTO(params).load_state_dict(saved)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ["diagonal", "rank_one"])
def test_weights_that_are_not_contiguous_are_saved_by_name(
    name: str, state_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """As those of convolutions in the channels_last format are."""

    def make() -> tuple[nn.Conv2d, TrainableOptimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return model, OPTIMIZERS[name](model.parameters(), state_dtype=state_dtype, relative_alpha=True)

    def steps(model: nn.Module, optimizer: TrainableOptimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            model(torch.randn(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    (model, optimizer), (other, fresh) = make(), make()
    assert not model.weight.is_contiguous()
    steps(model, optimizer, 1)
    save_state(model, optimizer, tmp_path / "state")
    load_state(other, fresh, tmp_path / "state")
    assert_same_bits(optimizer, list(model.parameters()), fresh, list(other.parameters()))  # type: ignore[arg-type]
    for p, weight in zip(other.parameters(), whole_weights(model, optimizer).values(), strict=True):
        assert torch.equal(p, weight)
    steps(model, optimizer, 2)
    load_weights(other, fresh, dict(model.named_parameters()))
    assert torch.equal(model.weight, other.weight)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(optimizer, list(model.parameters()), fresh, list(other.parameters()))  # type: ignore[arg-type]


def test_a_checkpoint_by_name_refuses_full(tmp_path: Path) -> None:
    """Before anything is written."""
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="FullTO's state changes its shape with the steps"):
        save_state(model, OPTIMIZERS["full"](model.parameters()), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_checkpoint_of_another_form_is_refused(tmp_path: Path) -> None:
    model, other = small_model(), small_model()
    optimizer = DiagonalTO(model.parameters())
    run(optimizer, list(model.parameters()), 1)
    save_state(model, optimizer, tmp_path / "state")
    bfloat16 = DiagonalTO(other.parameters(), state_dtype="bfloat16")
    for fresh, said in ((bfloat16, "or another state_dtype"), (RankOneTO(other.parameters()), "of another optimizer")):
        with pytest.raises(RuntimeError, match=said):
            load_state(other, fresh, tmp_path / "state")
    with pytest.raises(RuntimeError, match=r"There is no '0\.weight' of 12 weights to load"):
        load_weights(other, bfloat16, {"0.weight": torch.ones(2)})


def test_names_are_those_without_any_wrapper() -> None:
    def model() -> nn.Module:
        layers = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        return nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)})

    class Engine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = model()
    names = [name for name, _ in plain.named_parameters()]
    assert list(named(plain)) == names
    wrapped: Any = model()
    wrapped["layers"]["other"] = checkpoint_wrapper(wrapped["layers"]["other"])
    wrapped["head"] = torch.compile(checkpoint_wrapper(wrapped["head"]))
    for whole in (wrapped, Engine(wrapped), torch.compile(Engine(wrapped)), Engine(torch.compile(wrapped))):  # type: ignore[arg-type]
        assert list(named(whole)) == names


@pytest.mark.parametrize("fused", [None, False])
def test_a_weight_of_another_shape_than_its_state_is_refused(variant: str, fused: bool | None) -> None:
    """Else the kernels would write where nothing is theirs."""
    (p,) = make_weights([(16, 16)], torch.float32)
    optimizer = OPTIMIZERS[variant]([p], fused=fused)
    run(optimizer, [p], 1)
    p.grad = None
    p.data = torch.randn(300, 300)
    with pytest.raises(RuntimeError):
        run(optimizer, [p], 1)


def test_what_a_wrapper_has_put_there_is_refused(variant: str) -> None:
    """FSDP's first version, and a flat tensor of another size, as DeepSpeed makes it."""
    (p,) = make_weights([(3,)])
    optimizer = OPTIMIZERS[variant]([p])
    other: Any = [torch.randn(7, dtype=torch.float64, requires_grad=True)]
    optimizer.param_groups[0]["params"] = other
    with pytest.raises(RuntimeError, match="replaced by others of another size"):
        run(optimizer, other, 1)
    other[0]._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="use FSDP2"):
        run(optimizer, other, 1)
