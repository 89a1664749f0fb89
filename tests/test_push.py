"""`to-finetune push`: the trained part goes to the hub with a true card, and nothing private goes along."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from to_finetune.cli import main
from to_finetune.model import load_finetuned
from to_finetune.model.run import FinetunedRun, find_run
from to_finetune.report.card import is_hub_name, model_card, without_paths
from to_finetune.report.push import push
from to_finetune.training.recipe import without_secrets

from .helpers import LAYER_WEIGHTS, Run, assert_same_bits, write_jsonl

TOKEN = "hf_ThisIsTheSecret"
TRAINED = {"README.md", "config.yaml", "loss.png", "run.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def run(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finetune(
        tmp_path_factory.mktemp("secret") / "first",
        optim_args="alpha=0.2,beta=0.15",
        learning_rate=0.01,
        val_set_size=6,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
        report_to="tensorboard",
    )
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def folder(run: Run) -> Iterator[Path]:
    """What a dry run leaves."""
    assert main(["push", str(run.folder), "--repo_id", "me/tiny", "--dry_run"]) == 0
    yield run.folder / "hub"
    shutil.rmtree(run.folder / "hub")


class Hub:
    """Records what is asked of HfApi, and keeps what is uploaded."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.token: str | None = None
        self.public = False

    def __call__(self, token: str | None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked.append((repo_id, options))
        if self.error:
            raise self.error

        class Url(str):
            repo_id = "someone/tiny"

        return Url("https://huggingface.co/someone/tiny")

    def repo_info(self, repo_id: str) -> Any:
        assert repo_id == "someone/tiny"
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.asked.append((repo_id, options))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("to_finetune.report.push.HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Its YAML head and its text."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_trained_part_and_its_record_go_and_nothing_else(folder: Path, run: Run) -> None:
    assert {path.name for path in folder.iterdir()} == TRAINED | {"trained.safetensors"}
    assert_same_bits(load_file(folder / "trained.safetensors"), run.weights)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_path_of_this_computer_goes_along(folder: Path, run: Run, llama: Path, alpaca: Path) -> None:
    for path in folder.iterdir():
        data = path.read_bytes()
        for private in (run.folder.parent, llama.parent, alpaca.parent, Path.cwd()):
            assert str(private).encode() not in data, f"{path.name} names {private}"
    assert "command" in run.record
    assert "command" not in json.loads((folder / "run.json").read_text())


def test_the_title_of_the_picture_is_no_path(run: Run, hub: Hub) -> None:
    with mock.patch.object(Figure, "savefig", autospec=True, side_effect=Figure.savefig) as saved:
        assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 0
    assert saved.call_args.args[0].axes[0].get_title(loc="left") == "me/tiny"


def test_the_runs_own_files_stay_as_they_are(folder: Path, run: Run, llama: Path) -> None:
    """They are linked, and a link that was written to would have changed them."""
    with safe_open(run.folder / "trained.safetensors", framework="pt") as file:
        assert file.metadata()["base_model_name_or_path"] == str(llama)
    with safe_open(folder / "trained.safetensors", framework="pt") as file:
        assert file.metadata()["base_model_name_or_path"] == "llama"
    assert not list(run.folder.glob("hub-*"))


def test_what_went_loads_beside_its_base(folder: Path, run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card says: under its name, in the working folder."""
    monkeypatch.chdir(llama.parent)
    model, tokenizer = load_finetuned(folder)
    assert_same_bits(dict(model.named_parameters()), dict(run.trainer.model.named_parameters()))
    assert tokenizer("red").input_ids == run.trainer.processing_class("red").input_ids


def test_the_head_of_the_card_names_no_local_model_or_data(folder: Path) -> None:
    assert card_of(folder)[0] == {
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["to_finetune", "trainable-optimizer", "diagonal_to"],
    }


def test_every_number_on_the_card_is_the_records(folder: Path, run: Run) -> None:
    text = card_of(folder)[1]
    results, subset = run.record["results"], run.record["subset"]
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    losses = {
        "held out, before": next(row["eval_loss"] for row in history if "eval_loss" in row),
        "held out": results["eval_loss"],
        "training, mean over the run": results["train_loss_mean"],
    }
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.,]+) \|$", text, re.MULTILINE)
    assert rows == [(name, f"{loss:.4f}", f"{math.exp(loss):,.2f}") for name, loss in losses.items()]
    share = f"{LAYER_WEIGHTS / subset['total_weights']:.1%}"
    assert f"- {LAYER_WEIGHTS:,} of {subset['total_weights']:,} weights ({share}), in 9 tensors\n" in text
    assert "- unfrozen_parameters: `layers\\.3\\.`\n" in text
    options = "alpha 0.2, beta 0.15, relative_alpha True, grad_scale factored, decoupled_weight_decay True"
    assert f"- optimizer: `diagonal_to`, learning rate 0.01, {options}\n" in text
    assert f"4 steps, {results['train_seconds']:.0f} seconds, 1 process.\n" in text
    for package, version in run.record["versions"].items():
        assert f"{package} {version}" in text
    assert 'load_finetuned(snapshot_download("me/tiny"))' in text
    assert "\n\n\n" not in text


def test_the_recipe_on_the_card_is_the_runs(folder: Path, run: Run) -> None:
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card_of(folder)[1], re.DOTALL)[1])  # type: ignore[index]
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    paths = {"model_name_or_path": "llama", "dataset_name": ["alpaca.jsonl"], "output_dir": "first"}
    assert recipe == config | paths == yaml.safe_load((folder / "config.yaml").read_text())


def test_a_dry_run_shows_what_would_go_and_asks_nothing(
    run: Run, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(run.folder), "--repo_id", "me/tiny", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "Would go to me/tiny" in shown
    assert f"Look at it in {run.folder / 'hub'}" in shown.replace("\n", "")
    rows = dict(re.findall(r"│ (\S+) +│ +([\d.]+ \w+) │", shown))
    assert rows.keys() == TRAINED | {"trained.safetensors", "all"}
    assert rows["trained.safetensors"] == f"{(run.folder / 'hub' / 'trained.safetensors').stat().st_size / 1000:.2f} kB"
    assert hub.asked == []


@pytest.mark.parametrize("private", [False, True])
def test_the_folder_is_uploaded_to_a_repository_that_is_made(
    private: bool, run: Run, folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ["--private"] if private else []
    assert main(["push", str(run.folder), "--repo_id", "tiny", *flags]) == 0
    (_, created), (uploaded_to, _) = hub.asked
    assert hub.asked[0][0] == "tiny"
    assert created == {"private": True if private else None, "exist_ok": True}
    assert uploaded_to == "someone/tiny"
    assert hub.files.keys() == before.keys()
    same = before.keys() - {"README.md", "loss.png"}  # which name the repository
    same.remove("trained.safetensors")  # the order of its header's keys is another each time
    assert {name: hub.files[name] for name in same} == {name: before[name] for name in same}
    output = capsys.readouterr()
    assert "https://huggingface.co/someone/tiny" in output.out
    assert TOKEN not in output.out + output.err
    assert not any(TOKEN.encode() in data for data in hub.files.values())
    assert not list(run.folder.glob("hub-*"))


def test_a_checkpoint_has_the_losses_until_then(run: Run, hub: Hub) -> None:
    checkpoint = run.folder / "checkpoint-2"
    assert main(["push", str(checkpoint), "--repo_id", "me/tiny"]) == 0
    card = hub.files["README.md"].decode()
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 2
    assert f"| training, mean over the run | {sum(losses) / 2:.4f} |" in card
    assert "\n2 steps.\n" in card
    assert "run.json" not in hub.files
    assert "trained.safetensors" in hub.files


def test_merged_goes_as_an_ordinary_model(run: Run, hub: Hub, tmp_path: Path, llama: Path) -> None:
    assert main(["push", str(run.folder), "--repo_id", "me/tiny", "--merged"]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert "trained.safetensors" not in hub.files
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
        assert str(llama.parent).encode() not in data
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(dict(model.named_parameters()), dict(run.trainer.model.named_parameters()))
    card = hub.files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny")' in card
    assert "library_name: transformers" in card
    assert "local folder" not in card


def test_a_run_that_trained_everything_goes_whole(finetune: Callable[..., Run], tmp_path: Path, hub: Hub) -> None:
    run = finetune(tmp_path / "run", unfrozen_parameters=None, max_steps=1)
    assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 0
    assert hub.files["model.safetensors"] == (run.folder / "model.safetensors").read_bytes()
    assert {"config.json", "generation_config.json"} <= hub.files.keys()
    assert "training_args.bin" not in hub.files
    assert not any(str(tmp_path).encode() in data for data in hub.files.values())


def test_adapters_go_with_what_peft_needs(finetune: Callable[..., Run], tmp_path: Path, hub: Hub, llama: Path) -> None:
    run = finetune(
        tmp_path / "run", unfrozen_parameters=None, use_peft=True, lora_target_modules=["q_proj"], max_steps=1
    )
    assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 0
    assert hub.files["adapter_model.safetensors"] == (run.folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "llama"
    assert json.loads((run.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama)
    assert not any(str(llama.parent).encode() in data for data in hub.files.values())
    card = hub.files["README.md"].decode()
    assert "library_name: peft" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/tiny")' in card
    assert "- lora_target_modules: `q_proj`\n" in card


def test_a_chat_template_goes_along(finetune: Callable[..., Run], tmp_path: Path, hub: Hub) -> None:
    turns = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]
    rows = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 4)
    run = finetune(tmp_path / "run", dataset_name=rows, max_steps=1)
    assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 0
    assert hub.files["chat_template.jinja"] == (run.folder / "chat_template.jinja").read_bytes()


def test_models_and_data_of_the_hub_are_linked() -> None:
    config = {
        "model_name_or_path": "huggyllama/llama-7b",
        "dataset_name": ["tatsu-lab/alpaca", "/home/me/private notes/rows.jsonl"],
        "optim": "adamw_torch",
        "learning_rate": 1e-5,
    }
    run = FinetunedRun(Path("run"), "subset", config, {}, [{"step": 3, "eval_loss": 2.0}])
    card = model_card(run, {"steps": 3, "eval_loss": 2.0}, "me/tiny")
    assert card.data.to_dict() == {
        "base_model": "huggyllama/llama-7b",
        "base_model_relation": "finetune",
        "datasets": ["tatsu-lab/alpaca"],
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["to_finetune"],
    }
    text = str(card)
    assert "[huggyllama/llama-7b](https://huggingface.co/huggyllama/llama-7b), fine-tuned" in text
    assert "data: [tatsu-lab/alpaca](https://huggingface.co/datasets/tatsu-lab/alpaca), `rows.jsonl`\n" in text
    assert "Trainable Optimizer" not in text
    assert "local folder" not in text
    assert "private notes" not in text
    assert "held out, before" not in text  # the only evaluation was at the end


def test_a_trainers_folder_without_a_recipe_has_a_card_too(run: Run, tmp_path: Path, hub: Hub) -> None:
    for name in ("trained.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run.folder / name, tmp_path)
    assert main(["push", str(tmp_path), "--repo_id", "me/tiny"]) == 0
    assert hub.files.keys() == {"README.md", "trained.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/llama", "llama"),
        ("/home/me/llama/", "llama"),
        ("~/llama", "llama"),
        ("../secret/rows.jsonl", "rows.jsonl"),
        (r"C:\Users\me\llama", "llama"),
        ("file:///home/me/rows.json", "rows.json"),
        ("huggyllama/llama-7b", "huggyllama/llama-7b"),
        (r"model\.layers\.(30|31)\.", r"model\.layers\.(30|31)\."),
        ("train[:4000]", "train[:4000]"),
        ("https://huggingface.co/me", "https://huggingface.co/me"),
        ("/", "/"),
        (0.5, 0.5),
        (None, None),
        ({"a": ["/x/y", {"b": "/x/z"}]}, {"a": ["y", {"b": "z"}]}),
    ],
)
def test_paths_become_bare_names(value: Any, shown: Any) -> None:
    assert without_paths(value) == shown


def test_a_relative_path_is_one_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("runs/tiny")
    assert without_paths("runs/tiny") == "runs/tiny"
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert not is_hub_name("runs/tiny")
    assert without_paths("runs/tiny") == "tiny"
    assert not is_hub_name("rows.jsonl")


def refused(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"status {status} for {TOKEN}", response=response)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (refused(401), "The hub refuses repo_id='me/tiny': it does not know the token."),
        (refused(403), "The hub refuses repo_id='me/tiny': the token has no right to write there."),
        (refused(500), "The hub refuses repo_id='me/tiny': status 500."),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set."), "The hub cannot be reached: HF_HUB_OFFLINE is set."),
        (ConnectionError("No route to host."), "The hub cannot be reached: No route to host."),
    ],
)
def test_a_hub_that_refuses_or_is_away_is_a_failed_run(
    error: Exception, sentence: str, run: Run, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert TOKEN not in said.out + said.err
    assert not list(run.folder.glob("hub-*"))


def test_the_real_client_without_a_network_is_one_sentence(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is set in all tests."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 1
    assert "error: The hub cannot be reached: " in capsys.readouterr().err


REFUSED = {
    "no such folder": (["/no/such/run"], "'/no/such/run' is no folder."),
    "an ordinary model": (["{llama}"], "is no run with trained weights."),
    "a name": (["{run}", "--repo_id", "a/b/c"], "repo_id='a/b/c' is no name for a repository:"),
    "characters": (["{run}", "--repo_id", "me/tiny!"], "repo_id='me/tiny!' is no name for a repository:"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_sentence(
    case: str, run: Run, llama: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = REFUSED[case]
    argv = [word.format(run=run.folder, llama=llama) for word in words]
    argv += [] if "--repo_id" in argv else ["--repo_id", "me/tiny"]
    assert main(["push", *argv]) == 2
    assert sentence in capsys.readouterr().err
    assert hub.asked == []


def test_damaged_weights_are_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "trained.safetensors").write_text("garbage")
    assert main(["push", str(folder), "--repo_id", "me/tiny", "--dry_run"]) == 2
    assert "error: The run's trained.safetensors is damaged: " in capsys.readouterr().err
    assert not list(folder.glob("hub-*"))


def test_without_a_token_it_says_how_to_have_one(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", str(run.folder), "--repo_id", "me/tiny"]) == 2
    assert "There is no token for the hub: `hf auth login` stores one, or set HF_TOKEN." in capsys.readouterr().err


def test_what_was_to_be_private_does_not_go_to_a_public_repository(
    run: Run, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub ignores the wish for one that is there."""
    hub.public = True
    assert main(["push", str(run.folder), "--repo_id", "someone/tiny", "--private"]) == 2
    assert "is there, and public: make it private first" in capsys.readouterr().err
    assert not hub.files


@pytest.mark.parametrize(("options", "said"), [({"hub_model_id": "a b"}, "no name for a repository"), ({}, "no token")])
def test_a_run_that_could_not_be_pushed_does_not_begin(
    finetune: Callable[..., Run],
    tmp_path: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert finetune(tmp_path / "run", push_to_hub=True, **options).code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_token_can_be_handed_over(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hugging Face's --hub_token; else the client looks for one itself."""
    push(str(run.folder), "me/tiny")
    assert hub.token is None
    monkeypatch.delenv("HF_TOKEN")
    push(str(run.folder), "me/tiny", token="hf_Another")
    assert hub.token == "hf_Another"


def test_the_repository_must_be_named() -> None:
    with pytest.raises(SystemExit) as end:
        main(["push", "run"])
    assert end.value.code == 2


def test_a_damaged_record_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run.folder / "trained.safetensors", tmp_path)
    (tmp_path / "run.json").write_text('{"status": ')
    assert find_run(str(run.folder)) is not None
    assert main(["push", str(tmp_path), "--repo_id", "me/tiny", "--dry_run"]) == 2
    assert "run.json is damaged (JSONDecodeError" in capsys.readouterr().err


def test_a_runs_own_push_to_hub_goes_the_same_way(finetune: Callable[..., Run], tmp_path: Path, hub: Hub) -> None:
    """Hugging Face's own upload would take training_args.bin along, with the token in it."""
    run = finetune(
        tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, hub_token=TOKEN
    )
    assert run.code == 0
    assert hub.token == TOKEN
    assert [repo_id for repo_id, _ in hub.asked][:1] == ["run"]
    assert set(hub.files) == TRAINED | {"trained.safetensors"}
    assert not [name for name, content in hub.files.items() if TOKEN.encode() in content]


def test_a_token_is_written_nowhere(
    finetune: Callable[..., Run], tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["finetune.py", "--hub_token", TOKEN, f"--hub_token={TOKEN}", "--seed", "1"]
    assert without_secrets(words) == ["finetune.py", "--hub_token", "***", "--hub_token=***", "--seed", "1"]
    assert without_secrets(["--hub-token", TOKEN, f"--hub-token={TOKEN}"]) == ["--hub-token", "***", "--hub-token=***"]
    monkeypatch.setattr("sys.argv", words)
    run = finetune(tmp_path / "run", max_steps=1, hub_token=TOKEN)
    assert run.record["command"] == "finetune.py --hub_token '***' '--hub_token=***' --seed 1"
    for file in run.folder.rglob("*"):  # Hugging Face writes training_args.bin, which `push` leaves behind
        assert not file.is_file() or file.name == "training_args.bin" or TOKEN.encode() not in file.read_bytes()
