"""The model card of a run: its base, its data, how it was trained, and how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from to_finetune.data.load import BUILDERS
from to_finetune.model.run import FinetunedRun
from to_finetune.pages import template
from to_finetune.runs import what_trains

LOSSES = {  # key in run.json -> row of the card
    "eval_loss": "held out",
    "train_loss_mean": "training, mean over the run",
    "train_loss_first_fifth": "training, mean over its first fifth",
}


def model_card(
    run: FinetunedRun, results: Mapping[str, Any], repo_id: str, merged: bool = False, picture: bool = False
) -> ModelCard:
    """Return the card, with the bare names of local files and folders in place of their paths.

    Args:
        results: as in run.json.
        repo_id: the repository of the card.
        merged: whether the repository holds the whole model instead of the trained part.
        picture: whether it holds a loss.png.
    """
    names = [str(run.base or "another model"), *as_list(run.config.get("dataset_name", []))]
    on_hub = [name for name in names if is_hub_name(name)]
    base, *data = without_paths(names)
    config = {"optim": "", **without_paths(run.config)}
    part = "whole" if merged else run.part
    is_ours = config["optim"].endswith("_to")
    head = ModelCardData(
        base_model=base if base in on_hub else None,
        base_model_relation=("adapter" if part == "adapter" else "finetune") if base in on_hub else None,
        datasets=[name for name in data if name in on_hub] or None,
        library_name={"adapter": "peft", "whole": "transformers"}.get(part),
        license="unknown",
        pipeline_tag="text-generation",
        tags=["to_finetune", *(["trainable-optimizer", config["optim"]] if is_ours else [])],
    )
    before = [row["eval_loss"] for row in run.history if row.get("step") == 0 and "eval_loss" in row]
    losses = {"held out, before": before[0]} if before else {}
    losses |= {label: results[key] for key, label in LOSSES.items() if results.get(key) is not None}

    def linked(name: str, kind: str = "") -> str:
        return f"[{name}](https://huggingface.co/{kind}{name})" if name in on_hub else f"`{name}`"

    text = template(Path(__file__).with_name("card.md.jinja"), exp=math.exp).render(
        head=head.to_yaml(),
        repo_id=repo_id,
        part=part,
        is_ours=is_ours,
        base=base,
        data=data,
        on_hub=on_hub,
        linked=linked,
        config=config,
        options=config.get("optim_args") or {},
        choice={key: as_list(value) for key, value in what_trains(config).items()},
        record={"subset": None, "versions": {}, **run.record},
        results={"train_seconds": None, "processes": None, **results},
        losses=losses,
        picture=picture,
        recipe=public_recipe(run.config),
    )
    return ModelCard(text)


def public_recipe(config: Mapping[str, Any]) -> str:
    """Return the text of config.yaml without local paths; empty for an empty config."""
    return yaml.safe_dump(without_paths(config), sort_keys=False, allow_unicode=True) if config else ""


def without_paths(value: Any) -> Any:
    """Return `value` with every string that is a path on this computer, at any depth, replaced by its bare name."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and is_local(value):
        return PureWindowsPath(value).name or value  # it handles both kinds of slash
    return value


def is_local(name: str) -> bool:
    """Whether `name` is a path here, by its form or because it exists, and not a name on the hub."""
    if name.startswith(("/", "~", "./", "../", "file:", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return True
    return ("/" in name or "\\" in name) and len(name) < 1000 and Path(name).exists()


def is_hub_name(name: str) -> bool:
    if is_local(name) or Path(name).suffix.lower() in BUILDERS or Path(name).exists():
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
