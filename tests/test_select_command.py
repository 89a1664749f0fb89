"""`to-finetune select`: what it shows and writes, and what it refuses, with nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from to_finetune.cli import main
from to_finetune.model import select_trainable
from to_finetune.model.select import read_yaml
from to_finetune.model.spectrum import select_by_snr

Select = Callable[..., tuple[int, str]]
PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
NAMES = [*PROJECTIONS, "input_layernorm", "post_attention_layernorm"]


@pytest.fixture
def select(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Select:
    """The command in an empty folder: its exit code, and what it printed or the sentence that it ended with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def select(*words: str, model: Path = llama) -> tuple[int, str]:
        code = main(["select", "--model_name_or_path", str(model), *words])
        shown = capsys.readouterr()
        return code, shown.out if code == 0 else shown.err

    return select


def layers(*numbers: int, modules: list[str] = NAMES) -> list[str]:
    return sorted(f"model.layers.{i}.{name}.weight" for i in numbers for name in modules)


def test_a_runs_own_flags_are_known_too(select: Select) -> None:
    _, shown = select("--last_layers", "1", "--modules", "mlp")
    assert select("--unfrozen_last_layers", "1", "--unfrozen_modules", "mlp") == (0, shown)
    _, shown = select("--parameters", "layers.0.")
    assert select("--unfrozen_parameters", "layers.0.") == (0, shown)


@pytest.mark.parametrize(
    ("words", "trained"),
    [
        (["--last_layers", "2"], layers(2, 3)),
        (["--modules", "q_proj", "lm_head"], [*["lm_head.weight"], *layers(0, 1, 2, 3, modules=["self_attn.q_proj"])]),
        (["--last_layers", "1", "--modules", "mlp"], layers(3, modules=PROJECTIONS[4:])),
        (["--parameters", r"layers\.0\..*norm", "^model.norm"], [*layers(0, modules=NAMES[7:]), "model.norm.weight"]),
    ],
    ids=["last layers", "modules", "both", "patterns"],
)
def test_the_file_trains_what_was_chosen_and_says_how_it_came_to_be(
    select: Select, llama: Path, words: list[str], trained: list[str]
) -> None:
    code, shown = select(*words, "--output_file", "new/choice.yaml")
    assert code == 0
    assert "To train it: --unfrozen_parameters new/choice.yaml" in shown
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert sorted(select_trainable(model, read_yaml("new/choice.yaml")).names) == sorted(trained)
    about = Path("new/choice.yaml").read_text().splitlines()[0]
    assert about.startswith(f"# to-finetune select --model_name_or_path {llama} {words[0]} ")
    assert main([*about.split("# to-finetune ")[1].replace("'", "").split(), "--output_file", "again.yaml"]) == 0
    assert read_yaml("again.yaml") == read_yaml("new/choice.yaml")


def test_it_shows_the_choice_layer_by_layer_and_writes_nothing(select: Select, tmp_path: Path) -> None:
    code, shown = select("--last_layers", "1", "--modules", "q_proj")
    assert code == 0
    row = next(line for line in shown.splitlines() if "self_attn.q_proj" in line)
    assert "░░░█" in row
    assert not list(tmp_path.iterdir())


def test_a_configuration_is_enough(select: Select, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(llama / "config.json", tmp_path / "model")
    assert select("--last_layers", "1", model=tmp_path / "model")[0] == 0
    code, error = select("--snr", "0.5", model=tmp_path / "model")
    assert code == 2
    assert "holds no model.safetensors" in error


def test_the_best_by_their_ratio(select: Select, llama: Path) -> None:
    assert select("--snr", "0.5", "--modules", "q_proj", "--output_file", "snr.yaml")[0] == 0
    scored = select_by_snr(llama, 0.5, ["q_proj"])
    assert read_yaml("snr.yaml") == [f"^{tensor.name}$" for tensor in scored if tensor.chosen]
    assert len(read_yaml("snr.yaml")) == 2


@pytest.mark.parametrize(("name", "begins"), [("map.png", b"\x89PNG"), ("map.svg", b"<?xml"), ("map.pdf", b"%PDF")])
def test_the_picture(select: Select, name: str, begins: bytes) -> None:
    code, shown = select("--last_layers", "1", "--picture", f"new/{name}")
    assert code == 0
    assert f"Drawn: new/{name}" in shown
    assert Path("new", name).read_bytes().startswith(begins)


REFUSED = {
    "no way": ([], "Nothing says what trains: use --last_layers, --modules, --snr, --parameters."),
    "two ways": (["--last_layers", "1", "--parameters", "x"], "--last_layers and --parameters both say what trains"),
    "ratio and layers": (["--last_layers", "1", "--snr", "0.5"], "--last_layers and --snr both say what trains"),
    "no layer": (["--last_layers", "0"], "The last 0 layers cannot be trained: the model has 4, so 1 to 4."),
    "too many layers": (["--last_layers", "5"], "The last 5 layers cannot be trained"),
    "unknown module": (["--modules", "q_prj"], "No module of the model is called 'q_prj'. Did you mean 'q_proj'"),
    "share above 1": (["--snr", "25"], "share=25.0 is not valid: above 0 and at most 1"),
    "share of nothing": (["--snr", "0.1"], "share=0.1 of 4 matrices of a type is none: at least 0.25."),
    "pattern that finds nothing": (["--parameters", "layer.3"], "unfrozen_parameters: 'layer.3' is found in none"),
    "pattern that is none": (["--parameters", "layers.("], "'layers.(' is not a regular expression"),
    "no such file": (["--parameters", "nowhere.yaml"], "nowhere.yaml: No such file or directory."),
    "file of another kind": (["--last_layers", "1", "--output_file", "x.txt"], "--output_file x.txt is not valid"),
    "file that is a folder": (["--last_layers", "1", "--output_file", "."], "--output_file . is not valid"),
    "file below a file": (
        ["--last_layers", "1", "--output_file", "{file}/x.yaml"],
        "output_file: '{file}' is no folder that can be written to.",
    ),
    "picture of another kind": (["--last_layers", "1", "--picture", "x.bmp"], "--picture x.bmp is not valid"),
    "picture below a file": (
        ["--last_layers", "1", "--output_file", "good.yaml", "--picture", "{file}/x.png"],
        "picture: '{file}' is no folder that can be written to.",
    ),
    "no such model": (["--model_name_or_path", "./nowhere", "--last_layers", "1"], "'./nowhere': no such folder."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_sentence_and_nothing_is_written(
    case: str, select: Select, alpaca: Path, tmp_path: Path
) -> None:
    words, sentence = REFUSED[case]
    code, error = select(*(word.format(file=alpaca) for word in words))
    assert code == 2
    line = error.splitlines()[-1]  # below an empty progress bar
    assert error.strip() == line
    assert line.startswith("error: ")
    assert sentence.format(file=alpaca) in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--last_layers", "two"], "invalid int value: 'two'"),
        (["--last_layer", "1"], "unknown '--last_layer'. Did you mean '--last_layers'"),
        (["--last_layers", "1", "stray"], "unknown 'stray'."),
    ],
)
def test_what_cannot_be_parsed(select: Select, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        select(*words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
