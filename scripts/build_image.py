"""Build the Dockerfile's image and try it, without a Docker daemon and without a GPU.

    python scripts/build_image.py WORK_DIR [--archive to-finetune.tar]

Needs root, buildah and debootstrap (`apt-get install buildah debootstrap`). It makes a base from Debian's packages and
the CPU build of torch, builds the Dockerfile on it, and runs in the image, as its user: the help, the health check, and
`accelerate launch finetune.py --optim diagonal_to ...` on a tiny Llama. WORK_DIR grows to 8 GB; a base that it already
holds is reused.

This machine's pip configuration (indexes, certificates) is mounted while pip runs and stays in no layer. It should lead
to a CPU build of torch: the build of a plain index is for CUDA, which works too but is some 5 GB larger.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import environment

RELEASE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-pip"
BASE, IMAGE = "localhost/torch-cpu", "localhost/to-finetune"
ROOT = environment.ROOT
TINY = "python scripts/tiny_llama.py runs/tiny"
TRAIN = r"""
accelerate launch finetune.py --optim diagonal_to --model_name_or_path runs/tiny/model
--dataset_name runs/tiny/instructions_train.jsonl --unfrozen_parameters layers\.3\. --max_length 128
--per_device_train_batch_size 4 --max_steps 5 --save_steps 5 --logging_steps 1 --output_dir runs/tried
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the Dockerfile's image and try it, without a Docker daemon.")
    parser.add_argument("work", type=Path, metavar="WORK_DIR", help="Where layers and images are kept.")
    parser.add_argument("--archive", type=Path, help="Write the image to this file too, for `docker load`.")
    arguments = parser.parse_args()
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            sys.exit(f"error: there is no {tool}: apt-get install buildah debootstrap")
    if os.geteuid() != 0:
        sys.exit("error: it has to be root, for debootstrap and for a chroot without user namespaces")
    buildah = Buildah(arguments.work.resolve())
    if BASE not in buildah.images():
        make_base(buildah)
    started = time.perf_counter()
    make_image(buildah)
    seconds = time.perf_counter() - started
    try_image(buildah)
    if arguments.archive:
        buildah("push", IMAGE, f"docker-archive:{arguments.archive.resolve()}:to-finetune:latest")
    sizes = buildah.images()
    print(f"{IMAGE}: {sizes[IMAGE]}, of which {BASE} {sizes[BASE]}; built in {seconds:.0f} s")


class Buildah:
    """`buildah` with all of its storage in one folder, and with this machine's pip configuration."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.storage = [f"--root={work / 'storage'}", f"--runroot={work / 'run'}", "--storage-driver=vfs"]
        settings = pip_settings()
        self.pip_conf = work / "pip.conf"
        self.pip_conf.touch(mode=0o600)
        self.pip_conf.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        self.pip_paths = [f"--volume={path}:{path}:ro" for path in local_paths(settings)]

    def __call__(self, *words: object) -> None:
        """Run `buildah words ...` and show what it prints; exit if it fails."""
        command = ["buildah", *self.storage, *map(str, words)]
        print(f"\n$ buildah {shlex.join(command[len(self.storage) + 1 :])}", flush=True)
        if code := subprocess.run(command).returncode:
            sys.exit(f"error: it failed with exit code {code}")

    def ask(self, *words: object) -> str:
        """Return what `buildah words ...` prints."""
        return subprocess.check_output(["buildah", *self.storage, *map(str, words)], text=True).strip()

    def images(self) -> dict[str, str]:
        """Return the size of each image, by name."""
        rows = self.ask("images", "--format", "{{.Name}} {{.Size}}").splitlines()
        return {name: size.strip() for name, size in (row.split(" ", 1) for row in rows)}


def make_base(buildah: Buildah) -> None:
    """Build what the Dockerfile expects of its base: Debian with its Python and torch."""
    rootfs = buildah.work / "rootfs"
    shutil.rmtree(rootfs, ignore_errors=True)
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(rootfs)]
    print(f"\n$ {shlex.join(debootstrap)}", flush=True)
    subprocess.run(debootstrap, check=True, stdout=subprocess.DEVNULL)
    container = buildah.ask("from", "scratch")
    buildah("add", "--quiet", container, rootfs, "/")
    buildah(
        *("run", "--isolation=chroot", f"--volume={buildah.pip_conf}:/etc/pip.conf:ro", *buildah.pip_paths, container),
        *("--", "python3", "-m", "pip", "install", "--no-cache-dir", "--break-system-packages", environment.CPU_TORCH),
    )
    buildah("commit", "--quiet", "--rm", "--format=docker", container, BASE)
    shutil.rmtree(rootfs)


def make_image(buildah: Buildah) -> None:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "to_finetune" / "__init__.py").read_text())
    assert version is not None
    buildah(
        *("build", "--isolation=chroot", "--format=docker", "--pull-never", f"--tag={IMAGE}"),
        *(f"--build-arg=BASE_IMAGE={BASE}", f"--build-arg=VERSION={version[1]}"),
        *(f"--secret=id=pip,src={buildah.pip_conf}", *buildah.pip_paths),
        ROOT,
    )


def try_image(buildah: Buildah) -> None:
    """Run the help, the health check and a short training in a container of the image."""
    container = buildah.ask("from", "--pull-never", IMAGE)
    config = json.loads(buildah.ask("inspect", "--type=image", IMAGE))["Docker"]["config"]
    kind, *health = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    try:
        for command in ([*config["Entrypoint"], *config["Cmd"]], health, shlex.split(TINY), shlex.split(TRAIN)):
            buildah("run", "--isolation=chroot", "--env=HF_HUB_OFFLINE=1", container, "--", *command)
    finally:
        buildah.ask("rm", container)


def pip_settings() -> dict[str, str]:
    """Return this machine's pip configuration; environment variables override files."""
    lines = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True).splitlines()
    settings = {}
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, value = line.split("=", 1)
        settings[name.split(".", 1)[1]] = str(ast.literal_eval(value))
    return settings


def local_paths(settings: dict[str, str]) -> list[Path]:
    """Return the files and folders that the settings name; for a file:// URL its folder, since its links lead there."""
    words = " ".join(settings.values()).split()
    named = (Path(word.removeprefix("file://")).parent if "://" in word else Path(word) for word in words)
    return sorted({path for path in named if path.is_absolute() and path.exists()})


if __name__ == "__main__":
    main()
