"""Ways to say which weights train, beside one's own regular expressions: all end in the patterns of `select_trainable`.

The last layers, modules by name, Spectrum's YAML as it is, or the matrices of the best signal-to-noise ratio as
Hartford et al. define it ("Spectrum: Targeted Training on Signal to Noise Ratio", arXiv 2406.06623).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.files import write_whole
from to_finetune.model.load import without_weights

Progress = Callable[[int, int, str], None]  # matrices done, matrices in all, the last one's name


def chosen_patterns(
    sizes: Mapping[str, int], parameters: Sequence[str] | None, last: int | None, types: Sequence[str] | None
) -> list[str] | None:
    """The patterns of `select_trainable` for the three flags that say what trains; None where none of them does.

    Args:
        sizes: the number of weights of each of the model's parameters, by name.
        parameters: `unfrozen_parameters`: regular expressions, or YAML files of such (see `read_yaml`).
        last: `unfrozen_last_layers`.
        types: `unfrozen_modules`, as in `modules`.

    Raises:
        UsageError: for regular expressions beside the others, and for what `read_yaml`, `last_layers` and `modules`
            refuse.
    """
    if parameters is not None and (last is not None or types is not None):
        other = "unfrozen_last_layers" if last is not None else "unfrozen_modules"
        raise UsageError(f"unfrozen_parameters and {other} both say what trains: use one way.")
    if parameters is not None:
        return listed(parameters)
    if types is not None:
        return modules(sizes, types, last)
    return last_layers(sizes, last) if last is not None else None


def listed(words: Sequence[str]) -> list[str]:
    """The regular expressions of `unfrozen_parameters`, with those that a YAML file lists in the place of its name.

    Raises:
        UsageError: as `read_yaml`.
    """
    return [p for word in words for p in (read_yaml(word) if word.endswith((".yaml", ".yml")) else [word])]


def last_layers(sizes: Mapping[str, int], n: int) -> list[str]:
    """The pattern of all weights of the last `n` decoder layers.

    Args:
        sizes: the number of weights of each of the model's parameters, by name.

    Raises:
        UsageError: for less than one layer, or more than there are.
    """
    prefix, layers = layer_list(sizes)
    if not 1 <= n <= len(layers):
        raise UsageError(f"The last {n} layers cannot be trained: the model has {len(layers)}, so 1 to {len(layers)}.")
    return [rf"^{re.escape(prefix)}\.({'|'.join(map(str, layers[-n:]))})\."]


def modules(sizes: Mapping[str, int], types: Sequence[str], last: int | None = None) -> list[str]:
    """One pattern for each of `types`: a module's name as it stands in the model, such as q_proj, mlp.up_proj or mlp.

    A name that the decoder's layers have means those; any other one a module outside of them, such as lm_head.

    Args:
        sizes: the number of weights of each of the model's parameters, by name.
        last: only in the last so many decoder layers.

    Raises:
        UsageError: for a name that the model (or its last layers) does not have, and for what `last_layers` refuses.
    """
    if not types:
        raise UsageError("No module types are given, so nothing would train.")
    prefix, _ = layer_list(sizes)
    layers = last_layers(sizes, last)[0] if last is not None else rf"^{re.escape(prefix)}\.\d+\."
    inside = dict.fromkeys(module_of(name, prefix) for name in sizes if re.search(layers, name))
    outside = dict.fromkeys(module_of(n, prefix) for n in sizes if layer_of(n, prefix) is None and last is None)
    within = {part for path in inside for part in _parts(path)}
    ends = {part for path in outside for part in _parts(path) if path.endswith(part)}
    patterns = []
    for kind in types:
        if kind in within:
            patterns.append(rf"{layers}.*\b{re.escape(kind)}\b")
        elif kind in ends:
            patterns.append(rf"\b{re.escape(kind)}(\.weight|\.bias)?$")
        else:
            where = f"the last {last} layers" if last is not None else "the model"
            there = shorten(", ".join([*inside, *outside]), 400)
            near = did_you_mean(kind, within | ends)
            raise UsageError(f"No module of {where} is called {kind!r}.{near} There are {there}.")
    return patterns


def layer_list(sizes: Mapping[str, int]) -> tuple[str, list[int]]:
    """The name and the numbers of the decoder's layers ("model.layers", [0, 1, ...]), or ("", []) without any.

    They are the numbered list that holds the most weights: a vision tower has one too.
    """
    weights: Counter[str] = Counter()
    numbers: dict[str, set[int]] = {}
    for name, size in sizes.items():
        # The first number of a name: experts are numbered within a layer.
        if match := re.match(r"(.+?)\.(\d+)\.", name):
            weights[match[1]] += size
            numbers.setdefault(match[1], set()).add(int(match[2]))
    if not weights:
        return "", []
    prefix = max(weights, key=weights.__getitem__)
    return prefix, sorted(numbers[prefix])


def layer_of(name: str, prefix: str) -> int | None:
    """The number of the layer of the list `prefix` that a parameter is in, None outside of them."""
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def module_of(name: str, prefix: str) -> str:
    """The type of a parameter's module: its path within its layer, or the whole path outside of the list `prefix`."""
    path = re.sub(rf"^{re.escape(prefix)}\.\d+\.", "", name)
    return re.sub(r"\.(weight|bias)$", "", path)


def _parts(path: str) -> set[str]:
    """a.b.c: a, a.b, a.b.c, b, b.c, c; none that begins or ends with a number, which could be a layer's."""
    names = path.split(".")
    runs = [names[start:end] for end in range(1, len(names) + 1) for start in range(end)]
    return {".".join(run) for run in runs if not run[0].isdigit() and not run[-1].isdigit()}


def read_yaml(path: str | os.PathLike[str]) -> list[str]:
    """The patterns under ``unfrozen_parameters`` in a file that Spectrum, `write_yaml` or a user of axolotl wrote.

    Raises:
        UsageError: for a file that cannot be read, is no YAML, or has no list of patterns there.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    key = "unfrozen_parameters"
    if not isinstance(content, dict) or key not in content:
        near = did_you_mean(key, map(str, content)) if isinstance(content, dict) else ""
        raise UsageError(f"{path} has no key {key!r} with a list of regular expressions.{near}")
    patterns = content[key]
    if not isinstance(patterns, list) or not patterns:
        raise UsageError(f"{path}: {key} must be a list of regular expressions, with one at least.")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(f"{path}: {key} has {pattern!r}, which YAML does not read as text: put it in quotes.")
    return patterns


class ScoredTensor(NamedTuple):
    """A weight matrix, its signal-to-noise ratio, and whether that is among the best of its module type."""

    name: str
    module: str
    snr: float
    chosen: bool


def signal_to_noise(weight: Tensor) -> float:
    """Spectrum's ratio for an (n, m) matrix, from its singular values alone.

    ::

        sigma     = interquartile range of the singular values / 1.349
        threshold = sigma * (1 + sqrt(min(n, m) / max(n, m)))        the edge of Marchenko and Pastur's noise
        ratio     = (sum of those above / sum of the others) / the largest

    It orders matrices of one kind; by itself it means little. The division by the largest makes it inverse to the scale
    of the weights, and a few strong directions in noise score lower than the noise alone. Infinite where nothing is
    below the threshold, 0 for a matrix of zeros.
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
    """Score the weight matrices of a model and choose the best `share` of each module type (rounded down, as Spectrum).

    One matrix is in memory at a time, so that a 7B model needs no more than a small one. Vectors (norms, biases) and
    experts that are stacked into one tensor are no matrices and are not chosen.

    Args:
        model_folder: with config.json and safetensors files, or the name of a model that the hub's cache holds.
        share: of the matrices of a type: above 0, at most 1.
        types: modules to look at, as in `modules`; None for all within the decoder layers.
        progress: called after each matrix.
        device: where the singular values are computed; needs float64.

    Returns:
        All matrices that were scored, type by type in the model's order, the best first.

    Raises:
        UsageError: for a share out of range or so small that it chooses nothing, an unknown type, and a folder that
            is no model, lacks weights, or has them quantised or not finite.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share={share} is not valid: above 0 and at most 1, for example 0.25 for a quarter.")
    folder = _local_folder(model_folder)
    model = without_weights(str(folder))  # the names that training will see, which the files may call otherwise
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
    """Write the chosen of `scored` in Spectrum's form, which axolotl reads as well.

    Each line is anchored, as Spectrum's own for the head and the embedding, and so finds this one tensor; those two,
    which Spectrum always adds, are there only if they were scored and chosen.
    """
    lines = [
        f"# The top {100 * share:.4g} % of each module type by signal-to-noise ratio (Spectrum, arXiv 2406.06623);",
        "# after each name its ratio.",
        "unfrozen_parameters:",
    ]
    for module in dict.fromkeys(tensor.module for tensor in scored):
        lines.append(f"# {module} layers")
        lines += [f"- ^{t.name}$  # {t.snr:.4g}" for t in scored if t.module == module and t.chosen]
    _write_lines(path, lines)


def write_names(path: str | os.PathLike[str], names: Sequence[str], about: str) -> None:
    """Write a subset by the names of its parameters in the same form, below the comment `about`.

    axolotl takes a dot in a pattern for itself, and a backslash before one for a backslash.
    """
    _write_lines(path, [f"# {about}", "unfrozen_parameters:", *(f"- ^{name}$" for name in names)])


def _write_lines(path: str | os.PathLike[str], lines: Sequence[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")


def _share_of(count: int, share: float) -> int:
    return math.floor(count * share + 1e-9)  # 100 * 0.29 is 28.999999999999996


def _local_folder(name: str | os.PathLike[str]) -> Path:
    """A folder as it is, a hub name as the folder of its snapshot in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UsageError(
            f"{str(name)!r} is neither a folder nor a model in the hub's cache (`hf download {name}` puts one there)."
        ) from None


def _weight_files(folder: Path, names: Iterable[str], base_prefix: str) -> dict[str, tuple[Path, str]]:
    """For each parameter the safetensors file that holds it and its name there, which may lack the base's prefix."""
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
        # Now, and not after an hour of singular values.
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
