"""How a run's data put a question to the model, so that it can be prompted in the same way afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from to_finetune.data.alpaca import PREAMBLE, alpaca_prompt

PromptForm = Literal["alpaca", "chat", "raw"]
Message = dict[str, str]  # role, content


def prompt_form(row: Mapping[str, Any]) -> PromptForm:
    """Return the form of a row of `load_data`: Alpaca's headings, a chat template, or the text as it stands."""
    if "messages" in row or isinstance(row.get("prompt"), list):
        return "chat"
    return "alpaca" if row.get("prompt", "").startswith(PREAMBLE) else "raw"


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], form: PromptForm) -> list[int]:
    """Return the tokens of the prompt for an answer to the last of `messages`, as TRL makes them from a row.

    Only a chat template sees the messages before the last one.
    """
    if form == "chat":
        encoded: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]
    question = messages[-1]["content"]
    tokens = tokenizer(alpaca_prompt(question) if form == "alpaca" else question)["input_ids"]
    if tokens and tokens[-1] == tokenizer.eos_token_id:  # which some tokenizers append: TRL cuts it off as well
        tokens.pop()
    return tokens
