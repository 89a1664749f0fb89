"""Parameter groups and their state, whole or sharded: created lazily, saved and loaded in any layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from to_finetune.optim import universal
from to_finetune.optim.checks import check_hyperparameters, check_layout
from to_finetune.optim.sharding import (
    Given,
    Layout,
    Member,
    given,
    layout_of,
    members_of,
    packed_state,
    stand_ins,
    unpacked_state,
)
from to_finetune.optim.state import new_state

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]
COUNTERS = ("step", "pairs", "skipped")
STATE_NAMES = {"a", "b", "u", "v"}  # of all variants
WHOLES = "whole_tensors"  # in a saved group: see `universal`


class StatefulOptimizer(Optimizer, ABC):
    """The part of an optimizer that holds parameter groups and state, without the step itself."""

    state_names: tuple[str, ...]  # of the weight's shape; zero at first, or as `_start` sets them
    block_names: tuple[str, ...] = ()  # of state with another shape
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.int8)
    fast_paths: tuple[str, ...] = ()  # of "foreach" and "fused"
    variant: str  # its name in the fused kernels and in saved files

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._given: list[Given] = []
        self._groups: list[Group] = []
        self._loaded: dict[Tensor, dict[str, Any]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _name_to_dtype(group)
            check_hyperparameters(group, self.state_dtypes)
            if group["capturable"] and not self.fast_paths:
                raise ValueError(f"capturable=True is not valid: the memory of {type(self).__name__} grows.")
            for path in ("foreach", "fused"):
                if group[path] and path not in self.fast_paths:
                    raise ValueError(f"{path}=True is not valid: {type(self).__name__} has no such path.")
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} takes real floating-point weights, not {p.dtype}.")
        except Exception:
            self.param_groups.pop()
            raise
        self._remember(group)

    def _remember(self, group: Group) -> None:
        """Record a new group as it was given, since a wrapper may replace its parameters."""
        start = sum(len(known.shapes) for known in self._given)
        self._given.append(given(group["params"], start, options_of(group, self.defaults)))
        self._groups.append(group)

    def _remember_again(self) -> None:
        """Record all groups anew, as those of a copy or with other parameters."""
        self._given, self._groups = [], []
        for group in self.param_groups:
            self._remember(group)
        self.forget_last_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved by a version with fewer options
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            _name_to_dtype(group)
        if "_given" not in self.__dict__:  # a copy
            self._loaded = {}
            self._remember_again()
        self._groups = list(self.param_groups)
        self.state.update(self._loaded)
        self.forget_last_step()

    @abstractmethod
    def forget_last_step(self) -> None:
        """Drop what is remembered of the last step; for whoever changes weights or state through ``.data``."""

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with int8 state as int16 (code and exponent) that any layout can load."""
        hook = self.register_state_dict_post_hook(lambda _, saved: self._to_saved(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _to_saved(self, saved: dict[str, Any]) -> None:
        """Convert a state dict of torch's to what is saved, in place, before the users' hooks see it."""
        self._look_again()
        tensors = chain.from_iterable(group["params"] for group in self.param_groups)
        numbers = dict(
            zip(tensors, chain.from_iterable(group["params"] for group in saved["param_groups"]), strict=True)
        )
        wholes: dict[int, Tensor] = {}
        for p, layout in self._owners():
            state = saved["state"][numbers[p]]
            if state[self.state_names[0]].dtype == torch.int8:
                state = packed_state(layout, p, state, self.state_names)
            if layout.is_flat:
                if universal.WHOLE in state:
                    wholes |= universal.whole(layout, state[universal.WHOLE])
                state = universal.renamed(state)
            saved["state"][numbers[p]] = state
        for group in saved["param_groups"]:
            if isinstance(group["state_dtype"], torch.dtype):  # torch's own tools for state dicts reject it
                group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
        if wholes:
            saved["param_groups"][0][WHOLES] = wholes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, keeping each tensor's saved dtype (torch would cast it to the weight's).

        Counters stay on the CPU, where reading them never waits for a device, unless the device itself counts.

        Raises:
            ValueError: if the saved parameter groups differ from the optimizer's.
            RuntimeError: if the state is another optimizer's, or of weights of other shapes.
        """
        hook = self.register_load_state_dict_pre_hook(lambda _, saved: self._from_saved(saved))  # the last
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loaded = {}
        self.param_groups[0].pop(WHOLES, None)

    def _from_saved(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Check and convert the states to load, before any is replaced; return the rest, for torch."""
        self._look_again()
        own = {number for group in saved["param_groups"] for number in group["params"]}
        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=False):
            new_group = {**group, **saved_group}
            for i, (p, number) in enumerate(zip(group["params"], saved_group["params"], strict=False)):
                if state := saved["state"].get(number):
                    layout = self._layout(group, i, p)
                    self._loaded[p] = self._as_held(new_group, self._known(group).begin + i, p, layout, state)
        return {**saved, "state": {key: state for key, state in saved["state"].items() if key not in own}}

    def _as_held(
        self, group: Group, position: int, p: Tensor, layout: Layout, saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Undo `_to_saved` for the state of one tensor."""
        if layout.is_flat:
            saved = universal.named_back(saved)
        else:
            self._check_state(position, p, saved)
        state = {
            name: x.to(_counting_device(group, p) if name in COUNTERS else p.device) if isinstance(x, Tensor) else x
            for name, x in saved.items()
        }
        if group["state_dtype"] in (torch.int8, "int8") or _is_packed(state, self.state_names):
            return unpacked_state(layout, p, state, self.state_names)
        return state

    def _check_state(self, position: int, p: Tensor, saved: Mapping[str, Any]) -> None:
        """Raise unless `saved` is this optimizer's state for a tensor of p's shape; the kernels do not check."""
        if saved.keys() & STATE_NAMES != set(self.state_names):
            names = saved.keys() - {*COUNTERS, *self.block_names}
            raise RuntimeError(
                f"The saved state of parameter {position} is {', '.join(sorted(names))}, but "
                f"{type(self).__name__}'s is {', '.join(self.state_names)}: it is another optimizer's."
            )
        for name in self.state_names:
            if saved[name].shape != p.shape:
                raise RuntimeError(
                    f"The saved state {name!r} of parameter {position} has the shape {tuple(saved[name].shape)}, the "
                    f"parameter {tuple(p.shape)}: it is another model's."
                )

    def _owners(self) -> Iterator[tuple[Tensor, Layout]]:
        """Yield the tensors that have state, each with its layout."""
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if self.state_names[0] in self.state.get(p, {}):
                    yield p, self._layout(group, i, p)

    @torch.no_grad()
    def held(self) -> list[Member]:
        """Return the members for all weights on this process, without gradients; missing state is created."""
        self._look_again()
        pairs = [(group, p, layout) for group in self.param_groups for p, layout in self.layouts(group)]
        return [member for group, p, layout in pairs for member in self._members_of(group, p, p, layout)]

    def names(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the name of each of the optimizer's parameters, in its order, given a model's parameters by name.

        Raises:
            RuntimeError: if the model does not have one of them.
        """
        by_tensor = {p: name for name, p in parameters.items()}
        self._look_again()
        names = []
        for group, known in zip(self._groups, self._given, strict=True):  # DeepSpeed drops empty groups of param_groups
            for i in range(len(known.shapes)):
                here = [p for p in (known.original(i), *group["params"][i : i + 1]) if p is not None and p in by_tensor]
                if not here:
                    raise RuntimeError(f"The optimizer's parameter {known.begin + i} is not one of the model's.")
                names.append(by_tensor[here[0]])
        return names

    def _known(self, group: Group) -> Given:
        return next(known for known, own in zip(self._given, self._groups, strict=True) if own is group)

    def _look_again(self) -> None:
        """Record all groups anew if Parameters, or groups, were put in, taken out or replaced.

        DeepSpeed's partitions are no Parameters, and ZeRO-3 leaves its groups empty between steps.
        """
        for group in self.param_groups:
            known = next((known for known, own in zip(self._given, self._groups, strict=True) if own is group), None)
            params = group["params"]
            are_given = params and all(isinstance(p, nn.Parameter) for p in params)
            if known is None or (are_given and not known.is_of(params)):
                self._remember_again()
                return

    def layouts(self, group: Group) -> list[tuple[Tensor, Layout]]:
        """Return all tensors of a group with their layouts, even while ZeRO-3 hides them."""
        tensors = stand_ins(group["params"], self._known(group))
        return [(p, self._layout(group, i, p)) for i, p in enumerate(tensors)]

    def _layout(self, group: Group, index: int, p: Tensor) -> Layout:
        layout = layout_of(p, index, self._known(group))
        check_layout(layout, self.variant, group, len(self._groups))
        return layout

    def _members(self, group: Group) -> list[Member]:
        """Return this process's members of the group's parameters that have a gradient."""
        layouts = [(p, self._layout(group, i, p)) for i, p in enumerate(group["params"]) if p.grad is not None]
        return [member for p, layout in layouts for member in self._members_of(group, p, p.grad, layout)]

    def _members_of(self, group: Group, p: Tensor, grad: Tensor, layout: Layout) -> list[Member]:
        """Return the members of one tensor of the group with their state, created if missing."""
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients.")
        if grad.is_neg():  # a view that stands for minus what is in memory, as in the gradients of complex numbers
            grad = grad.resolve_neg()
        if layout.is_flat and "exp_avg" in self.state.get(p, {}):
            self._take_from_deepspeed(group, p, layout)
        state = self.state[p]
        is_new = self.state_names[0] not in state
        if is_new:
            state.update(self._initial_state(group, p, layout.exponents()))
        elif _is_packed(state, self.state_names):  # put there by a wrapper, past `load_state_dict`
            state.update(unpacked_state(layout, p, state, self.state_names))
        members = members_of(layout, p, grad, state)
        if is_new:
            self._start(group, members)
        return members

    def _take_from_deepspeed(self, group: Group, p: Tensor, layout: Layout) -> None:
        """Convert the state that DeepSpeed has loaded from a universal checkpoint to ours."""
        group.update(self._known(group).options)  # DeepSpeed gives each group the first one's
        wholes = self._groups[0].get(WHOLES, {})
        dtype = group["state_dtype"] or compute_dtype(p)
        self.state[p] = universal.taken(layout, p, self.state[p], self.state_names, dtype, wholes)
        self.forget_last_step()

    def _initial_state(self, group: Group, p: Tensor, blocks: int) -> dict[str, Tensor]:
        counters = ("step", "skipped") if group["skip_nonfinite"] else ("step",)
        device = _counting_device(group, p)
        state = {name: _counter(device) for name in counters}
        for name in self.state_names:
            state.update(new_state(p, name, group["state_dtype"] or compute_dtype(p), blocks))
        return state

    def _start(self, group: Group, members: Sequence[Member]) -> None:
        """Initialize the new state that does not start at zero."""


def options_of(group: Group, defaults: Iterable[str]) -> Group:
    """Return a group's options by the names of their defaults, but for lr, which a schedule changes."""
    return {name: group[name] for name in defaults if name != "lr"}


def _is_packed(state: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether it is int8 state as `sharding.packed_state` makes it."""
    return state[names[0]].dtype == torch.int16


def compute_dtype(p: Tensor) -> torch.dtype:
    """Return float32 for weights of up to 32 bits, float64 for float64."""
    return torch.promote_types(p.dtype, torch.float32)


def _counting_device(group: Group, p: Tensor) -> torch.device:
    """Return where p's steps are counted: the CPU, where reading never waits, unless the device itself must count."""
    return p.device if group["capturable"] or group["skip_nonfinite"] else torch.device("cpu")


def _counter(device: torch.device) -> Tensor:
    """Return zero: on the host so that fake tensors too know its value, on a device without a copy to it."""
    if device.type == "cpu":
        return torch.tensor(0.0, dtype=torch.float32, device=device)
    return torch.zeros((), dtype=torch.float32, device=device)


def _name_to_dtype(group: Group) -> None:
    if isinstance(group["state_dtype"], str):
        group["state_dtype"] = getattr(torch, group["state_dtype"], group["state_dtype"])
