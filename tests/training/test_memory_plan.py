"""The plan's bytes against hand-worked ones, and what does not fit: refused before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from mistudio_schemas import (
    BatchTopKSAE,
    ErrorCode,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    StandardSAE,
    TopKSAE,
)
from mistudio_train.errors import GpuUnavailable, ModelRefused, NotEnoughMemory
from mistudio_train.gpu import Gpu
from mistudio_train.messages import Lease
from mistudio_train.training import device as devices
from mistudio_train.training.device import OVERHEAD_CPU, Device, free_memory, leased_device
from mistudio_train.training.memory_plan import (
    STEP_BYTES,
    first_blocks,
    plan_memory,
    sae_training_bytes,
    trunk_shapes,
    weight_bytes,
)
from mistudio_train.training.model_source import ModelSource, inspect
from mistudio_train.training.recommendations import recommendations
from mistudio_train.training.sites import Site
from tests.models import FAMILIES, tiny_model

from .conftest import load_tiny, spec_of

GIB = 1024**3
SAES = (StandardSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE, GatedSAE)
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def config_only(folder: Path, **config: Any) -> ModelSource:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return inspect(str(folder), folders=[folder.parent])


def gpu(free_gib: float, capability: str = "8.6") -> Device:
    free = int(free_gib * GIB)
    return Device("cuda:0", free, Gpu(0, "G", capability, free, 0, free, 0.0))


@pytest.mark.parametrize("site", [Site(1), Site(3), Site(1, "resid_pre"), Site(3, "resid_pre")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_parameters_are_those_that_are_kept(tmp_path: Path, family: str, site: Site) -> None:
    folder = tiny_model(family, tmp_path / family)
    shapes = trunk_shapes(inspect(str(folder), folders=[tmp_path]))
    shapes = {name: shape for name, shape in shapes.items() if "pooler" not in name}
    planned = weight_bytes(first_blocks(site.blocks, shapes), "float32", "none")
    loaded = load_tiny(folder, [site])
    actual = 4 * sum(weight.numel() for name, weight in loaded.trunk.named_parameters() if "pooler" not in name)
    assert planned == pytest.approx(actual, rel=0.05)


def test_an_saes_bytes_are_copies_of_its_parameters_and_of_a_batch() -> None:
    parameters, sae = 2 * 10 * 30 + 30 + 10, JumpReLUSAE()
    on_gpu = sae_training_bytes(sae, d_in=10, d_sae=30, batch_size=7, on_cpu=False)
    assert on_gpu == 4 * (7 * parameters + 8 * 7 * 40)
    on_cpu = sae_training_bytes(sae, d_in=10, d_sae=30, batch_size=7, on_cpu=True)
    assert on_cpu == STEP_BYTES + int(4 * (6.2 * parameters + 2.2 * 7 * 30 + 5 * 7 * 10))


@pytest.mark.parametrize("sae", [sae() for sae in SAES], ids=lambda sae: sae.kind)
def test_every_kind_has_its_bytes(sae: SAEConfig) -> None:
    assert sae_training_bytes(sae, 10, 1000, 7, on_cpu=True) > sae_training_bytes(sae, 10, 500, 7, on_cpu=True)


def test_quantised_weights_are_the_matrices_but_not_the_embeddings() -> None:
    shapes = {"embed_tokens.weight": (100, 8), "layers.0.q_proj.weight": (8, 8), "norm.weight": (8,)}
    assert weight_bytes(shapes, "float16", "none") == 2 * (800 + 64 + 8)
    assert weight_bytes(shapes, "float16", "nf4") == int(2 * 808 + 0.52 * 64)


def test_an_sae_that_does_not_fit_is_refused_from_the_config_alone(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B | {"num_hidden_layers": 1, "vocab_size": 1000})
    spec = spec_of(tmp_path / "m", tmp_path, memory=3 * GIB, hidden_dim=32768)
    with pytest.raises(NotEnoughMemory) as caught:
        plan_memory(source, spec)
    assert caught.value.code is ErrorCode.MEMORY_INSUFFICIENT
    # 2 * 4096 * 32768 parameters, four times in fp32, are 4 GiB; the process itself has 0.81, a batch of 16 0.05.
    assert "The SAE needs 4.86 GiB" in str(caught.value)
    assert "3.00 GiB are available" in str(caught.value)
    assert "hidden_dim" in caught.value.hint
    assert plan_memory(source, spec, Device("cpu", 8 * GIB)).planned_bytes <= 8 * GIB


def test_a_model_that_does_not_fit_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B)
    with pytest.raises(NotEnoughMemory, match="The model needs") as caught:
        plan_memory(source, spec_of(tmp_path / "m", tmp_path, memory=8 * GIB))
    assert "smaller model" in caught.value.hint


def test_the_largest_of_several_saes_counts_and_of_the_others_their_weights(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B | {"num_hidden_layers": 1, "vocab_size": 10})
    saes = [{"kind": "standard", "hidden_dim": 128 * (i + 1), "name": f"s{i}"} for i in range(3)]
    plan = plan_memory(source, spec_of(tmp_path / "m", tmp_path, saes=saes))
    largest = sae_training_bytes(StandardSAE(), 4096, 384, 16, on_cpu=True)
    assert plan.sae_bytes == largest + 4 * 2 * 4096 * (128 + 256)


@pytest.mark.parametrize(
    ("corpus", "size", "fields", "expected"),
    [
        ("corpus.txt", 1000, {}, 4 * 4096 * 1000),
        ("corpus.txt", 10**6, {}, 2 * 256 * 1024**2),
        ("corpus.txt", 10**6, {"token_budget": 100}, 4 * 4096 * 100),
        ("corpus.txt", 10**6, {"shuffle_bytes": 1024**2}, 2 * 1024**2),
        ("corpus.txt.gz", 1000, {}, 2 * 256 * 1024**2),
    ],
)
def test_a_cpu_has_the_buffers_that_rows_are_shuffled_in(
    tmp_path: Path, corpus: str, size: int, fields: dict[str, int], expected: int
) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B | {"num_hidden_layers": 1, "vocab_size": 10})
    (tmp_path / "corpus.txt").write_bytes(b"x" * size)
    asked = {"hidden_dim": 128, "corpus_file": corpus, **fields}
    spec = spec_of(tmp_path / "m", tmp_path, **asked)  # type: ignore[arg-type]
    on_gpu, on_cpu = (sae_training_bytes(StandardSAE(), 4096, 128, 16, on_cpu=on_cpu) for on_cpu in (False, True))
    assert plan_memory(source, spec, Device("cpu", 64 * GIB)).sae_bytes == on_cpu + expected
    assert plan_memory(source, spec, gpu(40)).sae_bytes == on_gpu


@pytest.mark.parametrize(
    ("free_gib", "asked", "expected"),
    [(40, "auto", "none"), (12, "auto", "nf4"), (40, "nf4", "nf4"), (40, "none", "none")],
)
def test_a_gpu_quantises_when_asked_to_or_when_nothing_else_fits(
    tmp_path: Path, free_gib: float, asked: str, expected: str
) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B)
    plan = plan_memory(source, spec_of(tmp_path / "m", tmp_path, quantization=asked), gpu(free_gib))
    assert plan.quantization == expected
    assert plan.planned_bytes <= plan.available_bytes
    assert plan.memory_optimizations["use_quantization"] == (expected == "nf4")
    assert plan.memory_optimizations["is_large_model"]


def test_without_quantisation_a_model_too_large_for_the_gpu_is_refused(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B)
    with pytest.raises(NotEnoughMemory):
        plan_memory(source, spec_of(tmp_path / "m", tmp_path, quantization="none"), gpu(12))


def test_a_cpu_does_not_quantise_and_says_so(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B | {"num_hidden_layers": 1, "vocab_size": 10})
    plan = plan_memory(source, spec_of(tmp_path / "m", tmp_path, quantization="nf4"))
    assert (plan.quantization, plan.dtype) == ("none", "float32")
    assert "need a GPU" in plan.warnings[0]


@pytest.mark.parametrize(("capability", "expected"), [("8.0", "bfloat16"), ("7.5", "float16")])
def test_precision_is_what_the_gpu_computes_in(tmp_path: Path, capability: str, expected: str) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B)
    spec = spec_of(tmp_path / "m", tmp_path)
    assert plan_memory(source, spec, gpu(40, capability)).dtype == expected
    assert plan_memory(source, spec_of(tmp_path / "m", tmp_path, dtype="float32"), gpu(80)).dtype == "float32"


def test_batches_are_a_power_of_two_so_that_a_little_less_memory_changes_nothing(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B)
    spec = spec_of(tmp_path / "m", tmp_path)
    tokens = {plan_memory(source, spec, gpu(free)).tokens_per_batch for free in (30.0, 30.1, 30.2)}
    assert len(tokens) == 1
    assert tokens.pop().bit_count() == 1


def test_the_seeds_keys_are_reported_with_what_was_planned(tmp_path: Path) -> None:
    source = config_only(tmp_path / "m", **LLAMA_8B | {"num_hidden_layers": 1, "vocab_size": 10})
    plan = plan_memory(source, spec_of(tmp_path / "m", tmp_path), Device("cpu", 8 * GIB))
    report = plan.memory_optimizations
    assert set(recommendations("x")) <= set(report)
    assert report["recommended_sequence_length"] == 512
    assert report["recommended_batch_size"] == plan.tokens_per_batch // 512
    assert report["planned_bytes"] == plan.planned_bytes > OVERHEAD_CPU


@pytest.mark.parametrize(
    ("name", "large", "gib"),
    [
        ("microsoft/phi-4", True, 8.0),
        ("meta-llama/Llama-3.2-1B", True, 8.0),
        ("mistralai/Mistral-7B-v0.1", True, 8.0),
        ("cognitivecomputations/dolphin-2.9", False, 4.0),
        ("microsoft/phi-1", False, 2.0),
        ("openai-community/gpt2", False, 2.0),
        ("google/bert-base", False, 2.0),
        ("albert-base", False, 4.0),
        ("some/dolphi-2", False, 4.0),
    ],
)
def test_the_seeds_table_goes_by_whole_parts_of_a_name(name: str, large: bool, gib: float) -> None:
    advice = recommendations(name)
    assert (advice["is_large_model"], advice["min_gpu_memory_gb"]) == (large, gib)


def test_a_container_and_the_operator_bound_the_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(str(2 * GIB))
    (tmp_path / "memory.current").write_text(str(GIB))
    (tmp_path / "memory.stat").write_text(f"anon {GIB // 2}\ninactive_file {GIB // 2}\n")
    assert free_memory(cgroup=tmp_path) == 3 * GIB // 2
    assert free_memory(GIB, cgroup=tmp_path) == GIB
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(GIB, cgroup=tmp_path) == GIB


def test_a_lease_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(1, "G", "8.0", 10 * GIB, 2 * GIB, 8 * GIB, 0.2)]
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    assert leased_device(Lease(1, 0.5)) == Device("cuda:1", 4 * GIB, gpus[0])
    assert leased_device(Lease(None, 0.25), GIB).available_bytes == GIB // 4
    with pytest.raises(GpuUnavailable):
        leased_device(Lease(0))


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x02" + b"\0" * 7 + b"[]"])
def test_damaged_weights_are_refused_by_their_head(tmp_path: Path, content: bytes) -> None:
    folder = tiny_model("gpt2", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelRefused) as caught:
        plan_memory(inspect(str(folder), folders=[tmp_path]), spec_of(folder, tmp_path))
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED


def test_weights_that_a_cpu_computes_with_as_they_are_stored_take_no_memory_twice(tmp_path: Path) -> None:
    stored = {dtype: config_only(tmp_path / dtype, **LLAMA_8B | {"dtype": dtype}) for dtype in ("float32", "bfloat16")}
    as_stored, converted = (
        plan_memory(source, spec_of(tmp_path / dtype, tmp_path, layer_number=3), Device("cpu", 64 * GIB))
        for dtype, source in stored.items()
    )
    assert as_stored.model_bytes < converted.model_bytes / 4  # four blocks of 32, and the embeddings
    assert converted.planned_bytes >= converted.model_bytes + OVERHEAD_CPU


def test_a_transcoder_is_planned_with_rows_of_both_its_sites(tmp_path: Path) -> None:
    one, two = TopKSAE(), TopKSAE(hook_site="mlp_in", predicts="mlp_out")
    for on_cpu in (True, False):
        sizes = [sae_training_bytes(sae, d_in=10, d_sae=30, batch_size=7, on_cpu=on_cpu) for sae in (one, two)]
        assert sizes[1] - sizes[0] == 4 * 6 * 7 * 10
