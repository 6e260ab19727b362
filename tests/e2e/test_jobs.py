"""From a request on Kafka to files in MinIO: every kind of job, what it says on the way, and every refusal."""

import hashlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_schemas import ErrorCode
from mistudio_train.paces import paces_in

from .conftest import LAYERS, TOKEN, World, corpus_texts

COMPLETED = [
    "decoder-mean-standard",
    "decoder-token-topk",
    "encoder-mean-topk",
    "encoder-token-standard",
    "three-saes",
    "default-layer",
    "same-again",
    "with-token",
    "from-the-bucket",
]
FILES = {
    "feature_activations.pt",
    "metadata.json",
    "report/curves.png",
    "report/density.png",
    "report/index.html",
    "request.json",
    "sae/README.md",
    "sae/cfg.json",
    "sae/sae_weights.safetensors",
    "sae/sparsity.safetensors",
    "sae_model.pt",
    "saes.json",
    "training_log.jsonl",
}


def loaded(world: World, job: str, name: str) -> Any:
    """A `.pt` file as plain `torch.load` reads it."""
    (ref,) = [one for one in world.outcomes[job].completed.artifacts if one.name == name]
    return torch.load(io.BytesIO(world.file(ref)), map_location="cpu")


@pytest.mark.parametrize("job", COMPLETED)
async def test_a_job_completes_once_and_every_object_is_what_its_event_says(world: World, job: str) -> None:
    done = world.outcomes[job].completed
    for ref in (*done.artifacts, done.manifest):
        data = world.file(ref)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (ref.size, ref.sha256)
    assert {ref.name for ref in done.artifacts} >= FILES
    listed = json.loads(world.file(done.manifest))["objects"]
    assert listed == [ref.model_dump(mode="json") for ref in done.artifacts]
    prefix = f"s3://{world.settings.minio_bucket}/jobs/{job}/runs/1/a1/"
    assert (done.model_path, done.metadata_path) == (prefix + "sae_model.pt", prefix + "metadata.json")


@pytest.mark.parametrize("job", COMPLETED)
async def test_progress_comes_in_order_and_ends_as_the_job_did(world: World, job: str) -> None:
    progress = world.outcomes[job].progress
    assert [one.progress for one in progress] == sorted(one.progress for one in progress)
    assert (progress[0].status, progress[-1].status, progress[-1].phase) == ("running", "completed", "ended")
    gaps = [(b.time - a.time).total_seconds() for a, b in itertools.pairwise(progress)]
    assert all(gap > 0.9 for gap in gaps[:-1]), "at most one a second, but for the last, which waits for nothing"
    assert all(one.model_info is not None for one in progress if one.phase == "training")


async def test_the_bundle_lines_up_with_the_corpus(world: World) -> None:
    bundle = loaded(world, "decoder-mean-standard", "feature_activations.pt")
    model = loaded(world, "decoder-mean-standard", "sae_model.pt")["model_state_dict"]
    assert bundle["texts"] == corpus_texts()
    x_ND, acts_NF = bundle["original_activations"], bundle["feature_activations"]
    assert acts_NF.shape == (len(corpus_texts()), 64)
    expected = torch.relu(x_ND @ model["encoder.weight"].T + model["encoder.bias"])
    torch.testing.assert_close(acts_NF, expected)


async def test_a_model_and_a_corpus_from_a_bucket_give_the_same_weights_as_from_a_folder(world: World) -> None:
    weights = []
    for job in ("decoder-mean-standard", "from-the-bucket"):
        done = world.outcomes[job].completed
        weights += [one.sha256 for one in done.artifacts if one.name == "sae/sae_weights.safetensors"]
    assert len(weights) == 2
    assert len(set(weights)) == 1
    info = world.outcomes["from-the-bucket"].completed.model_info
    assert info.actual_model_loaded == info.model_name == f"s3://{world.settings.minio_bucket}/models/llama"


async def test_a_topk_bundle_keeps_k_features_a_row(world: World) -> None:
    acts_NF = loaded(world, "encoder-mean-topk", "feature_activations.pt")["feature_activations"]
    assert int((acts_NF > 0).sum(1).max()) <= 8
    assert "keep the 8 largest" in loaded(world, "encoder-mean-topk", "sae_model.pt")["needs"]


async def test_metadata_and_event_say_the_same(world: World) -> None:
    done = world.outcomes["decoder-token-topk"].completed
    (ref,) = [one for one in done.artifacts if one.name == "metadata.json"]
    metadata = json.loads(world.file(ref))
    assert metadata["training_results"]["fvu"] == done.saes[0].metrics.fvu == done.training_stats["fvu"]
    assert metadata["data_info"]["corpus"] == done.corpus.model_dump(mode="json")
    assert metadata["paths"]["activations_path"] == done.activations_path
    assert done.corpus.texts == len(corpus_texts())
    assert done.corpus.rows == done.corpus.tokens > done.corpus.texts
    assert done.saes[0].metrics.l0 == pytest.approx(8, abs=0.5)


async def test_three_saes_at_two_layers_share_one_extraction(world: World) -> None:
    outcome = world.outcomes["three-saes"]
    done = outcome.completed
    assert [(one.name, one.kind, one.layer_number) for one in done.saes] == [
        ("first", "batchtopk", 2),
        ("second", "standard", 2),
        ("third", "matryoshka", 4),
    ]
    names = {ref.name for ref in done.artifacts}
    for place in ("", "saes/second/", "saes/third/"):
        assert {place + name for name in FILES - {"request.json", "saes.json"}} <= names
    phases = [one.phase for one in outcome.progress]
    changes = [phase for before, phase in zip([None, *phases], phases, strict=False) if phase != before]
    assert changes.count("extracting") <= 1
    first = loaded(world, "three-saes", "feature_activations.pt")
    third = loaded(world, "three-saes", "saes/third/feature_activations.pt")
    assert first["texts"] == third["texts"]
    assert not torch.equal(first["original_activations"], third["original_activations"])


async def test_metadata_says_which_folders_for_other_software_are_there(world: World) -> None:
    def exports(job: str) -> tuple[set[str], dict[str, str]]:
        files = {ref.name: ref for ref in world.outcomes[job].completed.artifacts}
        folders = {name.partition("/")[0] for name in files if "/" in name}
        return folders, json.loads(world.file(files["metadata.json"]))["exports"]

    folders, said = exports("decoder-token-topk")
    assert folders >= {"sae", "sparsify"}
    assert said == {"sae": "SAELens", "sparsify": "EleutherAI sparsify"}
    folders, said = exports("three-saes")
    assert "sparsify" not in folders
    assert "'batchtopk' keeps others" in said["sparsify"]


async def test_the_default_layer_becomes_the_last_of_a_shallow_model_with_a_warning(world: World) -> None:
    done = world.outcomes["default-layer"].completed
    assert done.saes[0].layer_number == done.model_info.selected_layer == LAYERS - 1
    assert any("default layer 12" in warning for warning in done.warnings)


async def test_the_same_request_gives_the_same_weights(world: World) -> None:
    hashes = {
        ref.sha256
        for job in ("decoder-mean-standard", "same-again")
        for ref in world.outcomes[job].completed.artifacts
        if ref.name == "sae/sae_weights.safetensors"
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("job", "code", "says", "hint"),
    [
        ("layer-out-of-range", ErrorCode.REQUEST_LAYER_OUT_OF_RANGE, "0..5", "0..5"),
        ("no-corpus", ErrorCode.CORPUS_NOT_FOUND, "corpse.txt", "corpus.txt"),
        ("no-model", ErrorCode.MODEL_NOT_FOUND, "nobody/has-this-model", ""),
        ("no-bucket-model", ErrorCode.MODEL_NOT_FOUND, "models/lama", "Check bucket and path"),
        ("foreign-model", ErrorCode.MODEL_NOT_ALLOWED, "", ""),
        ("too-wide", ErrorCode.REQUEST_OUT_OF_RANGE, "Hidden dimension too large (max 32768)", "Correct the field"),
        ("too-large", ErrorCode.MEMORY_INSUFFICIENT, "GiB", "Lower"),
        ("bad-corpus", ErrorCode.CORPUS_UNREADABLE, "line 2", "UTF-8"),
    ],
)
async def test_a_request_that_cannot_be_done_is_refused_within_seconds(
    world: World, job: str, code: ErrorCode, says: str, hint: str
) -> None:
    outcome = world.outcomes[job]
    failed = outcome.failed
    assert (failed.code, says in failed.message, hint in failed.hint) == (code, True, True), failed
    assert (failed.time - outcome.progress[0].time).total_seconds() < 10
    assert not failed.retryable
    assert not any(one.phase == "training" for one in outcome.progress)


def test_a_token_in_a_request_goes_nowhere(world: World) -> None:
    """Not into an event, an object, a file of any workspace, or a line of the worker's or a child's."""
    events = [record.value + b"".join(value for _, value in record.headers) for record in world.records]
    objects = [world.store.get_bytes(found.key)[0] for found in world.store.list("")]
    kept = world.folder / "kept" / "with-token"
    files = [path.read_bytes() for path in kept.rglob("*") if path.is_file()]
    assert {"output", "scratch"} <= {path.name for path in kept.iterdir()}
    assert all((events, objects, files, "with-token" in world.printed))
    assert not any(TOKEN.encode() in some for some in (*events, *objects, *files, world.printed.encode()))


def test_how_long_each_job_took_is_noted_on_the_workers_disk(world: World) -> None:
    noted = {pace.job_id: pace for pace in paces_in(world.settings.paces)}
    assert set(COMPLETED) <= set(noted)
    for job in COMPLETED:
        event, pace = world.outcomes[job].completed, noted[job]
        assert sum(part.seconds for part in pace.parts.values()) == pytest.approx(
            event.duration_seconds, rel=0.5, abs=3
        )
        assert all(part.seconds >= 0 for part in pace.parts.values())
        assert pace.result == sum(ref.size for ref in event.artifacts)
        assert pace.disk > pace.result


def test_nothing_is_left_in_the_workspace(world: World) -> None:
    workspaces: Path = world.settings.workspaces
    assert list(workspaces.iterdir()) == []
