"""A model ready for prompts: a run's, with its base in the same memory, or an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from to_finetune.data.prompts import PromptForm
from to_finetune.errors import UsageError
from to_finetune.model.load import load_base, load_model, load_tokenizer
from to_finetune.model.run import find_run
from to_finetune.model.trained import load_trained, read_trained


class OpenModel:
    """A model, its tokenizer, the form of its prompts, and the weights in which its base differs."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        form: PromptForm,
        base_tensors: dict[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.form = form
        self._base_tensors = base_tensors or {}

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Make the model its base within the context. Swaps the tensors themselves: nothing is copied or rounded."""
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in self._base_tensors.items():
            self._base_tensors[name], parameters[name].data = parameters[name].data, tensor


def choose_device(name: str | None = None) -> torch.device:
    """Return the device called `name`; by default the GPU if there is one, else the CPU.

    Raises:
        UsageError: for a device that is not available.
    """
    there = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"device={name!r} is not there. There is cpu{f' and {there.type}' if there else ''}."
        ) from None
    return device


def open_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    with_base: bool = False,
    form: PromptForm | None = None,
) -> OpenModel:
    """Load the model of a run's folder, of a checkpoint, or of any other folder or hub name, ready for prompts.

    Args:
        dtype: None for bfloat16 on a GPU that has it, else float32.
        with_base: also keep the base's values of the weights that were trained, for `OpenModel.as_base`.
        form: None for that of the run's data or, if not known, "chat" with a chat template, else "raw".

    Raises:
        UsageError: when there is no such model, or no base where one is needed.
    """
    run = find_run(name)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if with_base and (run is None or (run.part == "whole" and not run.base)):
        raise UsageError(f"{name!r} is no run of finetune.py, so that its base is not known: nothing to compare with.")
    model: Any
    base_tensors: dict[str, Tensor] = {}
    if run is None or run.part == "whole":
        tokenizer, model = load_tokenizer(name), load_model(name, dtype=dtype)
        if run and with_base:
            base = load_model(str(run.base), run.config.get("model_revision"), dtype)
            base_tensors = dict(base.named_parameters())
    else:
        model, tokenizer = load_base(run.folder, dtype, run.quantization)
        if with_base and run.part == "subset":
            trained = read_trained(run.folder)[0]
            base_tensors = {name: p.detach().clone() for name, p in model.named_parameters() if name in trained}
        load_trained(model, run.folder)
    model.eval()
    if run is None or run.quantization is None:  # a quantised model stays where it was quantised
        model.to(device)
    if form == "chat" and not tokenizer.chat_template:
        raise UsageError(f"template='chat': the tokenizer of {name!r} has no chat template.")
    recorded = run.record.get("prompt_form") if run else None
    return OpenModel(
        model,
        tokenizer,
        form or recorded or ("chat" if tokenizer.chat_template else "raw"),
        {name: tensor.detach().to(model.device) for name, tensor in base_tensors.items()},
    )
