"""A virtual environment of the project's own, in .venv: made on first use, needs Python and a package index only.

python scripts/environment.py dev      makes it (extras: hf to fine-tune, dev to run the tests as well)
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

THIS = Path(__file__).resolve()
ROOT = THIS.parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST = (3, 11)
CPU_TORCH = "torch==2.13.0"  # tested; where there is a GPU, pip chooses the build, and a PIP_CONSTRAINT the version


def enter(extra: str) -> None:
    """Continue the calling script inside the environment, with the project and `extra` installed in it."""
    make(extra)
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    if os.name == "nt":
        sys.exit(subprocess.run([PYTHON, *sys.argv]).returncode)
    os.execv(PYTHON, [str(PYTHON), *sys.argv])


def make(extra: str) -> None:
    """Create or complete the environment, unless it already is what pyproject.toml and this file ask for."""
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", THIS))).hexdigest()
    if sys.version_info < OLDEST:
        sys.exit(f"error: this is Python {sys.version.split()[0]}; it takes {OLDEST[0]}.{OLDEST[1]} or newer.")
    stamps = {name: VENV / f"installed-{name}" for name in ("hf", "dev")}
    good_enough = ("dev",) if extra == "dev" else ("hf", "dev")  # dev holds all that hf does
    if PYTHON.exists() and any(stamps[name].exists() and stamps[name].read_text() == wanted for name in good_enough):
        return
    print(f"Setting up {VENV} (once, one to three minutes) ...", flush=True)
    torch = "torch" if shutil.which("nvidia-smi") or "PIP_CONSTRAINT" in os.environ else CPU_TORCH
    pip = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    anew = [] if is_good() else ["--clear"]
    for command in (
        [sys.executable, "-m", "venv", *anew, str(VENV)],
        [*pip, torch],
        [*pip, "--editable", f"{ROOT}[{extra}]"],
    ):
        if subprocess.run(command, env={**os.environ, "DS_BUILD_OPS": "0"}).returncode:
            sys.exit(f"error: the set-up failed at: {' '.join(command)}")
    stamps[extra].write_text(wanted)


def is_good() -> bool:
    """Whether there is an environment, with a Python that is there and new enough."""
    check = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", check]).returncode == 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["hf"], ["dev"]):
        sys.exit("usage: environment.py hf|dev")
    make(sys.argv[1])
