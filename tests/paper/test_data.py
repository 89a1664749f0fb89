"""The paper's data sets: small files in upstream's formats give exactly the tensors that they should."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from math import log, sqrt
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from sklearn.datasets import load_files
from sklearn.utils import Bunch

from to_finetune.errors import UsageError
from to_finetune.paper import data
from to_finetune.paper.data import FILES, load, load_cifar10

REAL_DATA = Path(os.environ.get("TO_FINETUNE_DATA", ""))
FETCHERS = {
    "covtype": "fetch_covtype",
    "kdd": "fetch_kddcup99",
    "news20": "fetch_20newsgroups",
    "mnist": "fetch_openml",
}
ALL_FILES = [(name, file) for name, files in FILES.items() for file in files]

RNG = np.random.default_rng(0)
MNIST = RNG.integers(0, 256, (4, 28, 28), np.uint8), np.array([3, 9, 0, 3], np.uint8)
SMALLNORB = RNG.integers(0, 256, (3, 2, 96, 96), np.uint8), np.array([4, 0, 2], np.int32)
CIFAR10 = RNG.integers(0, 256, (13, 3, 32, 32), np.uint8), [*range(10), 2, 1, 0]  # five batches of two, a test of three
KDD = [  # duration, the symbols, src_bytes, the label; each other column is 7
    (0, "udp", "http", "SF", 100, "normal."),
    (5, "tcp", "smtp", "REJ", 400, "buffer_overflow."),
    (20, "udp", "http", "SF", 300, "normal."),
    (20, "icmp", "eco_i", "SF", 200, "smurf."),
]
KDD_X = [  # duration, src_bytes, icmp, tcp, udp, eco_i, http, smtp, REJ, SF
    [0, 0, 0, 0, 1, 0, 1, 0, 0, 1],
    [1 / 4, 1, 0, 1, 0, 0, 0, 1, 1, 0],
    [1, 2 / 3, 0, 0, 1, 0, 1, 0, 0, 1],
    [1, 1 / 3, 1, 0, 0, 1, 0, 0, 0, 1],
]
COVTYPE = [  # the numeric columns, which binary columns are set, the label
    ([10, 0, 1, 5, 5, 5, 5, 5, 5, -3], (0, 43), 7),
    ([30, 1, 0, 4, 6, 5, 5, 5, 5, 5], (1, 42), 1),
    ([15, 0, 1, 8, 8, 5, 5, 5, 5, 1], (0, 4), 2),
]
COVTYPE_NUMBERS = [
    [0, 0, 1, 1 / 4, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 1 / 3, 0, 0, 0, 0, 1],
    [1 / 4, 0, 1, 1, 1, 0, 0, 0, 0, 1 / 2],
]


def kdd_fields(row: tuple[Any, ...]) -> list[Any]:
    return [*row[:5], *[7] * 36, row[5]]


def covtype_fields(row: tuple[list[int], tuple[int, ...], int]) -> list[int]:
    numbers, ones, label = row
    return [*numbers, *(int(i in ones) for i in range(44)), label]


def csv(rows: list[list[Any]]) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()


def norb(array: np.ndarray) -> bytes:
    """NORB's matrix: what the numbers are, how many sizes, the sizes, of which there are at least three."""
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
    sizes = [*array.shape, 1, 1][: max(3, array.ndim)]
    return (
        struct.pack(f"<{2 + len(sizes)}i", magic, array.ndim, *sizes)
        + array.astype(array.dtype.newbyteorder("<")).tobytes()
    )


def cifar_batch(rows: slice) -> bytes:
    x, y = CIFAR10
    return pickle.dumps({b"data": x[rows].reshape(-1, 3072), b"labels": y[rows]})


def news_text(group: int) -> bytes:
    return f"From: me\n\nThe café of word{group:02} word{group:02}".encode("latin-1")


def contents() -> dict[str, bytes]:
    """All of `FILES` but the newsgroups, unpacked."""
    return {
        FILES["smallnorb"][0]: norb(SMALLNORB[0]),
        FILES["smallnorb"][1]: norb(SMALLNORB[1]),
        FILES["covtype"][0]: csv([covtype_fields(row) for row in COVTYPE]),
        FILES["kdd"][0]: csv([kdd_fields(row) for row in KDD]),
        FILES["mnist"][0]: idx(MNIST[0]),
        FILES["mnist"][1]: idx(MNIST[1]),
        **{FILES["cifar10"][i]: cifar_batch(slice(2 * i, 2 * i + 2)) for i in range(5)},
    }


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all sets, as a user has downloaded them."""
    for file, content in contents().items():
        write(tmp_path / file, content)
    for group in range(20):
        write(tmp_path / FILES["news20"][0] / f"group{group:02}" / "51060", news_text(group))
    return tmp_path


@pytest.fixture
def fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """scikit-learn's downloads give the same rows, in the types that they really have; with what they were called."""
    kdd = np.array([[f.encode() if isinstance(f, str) else f for f in kdd_fields(row)] for row in KDD], object)
    covtype = np.array([covtype_fields(row) for row in COVTYPE], float)
    test_row = np.zeros((1, 784))  # comes after the training rows in OpenML's set
    bunches = {
        "covtype": Bunch(data=covtype[:, :-1], target=covtype[:, -1].astype(np.int32)),
        "kdd": Bunch(data=kdd[:, :-1], target=kdd[:, -1]),
        "news20": load_files(folder / FILES["news20"][0], encoding="latin1"),
        "mnist": Bunch(
            data=np.vstack([MNIST[0].reshape(4, 784), test_row]), target=np.array([*map(str, MNIST[1]), "1"], object)
        ),
    }
    monkeypatch.setitem(data.UPSTREAM_ROWS, "mnist", len(MNIST[0]))
    asked: dict[str, dict[str, Any]] = {}
    for name, bunch in bunches.items():

        def fetch(*args: Any, name: str = name, bunch: Bunch = bunch, **options: Any) -> Bunch:
            asked[name] = options
            return bunch

        monkeypatch.setattr(f"sklearn.datasets.{FETCHERS[name]}", fetch)
    return asked


@pytest.fixture(params=["files", "download"])
def source(request: pytest.FixtureRequest, folder: Path, fetched: dict[str, Any]) -> Path | None:
    """What to give as data_dir."""
    return folder if request.param == "files" else None


def check(found: data.Classification, name: str, x: Any, y: list[int], classes: int) -> None:
    assert (found.name, found.classes) == (name, classes)
    assert (found.x.dtype, found.y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(found.x, torch.from_numpy(np.asarray(x, np.float64).astype(np.float32)))
    assert found.y.tolist() == y


def test_mnist(source: Path | None) -> None:
    found = load("mnist", source)
    check(found, "mnist", MNIST[0].reshape(4, 784) / 255, [3, 9, 0, 3], 10)
    assert found.note == "28 x 28 pixels / 255; 4 rows, the whole upstream set."


def test_kdd(source: Path | None, fetched: dict[str, Any]) -> None:
    found = load("kdd", source)
    check(found, "kdd", KDD_X, [0, 1, 0, 1], 2)
    assert found.note == (
        "10 inputs, 2 numeric columns scaled to [0, 1] (without 36 constant ones) and 8 indicators of the symbolic "
        "ones; normal is 0 and any attack 1; 4 rows, not the 494,021 of the upstream set."
    )
    assert fetched.get("kdd", {"percent10": True}) == {"percent10": True}


def test_covtype(source: Path | None) -> None:
    found = load("covtype", source)
    both = [[value for i in range(44) for value in (i in ones, i not in ones)] for _, ones, _ in COVTYPE]
    check(found, "covtype", np.hstack([COVTYPE_NUMBERS, both]), [6, 0, 1], 7)
    assert found.x.shape == (3, 98)
    assert "3 rows, not the 581,012 of the upstream set" in found.note


def test_news20(source: Path | None, fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text has café, from, and its own word twice; `the`, `of`, `from` and `me` are stop words."""
    found = load("news20", source)
    idf = log(21 / 2) + 1  # of a word in one of the 20 texts; 1 of a word in all
    own = (1 + log(2)) * idf
    expected = torch.zeros(20, 21)
    for row, group in enumerate(found.y.tolist()):
        expected[row, 0], expected[row, 1 + group] = 1 / sqrt(1 + own**2), own / sqrt(1 + own**2)
    torch.testing.assert_close(found.x, expected)
    assert sorted(found.y.tolist()) == [*range(20)] != found.y.tolist()
    assert found.note == (
        "tf-idf of the 21 most frequent terms, a number that is ours and not the paper's; "
        "20 rows, not the 11,314 of the upstream set."
    )
    assert fetched.get("news20", {}).get("subset", "train") == "train"
    monkeypatch.setattr(data, "NEWS20_TERMS", 3)
    assert load("news20", source).x.shape == (20, 3)


def test_both_ways_give_news20s_rows_in_one_order(folder: Path, fetched: dict[str, Any]) -> None:
    assert torch.equal(load("news20", folder).y, load("news20", None).y)
    assert fetched["news20"]["shuffle"] is False


def test_smallnorb(folder: Path) -> None:
    found = load("smallnorb", folder)
    check(found, "smallnorb", SMALLNORB[0].reshape(3, 18432) / 255, [4, 0, 2], 5)
    assert found.note == "2 x 96 x 96 pixels / 255; 3 rows, not the 24,300 of the upstream set."


def test_cifar10(folder: Path) -> None:
    check_cifar10(load_cifar10(folder))


def test_cifar10_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [fromarray(image.transpose(1, 2, 0)) for image in CIFAR10[0][:10]]
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    train = Dataset.from_dict({"img": images, "label": CIFAR10[1][:10]}, features=features)
    hub = {("uoft-cs/cifar10", "train"): train}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: hub[name, split])
    check_cifar10(load_cifar10(None))


def check_cifar10(found: data.Images) -> None:
    assert found.x.dtype == torch.uint8
    assert torch.equal(found.x, torch.from_numpy(CIFAR10[0][:10]))
    assert torch.equal(found.y, torch.tensor(CIFAR10[1][:10]))


@pytest.mark.parametrize("name", ["smallnorb", "covtype", "kdd", "mnist"])
@pytest.mark.parametrize(("packed", "in_a_folder"), [(True, False), (False, True), (False, False)])
def test_files_may_be_unpacked_and_without_a_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, packed: bool, in_a_folder: bool
) -> None:
    other = tmp_path_factory.mktemp("other")
    for file in FILES[name]:
        place = file if in_a_folder else Path(file).name
        write(other / (place if packed else place.removesuffix(".gz")), contents()[file])
    assert torch.equal(load(name, other).x, load(name, folder).x)


@pytest.mark.parametrize("name", ["news20", "cifar10"])
def test_data_dir_may_be_the_sets_own_folder(folder: Path, name: str) -> None:
    own = (folder / FILES[name][0]).parent
    if name == "news20":
        assert torch.equal(load(name, own).x, load(name, folder).x)
    else:
        assert torch.equal(load_cifar10(own).x, load_cifar10(folder).x)


def sentence(name: str, data_dir: Path | None) -> str:
    """What the error says, in one line."""
    with pytest.raises(UsageError) as error:
        load_cifar10(data_dir) if name == "cifar10" else load(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "file"), ALL_FILES)
def test_a_missing_file_is_named(folder: Path, name: str, file: str) -> None:
    shutil.rmtree(folder / file) if name == "news20" else (folder / file).unlink()
    other_way = f"or leave --data_dir out to download {name}"
    if name == "smallnorb":
        other_way = "from https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
    assert sentence(name, folder) == f"--data_dir {folder} has no {file}: put it there, {other_way}."


@pytest.mark.parametrize("name", FILES)
def test_data_dir_must_be_a_folder(tmp_path: Path, name: str) -> None:
    assert sentence(name, tmp_path / "none") == f"--data_dir {tmp_path / 'none'} is not a folder."


def test_smallnorb_without_a_folder() -> None:
    first, second = FILES["smallnorb"]
    assert sentence("smallnorb", None) == (
        f"smallnorb has no download here: put {first} and {second}, from "
        "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/, into a folder and give --data_dir."
    )


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        *((name, URLError("no route to host"), "<urlopen error no route to host>") for name in FETCHERS),
        ("mnist", TimeoutError(), "TimeoutError"),
        ("cifar10", ConnectionError("Couldn't reach\nthe Hub"), "Couldn't reach the Hub"),
        ("cifar10", RuntimeError("of httpx"), "of httpx"),
    ],
)
def test_a_failed_download(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, reason: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(f"sklearn.datasets.{FETCHERS[name]}" if name in FETCHERS else "datasets.load_dataset", fail)
    assert sentence(name, None) == (
        f"{name} cannot be downloaded ({reason}): try again, or put {', '.join(FILES[name])} into a folder and give "
        "--data_dir."
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("mnits", " Did you mean 'mnist'?"), ("cifar10", ""), ("KDD", ""), ("kdd99", " Did you mean 'kdd'?")],
)
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        load(name, None)
    assert str(error.value) == f"There is no data set {name!r}, only smallnorb, covtype, kdd, news20, mnist.{hint}"


@pytest.mark.parametrize(
    ("name", "part", "broken", "what"),
    [
        *((name, 0, lambda _: b"", " is empty.") for name in FILES if name != "news20"),
        ("mnist", 0, lambda c: b"\0\0\x0b" + c[3:], " starts with the bytes 00000b03, not 00000803."),
        ("mnist", 1, lambda c: idx(MNIST[0]), " starts with the bytes 00000803, not 00000801."),
        ("mnist", 0, lambda c: c[:15], " is truncated: it ends within its header."),
        ("mnist", 0, lambda c: c[:-1], " has 3,151 bytes, not 3,152 as its header says: is it truncated?"),
        ("mnist", 0, lambda c: idx(MNIST[0][:, :27]), " has rows of [27, 28], not of [28, 28]."),
        ("smallnorb", 0, lambda c: c[::-1], " starts with the bytes"),
        (
            "smallnorb",
            0,
            lambda c: norb(SMALLNORB[1]),
            " starts with the bytes 544c3d1e01000000, not 554c3d1e04000000.",
        ),
        ("smallnorb", 1, lambda c: c[:19], " is truncated: it ends within its header."),
        ("smallnorb", 1, lambda c: c[:-4], " has 28 bytes, not 32 as its header says: is it truncated?"),
        ("smallnorb", 0, lambda c: norb(SMALLNORB[0][:, :1]), " has rows of [1, 96, 96], not of [2, 96, 96]."),
        ("kdd", 0, lambda c: c[:-20], " is malformed: the dtype passed requires 42 columns but 3"),
        ("kdd", 0, lambda c: c.replace(b"400", b"?"), " is malformed: could not convert string '?' to float64"),
        ("covtype", 0, lambda c: c[:-2], " is malformed: could not convert string '' to int64"),
        ("covtype", 0, lambda c: csv([[1, 2]]), " is malformed: the dtype passed requires 55 columns but 2 were found"),
        ("cifar10", 3, lambda c: c[:-20], " is not a batch of CIFAR-10: "),
        ("cifar10", 4, lambda c: pickle.dumps({"data": 1}), " is not a batch of CIFAR-10: b'labels'"),
        ("cifar10", 4, lambda c: pickle.dumps({b"data": np.zeros((2, 9), "u1"), b"labels": [0, 1]}), " is not a batch"),
    ],
)
def test_a_broken_file_is_named(
    folder: Path, name: str, part: int, broken: Callable[[bytes], bytes], what: str
) -> None:
    file = FILES[name][part]
    write(folder / file, broken(contents()[file]))
    assert sentence(name, folder).startswith(f"{folder / file}{what}")


@pytest.mark.parametrize("name", ["smallnorb", "covtype", "kdd", "mnist"])
def test_a_broken_archive_is_named(folder: Path, name: str) -> None:
    path = folder / FILES[name][0]
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:20] + b"\0\0\0\0" + whole[24:], contents()[FILES[name][0]]):
        path.write_bytes(broken)
        assert sentence(name, folder).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize(
    ("name", "file", "content", "what"),
    [
        ("mnist", FILES["mnist"][1], idx(MNIST[1][:3]), "mnist has 4 rows and 3 labels."),
        ("mnist", FILES["mnist"][1], idx(MNIST[1] + 1), "mnist has other labels than those of its 10 classes."),
        (
            "covtype",
            FILES["covtype"][0],
            csv([[*covtype_fields(COVTYPE[0])[:-1], 0]]),
            "covtype has other labels than those of its 7 classes.",
        ),
    ],
)
def test_labels_must_fit(folder: Path, name: str, file: str, content: bytes, what: str) -> None:
    write(folder / file, content)
    assert sentence(name, folder) == what


def test_there_must_be_20_newsgroups(folder: Path) -> None:
    groups = folder / FILES["news20"][0]
    shutil.rmtree(groups / "group07")
    assert sentence("news20", folder) == f"{groups} has 19 folders with 19 texts, not 20 newsgroups."
    shutil.rmtree(groups)
    for group in range(20):
        (groups / str(group)).mkdir(parents=True)
    assert sentence("news20", folder) == f"{groups} has 20 folders with 0 texts, not 20 newsgroups."
    shutil.rmtree(groups)
    groups.write_text("a file")
    assert sentence("news20", folder).startswith(f"{groups} cannot be read: ")


@pytest.mark.parametrize(
    ("name", "features", "classes", "rows"),
    [("smallnorb", 18432, 5, 24300), ("covtype", 98, 7, None), ("kdd", 116, 2, None), ("news20", 2000, 20, 11314),
     ("mnist", 784, 10, 60000)],
)  # fmt: skip
def test_real_data(name: str, features: int, classes: int, rows: int | None) -> None:
    """Set TO_FINETUNE_DATA to a folder with upstream's files; a part of covtype's or kdd's rows will do."""
    if "TO_FINETUNE_DATA" not in os.environ or not (REAL_DATA / FILES[name][0]).parent.is_dir():
        pytest.skip(f"TO_FINETUNE_DATA does not name a folder with {name}")
    found = load(name, REAL_DATA)
    assert found.x.shape == (rows or len(found.y), features)
    assert found.y.unique().tolist() == [*range(classes)] == [*range(found.classes)]
    assert found.x.min() == 0
    assert 0.5 < found.x.max() <= 1


def test_real_cifar10() -> None:
    if "TO_FINETUNE_DATA" not in os.environ or not (REAL_DATA / "cifar-10-batches-py").is_dir():
        pytest.skip("TO_FINETUNE_DATA does not name a folder with cifar10")
    found = load_cifar10(REAL_DATA)
    assert found.x.shape == (50000, 3, 32, 32)
    assert found.y.bincount().tolist() == [5000] * 10
