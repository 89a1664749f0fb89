"""The chat template that conversations are written with, and whether it marks the assistant's tokens."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from to_finetune.data.alpaca import CHAT_TEMPLATE
from to_finetune.errors import UsageError, did_you_mean


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str:
    """Set the tokenizer's template to that of `path`; without a path, to Alpaca's headings if it has none.

    TRL would also take over the tokens of another tokenizer and pad the embeddings, which a partly frozen run would
    neither train nor save.

    Args:
        tokenizer: changed in place.
        path: a .jinja or .j2 file, or a tokenizer (a folder or a hub name) that has a template.

    Returns:
        The EOS token that goes with the template.

    Raises:
        UsageError: when there is no template, or its tokenizer has tokens that this one lacks.
    """
    if path is None:
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        return str(tokenizer.eos_token)
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            siblings = map(str, Path(path).parent.glob("*")) if Path(path).parent.is_dir() else []
            raise UsageError(f"chat_template_path={path!r}: no such file.{did_you_mean(path, siblings)}")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return str(tokenizer.eos_token)
    try:
        source = AutoTokenizer.from_pretrained(path)
        template = source.get_chat_template()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"chat_template_path={path!r} is no .jinja file and no tokenizer that has a template: "
            f"{shorten(str(error), 200)}"
        ) from error
    known = tokenizer.get_vocab()
    missing = [token for token in (*source.get_added_vocab(), source.eos_token) if token and token not in known]
    if missing:
        raise UsageError(
            f"chat_template_path={path!r}: its tokenizer has {len(missing)} tokens that the model's lacks, "
            f"{missing[0]!r} first. Write a template without them to a .jinja file, or take a model that has them."
        )
    tokenizer.chat_template = template
    return str(source.eos_token)


def check_marked(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the template lacks the markers that a loss on only the assistant's turns needs.

    For the templates of many models TRL has a version with markers, and uses it by itself.

    Raises:
        UsageError: with what to do.
    """
    if has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        raise UsageError(
            "assistant_only_loss: the chat template does not mark the assistant's tokens, and TRL knows no twin of it "
            "that does. Put {% generation %} and {% endgeneration %} around what the assistant says, in a file for "
            "--chat_template_path, or learn every turn with --assistant_only_loss false."
        ) from None
