"""`to-finetune reproduce`: from a target's name to tables, figures and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from to_finetune import cli
from to_finetune.errors import RunError
from to_finetune.paper import reproduce
from to_finetune.paper.targets import ABOUT


def test_quick_trial_runs_everything_once_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["reproduce", "mnist-0.034", "kdd-ffn", "theory", "--quick", "--output_dir", str(tmp_path)]
    assert cli.main(targets) == 0
    folder = tmp_path / "quick"
    made = {name: (folder / f"{name}.json").read_text() for name in ("mnist-0.034", "kdd-ffn", "theory")}
    result = json.loads(made["mnist-0.034"])
    assert "stand in" in result["data"]["note"]
    assert result["seconds"] > 0
    assert "torch" in result["machine"]["versions"]
    for name in ("index.html", "table2.md", "table3.tex", "rates.md", "tables.json", "figure1.svg", "figure6.png"):
        assert list(folder.glob(name.replace(".", "*."))), name
    assert "3 of 3" in capsys.readouterr().out

    monkeypatch.setattr(reproduce, "run_job", lambda name, show, **settings: pytest.fail(f"{name} ran again"))
    assert cli.main(targets) == 0  # nothing ran again
    assert {name: (folder / f"{name}.json").read_text() for name in made} == made


def test_targets_stand_for_their_jobs() -> None:
    assert len(reproduce.wanted(["table2"], "cpu")) == 17
    assert reproduce.wanted(["figure1"], "cpu") == reproduce.wanted(["table2"], "cpu")
    assert reproduce.wanted(["table3"], "cpu")[5:] == ["covtype-ffn", "kdd-ffn", "resnet18"]
    assert reproduce.wanted(["table3"], "cuda")[-1] == "resnet50"
    assert reproduce.wanted(["theory", "figure7", "table6"], "cpu") == ["theory", "llm"]
    assert set(reproduce.wanted(["all"], "cuda")) == set(reproduce.JOBS)
    assert all(reproduce.wanted([name], "cpu") for name in ABOUT if name != "CASE")


def test_missing_data_are_named_once_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    options = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    names = ["smallnorb-0.001", "smallnorb-convex"]
    assert cli.main(["reproduce", *names, *options]) == 2
    assert capsys.readouterr().err.count("smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat") == 1

    real = reproduce.run_job

    def quicker(name: str, show: Any, **settings: Any) -> None:
        if name == "theory":
            raise RunError("it failed.")
        real(name, show, **settings | {"quick": name == "mnist-convex"})

    monkeypatch.setattr(reproduce, "run_job", quicker)
    assert cli.main(["reproduce", *names, "theory", "mnist-convex", *options]) == 1
    out = capsys.readouterr().out
    assert out.count("not done:") == 2
    assert "it failed." in out
    assert (tmp_path / "out" / "mnist-convex.json").exists()
    assert not (tmp_path / "out" / "smallnorb-convex.json").exists()

    assert cli.main(["reproduce", "mnist-convex", *options]) == 2  # it was a quick trial
    assert "mnist-convex.json was made by another protocol" in capsys.readouterr().err
    monkeypatch.setattr(reproduce, "run_job", lambda name, show, folder, **_: (folder / "ran").write_text(name))
    assert cli.main(["reproduce", "mnist-convex", "theory", *options]) == 1
    assert "mnist-convex.json was made by another protocol" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "ran").read_text() == "theory"
    (tmp_path / "out" / "mnist-convex.json").write_text("{")
    assert cli.main(["reproduce", "mnist-convex", *options]) == 2
    assert "mnist-convex.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reproduce", "tabel2"], "There is no target 'tabel2' to reproduce; there are all, table2,"),
        (["reproduce", "tabel2"], "Did you mean 'table2'"),
        (["reproduce", "theory", "--device", "cuda:99"], "--device cuda:99"),
        (["reproduce", "theory", "--device", "mps"], "--device mps cannot be used: it takes cpu and cuda"),
        (["reproduce", "mnist-convex", "--data_dir", "/nowhere"], "--data_dir /nowhere"),
    ],
)
def test_a_bad_call_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["reproduce", "theory", "--output_dir", str(tmp_path / "file" / "out")]) == 2
    assert "--output_dir" in capsys.readouterr().err


def test_where_a_job_fails_and_nothing_is_done_the_exit_code_is_a_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **settings: Any) -> None:
        raise RunError("it failed.")

    monkeypatch.setattr(reproduce, "run_job", fails)
    assert cli.main(["reproduce", "theory", "--output_dir", str(tmp_path)]) == 1
    assert "error: it failed." in capsys.readouterr().err


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from to_finetune.cli import main\n"
        "try: main(['reproduce', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ABOUT)
