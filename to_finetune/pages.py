"""Jinja templates: values are escaped in HTML, and a missing value is an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape


@cache
def template(file: Path, **filters: Callable[..., object]) -> Template:
    """Return the Jinja template in `file`, with `filters` in addition to Jinja's own."""
    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(file.name)
