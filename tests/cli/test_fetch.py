"""`fetch` brings the newest finished run from the real store, and only if every byte is as it was written."""

import json
from pathlib import Path

import pytest

from mistudio_schemas import ErrorCode
from mistudio_train.settings import Settings
from mistudio_train.worker.artifacts import upload, write_manifest
from mistudio_train.worker.delivery import Place
from mistudio_train.worker.register import MessageId, Register
from mistudio_train.worker.run_record import Claim
from mistudio_train.worker.store import Store, open_store
from tests.cli.conftest import Cli
from tests.cli.events import completed, failed

FILES = ("sae_model.pt", "feature_activations.pt", "metadata.json", "sae/cfg.json")


@pytest.fixture
def store(worker_env: dict[str, str], worker_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in worker_env.items():
        monkeypatch.setenv(name, value)
    opened = open_store(worker_settings)
    opened.ensure()
    return opened


def begin(store: Store, offset: int) -> Claim:
    message = MessageId(group="g", topic="t", partition=0, offset=offset, timestamp=0, value_sha256="0" * 64)
    return Register(store).create("j", message, "w")


def finish(store: Store, claim: Claim, folder: Path) -> None:
    """As a worker ends a run: files, manifest, register."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of run {claim.record.run}")
    refs = upload(store, claim, folder)
    manifest = write_manifest(store, claim, refs)
    event = completed("j", claim.record.run).model_copy(update={"artifacts": refs, "manifest": manifest})
    Register(store).finish(claim, event, Place("t", 0, 0))


def test_the_newest_finished_run_is_fetched(cli: Cli, store: Store, tmp_path: Path) -> None:
    finish(store, begin(store, 0), tmp_path / "one")
    finish(store, begin(store, 1), tmp_path / "two")
    Register(store).finish(begin(store, 2), failed("j", 3), Place("t", 0, 0))
    to = tmp_path / "fetched"
    ended = cli("fetch", "j", "--to", to)
    assert ended.status == 0, ended.err
    assert sorted(ended.out.splitlines()) == sorted(str(to / name) for name in (*FILES, "manifest.json"))
    assert (to / "sae/cfg.json").read_text() == "sae/cfg.json of run 2"
    assert "SAELens" in ended.err


def test_another_run_in_the_layout_of_miStudioFind(cli: Cli, store: Store, tmp_path: Path) -> None:  # noqa: N802
    finish(store, begin(store, 0), tmp_path / "one")
    finish(store, begin(store, 1), tmp_path / "two")
    to = tmp_path / "fetched"
    ended = cli("fetch", "j", "--to", to, "--run", "1", "--layout", "mistudio", "--json")
    places = {"models/j/sae_model.pt", "activations/j/feature_activations.pt", "activations/j/metadata.json"}
    assert json.loads(ended.out)["run"] == 1
    assert set(json.loads(ended.out)["files"]) == {str(to / place) for place in places}
    assert (to / "models/j/sae_model.pt").read_text() == "sae_model.pt of run 1"


def test_a_damaged_file_is_not_delivered(cli: Cli, store: Store, tmp_path: Path) -> None:
    claim = begin(store, 0)
    finish(store, claim, tmp_path / "one")
    store.put_bytes(f"{claim.attempt_prefix}metadata.json", b"something else")
    to = tmp_path / "fetched"
    ended = cli("fetch", "j", "--to", to)
    assert (ended.status, ended.out) == (2, "")
    assert "metadata.json is damaged" in ended.err
    assert [path for path in to.rglob("*") if path.is_file()] == []


def test_what_is_not_there_is_said(cli: Cli, store: Store, tmp_path: Path) -> None:
    to = tmp_path / "fetched"
    assert "the store has no run of j" in cli("fetch", "j", "--to", to).err
    assert "is no job's id" in cli("fetch", "../j", "--to", to).err
    claim = begin(store, 0)
    assert "run 1 is running" in cli("fetch", "j", "--to", to).err
    Register(store).attempt_failed(claim, ErrorCode.INTERNAL, "x")
    ended = cli("fetch", "j", "--to", to, "--run", "7")
    assert (ended.status, ended.out) == (2, "")
    assert "j run 7" in ended.err


@pytest.mark.usefixtures("nowhere")
def test_no_store(cli: Cli, tmp_path: Path) -> None:
    ended = cli("fetch", "j", "--to", tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert "127.0.0.1:9" in ended.err
    assert "Traceback" not in ended.err
