"""A run's files, up and down again, byte for byte."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mistudio_schemas import ArtifactRef, TrainCompleted
from mistudio_train.errors import ExportRefused, StoreUnavailable
from mistudio_train.worker.artifacts import (
    ArtifactDamaged,
    Manifest,
    fetch_run,
    read_manifest,
    upload,
    write_manifest,
)
from mistudio_train.worker.register import Claim, MessageId, Register
from mistudio_train.worker.store import Store

FILES = {
    "feature_activations.pt": b"bundle",
    "metadata.json": b"{}",
    "report/index.html": b"<p>",
    "sae/cfg.json": b"{...}",
    "sae/sae_weights.safetensors": b"\0" * 1000,
    "sae_model.pt": b"model",
    "training_log.jsonl": b"",
}
ID = MessageId(group="g", topic="t", partition=0, offset=0, timestamp=0, value_sha256="0" * 64)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def claim(store: Store) -> Claim:
    return Register(store).create("job", ID, "w")


@pytest.fixture
def manifest(store: Store, claim: Claim, output: Path) -> Manifest:
    ref = write_manifest(store, claim, upload(store, claim, output))
    return read_manifest(store, ref.key, ref.sha256)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_every_file_goes_up_and_is_described(store: Store, claim: Claim, output: Path) -> None:
    steps: list[tuple[int, int]] = []
    refs = {ref.name: ref for ref in upload(store, claim, output, lambda done, total: steps.append((done, total)))}
    assert list(refs) == list(FILES)
    for name, data in FILES.items():
        ref = refs[name]
        assert ref.key == f"jobs/job/runs/1/a1/{name}"
        assert (ref.size, ref.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (ref.bucket, ref.uri) == (store.bucket, store.uri(ref.key))
        assert store.get_bytes(ref.key)[0] == data
    assert refs["report/index.html"].media_type == "text/html; charset=utf-8"
    assert refs["sae/cfg.json"].media_type == "application/json"
    assert refs["sae_model.pt"].media_type == "application/octet-stream"
    total = sum(map(len, FILES.values()))
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)


def test_the_manifest_lists_what_is_there(store: Store, claim: Claim, output: Path) -> None:
    refs = upload(store, claim, output)
    ref = write_manifest(store, claim, refs)
    data = store.get_bytes("jobs/job/runs/1/a1/manifest.json")[0]
    assert (ref.name, ref.size, ref.sha256) == ("manifest.json", len(data), hashlib.sha256(data).hexdigest())
    manifest = read_manifest(store, ref.key, ref.sha256)
    assert (manifest.job_id, manifest.run, manifest.attempt, manifest.objects) == ("job", 1, 1, refs)


def test_an_upload_can_be_done_again(store: Store, claim: Claim, output: Path) -> None:
    assert upload(store, claim, output) == upload(store, claim, output)


def test_attempts_do_not_touch_each_other(store: Store, claim: Claim, output: Path) -> None:
    first = upload(store, claim, output)
    (output / "sae_model.pt").write_bytes(b"another")
    upload(store, Register(store).take_over(claim, "w2"), output)
    assert [store.get_bytes(ref.key)[0] for ref in first] == list(FILES.values())


def test_an_object_that_did_not_arrive_whole_is_noticed(store: Store, claim: Claim, output: Path) -> None:
    class Cuts:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def put_file(self, key: str, path: Path, *more: Any) -> Any:
            copied = store.put_file(key, path, *more)
            if key.endswith("sae_model.pt"):
                store.put_bytes(key, b"mod")
            return copied

    with pytest.raises(StoreUnavailable, match=r"sae_model\.pt has 3 bytes in the store; 5 were sent"):
        upload(Cuts(), claim, output)


@pytest.mark.parametrize("kind", ["link", "manifest"])
def test_what_is_no_artifact_is_refused(store: Store, claim: Claim, output: Path, kind: str) -> None:
    if kind == "link":
        (output / "passwd").symlink_to("/etc/passwd")
    else:
        (output / "manifest.json").write_text("{}")
    with pytest.raises(ExportRefused):
        upload(store, claim, output)
    assert list(store.list(claim.attempt_prefix)) == []


def test_a_run_is_fetched_as_it_was(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    paths = fetch_run(store, manifest, tmp_path / "to")
    assert files_in(tmp_path / "to") == FILES
    assert [path.relative_to(tmp_path / "to").as_posix() for path in paths] == list(FILES)


def test_a_completed_event_leads_to_the_same_files_and_the_manifest(
    store: Store, claim: Claim, output: Path, tmp_path: Path
) -> None:
    refs = upload(store, claim, output)
    ref = write_manifest(store, claim, refs)
    what_is_read: dict[str, Any] = {"job_id": "job", "artifacts": refs, "manifest": ref}
    fetch_run(store, TrainCompleted.model_construct(**what_is_read), tmp_path / "to")
    assert files_in(tmp_path / "to") == FILES | {"manifest.json": store.get_bytes(ref.key)[0]}


def test_the_file_based_layout_has_its_three_files(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    fetch_run(store, manifest, tmp_path / "to", "mistudio")
    assert files_in(tmp_path / "to") == {
        "activations/job/feature_activations.pt": b"bundle",
        "activations/job/metadata.json": b"{}",
        "models/job/sae_model.pt": b"model",
    }


def test_a_run_without_a_model_has_no_such_layout(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    manifest.objects = [ref for ref in manifest.objects if ref.name != "sae_model.pt"]
    with pytest.raises(ArtifactDamaged, match=r"no sae_model\.pt"):
        fetch_run(store, manifest, tmp_path / "to", "mistudio")


def test_one_flipped_bit_is_found_and_nothing_is_left(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    store.put_bytes("jobs/job/runs/1/a1/sae/sae_weights.safetensors", b"\0" * 500 + b"\1" + b"\0" * 499)
    with pytest.raises(ArtifactDamaged, match=r"sae_weights\.safetensors is damaged") as raised:
        fetch_run(store, manifest, tmp_path / "to")
    assert "run the job again" in raised.value.hint
    assert list((tmp_path / "to").iterdir()) == []


def test_a_damaged_object_replaces_nothing(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    fetch_run(store, manifest, tmp_path / "to")
    store.put_bytes("jobs/job/runs/1/a1/sae_model.pt", b"wrong")
    with pytest.raises(ArtifactDamaged):
        fetch_run(store, manifest, tmp_path / "to")
    assert files_in(tmp_path / "to") == FILES


def test_a_missing_object_is_told(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    store.delete(["jobs/job/runs/1/a1/metadata.json"])
    with pytest.raises(ArtifactDamaged, match=r"metadata\.json is missing"):
        fetch_run(store, manifest, tmp_path / "to")


def test_a_manifest_that_was_changed_is_not_believed(store: Store, claim: Claim, output: Path) -> None:
    ref = write_manifest(store, claim, upload(store, claim, output))
    data = store.get_bytes(ref.key)[0]
    store.put_bytes(ref.key, data.replace(b'"run": 1', b'"run": 2'))
    with pytest.raises(ArtifactDamaged, match=r"manifest\.json is damaged"):
        read_manifest(store, ref.key, ref.sha256)
    store.delete([ref.key])
    with pytest.raises(ArtifactDamaged, match=r"manifest\.json is missing"):
        read_manifest(store, ref.key, ref.sha256)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\0b", ""])
def test_names_that_lead_out_of_the_folder_are_refused(
    store: Store, manifest: Manifest, tmp_path: Path, name: str
) -> None:
    manifest.objects.append(manifest.objects[0].model_copy(update={"name": name}))
    with pytest.raises(ArtifactDamaged, match="unsafe"):
        fetch_run(store, manifest, tmp_path / "to")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("change", [{"bucket": "no-such-bucket"}, {"bucket": "../.."}, {"key": "../../etc/passwd"}])
def test_objects_elsewhere_are_missing(
    store: Store, manifest: Manifest, tmp_path: Path, change: dict[str, str]
) -> None:
    manifest.objects[0] = ArtifactRef.model_validate(manifest.objects[0].model_dump() | change)
    with pytest.raises(ArtifactDamaged, match="is missing"):
        fetch_run(store, manifest, tmp_path / "to")
