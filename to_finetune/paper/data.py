"""The data sets of the paper's experiments, as tensors: from upstream's own files, or downloaded."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from to_finetune.errors import UsageError, did_you_mean

NAMES = ("smallnorb", "covtype", "kdd", "news20", "mnist")
NEWS20_TERMS = 2000
NORB_SOURCE = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
NORB = "smallnorb/smallnorb-5x46789x9x18x6x2x96x96-training"
FILES = {  # below data_dir, as upstream names them
    "smallnorb": (f"{NORB}-dat.mat.gz", f"{NORB}-cat.mat.gz"),
    "covtype": ("covtype/covtype.data.gz",),
    "kdd": ("kdd/kddcup.data_10_percent.gz",),
    "news20": ("20news-bydate/20news-bydate-train",),
    "mnist": ("mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz"),
    "cifar10": tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
}
UPSTREAM_ROWS = {"smallnorb": 24300, "covtype": 581012, "kdd": 494021, "news20": 11314, "mnist": 60000}

IDX_IMAGES, IDX_LABELS = bytes([0, 0, 8, 3]), bytes([0, 0, 8, 1])  # uint8, in 3 and 1 dimensions
NORB_IMAGES, NORB_LABELS = struct.pack("<ii", 0x1E3D4C55, 4), struct.pack("<ii", 0x1E3D4C54, 1)  # uint8; int32
KDD_ROW = np.dtype([("duration", "f8"), ("symbols", "U16", 3), ("others", "f8", 37), ("label", "U16")])
COVTYPE_ROW = np.dtype([("numbers", "f8", 10), ("binary", "f4", 44), ("label", "i8")])


class Classification(NamedTuple):
    """x: (rows, features) float32; y: (rows,) int64, from 0 to classes - 1; note: how x was made, of how many rows."""

    name: str
    x: Tensor
    y: Tensor
    classes: int
    note: str


class Images(NamedTuple):
    """x: (rows, 3, 32, 32) uint8; y: (rows,) int64, from 0 to 9."""

    x: Tensor
    y: Tensor


def load(name: str, data_dir: Path | None) -> Classification:
    """Load the training rows of one of `NAMES`.

    Args:
        data_dir: a folder with upstream's files, in subfolders as in `FILES` or not, gzipped or not; without it
            scikit-learn downloads and caches the data set.

    Raises:
        UsageError: for an unknown name, data that are missing or malformed, or a download that fails.
    """
    loaders = {"smallnorb": _smallnorb, "covtype": _covtype, "kdd": _kdd, "news20": _news20, "mnist": _mnist}
    if name not in loaders:
        raise UsageError(f"There is no data set {name!r}, only {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    return loaders[name](data_dir)


def load_cifar10(data_dir: Path | None) -> Images:
    """Load the 50,000 training images of CIFAR-10; without data_dir, from the Hugging Face hub.

    Raises:
        UsageError: for data that are missing or malformed, or a download that fails.
    """
    if data_dir is None:
        from datasets import load_dataset

        return _hub_images(_download("cifar10", lambda: load_dataset("uoft-cs/cifar10", split="train")))
    batches = [_cifar_batch(path) for path in _find(data_dir, "cifar10")]
    return Images(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))


def _smallnorb(data_dir: Path | None) -> Classification:
    if data_dir is None:
        raise UsageError(
            f"smallnorb has no download here: put {' and '.join(FILES['smallnorb'])}, from {NORB_SOURCE}, "
            "into a folder and give --data_dir."
        )
    images, labels = _find(data_dir, "smallnorb")
    x = _matrix(images, NORB_IMAGES, "<i4", (2, 96, 96), "u1")
    y = _matrix(labels, NORB_LABELS, "<i4", (), "<i4", unused=2)  # a header has at least three sizes
    return _classification("smallnorb", _pixels(x), y, 5, "2 x 96 x 96 pixels / 255")


def _covtype(data_dir: Path | None) -> Classification:
    if data_dir is None:
        from sklearn.datasets import fetch_covtype

        bunch = _download("covtype", fetch_covtype)
        numbers, binary, label = bunch.data[:, :10], bunch.data[:, 10:].astype("f4"), bunch.target
    else:
        rows = _csv(_find(data_dir, "covtype")[0], COVTYPE_ROW)
        numbers, binary, label = rows["numbers"], rows["binary"], rows["label"]
    both = np.stack([binary, 1 - binary], axis=2).reshape(len(binary), -1)
    how = "10 numeric columns scaled to [0, 1], then (value, 1 - value) of each of the 44 binary ones"
    return _classification("covtype", np.hstack([_scaled(numbers), both]), label - 1, 7, how)


def _kdd(data_dir: Path | None) -> Classification:
    from sklearn.preprocessing import OneHotEncoder

    if data_dir is None:
        from sklearn.datasets import fetch_kddcup99

        bunch = _download("kdd", lambda: fetch_kddcup99(percent10=True))
        numbers = np.delete(bunch.data, [1, 2, 3], axis=1).astype("f8")
        symbols, attack = bunch.data[:, 1:4], bunch.target != b"normal."
    else:
        rows = _csv(_find(data_dir, "kdd")[0], KDD_ROW)
        numbers = np.column_stack([rows["duration"], rows["others"]])
        symbols, attack = rows["symbols"].astype(object), rows["label"] != "normal."  # objects are encoded faster
    varies = numbers.min(axis=0) < numbers.max(axis=0)
    indicators = OneHotEncoder(sparse_output=False, dtype=np.float32).fit_transform(symbols)
    x = np.hstack([_scaled(numbers[:, varies]), indicators])
    how = (
        f"{x.shape[1]} inputs, {varies.sum()} numeric columns scaled to [0, 1] (without {(~varies).sum()} constant "
        f"ones) and {indicators.shape[1]} indicators of the symbolic ones; normal is 0 and any attack 1"
    )
    return _classification("kdd", x, attack, 2, how)


def _news20(data_dir: Path | None) -> Classification:
    from sklearn.datasets import fetch_20newsgroups, load_files
    from sklearn.feature_extraction.text import TfidfVectorizer

    if data_dir is None:  # not reshuffled, so that the rows are in the order of load_files, as below
        texts = _download("news20", lambda: fetch_20newsgroups(subset="train", shuffle=False))
    else:
        [folder] = _find(data_dir, "news20")
        try:
            texts = load_files(folder, encoding="latin-1")
        except OSError as error:
            raise UsageError(f"{folder} cannot be read: {error}.") from error
        if len(texts.target_names) != 20 or not texts.data:
            found = f"{len(texts.target_names)} folders with {len(texts.data)} texts"
            raise UsageError(f"{folder} has {found}, not 20 newsgroups.")
    tfidf = TfidfVectorizer(max_features=NEWS20_TERMS, stop_words="english", sublinear_tf=True, dtype=np.float32)
    x = tfidf.fit_transform(texts.data).toarray()
    how = f"tf-idf of the {x.shape[1]:,} most frequent terms, a number that is ours and not the paper's"
    return _classification("news20", x, texts.target, 20, how)


def _mnist(data_dir: Path | None) -> Classification:
    if data_dir is None:
        from sklearn.datasets import fetch_openml

        bunch = _download("mnist", lambda: fetch_openml("mnist_784", version=1, as_frame=False))
        x, y = (rows[: UPSTREAM_ROWS["mnist"]] for rows in (bunch.data, bunch.target))  # the test rows come after
    else:
        images, labels = _find(data_dir, "mnist")
        x, y = _matrix(images, IDX_IMAGES, ">i4", (28, 28), "u1"), _matrix(labels, IDX_LABELS, ">i4", (), "u1")
    return _classification("mnist", _pixels(x), y, 10, "28 x 28 pixels / 255")


def _classification(name: str, x: np.ndarray, y: np.ndarray, classes: int, how: str) -> Classification:
    y = y.astype(np.int64)
    if len(x) != len(y) or len(x) == 0:
        raise UsageError(f"{name} has {len(x):,} rows and {len(y):,} labels.")
    if y.min() < 0 or y.max() >= classes:
        raise UsageError(f"{name} has other labels than those of its {classes} classes.")
    upstream = UPSTREAM_ROWS[name]
    whole = "the whole upstream set" if len(x) == upstream else f"not the {upstream:,} of the upstream set"
    return Classification(name, torch.from_numpy(x), torch.from_numpy(y), classes, f"{how}; {len(x):,} rows, {whole}.")


def _find(data_dir: Path, name: str) -> list[Path]:
    """Find the files of a data set, each in its own folder or in data_dir itself, gzipped as upstream or unpacked."""
    if not data_dir.is_dir():
        raise UsageError(f"--data_dir {data_dir} is not a folder.")
    found = []
    for file in FILES[name]:
        places = [data_dir / file, data_dir / Path(file).name]
        path = next((p for place in places for p in (place, Path(str(place).removesuffix(".gz"))) if p.exists()), None)
        if path is None:
            else_ = f"from {NORB_SOURCE}" if name == "smallnorb" else f"or leave --data_dir out to download {name}"
            raise UsageError(f"--data_dir {data_dir} has no {file}: put it there, {else_}.")
        found.append(path)
    return found


def _download(name: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except Exception as error:  # sklearn, datasets and their network libraries share no exception type
        files = ", ".join(FILES[name])
        reason = shorten(str(error), 200) or type(error).__name__
        raise UsageError(
            f"{name} cannot be downloaded ({reason}): try again, or put {files} into a folder and give --data_dir."
        ) from error


def _content(path: Path) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    if not content.strip():
        raise UsageError(f"{path} is empty.")
    return content


def _csv(path: Path, row: np.dtype) -> np.ndarray:
    lines = StringIO(_content(path).decode("latin-1"))
    try:
        return np.loadtxt(lines, row, comments=None, delimiter=",", ndmin=1)
    except ValueError as error:
        reason = str(error).partition("; use")[0]  # without numpy's advice to its callers
        raise UsageError(f"{path} is malformed: {reason}") from error


def _matrix(path: Path, start: bytes, size: str, row: tuple[int, ...], dtype: str, unused: int = 0) -> np.ndarray:
    """Read the rows of an IDX or NORB file: the bytes `start`, the sizes (and `unused` more), the numbers."""
    content = _content(path)
    data_at = len(start) + np.dtype(size).itemsize * (1 + len(row) + unused)
    if not content.startswith(start):
        raise UsageError(f"{path} starts with the bytes {content[: len(start)].hex()}, not {start.hex()}.")
    if len(content) < data_at:
        raise UsageError(f"{path} is truncated: it ends within its header.")
    shape = np.frombuffer(content, size, 1 + len(row), len(start)).tolist()
    if tuple(shape[1:]) != row:
        raise UsageError(f"{path} has rows of {shape[1:]}, not of {list(row)}.")
    expected = data_at + math.prod(shape) * np.dtype(dtype).itemsize
    if len(content) != expected:
        raise UsageError(f"{path} has {len(content):,} bytes, not {expected:,} as its header says: is it truncated?")
    return np.frombuffer(content, dtype, offset=data_at).reshape(shape)


def _pixels(images: np.ndarray) -> np.ndarray:
    x = images.reshape(len(images), -1).astype(np.float32)
    x /= 255
    return x


def _scaled(numbers: np.ndarray) -> np.ndarray:
    """Scale every column so that its least value is 0 and its greatest 1; return float32."""
    from sklearn.preprocessing import MinMaxScaler

    return MinMaxScaler().fit_transform(numbers).astype(np.float32)


def _cifar_batch(path: Path) -> Images:
    content = _content(path)
    try:
        batch = pickle.loads(content, encoding="bytes")  # upstream's format is of Python 2, where text is bytes
        y = torch.tensor(batch[b"labels"])
        x = torch.from_numpy(batch[b"data"]).reshape(len(y), 3, 32, 32)
    except Exception as error:  # what pickle raises depends on where the file is broken
        raise UsageError(f"{path} is not a batch of CIFAR-10: {error}") from error
    return Images(x, y)


def _hub_images(rows: Any) -> Images:
    x = np.stack([np.asarray(row["img"]) for row in rows])
    return Images(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"][:]))
