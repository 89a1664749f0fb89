"""Upload a run to the hub: its trained part, its record without private details, and its model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from to_finetune.errors import RunError, UsageError
from to_finetune.files import write_json
from to_finetune.model.run import FinetunedRun, find_run
from to_finetune.model.trained import TRAINED_WEIGHTS_NAME
from to_finetune.report.card import model_card, public_recipe, without_paths
from to_finetune.report.plot import plot_losses
from to_finetune.runs import CONFIG, LOSS_CURVE, RECORD
from to_finetune.training.record import summarise

WEIGHTS = {  # by what was trained
    "subset": [TRAINED_WEIGHTS_NAME],
    "adapter": ["adapter_model.safetensors", "adapter_config.json"],
    "whole": ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"],
}
TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"]
PUBLIC = ("status", "started", "versions", "prompt_form", "subset", "results", "proofs")  # of run.json
BASE = "base_model_name_or_path"  # in the files of the weights
DRY_RUN = "hub"  # a folder in the run's


class Pushed(NamedTuple):
    """What was uploaded, or would be, and where to look at it."""

    where: str  # a URL, or the folder of a dry run
    sizes: dict[str, int]  # bytes, by file name


def push(
    name: str,
    repo_id: str,
    private: bool = False,
    merged: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Upload a run, or one of its checkpoints, to the hub's repository `repo_id`, created if it does not exist.

    Args:
        private: create the repository as private; an existing public one is refused.
        merged: upload the whole model, its base included.
        dry_run: upload nothing, but leave the files in the folder `hub` of the run's folder.
        token: the hub's token; None for that of HF_TOKEN or `hf auth login`.

    Raises:
        UsageError: if `name` is not a run, the hub does not accept `repo_id`, or there is no token.
        RunError: if the hub cannot be reached, or refuses.
    """
    run = find_run(name)
    if run is None:
        what = "is no run with trained weights" if Path(name).exists() else "is no folder"
        raise UsageError(f"{name!r} {what}.")
    check_push(repo_id, token, dry_run)
    with TemporaryDirectory(prefix="hub-", dir=run.folder) as scratch:  # beside the weights, to link instead of copy
        folder = Path(scratch) / DRY_RUN
        write_folder(run, folder, repo_id, merged)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        if not dry_run:
            return Pushed(_upload(folder, repo_id, private, token), sizes)
        final = run.folder / DRY_RUN
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        return Pushed(str(final), sizes)


def check_push(repo_id: str, token: str | None = None, dry_run: bool = False) -> None:
    """Raise for arguments that `push` would refuse.

    Raises:
        UsageError: if the hub does not accept `repo_id`, or there is no token (unless `dry_run`).
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"repo_id={repo_id!r} is no name for a repository: {error}") from None
    if not dry_run and (token or get_token()) is None:
        raise UsageError("There is no token for the hub: `hf auth login` stores one, or set HF_TOKEN.")


def write_folder(run: FinetunedRun, folder: Path, repo_id: str, merged: bool = False) -> None:
    """Write the files for the hub; none of them names a path on this computer."""
    folder.mkdir()
    if run.base:  # as card and weights must name it alike
        run = run._replace(config={**run.config, "model_name_or_path": run.base})
    if merged and run.part != "whole":
        from to_finetune.model.merge import merge

        merge(str(run.folder), str(folder))
    else:
        for path in _matching(run.folder, [*WEIGHTS[run.part], *TOKENIZER]):
            _link(path, folder / path.name)
    for path in _matching(folder, ["*config.json"]):
        _write_public_json(path, run.base)
    if (folder / TRAINED_WEIGHTS_NAME).exists():
        _write_public_tensors(folder / TRAINED_WEIGHTS_NAME, run.base)
    if run.history:
        label = run.config.get("optim", "training")
        plot_losses({label: run.history}, folder / LOSS_CURVE, title=repo_id)
    is_end = (run.folder / RECORD).exists()
    results = run.record.get("results") if is_end else None
    card = model_card(run, results or summarise(run.history), repo_id, merged, picture=bool(run.history))
    card.save(folder / "README.md")
    if run.config:
        (folder / CONFIG).write_text(public_recipe(run.config), encoding="utf-8")
    if run.record and is_end:
        public = {key: run.record[key] for key in PUBLIC if key in run.record}
        write_json(folder / RECORD, public)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def _link(source: Path, target: Path) -> None:
    """Hard-link the file under another name, or copy it if the disk cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_public_json(path: Path, base: str | None) -> None:
    """Reduce paths to names in a file of settings, in a new file, so that the hard-linked original keeps its own."""
    values = json.loads(path.read_text(encoding="utf-8"))
    public = {**values, BASE: base} if base and values.get(BASE) else values
    public = {key: without_paths(value) if "path" in key or "file" in key else value for key, value in public.items()}
    if public != values:
        write_json(path, public)


def _write_public_tensors(path: Path, base: str | None) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata()
            public = without_paths({**metadata, BASE: base or metadata[BASE]})
            if public == metadata:
                return
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise UsageError(f"The run's {path.name} is damaged: {error}.") from None
    path.unlink()
    save_file(tensors, path, metadata=public)


def _upload(folder: Path, repo_id: str, private: bool, token: str | None) -> str:
    """Upload the folder and return the repository's URL."""
    api = HfApi(token=token)
    try:
        # None leaves the visibility to the account's default.
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository.repo_id).private:  # `private` is ignored for one that exists
            raise UsageError(f"repo_id={repo_id!r} is there, and public: make it private first, or name another.")
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="A run of to_finetune")
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {401: "it does not know the token", 403: "the token has no right to write there"}.get(
            status, shorten(error.server_message or f"status {status}", 300)
        )
        raise RunError(f"The hub refuses repo_id={repo_id!r}: {reason}.") from None
    except (HTTPError, OSError) as error:  # HTTPError of the library's own client; OSError: also HF_HUB_OFFLINE
        raise RunError(f"The hub cannot be reached: {shorten(str(error), 300)}") from None
    return str(repository)
