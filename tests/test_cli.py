"""`to-finetune` itself: its help, its errors, and how quick it is to say them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from unittest import mock

import pytest

from to_finetune.cli import VERBS, main, parse


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_without_torch(verb: str) -> None:
    """In a process of its own: what it imports must not be there yet. torch is what takes seconds."""
    code = (
        "import sys; from to_finetune.cli import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules, 'imports torch to show its help'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: to-finetune {verb}" in shown.stdout


@pytest.mark.parametrize(
    ("module", "other"), [("page", "torch"), ("plot", "matplotlib.pyplot"), ("subset_map", "matplotlib.pyplot")]
)
def test_a_report_is_made_without(module: str, other: str) -> None:
    """torch takes seconds, and pyplot would choose how a notebook shows its own figures."""
    code = f"import sys, to_finetune.report.{module}; assert {other!r} not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert set(VERBS) <= set(capsys.readouterr().out.split())


def test_every_verb_is_a_module() -> None:
    for verb in VERBS:
        module = import_module(f"to_finetune.commands.{verb}")
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_an_unknown_verb_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reprodce"]) == 2
    assert "'reprodce' is no verb. Did you mean 'reproduce'" in capsys.readouterr().err


def test_no_verb_is_bad_usage() -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


def test_dashes_are_underscores() -> None:
    """Also in front of the flags of a run, which would take them for their own."""
    arguments = parse(
        ["evaluate", "runs/a", "--dataset-name=b", "--split", "c-d", "--max-length", "9", "--val-set-size"]
    )
    assert (arguments.dataset_name, arguments.split, arguments.max_length) == ("b", "c-d", 9)
    assert arguments.flags == ["--val-set-size"]  # a run's own, which takes both


def test_a_missing_library_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("to_finetune.commands.train.run", lambda arguments: import_module("no_such_library"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == 'error: train needs no_such_library: pip install "to-finetune[hf]"\n'


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
def test_the_exit_code_of_a_signal_is_the_shells(
    interrupt: KeyboardInterrupt, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("to_finetune.commands.train.run", mock.Mock(side_effect=interrupt))
    assert main(["train"]) == code
    assert capsys.readouterr().err == "interrupted; what is finished is kept\n"


def test_a_reader_may_have_enough() -> None:
    """As of `to-finetune plan --json | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    code = """
import sys
from to_finetune import cli
from to_finetune.commands import report
report.run = lambda arguments: print("{}") or 0
sys.exit(cli.main(["report", "runs/a"]))
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_sigterm_interrupts_a_reproduction(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object, **settings: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("to_finetune.paper.reproduce.reproduce", killed)
    assert main(["reproduce", "theory"]) == 143


def test_an_unknown_flag_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "kdd-convex", "--outptdir", "x"])
    assert end.value.code == 2
    assert "unknown '--outptdir'. Did you mean '--output_dir'" in capsys.readouterr().err
