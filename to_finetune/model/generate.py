"""Generating a model's answers, token by token, to a prompt or in a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer, set_seed

from to_finetune.data.prompts import Message, PromptForm, prompt_tokens
from to_finetune.errors import UsageError, at_least_one

Write = Callable[[str], None]  # takes an answer's text, piece by piece


@dataclass
class Decoding:
    """How an answer is decoded.

    Raises:
        UsageError: for values that are not valid.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the most likely token each time
    top_p: float | None = None  # None: as in the model's generation_config.json
    seed: int | None = None  # set before each answer, so that none depends on earlier ones

    def __post_init__(self) -> None:
        at_least_one(max_new_tokens=self.max_new_tokens)
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature:g} is not valid: 0 (the most likely token) or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p:g} is not valid: above 0 and at most 1.")
        if self.top_p is not None and self.temperature == 0:
            raise UsageError(f"top_p={self.top_p:g} needs a --temperature above 0: at 0 nothing is drawn.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UsageError(f"seed={self.seed} is not valid: 0 to 2**32 - 1.")


class Answer(NamedTuple):
    """A model's answer."""

    text: str
    tokens: int
    ended: bool  # by itself, with an end-of-sequence token


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    form: PromptForm,
    decoding: Decoding,
    write: Write | None = None,
) -> Answer:
    """Answer the last of `messages`, up to an end token, `max_new_tokens` or the end of the model's context.

    Args:
        write: called with the text as it is generated. Ctrl-C meanwhile ends the answer there.

    Raises:
        UsageError: for a prompt that is empty or leaves no room in the context.
    """
    if not messages[-1]["content"].strip():
        raise UsageError("The prompt is empty.")
    prompt = prompt_tokens(tokenizer, messages, form)
    room = context_length(model, tokenizer) - len(prompt)
    if room < 1:
        raise UsageError(
            f"The prompt has {len(prompt):,} tokens, too many for the model's context of "
            f"{context_length(model, tokenizer):,} tokens: shorten it."
        )
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.temperature else {}
    config = GenerationConfig(
        max_new_tokens=min(decoding.max_new_tokens, room),
        do_sample=decoding.temperature > 0,
        eos_token_id=ends,
        pad_token_id=pad,
        **sampling,
    )
    if decoding.seed is not None:
        set_seed(decoding.seed)
    tokens = torch.tensor([prompt], device=model.device)
    stream = _Stream(tokenizer, write) if write else None
    try:
        with torch.inference_mode():
            output = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=stream
            )
    except KeyboardInterrupt:
        if stream is None:
            raise
        stream.end()
        new = stream.tokens
    else:
        new = output[0, len(prompt) :].tolist()
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return Answer(text, len(new), bool(new) and new[-1] in ends)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the one that training taught, and the model's own."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own})


def context_length(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length of the model's context in tokens, for the prompt and the answer together."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length or tokenizer.model_max_length


def fitting(
    messages: Sequence[Message],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    decoding: Decoding,
) -> list[Message]:
    """Drop the oldest questions and answers of `messages` until another answer fits; the last message is kept.

    An answer needs `max_new_tokens`, but at most half of the context.
    """
    context = context_length(model, tokenizer)
    room = min(decoding.max_new_tokens, context // 2)
    kept = list(messages)
    while len(kept) > 1 and len(prompt_tokens(tokenizer, kept, form)) + room > context:
        kept = kept[2:]
    return kept


class _Stream(TextStreamer):
    """Passes on the text word by word as it is generated, and keeps the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)
