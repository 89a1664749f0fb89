"""Ways to choose which weights train; all of them result in patterns for `select_trainable`.

In addition to one's own regular expressions: the last layers, modules by name, or a file in the format of Spectrum and
axolotl.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import yaml

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.files import write_whole
from to_finetune.layers import layer_list, layer_of, module_names, module_of


def chosen_patterns(
    sizes: Mapping[str, int], parameters: Sequence[str] | None, last: int | None, types: Sequence[str] | None
) -> list[str] | None:
    """Return the patterns for `select_trainable` from the three flags that say what trains; None if none is given.

    Args:
        sizes: the number of weights of each of the model's parameters, by name.
        parameters: `unfrozen_parameters`: regular expressions, or YAML files of such (see `read_yaml`).
        last: `unfrozen_last_layers`.
        types: `unfrozen_modules`, as in `modules`.

    Raises:
        UsageError: for regular expressions together with another flag, and as `read_yaml`, `last_layers` and `modules`.
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
    """Return the regular expressions of `unfrozen_parameters`; the name of a YAML file is replaced by its list.

    Raises:
        UsageError: as `read_yaml`.
    """
    return [p for word in words for p in (read_yaml(word) if word.endswith((".yaml", ".yml")) else [word])]


def last_layers(sizes: Mapping[str, int], n: int) -> list[str]:
    """Return the pattern of all weights of the last `n` decoder layers.

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
    """Return one pattern for each of `types`, which are names of modules, such as q_proj, mlp.up_proj or mlp.

    A name that occurs within the decoder's layers selects modules there only; any other name selects a module outside
    of them, such as lm_head.

    Args:
        sizes: the number of weights of each of the model's parameters, by name.
        last: only in the last so many decoder layers.

    Raises:
        UsageError: for a name that the model (or its last layers) does not have, and as `last_layers`.
    """
    if not types:
        raise UsageError("No module types are given, so nothing would train.")
    prefix, _ = layer_list(sizes)
    layers = last_layers(sizes, last)[0] if last is not None else rf"^{re.escape(prefix)}\.\d+\."
    inside = dict.fromkeys(module_of(name, prefix) for name in sizes if re.search(layers, name))
    outside = dict.fromkeys(module_of(n, prefix) for n in sizes if layer_of(n, prefix) is None and last is None)
    within = {part for path in inside for part in module_names(path)}
    ends = {part for path in outside for part in module_names(path) if path.endswith(part)}
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


def read_yaml(path: str | os.PathLike[str]) -> list[str]:
    """Return the patterns under ``unfrozen_parameters`` in a file from Spectrum, `write_yaml` or an axolotl user.

    Raises:
        UsageError: for a file that cannot be read, is not valid YAML, or has no list of patterns under that key.
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


def write_names(path: str | os.PathLike[str], names: Sequence[str], about: str) -> None:
    """Write the names of a subset's parameters in the same format, below the comment `about`.

    axolotl takes a dot in a pattern literally, and a backslash before it as well.
    """
    write_lines(path, [f"# {about}", "unfrozen_parameters:", *(f"- ^{name}$" for name in names)])


def write_lines(path: str | os.PathLike[str], lines: Sequence[str]) -> None:
    """Write a file atomically, creating its folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")
