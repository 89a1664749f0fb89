"""`to-finetune generate`: prompts are put as the training put them, and the base answers from the same memory."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from to_finetune.cli import main
from to_finetune.data.alpaca import CHAT_TEMPLATE
from to_finetune.data.prompts import prompt_form, prompt_tokens
from to_finetune.errors import UsageError
from to_finetune.model import generate, load_finetuned
from to_finetune.model.generate import Decoding, answer, end_tokens, fitting
from to_finetune.model.opened import OpenModel, open_model
from to_finetune.model.run import find_run
from to_finetune.model.terminal import chat
from to_finetune.runs import located

from .helpers import LAYER_WEIGHTS, Run, assert_same_bits, make_llama, write_jsonl

CPU = torch.device("cpu")
QUESTION = "Say red tree."
ALPACA = (  # written out, so that a change of the prompt is seen
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay red tree.\n\n### Response:\n"
)
SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def run(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The last layer, in large steps, so that its answers are not the base's."""
    run = finetune(tmp_path_factory.mktemp("runs") / "first", learning_rate=0.05, save_strategy="steps", save_steps=2)
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def whole_run(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune(
        tmp_path_factory.mktemp("runs") / "whole", unfrozen_parameters=None, learning_rate=0.05, max_steps=2
    )


@pytest.fixture(scope="module")
def chat_model(llama: Path) -> OpenModel:
    """The tiny Llama with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = CHAT_TEMPLATE
    return OpenModel(AutoModelForCausalLM.from_pretrained(llama), tokenizer, "chat")


def test_a_model_without_a_tokenizer_is_refused_before_a_weight_is_loaded(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with mock.patch("to_finetune.model.opened.load_model") as load_model, pytest.raises(UsageError):
        open_model(str(tmp_path / "model"), CPU)
    load_model.assert_not_called()


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """The likeliest token after `tokens`, `count` times, one forward pass over all of them each time."""
    said: list[int] = []
    while len(said) < count and said[-1:] != [1]:
        with torch.no_grad():
            said.append(int(model(torch.tensor([tokens + said])).logits[0, -1].argmax()))
    return said


def ask(opened: OpenModel, decoding: Decoding = SHORT, question: str = QUESTION) -> str:
    message = [{"role": "user", "content": question}]
    return answer(opened.model, opened.tokenizer, message, opened.form, decoding).text


def tuned_by_hand(run: Run, llama: Path) -> Any:
    """The base with the saved tensors, without any of the code that is tested."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert not model.load_state_dict(run.weights, strict=False).unexpected_keys
    return model


def test_a_run_answers_what_its_model_says_to_alpacas_prompt(run: Run, llama: Path) -> None:
    opened = open_model(str(run.folder), CPU)
    tokens = opened.tokenizer(ALPACA)["input_ids"]
    expected = greedy(tuned_by_hand(run, llama), tokens, 12)
    assert ask(opened) == opened.tokenizer.decode(expected, skip_special_tokens=True)
    assert expected != greedy(AutoModelForCausalLM.from_pretrained(llama), tokens, 12)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_base_in_a_relative_folder_is_found_from_elsewhere(
    finetune: Callable[..., Run], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    """Which has the form of a name on the hub."""
    (tmp_path / "models").symlink_to(llama.parent)
    monkeypatch.chdir(tmp_path)
    what: dict[str, Any] = {"use_peft": True, "unfrozen_parameters": None} if adapters else {}
    base = f"models/{llama.name}"
    saves = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = finetune(tmp_path / "run", model_name_or_path=base, **saves, **what)
    assert run.code == 0
    here, _ = load_finetuned(run.folder)
    another = make_llama(tmp_path / "elsewhere" / base, tie_word_embeddings=True)
    monkeypatch.chdir(another.parent.parent)
    for folder in (run.folder, run.folder / "checkpoint-1"):
        there, _ = load_finetuned(folder)
        assert_same_bits(dict(there.named_parameters()), dict(here.named_parameters()))
    found = find_run(str(run.folder))
    assert found is not None
    assert found.base == str(tmp_path / base)
    (tmp_path / "models").unlink()  # as on another computer, where the name is all that is known
    assert located(base, run.folder) == base


def test_a_checkpoint_is_asked_as_its_run(run: Run) -> None:
    checkpoint = open_model(str(run.folder / "checkpoint-2"), CPU)
    assert checkpoint.form == "alpaca"
    assert ask(checkpoint) != ask(open_model(str(run.folder), CPU))


def with_adapter(llama: Path, folder: Path) -> Path:
    """Adapters with random weights, as peft itself saves them."""
    torch.manual_seed(1)
    names = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=64, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"prompt_form": "alpaca"}))
    return folder


@pytest.mark.parametrize("part", ["subset", "adapter", "whole"])
def test_the_base_answers_from_the_same_memory_and_leaves_no_trace(
    part: str, run: Run, whole_run: Run, llama: Path, tmp_path: Path
) -> None:
    folders = {"subset": run.folder, "whole": whole_run.folder}
    folder = folders[part] if part in folders else with_adapter(llama, tmp_path)
    opened = open_model(str(folder), CPU, with_base=True)
    before = {name: p.detach().clone() for name, p in opened.model.named_parameters()}
    tuned = ask(opened)

    with opened.as_base():
        of_base = ask(opened)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    expected = greedy(plain, opened.tokenizer(ALPACA)["input_ids"], 12)
    assert of_base == opened.tokenizer.decode(expected, skip_special_tokens=True)
    assert of_base != tuned
    assert_same_bits({name: p.detach() for name, p in opened.model.named_parameters()}, before)
    assert ask(opened) == tuned


def test_the_tuned_weights_are_back_after_an_error(run: Run) -> None:
    opened = open_model(str(run.folder), CPU, with_base=True)
    with pytest.raises(ZeroDivisionError), opened.as_base():
        raise ZeroDivisionError
    assert_same_bits({name: dict(opened.model.named_parameters())[name].data for name in run.weights}, run.weights)


def test_only_what_trained_is_kept_twice(run: Run) -> None:
    opened = open_model(str(run.folder), CPU, with_base=True)
    assert opened._base_tensors.keys() == run.weights.keys()


def test_an_answer_ends_with_the_tokenizers_or_the_models_own_end(llama: Path) -> None:
    opened = OpenModel(AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama), "raw")
    tokens = greedy(opened.model, opened.tokenizer(QUESTION)["input_ids"], 5)
    first = tokens.index(tokens[3])
    message = [{"role": "user", "content": QUESTION}]
    opened.model.generation_config.eos_token_id = [tokens[3]]
    assert end_tokens(opened.model, opened.tokenizer) == sorted({1, tokens[3]})
    said = answer(opened.model, opened.tokenizer, message, "raw", SHORT)
    assert (said.tokens, said.ended) == (first + 1, True)
    opened.model.generation_config.eos_token_id = 1
    opened.tokenizer.eos_token = opened.tokenizer.convert_ids_to_tokens(tokens[3])
    said = answer(opened.model, opened.tokenizer, message, "raw", SHORT)
    assert (said.tokens, said.ended) == (first + 1, True)


def test_an_answer_is_cut_at_its_length_or_the_context(llama: Path) -> None:
    opened = OpenModel(AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama), "raw")
    words = len(opened.tokenizer("red " * 10)["input_ids"]) - len(opened.tokenizer("red " * 9)["input_ids"])

    def asked(prompt: str) -> tuple[int, int, bool]:
        said = answer(opened.model, opened.tokenizer, [{"role": "user", "content": prompt}], "raw", Decoding(40))
        return len(opened.tokenizer(prompt)["input_ids"]), said.tokens, said.ended

    prompt, tokens, ended = asked("red ")
    assert (tokens, ended) == (40, False)
    prompt, tokens, ended = asked("red " * (490 // words))
    assert prompt > 472
    assert prompt + tokens == 512
    with pytest.raises(UsageError, match=r"^The prompt has 5\d\d tokens, too many for the model's context of 512"):
        asked("red " * (520 // words))


def test_drawn_answers_are_transformers_own_and_repeat_with_a_seed(llama: Path) -> None:
    opened = OpenModel(AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama), "raw")
    tokens = torch.tensor([opened.tokenizer(QUESTION)["input_ids"]])
    set_seed(3)
    expected = opened.model.generate(tokens, max_new_tokens=12, do_sample=True, temperature=0.7, top_p=0.9)
    expected = opened.tokenizer.decode(expected[0, tokens.shape[1] :], skip_special_tokens=True)
    drawn = Decoding(12, temperature=0.7, top_p=0.9, seed=3)
    assert [ask(opened, drawn), ask(opened, drawn)] == [expected, expected]
    assert ask(opened, Decoding(12, temperature=0.7, top_p=0.9, seed=4)) != expected


def test_the_pieces_that_are_streamed_make_the_answer(llama: Path) -> None:
    opened = OpenModel(AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama), "raw")
    pieces: list[str] = []
    message = [{"role": "user", "content": QUESTION}]
    said = answer(opened.model, opened.tokenizer, message, "raw", Decoding(40), pieces.append)
    assert "".join(pieces) == said.text == ask(opened, Decoding(40))
    assert len(pieces) > 5


def test_ctrl_c_ends_an_answer_where_it_is(llama: Path) -> None:
    opened = OpenModel(AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama), "raw")
    calls = iter(range(100))

    def write(text: str) -> None:
        if next(calls) == 6:  # the seventh token's
            raise KeyboardInterrupt

    message = [{"role": "user", "content": QUESTION}]
    said = answer(opened.model, opened.tokenizer, message, "raw", Decoding(40), write)
    assert (said.tokens, said.ended) == (7, False)
    expected = greedy(opened.model, opened.tokenizer(QUESTION)["input_ids"], 7)
    assert said.text == opened.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": ALPACA, "completion": "red"}, "alpaca"),
        ({"prompt": "red", "completion": "tree"}, "raw"),
        ({"text": "red tree"}, "raw"),
        ({"messages": [{"role": "user", "content": "red"}]}, "chat"),
        ({"prompt": [{"role": "user", "content": "red"}], "completion": []}, "chat"),
    ],
)
def test_the_form_of_a_row(row: dict[str, Any], form: str) -> None:
    assert prompt_form(row) == form


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    plain = prompt_tokens(tokenizer, [{"role": "user", "content": QUESTION}], "raw")
    ended = AutoTokenizer.from_pretrained(llama)
    ended.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert ended(QUESTION)["input_ids"] == [*plain, 1]
    assert prompt_tokens(ended, [{"role": "user", "content": QUESTION}], "raw") == plain


@pytest.mark.parametrize(
    ("row", "question", "form"),
    [
        ({"instruction": "Say red.", "input": "", "output": "red"}, "Say red.", "alpaca"),
        ({"prompt": "Say red:", "completion": " red"}, "Say red:", "raw"),
        ({"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "red"}]}, "A?", "chat"),
    ],
)
def test_a_question_becomes_the_tokens_that_the_run_has_masked(
    row: dict[str, Any], question: str, form: str, finetune: Callable[..., Run], tmp_path: Path
) -> None:
    """The run records the form; its prepared row begins with what the answer followed."""
    run = finetune(tmp_path / "run", dataset_name=write_jsonl(tmp_path / "rows.jsonl", [row] * 4), max_steps=1)
    assert run.record["prompt_form"] == form
    total = sum(p.numel() for p in run.trainer.model.parameters())
    assert run.record["subset"] == {"tensors": 9, "weights": LAYER_WEIGHTS, "total_weights": total}
    opened = open_model(str(run.folder), CPU)
    assert opened.form == form
    prepared = run.trainer.train_dataset[0]
    masked = [token for token, label in zip(prepared["input_ids"], prepared["labels"], strict=True) if label == -100]
    assert prompt_tokens(opened.tokenizer, [{"role": "user", "content": question}], opened.form) == masked


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_the_oldest_turns_go_when_the_context_is_full(chat_model: OpenModel) -> None:
    def kept(room: int) -> list[dict[str, str]]:
        return fitting(messages, chat_model.model, chat_model.tokenizer, "chat", Decoding(room))

    def size(messages: list[dict[str, str]]) -> int:
        return len(chat_model.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    messages = conversation("one", "red " * 160, "two", "blue " * 90, "three")
    assert size(messages[2:]) < 256 < size(messages) < 492
    assert kept(20) == messages
    assert kept(512 - size(messages)) == messages
    assert kept(512 - size(messages) + 1) == messages[2:]
    assert kept(512) == messages[2:]  # what is said may fill half of the context
    messages = conversation("one", "red", "red " * 600)
    assert kept(20) == messages[2:]  # too long, which answer() says


def talk(opened: OpenModel, lines: list[str], monkeypatch: pytest.MonkeyPatch, compare: bool = False) -> str:
    """What the terminal shows of a chat in which `lines` are typed."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            line = next(typed)
        except StopIteration:
            raise EOFError from None
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    shown = io.StringIO()
    chat(opened, SHORT, Console(file=shown, width=200, highlight=False), compare)
    assert next(typed, None) in (None, "never read")
    return shown.getvalue()


def test_a_chat_goes_on_from_what_was_said(chat_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []

    def spy(model: Any, tokenizer: Any, messages: Any, *more: Any) -> generate.Answer:
        asked.append(list(messages))
        return answer(model, tokenizer, messages, *more)

    monkeypatch.setattr("to_finetune.model.terminal.answer", spy)
    shown = talk(chat_model, ["A?", "  ", "B?", "^C", "/rest", "/reset", "C?", "/exit", "never read"], monkeypatch)
    first, second = (ask(chat_model, question=q) for q in ("A?", "B?"))
    text = "<s>### Instruction:\nA?\n\n### Response:\n"
    tokens = chat_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert first == chat_model.tokenizer.decode(greedy(chat_model.model, tokens, 12), skip_special_tokens=True)
    assert asked == [
        conversation("A?"),
        [*conversation("A?"), {"role": "assistant", "content": first}, *conversation("B?")],
        conversation("C?"),
    ]
    assert second
    assert "There is no /rest. Ctrl-C stops an answer, /reset forgets" in shown
    assert "Forgotten." in shown


def test_without_a_template_each_question_stands_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "to_finetune.model.terminal.answer",
        lambda model, tokenizer, messages, *more: asked.append(messages) or generate.Answer("red", 1, True),
    )
    shown = talk(open_model(str(run.folder), CPU), ["A?", "B?"], monkeypatch)
    assert asked == [conversation("A?"), conversation("B?")]
    assert "Each question stands by itself" in shown


def test_a_chat_survives_a_question_that_is_too_long(chat_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(chat_model, ["red " * 600, "A?"], monkeypatch)
    assert "too many for the model's context of 512 tokens: shorten it." in shown
    assert ask(chat_model, question="A?").split()[0] in shown


def test_in_a_comparing_chat_each_keeps_to_its_own_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(str(run.folder), CPU, with_base=True, form="alpaca")
    opened.tokenizer.chat_template, opened.form = CHAT_TEMPLATE, "chat"
    asked: list[Any] = []

    def spy(model: Any, tokenizer: Any, messages: Any, *more: Any) -> generate.Answer:
        asked.append(list(messages))
        return answer(model, tokenizer, messages, *more)

    monkeypatch.setattr("to_finetune.model.terminal.answer", spy)
    shown = talk(opened, ["A?", "B?"], monkeypatch, compare=True)
    assert shown.index("base:") < shown.index("tuned:")
    tuned = ask(opened, question="A?")
    with opened.as_base():
        base = ask(opened, question="A?")
    assert base != tuned
    assert asked[2:] == [conversation("A?", said, "B?") for said in (base, tuned)]


@pytest.fixture
def words_only(llama: Path) -> Iterator[None]:
    """The base may say letters only, so that what the terminal shows can be compared: generation_config.json."""
    path = llama / "generation_config.json"
    before = path.read_text()
    vocabulary = AutoTokenizer.from_pretrained(llama).get_vocab()
    others = sorted(number for token, number in vocabulary.items() if not (token.isascii() and token.isalpha()))
    path.write_text(json.dumps({**json.loads(before), "suppress_tokens": others}))
    yield
    path.write_text(before)


@pytest.mark.usefixtures("words_only")
def test_the_command_prints_the_answers(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--max_new_tokens", "6", "--device", "cpu"]
    opened = open_model(str(run.folder), CPU, with_base=True)
    with opened.as_base():
        base = [ask(opened, Decoding(6), q) for q in (QUESTION, "Say blue.")]
    tuned = [ask(opened, Decoding(6), q) for q in (QUESTION, "Say blue.")]
    assert base != tuned

    assert main(["generate", str(run.folder), "--prompt", QUESTION, "--prompt", "Say blue.", *flags]) == 0
    cut = " [cut at 6 tokens]\n\n"
    assert capsys.readouterr().out == f"> {QUESTION}\n{tuned[0]}{cut}> Say blue.\n{tuned[1]}{cut}"

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n  Say blue.\n"))
    assert main(["generate", str(run.folder), "--compare", *flags]) == 0
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[0] == "│"]
    assert rows == [[f"{b} [cut at 6 tokens]", f"{t} [cut at 6 tokens]"] for b, t in zip(base, tuned, strict=True)]
    assert [line.rstrip() for line in shown.splitlines() if line[0] == ">"] == [f"> {QUESTION}", "> Say blue."]


def test_the_template_can_be_chosen(run: Run) -> None:
    opened = open_model(str(run.folder), CPU, form="raw")
    tokens = greedy(opened.model, opened.tokenizer(QUESTION)["input_ids"], 12)
    assert ask(opened) == opened.tokenizer.decode(tokens, skip_special_tokens=True)


REFUSED = {
    "no such folder": (["/no/such/run"], "'/no/such/run': no such folder."),
    "no model in it": (["{tmp}"], "holds no config.json, so it is no model."),
    "empty prompt": (["{run}", "--prompt", "  "], "A --prompt is empty."),
    "temperature": (["{run}", "--temperature", "-1"], "temperature=-1 is not valid: 0"),
    "temperature nan": (["{run}", "--temperature", "nan"], "temperature=nan is not valid: 0"),
    "top_p": (["{run}", "--temperature", "1", "--top_p", "1.5"], "top_p=1.5 is not valid: above 0 and at most 1."),
    "top_p of nothing": (["{run}", "--top_p", "0.9"], "top_p=0.9 needs a --temperature above 0"),
    "no tokens": (["{run}", "--max_new_tokens", "0"], "max_new_tokens=0 is not valid: at least 1."),
    "seed": (["{run}", "--seed", "-1"], "seed=-1 is not valid: 0 to 2**32 - 1."),
    "device": (["{run}", "--device", "tpu9"], "device='tpu9' is not there. There is cpu"),
    "too long": (["{run}", "--prompt", "red " * 600], "too many for the model's context of 512 tokens"),
    "no base": (["{llama}", "--compare"], "is no run of finetune.py, so that its base is not known"),
    "no chat template": (["{run}", "--template", "chat"], "has no chat template."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_sentence(
    case: str, run: Run, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = REFUSED[case]
    argv = [word.format(run=run.folder, llama=llama, tmp=tmp_path) for word in words]
    prompt = [] if "--prompt" in argv else ["--prompt", QUESTION]
    assert main(["generate", *argv, *prompt]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_damaged_weights_of_a_model_are_one_sentence(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "damaged")
    (folder / "model.safetensors").write_text("garbage")
    assert main(["generate", str(folder), "--prompt", QUESTION]) == 2
    assert f"model_name_or_path={str(folder)!r} cannot be loaded" in capsys.readouterr().err


def test_nothing_to_read_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["generate", str(run.folder)]) == 2
    assert "There is nothing to answer: give a --prompt, or pipe in a line for each." in capsys.readouterr().err


def test_a_run_that_did_not_end_names_its_checkpoints(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoint-2").mkdir()
    assert main(["generate", str(tmp_path), "--prompt", QUESTION]) == 2
    assert "is a run without trained weights: it did not end. It has checkpoint-2." in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dtype", "--template"])
def test_a_word_that_a_flag_does_not_know_is_refused(flag: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "run", flag, "int3"])
    assert end.value.code == 2


def test_a_chat_in_a_terminal(run: Run) -> None:
    """Ctrl-C stops an answer and not the program; Ctrl-D ends it."""
    terminal, its_end = pty.openpty()
    # With a space at its beginning, and far longer than a busy machine takes to stop it.
    drawn = ["--max_new_tokens", "3000", "--temperature", "0.06", "--seed", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "to_finetune.cli", "generate", str(run.folder), *drawn],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)

    def until(text: str) -> str:
        shown, deadline = "", time.monotonic() + 120
        while text not in shown:
            assert time.monotonic() < deadline, f"{text!r} did not come: {shown}"
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        return shown

    try:
        assert "Ctrl-C stops an answer" in until("\n> ")
        os.write(terminal, b"Say red.\n")
        until("Say red.\r\n")
        until(" ")  # a first word is there
        os.killpg(process.pid, signal.SIGINT)
        stopped = until("\n> ")
        assert "[cut at" in stopped
        assert int(stopped.split("[cut at ")[1].split()[0]) < 3000
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
