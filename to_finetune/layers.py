"""A decoder's layers and modules, by the names of its parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping


def layer_list(sizes: Mapping[str, int]) -> tuple[str, list[int]]:
    """Return the prefix and numbers of the decoder's layers: ("model.layers", [0, 1, ...]), or ("", []) without any.

    They are the numbered list with the most weights: a vision tower has a list of layers too.
    """
    weights: Counter[str] = Counter()
    numbers: dict[str, set[int]] = {}
    for name, size in sizes.items():
        # Only the first number of a name is a layer's: experts are numbered within a layer.
        if match := re.match(r"(.+?)\.(\d+)\.", name):
            weights[match[1]] += size
            numbers.setdefault(match[1], set()).add(int(match[2]))
    if not weights:
        return "", []
    prefix = max(weights, key=weights.__getitem__)
    return prefix, sorted(numbers[prefix])


def layer_of(name: str, prefix: str) -> int | None:
    """Return the number of the parameter's layer in the list `prefix`, or None outside of it."""
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def module_of(name: str, prefix: str) -> str:
    """Return a parameter's module type: its path within its layer, or its whole path outside of the list `prefix`."""
    path = re.sub(rf"^{re.escape(prefix)}\.\d+\.", "", name)
    return re.sub(r"\.(weight|bias)$", "", path)


def module_names(path: str) -> set[str]:
    """Return the names that select the module a.b.c: a, a.b, a.b.c, b, b.c, c.

    No name begins or ends with a number, which could be a layer's.
    """
    names = path.split(".")
    runs = [names[start:end] for end in range(1, len(names) + 1) for start in range(end)]
    return {".".join(run) for run in runs if not run[0].isdigit() and not run[-1].isdigit()}
