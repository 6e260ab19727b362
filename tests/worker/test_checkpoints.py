"""Checkpoints in every kind of store: up, pruned, down again, lost and damaged; and nothing of a run that is lost."""

import asyncio
import errno
import hashlib
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistudio_train.errors import DiskFull, StoreUnavailable
from mistudio_train.worker import checkpoints
from mistudio_train.worker.artifacts import remove_leftovers
from mistudio_train.worker.checkpoints import CheckpointUploads, Stored, restore
from mistudio_train.worker.intake import Message
from mistudio_train.worker.register import Claim, MessageId, Register, RunLost
from mistudio_train.worker.store import DirectoryStore, Store

MESSAGE = Message("train.requested", 0, 7, 1_700_000_000_000, b"job-1", b"{}")
SHARD = "scratch/activations/1-resid_post/shard-00000.bin"


@pytest.fixture
def claim(store: Store) -> Claim:
    return Register(store).create("job-1", MessageId.of(MESSAGE, "group"), "worker-1")


def save(workspace: Path, number: int, files: dict[str, bytes]) -> None:
    """As a child does."""
    for name, data in files.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_bytes(data)
    refs = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (workspace / "checkpoints").mkdir(parents=True, exist_ok=True)
    (workspace / "checkpoints" / f"{number:06d}.json").write_text(json.dumps({"number": number, "files": refs}))


class Uploading:
    """Uploads of one attempt, and what they say."""

    def __init__(self, store: Store, claim: Claim, workspace: Path, known: list[Stored] | None = None) -> None:
        self.said: list[str] = []
        register = Register(store)
        self.uploads = CheckpointUploads(
            store,
            claim,
            workspace,
            known or [],
            lambda: register.require_ours(claim),
            self.said.append,
            lambda: self.said.append("lost"),
        )

    async def store(self, number: int) -> bool:
        self.uploads.hear(number)
        return await self.uploads.flush(asyncio.get_running_loop().time() + 20)


def keys(store: Store) -> list[str]:
    return [found.key.removeprefix("jobs/job-1/runs/1/") for found in store.list("jobs/job-1/runs/1/")]


async def test_a_checkpoint_goes_up_and_comes_down_whole(store: Store, claim: Claim, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    files = {SHARD: b"activations" * 1000, "checkpoints/000001-sae0.pt": b"state"}
    save(here, 1, files)
    up = Uploading(store, claim, here)
    assert await up.store(1)
    assert up.said == ["jobs/job-1/runs/1/a1/checkpoints/000001.json"]
    (found,) = restore(store, claim, there)
    assert found.key == up.said[0]
    assert {name: (there / name).read_bytes() for name in files} == files
    index = "checkpoints/000001.json"
    assert (there / index).read_bytes() == (here / index).read_bytes()


async def test_a_checkpoint_that_has_half_come_down_is_none(
    store: Store, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt of this worker fetches it again."""

    def refuse(*_: Any, **__: Any) -> None:
        raise DiskFull("it is full", "Free space.")

    here, there = tmp_path / "here", tmp_path / "there"
    save(here, 1, {SHARD: b"activations"})
    assert await Uploading(store, claim, here).store(1)
    monkeypatch.setattr(type(store), "get_file", refuse)
    with pytest.raises(DiskFull):
        restore(store, claim, there)
    assert not list(there.rglob("*.json"))


async def test_the_last_two_are_kept_and_what_both_name_is_stored_once(
    store: Store, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, real = Uploading(store, claim, tmp_path), type(store).put_file
    stored: list[str] = []

    def put_file(store: Store, key: str, *arguments: Any, **options: Any) -> Any:
        stored.append(key)
        return real(store, key, *arguments, **options)

    monkeypatch.setattr(type(store), "put_file", put_file)
    for number in range(1, 5):
        save(tmp_path, number, {SHARD: b"shard", f"checkpoints/{number:06d}-sae0.pt": b"state %d" % number})
        assert await up.store(number)
    prefix = "a1/checkpoints/"
    assert keys(store) == [
        f"{prefix}000003.json",
        f"{prefix}000004.json",
        f"{prefix}files/checkpoints/000003-sae0.pt",
        f"{prefix}files/checkpoints/000004-sae0.pt",
        f"{prefix}files/{SHARD}",
        "run.json",
    ]
    assert len([key for key in stored if key.endswith(SHARD)]) == 1


async def test_a_later_attempt_goes_on_from_the_earlier_ones_files_and_prunes_them(
    store: Store, claim: Claim, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save(first, 1, {SHARD: b"shard", "checkpoints/000001-sae0.pt": b"one"})
    assert await Uploading(store, claim, first).store(1)
    taken = Register(store).take_over(claim, "worker-2")
    known = restore(store, taken, second)
    up = Uploading(store, taken, second, known)
    for number in (2, 3):
        save(second, number, {SHARD: b"shard", f"checkpoints/{number:06d}-sae0.pt": b"state"})
        assert await up.store(number)
    assert keys(store) == [
        f"a1/checkpoints/files/{SHARD}",
        "a2/checkpoints/000002.json",
        "a2/checkpoints/000003.json",
        "a2/checkpoints/files/checkpoints/000002-sae0.pt",
        "a2/checkpoints/files/checkpoints/000003-sae0.pt",
        "run.json",
    ]
    newest, _ = restore(store, taken, tmp_path / "third")
    assert newest.number == 3
    assert (tmp_path / "third" / SHARD).read_bytes() == b"shard"


async def test_a_file_of_the_same_name_and_other_content_is_stored_again(
    store: Store, claim: Claim, tmp_path: Path
) -> None:
    """The corpus was replaced: what an earlier attempt has kept is of no use."""
    save(tmp_path / "first", 1, {SHARD: b"old"})
    assert await Uploading(store, claim, tmp_path / "first").store(1)
    taken = Register(store).take_over(claim, "worker-2")
    known = restore(store, taken, tmp_path / "second")
    save(tmp_path / "second", 2, {SHARD: b"new"})
    assert await Uploading(store, taken, tmp_path / "second", known).store(2)
    restore(store, taken, tmp_path / "third")
    assert (tmp_path / "third" / SHARD).read_bytes() == b"new"


async def test_a_run_that_is_lost_gets_nothing_more(store: Store, claim: Claim, tmp_path: Path) -> None:
    save(tmp_path, 1, {SHARD: b"shard"})
    Register(store).take_over(claim, "worker-2")
    up = Uploading(store, claim, tmp_path)
    assert await up.store(1)  # nothing is left to be done
    assert isinstance(up.uploads.lost, RunLost)
    assert up.said == ["lost"]
    assert keys(store) == ["run.json"]


async def test_what_is_damaged_in_the_store_is_done_without(store: Store, claim: Claim, tmp_path: Path) -> None:
    up = Uploading(store, claim, tmp_path / "here")
    for number in (1, 2):
        save(tmp_path / "here", number, {f"checkpoints/{number:06d}-sae0.pt": b"state %d" % number, SHARD: b"shard"})
        assert await up.store(number)
    prefix = "jobs/job-1/runs/1/a1/checkpoints/"
    store.delete([f"{prefix}files/{SHARD}"])
    store.put_bytes(f"{prefix}000002.json", b'{"number": 2, "index": "{", "files"')
    store.put_bytes(f"{prefix}000003.json", json.dumps({"number": 3, "index": "{}", "files": {"../x": "y"}}).encode())
    (found,) = restore(store, claim, tmp_path / "there")
    assert found.number == 1
    assert (tmp_path / "there" / "checkpoints" / "000001-sae0.pt").read_bytes() == b"state 1"
    assert not (tmp_path / "there" / SHARD).exists()
    assert not (tmp_path / "x").exists()


async def test_a_checkpoint_that_the_child_has_let_go_of_is_passed_by(
    store: Store, claim: Claim, tmp_path: Path
) -> None:
    up = Uploading(store, claim, tmp_path)
    save(tmp_path, 1, {"checkpoints/000001-sae0.pt": b"state"})
    (tmp_path / "checkpoints/000001-sae0.pt").unlink()
    up.uploads.hear(1)
    assert not await up.uploads.flush(asyncio.get_running_loop().time() + 0.2)
    save(tmp_path, 2, {"checkpoints/000002-sae0.pt": b"state"})
    assert await up.store(2)
    assert keys(store)[0] == "a1/checkpoints/000002.json"


class AwayTwice(DirectoryStore):
    """A store that is away for the first two files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.refusals = 2

    def put_file(self, *arguments: Any, **options: Any) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("it is away", "Wait.")
        return super().put_file(*arguments, **options)


@pytest.fixture
def away(tmp_path: Path) -> AwayTwice:
    store = AwayTwice(tmp_path / "store")
    store.ensure()
    return store


async def test_a_store_that_is_away_is_waited_for(away: AwayTwice, tmp_path: Path) -> None:
    claim = Register(away).create("job-1", MessageId.of(MESSAGE, "group"), "worker-1")
    save(tmp_path, 1, {SHARD: b"shard"})
    assert await Uploading(away, claim, tmp_path).store(1)
    assert away.refusals == 0


async def test_a_volume_without_links_gets_copies(
    store: Store, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "here", 1, {SHARD: b"shard"})
    assert await Uploading(store, claim, tmp_path / "here").store(1)
    restore(store, claim, tmp_path / "there")
    assert (tmp_path / "there" / SHARD).read_bytes() == b"shard"


async def test_a_disk_that_refuses_is_tried_again(
    store: Store, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors, mkdir = [OSError(errno.EIO, "it stutters")], Path.mkdir

    def stutter(self: Path, *given: Any, **options: Any) -> None:
        if errors and "outgoing" in self.parts:
            raise errors.pop()
        mkdir(self, *given, **options)

    save(tmp_path, 1, {SHARD: b"shard"})
    monkeypatch.setattr(Path, "mkdir", stutter)
    assert await Uploading(store, claim, tmp_path).store(1)
    assert "checkpoint 1 is not in the store yet: [Errno 5] it stutters" in caplog.text


async def test_the_newest_checkpoint_is_taken_while_the_child_works(store: Store, claim: Claim, tmp_path: Path) -> None:
    save(tmp_path, 1, {SHARD: b"shard"})
    stored = asyncio.Event()
    register = Register(store)
    uploads = CheckpointUploads(
        store, claim, tmp_path, [], lambda: register.require_ours(claim), lambda _: stored.set(), lambda: None
    )
    async with uploads, asyncio.timeout(20):
        uploads.hear(1)
        await stored.wait()
    assert "a1/checkpoints/000001.json" in keys(store)


async def test_storing_pauses_for_its_share_of_the_time(
    store: Store, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an upload that takes a second a pause of 49 follows."""
    pauses: asyncio.Queue[float] = asyncio.Queue()

    async def pause(seconds: float) -> None:
        pauses.put_nowait(seconds)
        await asyncio.Event().wait()

    seconds = itertools.count()
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(checkpoints, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": pause}))
    save(tmp_path, 1, {SHARD: b"shard"})
    async with Uploading(store, claim, tmp_path).uploads as uploads, asyncio.timeout(20):
        uploads.hear(1)
        assert await pauses.get() == pytest.approx(49)


async def test_of_a_run_that_has_failed_nothing_is_left(store: Store, claim: Claim, tmp_path: Path) -> None:
    save(tmp_path, 1, {SHARD: b"shard"})
    assert await Uploading(store, claim, tmp_path).store(1)
    remove_leftovers(store, claim)
    assert keys(store) == ["run.json"]
