"""One short training, in any layout: alone, or through accelerate under DDP, FSDP2 and DeepSpeed's ZeRO.

A step has twelve rows, shared by the processes; their gradients are whole numbers whose mean is exact, so that every
layout's optimizer gets the same bits, whatever the order in which a backend adds. One layer is frozen, shapes are odd,
so that every shard is uneven, and there are two parameter groups, as Hugging Face makes them.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import sys
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from to_finetune.optim import DiagonalTO, RankOneTO, TrainableOptimizer
from to_finetune.optim.checkpoint import load_state, save_state

from .on_cpu import shard_with, use_gloo

STEPS, ROWS = 4, 12
RMS = {"alpha": 0.3, "relative_alpha": True, "grad_scale": "rms", "lr": 0.01}
RECOMMENDED = {**RMS, "grad_scale": "factored"}
PAPER = {"alpha": 1e-4, "lr": 1e-4}
OPTIMIZERS: dict[str, tuple[type[TrainableOptimizer], dict[str, Any]]] = {
    "diagonal": (DiagonalTO, PAPER),
    "diagonal-recommended": (DiagonalTO, RECOMMENDED),
    "diagonal-group": (DiagonalTO, {**RMS, "scope": "group"}),
    "rank_one": (RankOneTO, {**PAPER, "max_norm": 2.0}),
    "rank_one-recommended": (RankOneTO, RECOMMENDED),
    "rank_one-group": (RankOneTO, {**RMS, "scope": "group", "schedule": "theorem"}),
}
STATES = ("float32", "bfloat16", "int8")
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3-subgroups": {"stage": 3, "sub_group_size": 60},
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
LAYOUTS = ("ddp", "fsdp2", "fsdp2-offload", *ZERO)
RESUMED_LAYOUTS = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-offload")
RESUMED = [(name, state) for name in ("diagonal-recommended", "rank_one-recommended") for state in ("float32", "int8")]
OWN_FORMATS = [RESUMED[0], RESUMED[-1]]  # both optimizers, both formats: converting takes its time


def refused(layout: str, optimizer: str) -> str | None:
    """What says why this combination is refused, if it is."""
    if layout == "zero3-subgroups" and "scope" in OPTIMIZERS[optimizer][1]:
        return 'scope="group" needs the gradients of a whole parameter group'
    if layout == "zero3-subgroups" and "max_norm" in OPTIMIZERS[optimizer][1]:
        return "max_norm needs the gradients of a whole parameter group"
    return None


class Layer(nn.Linear):
    """Its loss is linear in its weights, with whole numbers drawn for each row."""

    index = 0

    def forward(self, rows: Sequence[int]) -> Tensor:
        return sum((p * slopes(rows, self.index + k, p.shape)).sum() for k, p in enumerate(self.parameters()))  # type: ignore[return-value]


class Layers(nn.Module):
    """45 weights in a bias and 45 x 7 and 45 x 3 in matrices: no shard ends where a block of 32 does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(6, 7), Layer(7, 45), Layer(45, 3)])
        for i, layer in enumerate(self.layers):
            layer.index = 2 * i
        self.layers[0].requires_grad_(False)

    def forward(self, rows: Sequence[int]) -> Tensor:
        return sum(layer(rows) for layer in self.layers)  # type: ignore[return-value]

    def groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def slopes(rows: Sequence[int], parameter: int, shape: torch.Size) -> Tensor:
    """The mean over rows of multiples of 12, of which there are at most 12."""
    drawn = []
    for row in rows:
        generator = torch.Generator().manual_seed(100 * row + parameter)
        drawn.append(12 * torch.randint(-8, 9, shape, generator=generator))
    return (sum(drawn) // len(rows)).float()  # type: ignore[union-attr]


def rows_of(step: int, rank: int = 0, world: int = 1) -> list[int]:
    """The rows of a process in a step."""
    return [ROWS * step + row for row in range(rank, ROWS, world)]


def make(name: str, state: str, model: Layers) -> TrainableOptimizer:
    variant, options = OPTIMIZERS[name]
    return variant(model.groups(), **options, decoupled_weight_decay=True, state_dtype=state)


@cache
def alone(name: str, state: str) -> Layers:
    """One process, in a plain loop; made once for all layouts."""
    model = Layers()
    optimizer = make(name, state, model)
    for step in range(STEPS):
        model(rows_of(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def accelerator_for(layout: str, **settings_of_deepspeed: Any) -> Accelerator:
    """On CPUs, where accelerate by itself knows DDP only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    if layout in ZERO:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": ZERO[layout],
            "zero_force_ds_cpu_optimizer": False,
            **settings_of_deepspeed,
        }
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    accelerator = Accelerator(cpu=True)
    if layout.startswith("fsdp2"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_offload=CPUOffloadPolicy(pin_memory=False) if layout == "fsdp2-offload" else False,
            cpu_ram_efficient_loading=False,
        )
        shard_with(plugin)
    return accelerator


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All trained weights in full precision, of any layout."""
    weights = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("module.")
            if hasattr(p, "get_full_hp_param"):  # ZeRO-1 and 2
                weights[name] = p.get_full_hp_param()
            elif hasattr(p, "ds_id"):  # ZeRO-3
                weights[name] = p._z3_optimizer.get_full_hp_param(p)
            else:
                weights[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return weights


class Run:
    """All processes of this launch, through accelerate."""

    def __init__(self, layout: str, name: str, state: str, **settings_of_deepspeed: Any) -> None:
        self.accelerator = accelerator_for(layout, **settings_of_deepspeed)
        model = Layers()
        self.model, self.optimizer = self.accelerator.prepare(model, make(name, state, model))

    def train(self, first: int = 0, last: int = STEPS) -> Run:
        for step in range(first, last):
            self.accelerator.backward(self.model(rows_of(step, dist.get_rank(), dist.get_world_size())))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def to(self) -> TrainableOptimizer:
        """The optimizer inside all wrappers."""
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def wrappers(self) -> list[str]:
        found, optimizer = [], self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
            found.append(type(optimizer).__name__)
        return found

    def deviation(self, name: str, state: str) -> float:
        return deviation(whole_weights(self.model), alone(name, state))


def deviation(found: dict[str, Tensor], model: Layers) -> float:
    """The largest difference of any weight from those of one process."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    return max(float((found[name].float() - p).abs().max()) for name, p in wanted.items())


def trajectories(world: int, folder: Path) -> dict[str, Any]:
    """Every layout with every optimizer and state."""
    results: dict[str, Any] = {}
    for layout, name, state in product(LAYOUTS, OPTIMIZERS, STATES):
        try:
            run = Run(layout, name, state).train()
            found = {
                "deviation": run.deviation(name, state),
                "wrappers": run.wrappers(),
                "steps": sorted({float(x["step"]) for x in run.to().state.values()}),
                "error": float(run.to().estimate_error()),
            }
        except RuntimeError as error:
            found = {"refused": str(error)}
        results[f"{world} {layout} {name} {state}"] = found
    return results


def resumed(world: int, folder: Path) -> dict[str, float]:
    """Half of each run is saved; half of those that other launches have saved is followed by its other half."""
    results: dict[str, float] = {}
    for (i, layout), (name, state) in product(enumerate(RESUMED_LAYOUTS), RESUMED):
        for before, saved in product(sorted(folder.glob("*-process")), (layout, RESUMED_LAYOUTS[i - 1])):
            if before.name != f"{world}-process":
                run = Run(layout, name, state)
                load_state(run.model, run.to(), before / f"{saved} {name} {state}")
                key = f"{before.name} {saved} to {world}-process {layout} {name} {state}"
                results[key] = run.train(STEPS // 2).deviation(name, state)
        run = Run(layout, name, state).train(0, STEPS // 2)
        save_state(run.model, run.to(), folder / f"{world}-process" / f"{layout} {name} {state}")
    return results


def own_formats(world: int, folder: Path) -> dict[str, float]:
    """As `resumed`, with accelerate's own save_state, and DeepSpeed's universal checkpoint where the number changes."""
    results: dict[str, float] = {}
    here = folder / f"{world}-process"
    for layout, (name, state) in product(RESUMED_LAYOUTS, OWN_FORMATS):
        case = f"{layout} {name} {state}"
        run = Run(layout, name, state).train(0, STEPS // 2)
        run.accelerator.save_state(str(here / case))
        again = Run(layout, name, state)
        again.accelerator.load_state(str(here / case))
        key = f"{world}-process to {world}-process {case}"
        results[key] = again.train(STEPS // 2).deviation(name, state)
        if layout in ZERO:
            convert(here / case)
        for before in sorted(folder.glob("*-process")):
            if before == here or not (before / case).is_dir():
                continue
            if layout in ZERO:
                other = Run(layout, name, state, checkpoint={"load_universal": True})
                other.model.load_checkpoint(str(before / case))
            else:
                other = Run(layout, name, state)
                other.accelerator.load_state(str(before / case))
            key = f"{before.name} to {world}-process {case}"
            results[key] = other.train(STEPS // 2).deviation(name, state)
    return results


def convert(folder: Path) -> None:
    """To the universal checkpoint, with DeepSpeed's own command."""
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        words = ["--input_folder", folder / "pytorch_model", "--output_folder", folder / "universal"]
        words += ["--inject_missing_state", "--num_extract_workers", 1, "--num_merge_workers", 1]
        with mock.patch.object(sys, "argv", ["ds_to_universal", *map(str, words)]):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    dist.barrier()


def process(rank: int, world: int, folder: str, parts: Sequence[str]) -> None:
    """One of the processes; the first writes results.json."""
    start(rank, world, folder)
    functions = {f.__name__: f for f in (trajectories, resumed, own_formats)}
    results = {part: functions[part](world, Path(folder) / part) for part in parts}
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()
    gc.unfreeze()


def start(rank: int, world: int, folder: str) -> None:
    """Join the other processes."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        DS_ACCELERATOR="cpu",
        TRITON_INTERPRET="0",
    )
    use_gloo()
    meeting = Path(folder) / f"meeting-{os.environ['MEETING']}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    gc.freeze()  # DeepSpeed collects garbage at every turn, which takes half a second with all that is imported


def launch(parts: Sequence[str], world: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Do these parts in `world` processes of their own; returns the results of each."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MEETING"] = secrets.token_hex(4)
    torch.multiprocessing.spawn(process, args=(world, str(folder), parts), nprocs=world)
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found
