"""The wheel, the image, the cloud files, the workflow and the citation: each says and holds what it should."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml

import to_finetune
from to_finetune.training.parser import parse_arguments

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


# The wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the sources by the hook that pip calls, without a network."""
    try:
        setuptools = version("setuptools")
    except PackageNotFoundError:
        setuptools = "0"
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"builds a wheel: needs setuptools 77, here is {setuptools}")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "to_finetune", source / "to_finetune", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (source / "dist").iterdir()
    assert path.name == f"to_finetune-{to_finetune.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    files = (path for path in (ROOT / "to_finetune").rglob("*") if path.is_file() and path.suffix != ".pyc")
    ours = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert ours == {path.relative_to(ROOT).as_posix() for path in files}
    assert {Path(name).suffix for name in ours} > {".py", ".cpp", ".html", ".typed"}


def test_its_metadata_is_the_projects(metadata: Message) -> None:
    assert metadata["Version"] == to_finetune.__version__
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2508.01764"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need] == PROJECT["dependencies"]


def test_it_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(name).decode().split() == ["[console_scripts]", "to-finetune", "=", "to_finetune.cli:main"]


def test_it_trains_outside_the_checkout(wheel: zipfile.ZipFile, llama: Path, alpaca: Path, tmp_path: Path) -> None:
    """What was unpacked from it is what runs, its page's template and the kernel's source included."""
    wheel.extractall(tmp_path / "installed")
    words = f"--model_name_or_path {llama} --dataset_name {alpaca} --unfrozen_last_layers 1 --val_set_size 4"
    words += " --max_steps 2 --use_cpu true --report_to none --output_dir run"
    code = (
        "import sys, to_finetune; from to_finetune.finetune import main; print(to_finetune.__file__); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert {"trained.safetensors", "run.json", "report.html"} <= {file.name for file in (tmp_path / "run").iterdir()}


def test_an_old_python_is_said_and_makes_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import environment

    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr("sys.version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"it takes 3\.11 or newer"):
        environment.make("hf")
    assert not (tmp_path / ".venv").exists()


def test_an_environment_whose_python_is_gone_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import environment

    monkeypatch.setattr(environment, "PYTHON", tmp_path / "python")
    (tmp_path / "python").symlink_to(tmp_path / "gone")
    assert not environment.is_good()
    (tmp_path / "python").unlink()
    (tmp_path / "python").symlink_to(sys.executable)
    assert environment.is_good()


def test_the_version_is_written_once() -> None:
    assert "version" not in PROJECT
    package = ast.parse((ROOT / "to_finetune" / "__init__.py").read_text(encoding="utf-8"))
    assigned = [node.value for node in package.body if isinstance(node, ast.Assign)]
    assert to_finetune.__version__ in [value.value for value in assigned if isinstance(value, ast.Constant)]


# The image

INSTRUCTIONS = re.findall(r"^([A-Z]+) (.*)$", re.sub(r"#.*\n", "", DOCKERFILE).replace("\\\n", ""), re.MULTILINE)


def of(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def test_the_base_is_pinned_to_a_version_of_torch_and_cuda_and_can_be_another() -> None:
    assert any(re.fullmatch(r"BASE_IMAGE=\S+:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-runtime", rest) for rest in of("ARG"))
    assert of("FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]


def test_the_image_is_not_roots_and_has_no_port() -> None:
    assert int(of("USER")[-1]) > 0
    assert of("EXPOSE") == []
    assert of("ENTRYPOINT") == ['["to-finetune"]']
    home = next(re.search(r"HF_HOME=(\S+)", rest) for rest in of("ENV") if "HF_HOME" in rest)
    assert home is not None
    assert any(home[1].startswith(volume) for volume in json.loads(of("VOLUME")[0]))


def test_all_that_is_copied_is_there_and_let_through_and_nothing_else_is() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    everything, *rest = [line for line in lines if line and not line.startswith("#")]
    assert everything == "*"
    let_through = {line[1:] for line in rest if line.startswith("!")}
    copied = {word for copy in of("COPY") if "--from" not in copy for word in copy.split()[:-1]}
    assert let_through == copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept_out = {line for line in rest if not line.startswith("!")}
    assert [name for name in (".git", ".venv", "runs") if any(fnmatch(name, line) for line in let_through)] == []
    assert "**/__pycache__" in kept_out


def test_every_extra_that_it_installs_is_one() -> None:
    (extras,) = (rest.split("=")[1] for rest in of("ARG") if rest.startswith("EXTRAS"))
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_list_of_its_requirements_is_the_projects(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (command,) = (rest for rest in of("RUN") if "tomllib" in rest)
    line = command.replace("${EXTRAS}", "sweep,quantized").replace("> /requirements.txt", "")
    words = [sys.executable, *shlex.split(line)[1:]]
    listed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    extras = PROJECT["optional-dependencies"]
    assert listed == [*PROJECT["dependencies"], *extras["sweep"], *extras["quantized"]]


def health_check() -> str:
    (check,) = of("HEALTHCHECK")
    python, c, code = json.loads(check.split("CMD ", 1)[1])
    assert (python, c) == ("python", "-c")
    return code


def test_the_health_check_passes_here() -> None:
    exec(health_check(), {})


def test_and_fails_where_the_optimizer_does_nothing() -> None:
    assert "optimizer.step()" in health_check()
    with pytest.raises(AssertionError):
        exec(health_check().replace("optimizer.step()", "None"), {})


# The cloud


def commands(text: str) -> list[list[str]]:
    """The flags of each call of finetune.py in a text."""
    text = text.replace("\\\n", " ").replace("#", "\n")
    return [shlex.split(found) for found in re.findall(r"finetune\.py +(--.*)", text)]


def check_flags(flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    arguments = parse_arguments([*flags, "--bf16", "false"])  # there may be no bfloat16 here
    return {key: value for group in arguments for key, value in vars(group).items()}


def test_the_compose_file_opens_with_its_command_and_runs_what_finetune_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "configs" / "cloud" / "compose.yaml"
    text = path.read_text(encoding="utf-8")
    assert "docker compose --file configs/cloud/compose.yaml up" in text.split("\nservices:")[0]
    service = yaml.safe_load(text)["services"]["finetune"]
    assert (path.parent / service["build"]["context"] / "Dockerfile").is_file()
    assert (service["gpus"], service["ipc"], service["init"]) == ("all", "host", True)
    assert {volume.split(":")[1] for volume in service["volumes"]} == {"/cache", "/workspace/runs"}
    assert service["environment"] == {"HF_TOKEN": "${HF_TOKEN:-}"}
    assert of("WORKDIR")[-1] == "/workspace"
    verb, *flags = shlex.split(service["command"])
    assert verb == "train"  # of the entry point
    parsed = check_flags(flags, ROOT, monkeypatch)
    assert parsed["output_dir"].startswith("runs/")  # which is a volume
    assert parsed["optim"] == "diagonal_to"


def test_the_skypilot_task_runs_what_finetune_takes_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "configs" / "cloud" / "skypilot.yaml").read_text(encoding="utf-8")
    assert "sky jobs launch configs/cloud/skypilot.yaml" in text.split("\nname:")[0]
    task = yaml.safe_load(text)
    assert set(task["resources"]["accelerators"]) == {"A100-80GB", "H100"}
    assert task["resources"]["use_spot"] is True
    assert task["secrets"] == {"HF_TOKEN": ""}
    (bucket,) = task["file_mounts"]
    (flags,) = commands(task["run"])
    flags = [flag.replace("$output_dir", f"{bucket}/run").replace("$resume", "true") for flag in flags]
    parsed = check_flags(flags, ROOT, monkeypatch)
    assert parsed["resume_from_checkpoint"] == "true"
    assert parsed["save_steps"] == 50
    assert set(re.findall(r"\[([\w,]+)\]", task["setup"])[0].split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize(("left", "resume"), [("checkpoint-50/trainer_state.json", "true"), ("run.json", "false")])
def test_a_task_that_was_cut_off_begins_again_only_where_no_checkpoint_is_whole(
    left: str, resume: str, tmp_path: Path
) -> None:
    """The task's own lines, with a torchrun that prints what it is called with."""
    run = yaml.safe_load((ROOT / "configs" / "cloud" / "skypilot.yaml").read_text(encoding="utf-8"))["run"]
    folder = tmp_path / "llama-7b-last2"
    (folder / left).parent.mkdir(parents=True)
    (folder / left).touch()
    script = run.replace("source .venv/bin/activate", 'torchrun() { echo "$*"; }').replace("/runs/", f"{tmp_path}/")
    gpus = {**os.environ, "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True, env=gpus)
    assert done.stdout.endswith(f"--output_dir {folder} --resume_from_checkpoint {resume}\n")
    assert folder.exists() == (resume == "true")


# The workflow


def test_the_workflow_runs_the_readmes_command_on_the_oldest_and_the_newest_python() -> None:
    jobs = yaml.safe_load(WORKFLOW)["jobs"]
    assert "$ python scripts/test.py\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert jobs["newest"]["steps"][-1] == {"run": "python scripts/test.py"}
    oldest, newest = jobs["newest"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={oldest}"
    named = re.findall(r":: (3\.\d+)'", str(PROJECT["classifiers"]))
    assert (named[0], named[-1]) == (oldest, newest)
    assert f'python-version: "{oldest}"' in WORKFLOW
    assert f"--python-version {oldest} --resolution lowest-direct" in WORKFLOW


def test_the_lowest_versions_are_those_of_every_extra_that_runs() -> None:
    extras = set(re.findall(r"--extra (\w+)", WORKFLOW))
    assert extras == set(PROJECT["optional-dependencies"]) - {"dev", "evaluate"}
    assert extras == set(
        re.findall(r"to-finetune\[(.*?)\]", str(PROJECT["optional-dependencies"]["dev"]))[0].split(",")
    )


LOWEST = {  # known to work; what is below is not
    "torch": "2.7",
    "bitsandbytes": "0.50",
    "datasets": "5.0",
    "deepspeed": "0.19",
    "matplotlib": "3.8.4",
    "peft": "0.19",
    "psutil": "5.9.4",
    "pyyaml": "6.0.1",
    "scikit-learn": "1.4.2",
    "scipy": "1.13",
    "tensorboard": "2.16.2",
    "triton": "3.3",
    "trl": "1.16",
}


def test_no_lower_bound_allows_a_version_that_is_too_old() -> None:
    """In every extra that names the package."""
    needs = [*PROJECT["dependencies"], *(need for extra in PROJECT["optional-dependencies"].values() for need in extra)]
    found = {(name, bound) for need in needs for name, bound in re.findall(r"^([\w-]+)>=([\d.]+)", need)}
    assert {pair for pair in found if pair[0] in LOWEST} == set(LOWEST.items())


# The citation


def test_the_citation_has_the_keys_that_its_format_requires_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] == "A Trainable Optimizer"
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Klabjan"]
    assert paper["url"] == PROJECT["urls"]["Paper"]


# The folders' own pages


def test_every_script_and_every_folder_of_configurations_is_on_its_page() -> None:
    scripts = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts" / "benchmarks").glob("*.py")]:
        name = path.relative_to(ROOT / "scripts").as_posix()
        assert f"| `{name}` |" in scripts
    configs = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").iterdir():
        assert path.is_file() or f"| `{path.name}/` |" in configs
    layouts = {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    assert {layout for layout in layouts if f"`{layout}`" not in configs} == set()
    recipe = re.search(r"configs/recipes/[\w-]+\.yaml", configs)
    assert recipe is not None
    assert (ROOT / recipe[0]).is_file()
