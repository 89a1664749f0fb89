"""The weight matrices with the best signal-to-noise ratio, as Hartford et al. define and choose them.

"Spectrum: Targeted Training on Signal to Noise Ratio", arXiv 2406.06623.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from to_finetune.errors import UsageError
from to_finetune.layers import layer_list, layer_of, module_of
from to_finetune.model.load import without_weights
from to_finetune.model.select import modules, write_lines

Progress = Callable[[int, int, str], None]  # matrices done, matrices in all, the last one's name


class ScoredTensor(NamedTuple):
    """A weight matrix, its signal-to-noise ratio, and whether that is among the best of its module type."""

    name: str
    module: str
    snr: float
    chosen: bool


def signal_to_noise(weight: Tensor) -> float:
    """Return Spectrum's signal-to-noise ratio of an (n, m) matrix, from its singular values alone.

    ::

        sigma     = interquartile range of the singular values / 1.349
        threshold = sigma * (1 + sqrt(min(n, m) / max(n, m)))        the Marchenko-Pastur edge of noise
        ratio     = (sum of values above / sum of the others) / largest value

    It ranks matrices of one type; by itself it means little. The division by the largest value makes it inversely
    proportional to the scale of the weights, and a few strong directions in noise score lower than the noise alone. It
    is infinite if no value is below the threshold, and 0 for a matrix of zeros.
    """
    wide = weight.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    # The roots of the eigenvalues of W Wᵀ, in float64: a third of the time of svdvals in float32, and no less exact.
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
    largest = values.max()
    if largest == 0:
        return 0.0
    low, high = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    threshold = (high - low) / 1.349 * (1 + math.sqrt(wide.shape[0] / wide.shape[1]))
    signal = values > threshold
    return (values[signal].sum() / values[~signal].sum() / largest).item()


def select_by_snr(
    model_folder: str | os.PathLike[str],
    share: float,
    types: Sequence[str] | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> list[ScoredTensor]:
    """Score a model's weight matrices and choose the best `share` of each module type (rounded down, as in Spectrum).

    Only one matrix is in memory at a time, so that a 7B model needs no more than a small one. Vectors (norms, biases)
    and experts that are stacked into one tensor are not matrices and are not chosen.

    Args:
        model_folder: with config.json and safetensors files, or the name of a model in the hub's cache.
        share: of the matrices of a type: above 0, at most 1.
        types: modules to score, as in `modules`; None for all within the decoder layers.
        progress: called after each matrix.
        device: where the singular values are computed; needs float64.

    Returns:
        All scored matrices, by type in the model's order, and within a type the best first.

    Raises:
        UsageError: for a share out of range or so small that it chooses nothing, an unknown type, and a folder that
            is not a model, lacks weights, or holds quantised or non-finite ones.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share={share} is not valid: above 0 and at most 1, for example 0.25 for a quarter.")
    folder = _local_folder(model_folder)
    model = without_weights(str(folder))  # the names that training will see; those in the files may differ
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2 and min(p.shape) > 1}
    prefix, _ = layer_list(sizes)
    if types is None:
        names = [name for name in sizes if layer_of(name, prefix) is not None]
    else:
        patterns = modules(sizes, types)
        names = [name for name in sizes if any(re.search(pattern, name) for pattern in patterns)]
    if not names:
        raise UsageError(f"{folder}: the model has no weight matrices in numbered layers; name the modules to look at.")
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(module_of(name, prefix), []).append(name)
    count = max(map(len, by_module.values()))
    if _share_of(count, share) == 0:
        raise UsageError(
            f"share={share} of {count} matrices of a type is none: at least {math.ceil(1e4 / count) / 1e4}."
        )

    files = _weight_files(folder, names, model.base_model_prefix)
    scores: dict[str, float] = {}
    for name in names:
        scores[name] = _score(*files[name], device)
        if progress:
            progress(len(scores), len(names), name)
    scored = []
    for module, members in by_module.items():
        best_first = sorted(members, key=scores.__getitem__, reverse=True)
        chosen = _share_of(len(members), share)
        scored += [ScoredTensor(name, module, scores[name], i < chosen) for i, name in enumerate(best_first)]
    return scored


def write_yaml(path: str | os.PathLike[str], scored: Sequence[ScoredTensor], share: float) -> None:
    """Write the chosen matrices of `scored` in Spectrum's format, which axolotl reads as well.

    Each pattern is anchored, as Spectrum's own for the head and the embedding are, and so matches one tensor. Those
    two, which Spectrum always adds, are included only if they were scored and chosen.
    """
    lines = [
        f"# The top {100 * share:.4g} % of each module type by signal-to-noise ratio (Spectrum, arXiv 2406.06623);",
        "# after each name its ratio.",
        "unfrozen_parameters:",
    ]
    for module in dict.fromkeys(tensor.module for tensor in scored):
        lines.append(f"# {module} layers")
        lines += [f"- ^{t.name}$  # {t.snr:.4g}" for t in scored if t.module == module and t.chosen]
    write_lines(path, lines)


def _share_of(count: int, share: float) -> int:
    return math.floor(count * share + 1e-9)  # 100 * 0.29 is 28.999999999999996


def _local_folder(name: str | os.PathLike[str]) -> Path:
    """Return a folder as it is, and for a hub name the folder of its snapshot in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UsageError(
            f"{str(name)!r} is neither a folder nor a model in the hub's cache (`hf download {name}` puts one there)."
        ) from None


def _weight_files(folder: Path, names: Iterable[str], base_prefix: str) -> dict[str, tuple[Path, str]]:
    """Return each parameter's safetensors file and its name in that file, which may lack the base's prefix."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    try:
        if index.is_file():
            held = {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                held = dict.fromkeys(file.keys(), single)
        else:
            raise UsageError(f"{folder} holds no {single.name}, nor an index of several such files.")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise UsageError(f"{index} is damaged: it has no weight_map of names to files.") from None
    except SafetensorError as error:
        raise UsageError(f"{single} is damaged: {error}.") from None
    found = {}
    for name in names:
        stored = name if name in held else name.removeprefix(base_prefix + ".")
        if stored not in held:
            raise UsageError(f"{folder}: no file has {name!r}; files that name the weights otherwise cannot be scored.")
        # Checked now, not after an hour of singular values.
        if not held[stored].is_file():
            raise UsageError(f"{folder}: {held[stored].name} is missing.")
        found[name] = held[stored], stored
    return found


def _score(path: Path, stored: str, device: torch.device | str) -> float:
    try:
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(stored)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}.") from None
    if weight.dtype.itemsize < 2:
        raise UsageError(f"{path}: {stored!r} is quantised ({weight.dtype}); score the model that it was made from.")
    if not torch.isfinite(weight).all():
        raise UsageError(f"{path}: {stored!r} has values that are not finite.")
    return signal_to_noise(weight.to(device))
