"""The fused path on CPUs: compiles `cpu.cpp` on first use (a few seconds) and caches it for the user's later runs."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.blocks import SUMS
from to_finetune.optim.kernels.batch import Batch, Pieces

SOURCE = Path(__file__).with_name("cpu.cpp")
# No contraction of a * b + c into one rounding: the results must equal those of the rules bit for bit.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    *("-shared", "-fPIC", "-pthread", "-w"),
)


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it cannot build the kernels."""


def reduce(batch: Batch, weights: bool) -> Tensor:
    """Return the sums over gradients and, with `weights`, over weights and state: (tensors, 8) float64."""
    return _call("reduce", batch, batch.constants(), weights)


def update(batch: Batch, scalars: Tensor, weights: bool, skip: Tensor | None) -> Tensor:
    """Take one step in place, unless `skip`; return sums as `reduce` does, with `weights` over the new ones."""
    if skip is not None and skip:
        return torch.zeros(len(batch.params), SUMS, dtype=torch.float64, device="cpu")
    return _call("update", batch, scalars, weights)


def measure_and_update(batch: Batch, scalars: Tensor, weights: bool, held: Tensor | None) -> Tensor:
    """Do both passes of a batch in which each tensor is a block, so that small ones are read from memory once."""
    flags = int(batch.group["grad_scale"] is not None), int(batch.group["relative_alpha"])
    return _call("measure_and_update", batch, scalars, weights, _address(held), *flags)


def add_squares(pieces: Pieces, sums: Tensor) -> None:
    """Add the squares of contiguous pieces of one format to the `sums`, float64, of their rows and columns."""
    _call_on_pieces("add_row_and_column_squares", pieces, sums)


def scale(pieces: Pieces, factors: Tensor) -> None:
    """Multiply each element by its row's and its column's factor, in place, rounding after each."""
    _call_on_pieces("scale_rows_and_columns", pieces, factors.float())


def equalize(matrices: Pieces) -> None:
    """Do all of `factored.equalize_`, in place, for whole contiguous matrices of one format."""
    _call_on_pieces("equalize", matrices)


def _call_on_pieces(function: str, pieces: Pieces, *numbers: Tensor) -> None:
    if pieces.pieces:
        arrays = (_address(x) for x in (pieces.table, *numbers))
        library()[function](pieces.format, ctypes.c_int64(len(pieces.table)), *arrays, torch.get_num_threads())


def _call(function: str, batch: Batch, scalars: Tensor, weights: bool, *more: Any) -> Tensor:
    n = len(batch.params)
    sums = torch.empty(n, SUMS, dtype=torch.float64, device="cpu")
    arrays = (_address(x) for x in (batch.table, scalars, sums))
    library()[function](*batch.formats, ctypes.c_int64(n), *arrays, int(weights), torch.get_num_threads(), *more)
    return sums


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        CompilerError: if they cannot be compiled.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise CompilerError("no C++ compiler was found")
    path = _compiled(compiler)
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError:  # damaged, or built by a machine with other libraries that shares this cache
        path.unlink(missing_ok=True)
        try:
            kernels = ctypes.CDLL(str(_compiled(compiler)))
        except OSError as error:
            raise CompilerError(f"what {compiler} made cannot be loaded: {error}") from None
    kernels.use_openmp(_openmp())
    return kernels


def _openmp() -> ctypes.c_void_p | None:
    """Return GCC's entry point of the OpenMP library that torch has loaded; None if there is none."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in sorted(
        set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\S*\.so\S*", mapped)), key=lambda path: "torch" not in path
    ):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p)
    return None


def _compiled(compiler: str) -> Path:
    """Return the library, compiled if need be, in the user's cache or, if that is not writable, in a new folder."""
    about = [SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, _processor()]
    name = f"cpu-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "to_finetune"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False)  # noqa: SIM115
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="to_finetune-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        beside = tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False)  # noqa: SIM115
    beside.close()
    errors = ""
    for native in (["-march=native"], []):
        command = [*compiler.split(), *FLAGS, *native, str(SOURCE), "-o", beside.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            errors = str(error)
            continue
        if done.returncode == 0:
            os.replace(beside.name, folder / name)  # other processes see the whole file or none
            return folder / name
        errors = done.stderr
    os.unlink(beside.name)
    raise CompilerError(f"{compiler} failed: {errors.strip() or 'no message'}")


def _processor() -> str:
    """Describe what -march=native depends on, for caches that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
