"""Conversations through every source of a template: every assistant's turn is learned, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from to_finetune.errors import UsageError

from ..helpers import write_jsonl
from .rows import CHAT, Learned, prepared, tokens

Prepare = Callable[..., Any]

MARKED = (
    "{% for message in messages %}{{ '[' + message.role + ']' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MARKED_PIECES = [
    "[system]Be brief.[user]red?[assistant]",
    Learned("blue</s>"),
    "[user]river?[assistant]",
    Learned("stone</s>"),
]
CHATML = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
CHATML_PIECES = [  # TRL's twin of it also marks the line break before the answer
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant",
    Learned("\nblue<|im_end|>\n"),
    "<|im_start|>user\nriver?<|im_end|>\n<|im_start|>assistant",
    Learned("\nstone<|im_end|>\n"),
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 2)


def set_template(template: str | None) -> Callable[[Any], None]:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = template

    return change


def test_the_tokenizers_own_template(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, chats: Path, with_tokenizer: Callable[..., Path]
) -> None:
    model = with_tokenizer(set_template(MARKED))
    data = prepare(chats, model_name_or_path=model).train_dataset
    assert prepared(data) == [tokens(tokenizer, MARKED_PIECES)] * 2


def test_a_template_from_a_file_goes_before_the_tokenizers_own(
    prepare: Prepare,
    tokenizer: PreTrainedTokenizerBase,
    chats: Path,
    with_tokenizer: Callable[..., Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "marked.jinja").write_text(MARKED)
    model = with_tokenizer(set_template(UNMARKED))
    trainer = prepare(chats, model_name_or_path=model, chat_template_path=tmp_path / "marked.jinja")
    assert prepared(trainer.train_dataset) == [tokens(tokenizer, MARKED_PIECES)] * 2
    assert trainer.processing_class.chat_template == MARKED  # which is saved with the weights


def test_a_template_from_another_tokenizer_brings_its_end(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, chats: Path, with_tokenizer: Callable[..., Path]
) -> None:
    """And no token: the model's embeddings stay as they are."""

    def change(other: Any) -> None:
        other.chat_template, other.eos_token = MARKED, "<pad>"

    trainer = prepare(chats, chat_template_path=with_tokenizer(change))
    pieces = [type(piece)(piece.replace("</s>", "<pad>")) for piece in MARKED_PIECES]
    assert prepared(trainer.train_dataset) == [tokens(tokenizer, pieces)] * 2
    assert trainer.processing_class.eos_token == "<pad>"
    assert trainer.model.config.eos_token_id == tokenizer.pad_token_id
    assert trainer.model.vocab_size == len(trainer.processing_class) == len(tokenizer)


def test_trl_marks_a_template_that_it_knows(prepare: Prepare, tokenizer: PreTrainedTokenizerBase, chats: Path) -> None:
    """Qwen's is stored without marks."""
    assert "generation %}" not in CHATML.read_text()
    data = prepare(chats, chat_template_path=CHATML).train_dataset
    assert prepared(data) == [tokens(tokenizer, CHATML_PIECES)] * 2


def test_without_marks_every_turn_may_be_learned(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, chats: Path, with_tokenizer: Callable[..., Path]
) -> None:
    model = with_tokenizer(set_template(UNMARKED))
    data = prepare(chats, model_name_or_path=model, assistant_only_loss=False).train_dataset
    assert prepared(data) == [tokens(tokenizer, [Learned("".join(MARKED_PIECES))])] * 2


def test_prompts_and_completions_need_no_marks(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": CHAT[:2], "completion": CHAT[2:3]}] * 2)
    unmarked = UNMARKED + "{% if add_generation_prompt %}[assistant]{% endif %}"
    data = prepare(rows, model_name_or_path=with_tokenizer(set_template(unmarked))).train_dataset
    assert prepared(data) == [tokens(tokenizer, MARKED_PIECES[:2])] * 2


def test_tools_reach_the_template(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    """And calls, whose turns have no content."""
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "red"}}}
    rows = [
        {
            "messages": [CHAT[1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "a colour"}],
            "tools": [{"type": "function", "function": {"name": "look_up"}}],
        }
    ]
    template = "{{ '[tools]' + tools[0].function.name }}" + MARKED.replace(
        "message.content + eos_token", "(message.tool_calls[0].function.name if message.tool_calls else '') + eos_token"
    )
    model = with_tokenizer(set_template(template))
    data = prepare(write_jsonl(tmp_path / "rows.jsonl", rows), model_name_or_path=model).train_dataset
    pieces = ["[tools]look_up[user]red?[assistant]", Learned("look_up</s>"), "[tool]a colour"]
    assert prepared(data) == [tokens(tokenizer, pieces)]


def test_tools_of_prompts_and_completions_reach_the_template(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": CHAT[1:2], "completion": CHAT[2:3], "tools": tools}])
    unmarked = UNMARKED + "{% if add_generation_prompt %}[assistant]{% endif %}"
    model = with_tokenizer(set_template("{{ '[tools]' + tools[0].function.name }}" + unmarked))
    data = prepare(rows, model_name_or_path=model).train_dataset
    assert prepared(data) == [tokens(tokenizer, ["[tools]look_up[user]red?[assistant]", Learned("blue</s>")])]


def refusal(prepare: Prepare, *args: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        prepare(*args, **options)
    return str(raised.value)


def test_a_template_without_marks_is_refused_with_what_to_do(
    prepare: Prepare, chats: Path, with_tokenizer: Callable[..., Path]
) -> None:
    said = refusal(prepare, chats, model_name_or_path=with_tokenizer(set_template(UNMARKED)))
    for words in ("does not mark the assistant's tokens", "{% generation %}", "--assistant_only_loss false"):
        assert words in said


def test_tokens_that_the_model_has_not_are_refused(
    prepare: Prepare, chats: Path, with_tokenizer: Callable[..., Path]
) -> None:
    def change(other: Any) -> None:
        other.chat_template = MARKED
        other.add_tokens(["<|im_start|>", "<|im_end|>"])

    said = refusal(prepare, chats, chat_template_path=with_tokenizer(change))
    assert "its tokenizer has 2 tokens that the model's lacks, '<|im_start|>' first" in said


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}", "the chat template: Unexpected end of template"),
        (
            "{{ raise_exception('No system turns.') }}{% generation %}{% endgeneration %}",
            "the chat template: No system",
        ),
    ],
    ids=["no Jinja", "raises"],
)
def test_what_a_template_says_is_passed_on(
    prepare: Prepare, chats: Path, with_tokenizer: Callable[..., Path], template: str, said: str
) -> None:
    model = with_tokenizer(set_template(template))
    assert said in refusal(prepare, chats, model_name_or_path=model, assistant_only_loss=False)


def test_alpacas_headings_have_no_place_for_tools(prepare: Prepare, tmp_path: Path) -> None:
    """They would be learned as if they were the assistant's."""
    turns = [*CHAT[:3], {"role": "tool", "content": "river"}, CHAT[4]]
    said = refusal(prepare, write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 2))
    assert "the chat template: Alpaca's headings have no place for the role tool" in said


@pytest.mark.parametrize(
    ("path", "said"),
    [("chatz.jinja", "no such file. Did you mean 'chats.jinja'"), ("nowhere", "no .jinja file and no tokenizer")],
)
def test_a_template_that_is_not_there(
    prepare: Prepare, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jinja").write_text(MARKED)
    assert f"chat_template_path={path!r}" in refusal(prepare, chats, chat_template_path=path)
    assert said in refusal(prepare, chats, chat_template_path=path)


def test_a_tokenizer_without_a_template_is_no_source(prepare: Prepare, chats: Path, llama: Path) -> None:
    assert AutoTokenizer.from_pretrained(llama).chat_template is None
    assert "no tokenizer that has a template" in refusal(prepare, chats, chat_template_path=llama)
