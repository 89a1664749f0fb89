"""Subsets beyond regular expressions: last layers, modules, Spectrum's YAML, signal-to-noise ratio; and their map."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from to_finetune.errors import UsageError
from to_finetune.model import select_trainable, spectrum
from to_finetune.model.select import last_layers, modules, read_yaml
from to_finetune.model.spectrum import ScoredTensor, select_by_snr, signal_to_noise, write_yaml
from to_finetune.report.subset_map import plot_subset, subset_table

from .test_subset import NORMS, PROJECTIONS, of_layers

GPT2_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
GPT2 = {
    "transformer.wte.weight": 5_000,
    "transformer.wpe.weight": 2_000,
    **{
        f"transformer.h.{i}.{part}.{leaf}": size
        for i in range(12)
        for part in GPT2_PARTS
        for leaf, size in (("weight", 900), ("bias", 30))
    },
    "transformer.ln_f.weight": 30,
}
# Its tower has more layers and more tensors, its decoder more weights, and the layers have numbered experts.
VISION = {
    **{f"model.vision.layers.{i}.mlp.{p}.{x}": 9 for i in range(6) for p in ("fc1", "fc2") for x in ("weight", "bias")},
    "model.vision.norm.weight": 3,
    **{f"model.text.layers.{i}.mlp.experts.{e}.up_proj.weight": 99 for i in (0, 1) for e in range(5)},
    "model.text.norm.weight": 3,
}


def sizes_of(model: PreTrainedModel) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters()}


def found(sizes: dict[str, int], patterns: list[str]) -> set[str]:
    return {name for name in sizes if any(re.search(pattern, name) for pattern in patterns)}


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama)


# The last layers, and modules


def test_the_last_layers(model: PreTrainedModel) -> None:
    assert last_layers(sizes_of(model), 2) == [r"^model\.layers\.(2|3)\."]
    assert set(select_trainable(model, last_layers(sizes_of(model), 2)).names) == of_layers(2, 3)
    assert set(select_trainable(model, last_layers(sizes_of(model), 4)).names) == of_layers(0, 1, 2, 3)


def test_the_last_layers_of_gpt2() -> None:
    """By number, not by letter: 9 comes before 10; and 1 is not 11."""
    last = {name for name in GPT2 if re.match(r"transformer\.h\.(9|10|11)\.", name)}
    assert found(GPT2, last_layers(GPT2, 3)) == last
    assert len(last) == 3 * 12


def test_the_decoder_is_where_the_weights_are() -> None:
    assert found(VISION, last_layers(VISION, 1)) == {
        f"model.text.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(5)
    }
    assert found(VISION, modules(VISION, ["mlp"])) == {name for name in VISION if "experts" in name}


@pytest.mark.parametrize("n", [0, -1, 5])
def test_as_many_layers_as_there_are(model: PreTrainedModel, n: int) -> None:
    with pytest.raises(UsageError, match=rf"last {n} layers .* has 4, so 1 to 4"):
        last_layers(sizes_of(model), n)


@pytest.mark.parametrize(
    ("types", "last", "names"),
    [
        (["q_proj", "v_proj"], None, of_layers(0, 1, 2, 3, parts=["self_attn.q_proj", "self_attn.v_proj"])),
        (["q_proj", "v_proj"], 2, of_layers(2, 3, parts=["self_attn.q_proj", "self_attn.v_proj"])),
        (["self_attn.o_proj"], 1, of_layers(3, parts=["self_attn.o_proj"])),
        (["mlp"], 1, of_layers(3, parts=PROJECTIONS[4:])),
        (["self_attn"], 3, of_layers(1, 2, 3, parts=PROJECTIONS[:4])),
        (NORMS, None, of_layers(0, 1, 2, 3, parts=NORMS)),
        (["norm"], None, {"model.norm.weight"}),
        (
            ["lm_head", "model.embed_tokens", "up_proj"],
            None,
            {"lm_head.weight", "model.embed_tokens.weight", *of_layers(0, 1, 2, 3, parts=["mlp.up_proj"])},
        ),
    ],
)
def test_modules_by_name(model: PreTrainedModel, types: list[str], last: int | None, names: set[str]) -> None:
    patterns = modules(sizes_of(model), types, last)
    assert len(patterns) == len(types)
    assert set(select_trainable(model, patterns).names) == names


def test_modules_of_gpt2() -> None:
    """With their biases; a name that two modules share means both."""
    names = {f"transformer.h.11.{part}.c_proj.{leaf}" for part in ("attn", "mlp") for leaf in ("weight", "bias")}
    assert found(GPT2, modules(GPT2, ["c_proj"], 1)) == names
    assert found(GPT2, modules(GPT2, ["mlp.c_proj"], 1)) == {name for name in names if "mlp" in name}
    assert found(GPT2, modules(GPT2, ["wte"])) == {"transformer.wte.weight"}


@pytest.mark.parametrize(
    ("types", "last", "says"),
    [
        (["q_porj"], None, "called 'q_porj'. Did you mean 'q_proj'"),
        (["q_proj", "proj"], None, "called 'proj'"),
        (["attention"], None, "There are self_attn.q_proj, "),
        (["lm_head"], 2, "the last 2 layers is called 'lm_head'"),
        (["model"], None, "called 'model'"),
        (["3"], None, "called '3'"),
        (["weight"], None, "called 'weight'"),
        (["q_proj"], 5, "has 4, so 1 to 4"),
        ([], None, "nothing would train"),
    ],
)
def test_a_module_that_is_not_there_is_refused(
    model: PreTrainedModel, types: list[str], last: int | None, says: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        modules(sizes_of(model), types, last)


# Spectrum's YAML

SPECTRUM = """unfrozen_parameters:
- ^lm_head.weight$
- ^model.embed_tokens.weight$
# input_layernorm layers
- model.layers.0.input_layernorm
# lm_head layers
# mlp.down_proj layers
- model.layers.3.mlp.down_proj
- model.layers.1.mlp.down_proj
"""


def test_spectrums_file_as_it_is(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "snr_results_unfrozenparameters_50percent.yaml"
    path.write_text(SPECTRUM)
    patterns = read_yaml(path)
    assert patterns == [line[2:] for line in SPECTRUM.splitlines() if line.startswith("- ")]
    assert set(select_trainable(model, patterns).names) == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        *of_layers(0, parts=["input_layernorm"]),
        *of_layers(1, 3, parts=["mlp.down_proj"]),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unfrozen_parameters: [", "is not valid YAML"),
        ("- model.layers.0\n", "has no key 'unfrozen_parameters'"),
        ("", "has no key 'unfrozen_parameters'"),
        ("unfrozen_parameter:\n- x\n", "Did you mean 'unfrozen_parameter'"),
        ("unfrozen_parameters:\n", "must be a list"),
        ("unfrozen_parameters: lm_head\n", "must be a list"),
        ("unfrozen_parameters:\n- [qk]_proj\n", "is not valid YAML"),
        ("unfrozen_parameters:\n- [qk]\n", "has ['qk'], which YAML does not read as text: put it in quotes"),
        ("unfrozen_parameters:\n- 3\n", "has 3, which"),
        ("unfrozen_parameters:\n- \xff\n", "is not valid YAML"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "subset.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")


# The signal-to-noise ratio


def with_singular_values(values: np.ndarray, rows: int, columns: int) -> Tensor:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in (rows, columns))
    return torch.from_numpy(left * values @ right.T)


def test_the_ratio_by_hand() -> None:
    """Quartiles 2 and 4, sigma 2/1.349, threshold twice that for a square: above it 10, 4 and 3; below it 2 and 1."""
    matrix = with_singular_values(np.array([10.0, 4.0, 3.0, 2.0, 1.0]), 5, 5)
    assert signal_to_noise(matrix) == pytest.approx((10 + 4 + 3) / (2 + 1) / 10, rel=1e-12)
    wide = with_singular_values(np.array([10.0, 4.0, 3.0, 2.0, 1.0]), 5, 500)  # threshold 1.63: only 1 is noise
    assert signal_to_noise(wide) == pytest.approx((10 + 4 + 3 + 2) / 1 / 10, rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_against_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=shape)).to(dtype)
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    beta = min(shape) / max(shape)
    threshold = (np.percentile(s, 75) - np.percentile(s, 25)) / 1.349 * np.sqrt((1 + np.sqrt(beta)) ** 2)
    assert 0 < (s > threshold).sum() < len(s)
    expected = s[s > threshold].sum() / s[s <= threshold].sum() / s[0]
    assert signal_to_noise(matrix) == pytest.approx(expected, rel=1e-9)


def test_signal_in_noise() -> None:
    """Two strong directions raise what is above the threshold over what is below; Spectrum then divides by the largest,

    so that the score itself falls: noise alone has the highest.
    """
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(64, 96))
    signal = with_singular_values(np.full(2, np.linalg.norm(noise, 2)), 64, 96).numpy()
    matrices = [torch.from_numpy(noise + strength * signal) for strength in (0.0, 2.0, 4.0, 8.0)]
    scores = [signal_to_noise(matrix) for matrix in matrices]
    ratios = [score * torch.linalg.matrix_norm(m, 2).item() for score, m in zip(scores, matrices, strict=True)]
    assert ratios == sorted(ratios)
    assert ratios[3] > 1.5 * ratios[0]
    assert scores == sorted(scores, reverse=True)


def test_the_ratio_depends_on_the_scale() -> None:
    """As Spectrum defines it."""
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert signal_to_noise(2 * matrix) == pytest.approx(signal_to_noise(matrix) / 2)


def test_the_ratio_at_its_ends() -> None:
    assert signal_to_noise(torch.zeros(4, 6)) == 0
    assert signal_to_noise(torch.ones(4, 6)) > 1  # of rank one
    assert signal_to_noise(torch.diag(torch.tensor([1.0, 1.0, 1.0]))) == float("inf")


# Choosing by it


def with_weights(llama: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_two_shards(llama: Path, folder: Path) -> Path:
    """A copy of the model in two files and an index."""
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({n: w for n, w in weights.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_the_best_of_each_type(llama: Path) -> None:
    """All seven matrices of the four layers are scored; norms, the embedding and the head are not."""
    weights = load_file(llama / "model.safetensors")
    scored = select_by_snr(llama, 0.5)
    assert {t.name for t in scored} == of_layers(0, 1, 2, 3, parts=PROJECTIONS)
    assert list(dict.fromkeys(t.module for t in scored)) == PROJECTIONS
    assert {t.name: t.snr for t in scored} == {
        name: pytest.approx(signal_to_noise(weights[name])) for name in of_layers(0, 1, 2, 3, parts=PROJECTIONS)
    }
    for part in PROJECTIONS:
        of_type = [t for t in scored if t.module == part]
        assert [t.snr for t in of_type] == sorted((t.snr for t in of_type), reverse=True)
        assert [t.chosen for t in of_type] == [True, True, False, False]


def test_the_layer_with_the_highest_ratios_is_chosen(llama: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in of_layers(2, parts=PROJECTIONS):
            weights[name] *= 0.01

    folder = with_weights(llama, tmp_path / "model", change)
    assert {t.name for t in select_by_snr(folder, 0.25) if t.chosen} == of_layers(2, parts=PROJECTIONS)


@pytest.mark.parametrize(("share", "each"), [(0.25, 1), (0.49, 1), (0.75, 3), (1.0, 4)])
def test_a_share_is_rounded_down(llama: Path, share: float, each: int) -> None:
    scored = select_by_snr(llama, share, ["q_proj", "k_proj"])
    assert [t.chosen for t in scored] == 2 * ([True] * each + [False] * (4 - each))


def test_a_share_that_is_a_whole_number_is_not_rounded_down_by_its_float() -> None:
    """100 * 0.29 is 28.999999999999996."""
    assert [spectrum._share_of(100, share) for share in (0.29, 0.295, 0.3)] == [29, 29, 30]


def test_types_are_modules_of_the_model(llama: Path) -> None:
    assert {t.module for t in select_by_snr(llama, 1.0, ["q_proj", "mlp"])} == {PROJECTIONS[0], *PROJECTIONS[4:]}
    assert [t.name for t in select_by_snr(llama, 1.0, ["lm_head"])] == ["lm_head.weight"]


def test_what_is_written_trains_exactly_what_was_chosen(model: PreTrainedModel, llama: Path, tmp_path: Path) -> None:
    scored = select_by_snr(llama, 0.5)
    path = tmp_path / "new" / "subset.yaml"
    write_yaml(path, scored, 0.5)
    patterns = read_yaml(path)
    assert set(select_trainable(model, patterns).names) == {t.name for t in scored if t.chosen}
    assert patterns == [f"^{t.name}$" for t in scored if t.chosen]
    assert [p.name for p in path.parent.iterdir()] == ["subset.yaml"]


def test_the_written_file(tmp_path: Path) -> None:
    path = tmp_path / "subset.yaml"
    path.write_text("old")
    write_yaml(
        path,
        [
            ScoredTensor("model.layers.1.mlp.up_proj.weight", "mlp.up_proj", 0.5, True),
            ScoredTensor("model.layers.0.mlp.up_proj.weight", "mlp.up_proj", 0.25, False),
            ScoredTensor("lm_head.weight", "lm_head", 1 / 3, False),
        ],
        0.5,
    )
    assert path.read_text() == (
        "# The top 50 % of each module type by signal-to-noise ratio (Spectrum, arXiv 2406.06623);\n"
        "# after each name its ratio.\n"
        "unfrozen_parameters:\n"
        "# mlp.up_proj layers\n"
        "- ^model.layers.1.mlp.up_proj.weight$  # 0.5\n"
        "# lm_head layers\n"
    )


def test_one_matrix_at_a_time_from_sharded_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is read, and each is gone before the next."""
    read: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    class Recorded:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework=framework)

        def __enter__(self) -> Recorded:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> Tensor:
            assert not any(reference() is not None for reference in alive)
            read.append(name)
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            return tensor

    folder = in_two_shards(llama, tmp_path / "model")
    whole = select_by_snr(llama, 0.5)
    monkeypatch.setattr(spectrum, "safe_open", Recorded)
    calls: list[tuple[int, int, str]] = []
    assert select_by_snr(folder, 0.5, progress=lambda *call: calls.append(call)) == whole
    assert sorted(read) == sorted(t.name for t in whole)
    assert calls == [(i + 1, 28, name) for i, name in enumerate(read)]


def test_gpt2s_files_lack_the_prefix(tmp_path: Path) -> None:
    """As on the hub; the names that come out are the ones that train, and the embeddings are in no layer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.transformer.named_parameters()), tmp_path / "model.safetensors")
    chosen = [t for t in select_by_snr(tmp_path, 0.5) if t.chosen]
    assert [t.module for t in chosen] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    subset = select_trainable(model, [f"^{t.name}$" for t in chosen])
    assert set(subset.names) == {t.name for t in chosen}


def test_a_model_in_the_hubs_cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--someone--llama"
    shutil.copytree(llama, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    original = spectrum.snapshot_download
    monkeypatch.setattr(spectrum, "snapshot_download", lambda *a, **k: original(*a, **k, cache_dir=tmp_path))
    assert select_by_snr("someone/llama", 0.25) == select_by_snr(llama, 0.25)


@pytest.mark.parametrize("share", [0, -0.5, 25, float("nan")])
def test_a_share_out_of_range_is_refused(llama: Path, share: float) -> None:
    with pytest.raises(UsageError, match=re.escape(f"share={share} is not valid: above 0 and at most 1")):
        select_by_snr(llama, share)


def test_a_share_that_chooses_nothing_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"share=0.2 of 4 matrices of a type is none: at least 0.25"):
        select_by_snr(llama, 0.2)


def test_an_unknown_type_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"'q_porj'. Did you mean 'q_proj'"):
        select_by_snr(llama, 0.5, ["q_porj"])


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "no such"])
def test_a_model_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a model in the hub's cache"):
        select_by_snr(name, 0.5)


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def write(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(text)


def without_q_proj(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def with_one(value: Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, "model.layers.1.self_attn.q_proj.weight": value}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("config.json"), "holds no config.json, so it is no model"),
        (write("config.json", '{"model_type": "vit"}'), "cannot be loaded as a causal language model"),
        (remove("model.safetensors"), "holds no model.safetensors"),
        (write("model.safetensors", "nonsense"), "model.safetensors is damaged"),
        (write("model.safetensors.index.json", "{"), "index.json is damaged"),
        (write("model.safetensors.index.json", '{"weight_map": []}'), "index.json is damaged"),
        (write("model.safetensors.index.json", '{"weight_map": {}}'), "no file has 'model.layers.0.self_attn.q_proj"),
        (without_q_proj, "no file has 'model.layers.1.self_attn.q_proj.weight'"),
        (with_one(torch.zeros(512, 1, dtype=torch.uint8)), "q_proj.weight' is quantised (torch.uint8)"),
        (with_one(torch.full((32, 32), torch.inf)), "q_proj.weight' has values that are not finite"),
    ],
)
def test_a_folder_that_cannot_be_scored_is_refused(
    llama: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    damage(folder)
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        select_by_snr(folder, 0.5)
    assert str(folder) in str(caught.value)


def test_a_missing_shard_is_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    folder = in_two_shards(llama, tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    calls: list[Any] = []
    with pytest.raises(UsageError, match=r"model-00002-of-00002.safetensors is missing"):
        select_by_snr(folder, 0.5, progress=lambda *call: calls.append(call))
    assert not calls


# The map


def printed(sizes: dict[str, int], trained: set[str]) -> list[str]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(subset_table(sizes, trained))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_map_in_the_terminal() -> None:
    """Weight and bias are one cell, partly trained here in layer 9."""
    trained = {*found(GPT2, last_layers(GPT2, 2)), "transformer.h.9.mlp.c_fc.bias", "transformer.wte.weight"}
    assert printed(GPT2, trained) == [
        "16.2 k of 74.0 k weights train (21.9 %)",
        "module            0····5····10  trained",
        "transformer.wte   █              5.00 k",
        "transformer.wpe   ░",
        "ln_1              ░░░░░░░░░░██   1.86 k",
        "attn.c_attn       ░░░░░░░░░░██   1.86 k",
        "attn.c_proj       ░░░░░░░░░░██   1.86 k",
        "ln_2              ░░░░░░░░░░██   1.86 k",
        "mlp.c_fc          ░░░░░░░░░▒██   1.89 k",
        "mlp.c_proj        ░░░░░░░░░░██   1.86 k",
        "transformer.ln_f  ░",
    ]


def test_the_map_of_experts_and_other_towers() -> None:
    """Each is one row; a layer without the module is blank."""
    sizes = {**VISION, "model.text.layers.1.shared.weight": 10}
    assert printed(sizes, {"model.text.layers.1.mlp.experts.4.up_proj.weight"}) == [
        "99 of 1.22 k weights train (8.1 %)",
        "module                 0·  trained",
        "model.vision.layers    ░",
        "model.vision.norm      ░",
        "mlp.experts.*.up_proj  ░▒       99",
        "shared                  ░",
        "model.text.norm        ░",
    ]


def test_many_layers_are_folded() -> None:
    sizes = {f"model.layers.{i}.post_attention_layernorm.weight": 8 for i in range(80)}
    lines = printed(sizes, set(list(sizes)[38:42]))
    assert lines[1:3] == [
        "                          0····5····10···15···20···25···30···35···",
        "module                    40···45···50···55···60···65···70···75···  trained",
    ]
    assert lines[4:6] == [
        "post_attention_layernorm  " + 38 * "░" + "██       32",
        "                          " + "██" + 38 * "░",
    ]


def test_a_trained_name_that_is_no_parameter_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"'lm_head.weight' is said to train"):
        subset_table(GPT2, {"lm_head.weight"})


@pytest.mark.parametrize("sizes", [GPT2, VISION, {"weight": 3, "bias": 1}], ids=["gpt2", "vision", "no layers"])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_map_as_a_picture(tmp_path: Path, sizes: dict[str, int], ending: str) -> None:
    path = tmp_path / f"map.{ending}"
    plot_subset(sizes, set(list(sizes)[-2:]), path, "title")
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(begins)
    assert path.stat().st_size > 5_000


def test_the_pictures_cells(tmp_path: Path) -> None:
    """One rectangle a cell, looking like its state."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    from to_finetune.report import subset_map

    trained = {*found(GPT2, last_layers(GPT2, 2)), "transformer.h.9.mlp.c_fc.bias"}
    with mock.patch.object(Figure, "savefig", autospec=True) as saved:
        plot_subset(GPT2, trained, tmp_path / "map.png")
    axes = saved.call_args.args[0].axes[0]
    looks = {(patch.get_x(), patch.get_width(), patch.get_y()): to_hex(patch.get_facecolor()) for patch in axes.patches}
    assert len(axes.patches) == len(looks) == 3 + 6 * 12
    names = {to_hex(look["facecolor"]): state for state, look in subset_map.LOOKS.items()}
    states = [names[colour] for colour in looks.values()]
    assert (states.count("trained"), states.count("partly"), states.count("frozen")) == (12, 1, 62)
    assert {x for (x, _, _), colour in looks.items() if names[colour] == "trained"} == {10, 11}
    assert [label.get_text() for label in axes.get_yticklabels()][2] == "ln_1"
