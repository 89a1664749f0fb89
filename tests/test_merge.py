"""`to-finetune merge`: the base with what was trained, as an ordinary model that was read again; or nothing."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from to_finetune.cli import main
from to_finetune.errors import RunError, UsageError
from to_finetune.model import load_finetuned, load_model, load_tokenizer
from to_finetune.model.merge import merge
from to_finetune.model.trained import read_trained

from .helpers import Run, assert_same_bits, make_llama

Finetune = Callable[..., Run]
ADAPTERS = {"use_peft": True, "unfrozen_parameters": None, "lora_r": 4, "lora_alpha": 12}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(finetune: Finetune, home: Path) -> Run:
    """Two checkpoints of the last layer, of which the first is not the end."""
    return finetune(home / "subset", save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def lora(finetune: Finetune, home: Path) -> Run:
    return finetune(home / "lora", lora_target_modules=["all-linear"], **ADAPTERS)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """By transformers alone."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("part", [".", "checkpoint-2"])
def test_the_merged_model_is_base_and_trained_part(
    run: Run, llama: Path, tmp_path: Path, part: str, dtype: torch.dtype | None
) -> None:
    """Every weight bit for bit, rounded to the dtype; and the base's tokenizer and generation settings."""
    merged = merge(run.folder / part, tmp_path / "merged", dtype)
    base, trained = tensors_of(llama), read_trained(run.folder / part)[0]
    assert len(trained) == 9
    expected = {name: weight.to(dtype or torch.float32) for name, weight in {**base, **trained}.items()}
    found = tensors_of(tmp_path / "merged")
    assert_same_bits(found, expected)
    assert {weight.dtype for weight in found.values()} == {dtype or torch.float32}
    model, _ = load_finetuned(run.folder / part, dtype or torch.float32)
    tokens = torch.arange(50)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("red tree").input_ids == AutoTokenizer.from_pretrained(llama)("red tree").input_ids
    assert (merged.trained, merged.dtype, merged.quantized) == (9, dtype or torch.float32, None)
    assert merged.logits == 64 * len(tokenizer)
    assert merged.bytes == sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merged_adapters_are_base_plus_b_a_times_alpha_by_r(
    lora: Run, llama: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    """Computed in float64; rounded once, so to half a unit in the last place."""
    merged = merge(lora.folder, tmp_path / "merged", dtype)
    adapters, base, found = read_trained(lora.folder)[0], tensors_of(llama), tensors_of(tmp_path / "merged")
    changed = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = weight.to(dtype or torch.float32).double()
        if f"{prefix}A.weight" in adapters:
            expected += adapters[f"{prefix}B.weight"].double() @ adapters[f"{prefix}A.weight"].double() * 12 / 4
            changed += 1
            assert not torch.equal(found[name], weight.to(found[name].dtype))
        half_unit = torch.finfo(found[name].dtype).eps / 2
        assert ((found[name].double() - expected).abs() <= 1.01 * half_unit * expected.abs() + 1e-7).all(), name
    assert changed == 28
    assert merged.trained == 56
    assert merged.adapter_difference is not None
    assert merged.adapter_difference < (1e-5 if dtype is None else 0.05)


def test_a_run_on_a_quantised_base_is_merged_onto_the_full_one(
    finetune: Finetune, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune(tmp_path / "run", load_in_4bit=True)
    capsys.readouterr()
    assert main(["merge", str(run.folder), "--output_dir", str(tmp_path / "merged")]) == 0
    assert_same_bits(tensors_of(tmp_path / "merged"), {**tensors_of(llama), **run.weights})
    said = " ".join(capsys.readouterr().out.split())
    assert "trained on the base in 4 bits, merged with it in full precision" in said
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config, "quantization_config")


def test_it_says_what_it_wrote_and_what_it_compared(
    run: Run, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["merge", str(run.folder), "--output_dir", str(tmp_path / "m"), "--dtype", "bfloat16"]
    assert main(words) == 0
    said = "".join(capsys.readouterr().out.split())
    size = sum(file.stat().st_size for file in (tmp_path / "m").iterdir())
    for words in (
        f"base {llama}",
        f"trained 9 tensors of {run.folder}, rounded to bfloat16",
        f"written {tmp_path / 'm'}, bfloat16, {size / 1000:.2f} kB",
        "its 19,072 logits of 64 tokens are bit for bit those of the base with the trained part in memory",
    ):
        assert words.replace(" ", "") in said
    assert "rounded" not in " ".join(str(row) for row in merge(run.folder, tmp_path / "n"))


def test_the_dtype_is_the_bases_own(finetune: Finetune, llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    run = finetune(tmp_path / "run", model_name_or_path=base, bf16=True)
    merged = merge(run.folder, tmp_path / "merged")
    assert (merged.trained_dtype, merged.dtype) == (torch.float32, torch.bfloat16)
    rounded = {name: weight.bfloat16() for name, weight in run.weights.items()}
    assert_same_bits(tensors_of(tmp_path / "merged"), {**tensors_of(base), **rounded})


def test_a_tied_head_stays_tied(finetune: Finetune, tied_llama: Path, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", model_name_or_path=tied_llama, unfrozen_parameters=["lm_head"])
    merge(run.folder, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, run.weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("by_its_name", [True, False])
def test_an_empty_folder_is_taken(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_its_name: bool) -> None:
    monkeypatch.chdir(tmp_path)
    merge(run.folder, tmp_path if by_its_name else ".")
    assert len(tensors_of(tmp_path)) == 39


def test_it_stops_where_the_run_taught_it_to(run: Run, tmp_path: Path) -> None:
    """The run's tokenizer may end texts with another token than the base's."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    folder = shutil.copytree(run.folder, tmp_path / "run")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(20)
    tokenizer.save_pretrained(folder)
    merge(folder, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["run", "lora"])
def test_one_model_is_in_memory_at_a_time(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What was written is read when the model that wrote it is gone."""
    alive: list[Any] = []
    counts = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = load_finetuned(*args, **kwargs)
        alive.extend(weakref.ref(module) for module in model.modules() if isinstance(module, LlamaForCausalLM))
        return model, tokenizer

    def read(*args: Any, **kwargs: Any) -> Any:
        counts.append(sum(ref() is not None for ref in alive))
        return LlamaForCausalLM.from_pretrained(*args, **kwargs)

    with (
        mock.patch("to_finetune.model.merge.load_finetuned", load),
        mock.patch("to_finetune.model.merge.AutoModelForCausalLM.from_pretrained", read),
    ):
        merge(request.getfixturevalue(kind).folder, tmp_path / "merged")
    assert len(alive) == 1
    assert counts[-1] == 0


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_model_that_reads_back_otherwise_is_not_kept(run: Run, tmp_path: Path, name: str) -> None:
    """By one bit of one weight."""

    def read(*args: Any, **kwargs: Any) -> Any:
        model = LlamaForCausalLM.from_pretrained(*args, **kwargs)
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight.view(-1)[7] = weight.view(-1)[7] * (1 + 2**-10)
        return model

    with (
        mock.patch("to_finetune.model.merge.AutoModelForCausalLM.from_pretrained", read),
        pytest.raises(RunError, match="does not give the logits of the model in memory"),
    ):
        merge(run.folder, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_adapters_of_an_embedding_that_is_the_head_too_are_not_merged(
    finetune: Finetune, tied_llama: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"unfrozen_parameters": None, "use_peft": True, "model_name_or_path": tied_llama}
    run = finetune(tmp_path / "run", lora_target_modules=["embed_tokens"], learning_rate=0.5, **options)
    with pytest.raises(RunError, match=r"The base's head is its embedding, and the adapters are of one of the two\."):
        merge(run.folder, tmp_path / "merged")


def test_a_merge_that_changes_what_adapters_do_is_not_written(lora: Run, tmp_path: Path) -> None:
    """As with a head that is tied to the embedding, to which the merged update would be added as well."""

    def double(model: Any, *args: Any, **kwargs: Any) -> Any:
        merged = model.base_model.merge_and_unload()
        with torch.no_grad():
            merged.model.layers[0].mlp.up_proj.weight.mul_(2)
        return merged

    with (
        mock.patch("peft.PeftModelForCausalLM.merge_and_unload", double, create=True),
        pytest.raises(RunError, match="Merging the adapters changed the logits by"),
    ):
        merge(lora.folder, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_nothing_half_written_stays(run: Run, tmp_path: Path) -> None:
    """Of a merge that fails on the way, and of one that was killed before."""
    killed = tmp_path / "merged.partial"
    killed.mkdir()
    (killed / "model.safetensors").write_text("half")
    with (
        mock.patch("transformers.PreTrainedTokenizerBase.save_pretrained", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        merge(run.folder, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The sentence."""
    capsys.readouterr()
    assert main(["merge", *map(str, words)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_trained_everything_is_a_model_already(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune(tmp_path / "whole", unfrozen_parameters=None, max_steps=2, save_strategy="steps", save_steps=2)
    for folder in (run.folder, run.folder / "checkpoint-2"):
        error = refused(capsys, folder, "--output_dir", tmp_path / "merged")
        assert (
            error == f"error: {str(folder)!r} trained everything, and is an ordinary model already: nothing to merge."
        )
    assert not (tmp_path / "merged").exists()


def test_what_is_no_run_is_refused(run: Run, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ("--output_dir", tmp_path / "merged")
    assert "holds nothing that was trained." in refused(capsys, llama, *output)
    near = run.folder.with_name("subst")
    assert refused(capsys, near, *output).startswith(
        f"error: {str(near)!r} is no folder. Did you mean {str(run.folder)!r}"
    )
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.folder, unfinished)
    (unfinished / "trained.safetensors").unlink()
    assert "it did not end. It has checkpoint-2, checkpoint-4." in refused(capsys, unfinished, *output)
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file", run.folder):
        error = refused(capsys, run.folder, "--output_dir", output)
        assert error == f"error: output_dir={str(output)!r} is not empty; choose a new folder."
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_below_a_file_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    error = refused(capsys, run.folder, "--output_dir", tmp_path / "file" / "merged")
    assert error == f"error: output_dir: '{tmp_path / 'file'}' is no folder that can be written to."
    assert refused(capsys, tmp_path / "file", "--output_dir", tmp_path / "merged").endswith("is no folder.")


def test_a_base_that_is_gone_is_named(finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_llama(tmp_path / "base", tie_word_embeddings=False)
    run = finetune(tmp_path / "run", model_name_or_path=base, max_steps=2)
    shutil.rmtree(base)
    error = refused(capsys, run.folder, "--output_dir", tmp_path / "merged")
    assert f"model_name_or_path={str(base)!r}: no such folder." in error


def test_a_base_that_is_stored_quantised_is_refused(run: Run, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = tmp_path / "base"
    model = load_model(str(llama), quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(base)
    load_tokenizer(str(llama)).save_pretrained(base)
    trained = tmp_path / "trained"
    with mock.patch.object(model.config, "_name_or_path", str(base)):
        from to_finetune.model import save_trained, select_trainable

        select_trainable(model, ["norm"])
        save_trained(model, trained)
    with pytest.raises(UsageError, match="is itself quantised: no full weights to merge with"):
        merge(trained, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_unknown_dtype_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(run.folder), "--output_dir", str(tmp_path / "merged"), "--dtype", "float12"])
    assert stopped.value.code == 2
    assert "invalid choice: 'float12'" in capsys.readouterr().err


def test_peft_reads_a_merged_folder_as_the_base_of_more_adapters(lora: Run, tmp_path: Path) -> None:
    merge(lora.folder, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list((tmp_path / "merged").glob("adapter*"))
