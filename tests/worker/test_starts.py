"""SAEs to go on from: runs in the store, buckets and folders; what is not there, not allowed, or was changed."""

from pathlib import Path
from typing import Any

import pytest

from mistudio_schemas import ErrorCode, TrainCompleted, TrainFailed
from mistudio_train.errors import StartRefused
from mistudio_train.settings import Settings
from mistudio_train.worker.register import Register
from mistudio_train.worker.starts import fetch_starts
from mistudio_train.worker.store import Store, open_store
from tests.models import SENTENCES, tiny_model

from .bus import events, publish, reading, request, running_worker

FILES = {"cfg.json": b"{}", "sae_weights.safetensors": b"weights"}


def fetched(name: str, to: Path, settings: Settings, store: Store) -> dict[str, bytes]:
    folder = fetch_starts([name], to, settings, store, Register(store))[name]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def code_of(name: str, to: Path, settings: Settings, store: Store) -> ErrorCode:
    with pytest.raises(StartRefused) as caught:
        fetched(name, to, settings, store)
    assert caught.value.hint
    assert str(caught.value).isprintable()
    return caught.value.code


def test_a_folder_of_a_bucket(worker_settings: Settings, tmp_path: Path) -> None:
    store = open_store(worker_settings)
    store.ensure()
    for name, data in (FILES | {"README.md": b"#"}).items():
        store.put_bytes(f"saes/mine/{name}", data)
    assert fetched(f"s3://{store.bucket}/saes/mine/", tmp_path / "to", worker_settings, store) == FILES
    store.put_bytes("saes/mine/gates.safetensors", b"gates")
    assert "gates.safetensors" in fetched(f"s3://{store.bucket}/saes/mine", tmp_path / "to", worker_settings, store)
    store.delete(["saes/mine/gates.safetensors"])
    assert fetched(f"s3://{store.bucket}/saes/mine", tmp_path / "to", worker_settings, store) == FILES
    none = code_of(f"s3://{store.bucket}/saes/none", tmp_path / "to", worker_settings, store)
    assert none is ErrorCode.SAE_NOT_FOUND


def test_a_folder_of_the_worker_where_it_is(store: Store, store_settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "allowed" / "sae"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    allowing = store_settings.model_copy(update={"local_model_folders": [tmp_path / "allowed"]})
    assert fetched(str(folder), tmp_path / "to", allowing, store) == FILES
    assert not (tmp_path / "to").exists()
    (tmp_path / "allowed" / "out").symlink_to("/etc")
    for name in (str(tmp_path / "allowed" / "out"), str(tmp_path / "allowed" / ".." / "x"), "/etc"):
        assert code_of(name, tmp_path / "to", allowing, store) is ErrorCode.SAE_NOT_ALLOWED
    assert code_of(f"{folder}/none", tmp_path / "to", allowing, store) is ErrorCode.SAE_NOT_FOUND
    assert code_of(str(folder), tmp_path / "to", store_settings, store) is ErrorCode.SAE_NOT_ALLOWED


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("s3://elsewhere/sae", ErrorCode.SAE_NOT_ALLOWED),
        ("s3://{bucket}/../sae", ErrorCode.SAE_NOT_ALLOWED),
        ("s3://{bucket}/", ErrorCode.SAE_NOT_ALLOWED),
        ("no-such-job", ErrorCode.SAE_NOT_FOUND),
        ("no-such-job/1", ErrorCode.SAE_NOT_FOUND),
        ("job/first", ErrorCode.SAE_NOT_FOUND),
        ("job/1/a/b", ErrorCode.SAE_NOT_FOUND),
        ("../job", ErrorCode.SAE_NOT_FOUND),
        ("..", ErrorCode.SAE_NOT_FOUND),
        ("a\x00\n", ErrorCode.SAE_NOT_FOUND),
    ],
)
def test_what_leads_nowhere(name: str, code: ErrorCode, store: Store, store_settings: Settings, tmp_path: Path) -> None:
    assert code_of(name.format(bucket=store.bucket), tmp_path / "to", store_settings, store) is code


async def test_a_job_goes_on_from_one_in_the_store(settings: Settings, tmp_path: Path) -> None:
    """From its primary SAE, from another one by its name, and not from objects that are others by now."""
    model = tiny_model("llama", tmp_path / "models" / "tiny")
    corpus = "\n".join(f"{text} {n}" for n in range(8) for text in SENTENCES)
    (settings.data_path / "samples" / "corpus.txt").write_text(corpus)
    settings = settings.model_copy(update={"local_model_folders": [tmp_path / "models"], "max_concurrent_jobs": 1})
    topics, fields = settings.topics, {"model_name": str(model), "layer_number": 1, "pooling": "token", "max_epochs": 1}
    sae: dict[str, Any] = {"kind": "batchtopk", "k": 4, "hidden_dim": 64, "batch_size": 64}
    two = [sae | {"name": "first"}, sae | {"name": "second", "hidden_dim": 128}]
    wider = sae | {"hidden_dim": 128, "init_from": "origin/1/second"}
    async with running_worker(settings), reading(settings, topics.completed, topics.failed) as reader:
        await publish(settings, request("origin", settings, partition=0, saes=two, **fields))
        await reader.of(topics.completed, 1)
        for job_id, one in (("one", sae | {"init_from": "origin"}), ("two", wider)):
            await publish(settings, request(job_id, settings, partition=0, sae=one, **fields))
        await reader.of(topics.completed, 3)
        store = open_store(settings)
        store.put_bytes("jobs/origin/runs/1/a1/sae/sae_weights.safetensors", b"x" * 100)
        for job_id, name in (("damaged", "origin"), ("narrow", "origin/1/second"), ("unknown", "origin/1/third")):
            await publish(settings, request(job_id, settings, partition=0, sae=sae | {"init_from": name}, **fields))
        failed = events(await reader.of(topics.failed, 3))
        done = events(await reader.of(topics.completed, 3))
    assert [one.job_id for one in done if isinstance(one, TrainCompleted)] == ["origin", "one", "two"]
    said = {one.job_id: (one.code, one.message) for one in failed if isinstance(one, TrainFailed)}
    assert said["damaged"][0] is said["narrow"][0] is ErrorCode.SAE_UNSUITABLE
    assert "sha256" in said["damaged"][1]
    assert "has 128 latents, and hidden_dim is 64" in said["narrow"][1]
    assert said["unknown"][0] is ErrorCode.SAE_NOT_FOUND
