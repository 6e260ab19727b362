"""What holds for every store, and what is special to each."""

import errno
import fcntl
import hashlib
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from pydantic import SecretStr
from urllib3.util import Timeout

from mistudio_train.errors import DiskFull
from mistudio_train.settings import Settings
from mistudio_train.worker.objects import receive
from mistudio_train.worker.store import (
    Copied,
    DirectoryStore,
    KeyRefused,
    NotFound,
    S3Store,
    Store,
    StoreForbids,
    StoreUnavailable,
    open_store,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
UNSAFE = ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a//b", "a/", "./a", "a\0b", "a\nb", "a\\..\\b"]
SECRET = "a-very-secret-key"


class TestEveryStore:
    """The contract."""

    def test_bytes_come_back_with_their_etag(self, store: Store) -> None:
        store.put_bytes("a/b.txt", b"abc", "text/plain")
        data, etag = store.get_bytes("a/b.txt")
        assert data == b"abc"
        assert store.put_if_match("a/b.txt", b"abcd", etag) is not None

    def test_a_file_is_hashed_on_its_way_and_comes_back(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "in").write_bytes(b"abc")
        seen: list[int] = []
        assert store.put_file("k", tmp_path / "in", on_bytes=seen.append) == Copied(3, ABC)
        assert sum(seen) == 3
        assert store.get_file("k", tmp_path / "new" / "out") == Copied(3, ABC)
        assert (tmp_path / "new" / "out").read_bytes() == b"abc"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]

    def test_a_file_of_several_parts_is_whole(self, store: Store, tmp_path: Path) -> None:
        data = bytes(range(256)) * (40 * 4096)  # 40 MiB: three parts
        (tmp_path / "in").write_bytes(data)
        expected = Copied(len(data), hashlib.sha256(data).hexdigest())
        assert store.put_file("big", tmp_path / "in") == expected
        assert store.get_file("big", tmp_path / "out") == expected

    def test_an_empty_file_is_a_file(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "in").touch()
        assert store.put_file("empty", tmp_path / "in").size == 0
        assert store.get_bytes("empty")[0] == b""

    def test_what_the_callback_raises_ends_the_transfer_and_stores_nothing(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "in").write_bytes(b"x" * 100)

        class RunWasLost(Exception):
            pass

        def stop(_: int) -> None:
            raise RunWasLost

        with pytest.raises(RunWasLost):
            store.put_file("k", tmp_path / "in", on_bytes=stop)
        assert list(store.list("")) == []

    def test_what_is_not_there_is_not_found(self, store: Store, tmp_path: Path) -> None:
        asks: list[Callable[[], object]] = [
            lambda: store.get_bytes("no"),
            lambda: store.stat("no/such"),
            lambda: store.get_file("no", tmp_path / "out"),
            lambda: store.get_file("no", tmp_path / "out", "another-bucket"),
        ]
        for ask in asks:
            with pytest.raises(NotFound, match="there is no object"):
                ask()
        assert list(tmp_path.glob("*out*")) == []

    def test_list_is_by_prefix_and_in_order(self, store: Store) -> None:
        for key in ["b/2", "b/10", "b/1/x", "bc", "a"]:
            store.put_bytes(key, key.encode())
        assert [found.key for found in store.list("b/")] == ["b/1/x", "b/10", "b/2"]
        assert [found.key for found in store.list("b/1")] == ["b/1/x", "b/10"]
        assert [(found.key, found.size) for found in store.list("")] == [
            ("a", 1),
            ("b/1/x", 5),
            ("b/10", 4),
            ("b/2", 3),
            ("bc", 2),
        ]
        assert list(store.list("nothing/")) == []

    def test_folders_are_the_next_part_of_the_keys(self, store: Store) -> None:
        for key in ["jobs/a/runs/1/run.json", "jobs/a/runs/10/run.json", "jobs/b/x", "jobs/file"]:
            store.put_bytes(key, b"")
        assert list(store.folders("jobs/")) == ["a", "b"]
        assert list(store.folders("jobs/a/runs/")) == ["1", "10"]
        assert list(store.folders("none/")) == []

    def test_stat_tells_size_and_time(self, store: Store) -> None:
        store.put_bytes("k", b"12345")
        found = store.stat("k")
        assert (found.key, found.size) == ("k", 5)
        assert abs(found.modified.timestamp() - time.time()) < 60

    def test_delete_removes_and_forgives(self, store: Store) -> None:
        for key in ["a/1", "a/2", "b"]:
            store.put_bytes(key, b"x")
        store.delete(["a/1", "a/2", "never/there"])
        assert [found.key for found in store.list("")] == ["b"]
        store.delete([])

    def test_only_one_can_be_first(self, store: Store) -> None:
        assert store.put_if_absent("k", b"first") is not None
        assert store.put_if_absent("k", b"second") is None
        assert store.get_bytes("k")[0] == b"first"

    def test_a_stale_etag_loses(self, store: Store) -> None:
        first = store.put_if_absent("k", b"1")
        assert first is not None
        second = store.put_if_match("k", b"2", first)
        assert second is not None
        assert store.put_if_match("k", b"3", first) is None
        assert store.get_bytes("k") == (b"2", second)
        assert store.put_if_match("gone", b"x", second) is None

    @pytest.mark.parametrize("race", range(10))
    def test_of_eight_creators_one_wins(self, store: Store, race: int) -> None:
        results = at_once(8, lambda n: store.put_if_absent(f"race-{race}", b"%d" % n))
        (winner,) = [n for n, etag in enumerate(results) if etag is not None]
        assert store.get_bytes(f"race-{race}") == (b"%d" % winner, results[winner])

    @pytest.mark.parametrize("race", range(10))
    def test_of_eight_swappers_one_wins(self, store: Store, race: int) -> None:
        etag = store.put_if_absent(f"race-{race}", b"start")
        assert etag is not None
        results = at_once(8, lambda n: store.put_if_match(f"race-{race}", b"%d" % n, etag))
        (winner,) = [n for n, new in enumerate(results) if new is not None]
        assert store.get_bytes(f"race-{race}") == (b"%d" % winner, results[winner])

    @pytest.mark.parametrize("key", UNSAFE)
    def test_keys_that_lead_out_are_refused(self, store: Store, tmp_path: Path, key: str) -> None:
        (tmp_path / "in").write_bytes(b"x")
        for ask in (
            lambda: store.put_bytes(key, b"x"),
            lambda: store.put_file(key, tmp_path / "in"),
            lambda: store.put_if_absent(key, b"x"),
            lambda: store.put_if_match(key, b"x", "etag"),
            lambda: store.get_bytes(key),
            lambda: store.get_file(key, tmp_path / "out"),
            lambda: store.stat(key),
            lambda: store.delete([key]),
        ):
            with pytest.raises(KeyRefused):
                ask()
        assert list(store.list("")) == []

    def test_a_key_may_have_any_letters(self, store: Store) -> None:
        for key in ["corpora/naïve ☃ 100%+&?#=.txt", "a/..b/c..", "x:y*z"]:
            store.put_bytes(key, b"x")
            assert store.get_bytes(key)[0] == b"x"
            assert store.put_if_absent(key, b"y") is None

    def test_ensure_can_be_called_again(self, store: Store) -> None:
        store.put_bytes("k", b"x")
        store.ensure()
        assert store.get_bytes("k")[0] == b"x"


def at_once(n: int, act: Callable[[int], str | None]) -> list[str | None]:
    """The results of `n` threads that start together."""
    barrier = threading.Barrier(n)

    def run(i: int) -> str | None:
        barrier.wait(10)
        return act(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


# S3 alone


@pytest.fixture
def s3(worker_settings: Settings) -> Iterator[S3Store]:
    with closing(S3Store(worker_settings)) as store:
        store.ensure()
        yield store


def s3_at(endpoint: str, **settings: object) -> S3Store:
    asked = {"minio_endpoint": endpoint, "minio_access_key": "someone", "minio_secret_key": SECRET} | settings
    return S3Store(Settings.model_validate(asked), timeout=Timeout(connect=0.2, read=0.1))


@pytest.fixture
def answering() -> Iterator[Callable[[bytes | None], str]]:
    """Starts servers that answer every request with the same bytes and hang up, or never answer (`None`)."""
    servers: list[socket.socket] = []
    connections: list[socket.socket] = []

    def start(answer: bytes | None) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        threading.Thread(target=serve, args=(server, answer), daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    def serve(server: socket.socket, answer: bytes | None) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # the test is over
                return
            connections.append(connection)
            if answer is not None:
                with suppress(OSError):  # a client that has hung up already wants no answer
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)  # ends `accept`
    for one in servers + connections:
        one.close()


def every_call(store: Store, tmp_path: Path) -> list[Callable[[], object]]:
    (tmp_path / "in").write_bytes(b"abc")
    return [
        store.ensure,
        lambda: store.put_bytes("k", b"x"),
        lambda: store.put_file("k", tmp_path / "in"),
        lambda: store.put_if_absent("k", b"x"),
        lambda: store.put_if_match("k", b"x", "etag"),
        lambda: store.get_bytes("k"),
        lambda: store.get_file("k", tmp_path / "out"),
        lambda: store.stat("k"),
        lambda: list(store.list("")),
        lambda: list(store.folders("")),
        lambda: store.delete(["k"]),
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert isinstance(port, int)
    return port


def test_a_store_that_hangs_is_unavailable_in_time(
    answering: Callable[[bytes | None], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(s3_at(answering(None))) as store:
        for call in every_call(store, tmp_path):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="no answer in time") as raised:
                call()
            assert time.monotonic() - began < 3
            assert_tells_nothing(raised.value, caplog)


def test_a_store_that_is_away_is_unavailable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(s3_at(f"127.0.0.1:{free_port()}")) as store:
        for call in every_call(store, tmp_path):
            with pytest.raises(StoreUnavailable, match="no connection") as raised:
                call()
            assert "MINIO_ENDPOINT" in raised.value.hint
            assert raised.value.retryable
            assert_tells_nothing(raised.value, caplog)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Oops\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\noops",
        b"HTTP/1.1 403 No\r\nContent-Type: application/xml\r\nContent-Length: 6\r\n\r\n<Error",
        b"HTTP/1.1 409 Conflict\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
        b"not even HTTP",
        b"",
    ],
)
def test_an_answer_that_is_no_s3_is_unavailable(
    answer: bytes, answering: Callable[[bytes | None], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(s3_at(answering(answer))) as store:
        for call in every_call(store, tmp_path):
            with pytest.raises(StoreUnavailable) as raised:
                call()
            assert_tells_nothing(raised.value, caplog)


def test_a_download_that_is_cut_leaves_nothing(answering: Callable[[bytes | None], str], tmp_path: Path) -> None:
    cut = b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 1000\r\n\r\nonly this"
    with closing(s3_at(answering(cut))) as store:
        with pytest.raises(StoreUnavailable, match="the connection broke"):
            store.get_file("k", tmp_path / "out")
        with pytest.raises(StoreUnavailable, match="the connection broke"):
            store.get_bytes("k")
    assert list(tmp_path.iterdir()) == []


def test_wrong_credentials_are_told_without_them(
    s3: S3Store, worker_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    s3.put_bytes("k", b"x")
    wrong = worker_settings.model_copy(update={"minio_secret_key": SecretStr(SECRET)})
    with closing(S3Store(wrong)) as store:
        for call in every_call(store, tmp_path):
            with pytest.raises(StoreForbids, match=r"SignatureDoesNotMatch|AccessDenied") as raised:
                call()
            assert "MINIO_SECRET_KEY" in raised.value.hint
            assert_tells_nothing(raised.value, caplog)


def test_a_bucket_that_is_gone_is_unavailable_and_no_missing_object(worker_settings: Settings, tmp_path: Path) -> None:
    with closing(S3Store(worker_settings)) as store:
        calls = [call for call in every_call(store, tmp_path) if call != store.ensure]
        for call in calls:
            with pytest.raises(StoreUnavailable, match="NoSuchBucket") as raised:
                call()
            assert "Create the bucket" in raised.value.hint


def test_buckets_are_made_by_many_workers_at_once(worker_settings: Settings) -> None:
    with closing(S3Store(worker_settings)) as store:
        assert at_once(4, lambda _: store.ensure()) == [None] * 4
        store.put_bytes("k", b"x")


def test_another_bucket_can_be_read(s3: S3Store, worker_settings: Settings, tmp_path: Path) -> None:
    other = worker_settings.model_copy(update={"minio_bucket": f"{worker_settings.minio_bucket}-other"})
    with closing(S3Store(other)) as store:
        store.ensure()
        store.put_bytes("k", b"abc")
    assert s3.get_file("k", tmp_path / "out", other.minio_bucket) == Copied(3, ABC)


def test_a_small_pool_serves_many_threads_without_a_warning(s3: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    at_once(16, lambda n: s3.put_bytes(f"k{n}", b"x"))
    assert len(list(s3.list("k"))) == 16
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("wrong", [{"minio_endpoint": f"http://u:{SECRET}@host"}, {"minio_bucket": "No_Bucket"}])
def test_settings_that_name_no_store_are_told(wrong: dict[str, str]) -> None:
    with pytest.raises(StoreUnavailable, match="do not name an object store") as raised:
        S3Store(Settings.model_validate(wrong))
    assert SECRET not in "".join(traceback.format_exception(raised.value))


def assert_tells_nothing(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the error, nor what it came from, nor the log has a secret or a signed URL."""
    shown = "".join(traceback.format_exception(error))
    context = error.__context__ or error
    logged = "".join(record.getMessage() for record in caplog.records if record.levelno >= logging.INFO)
    for text in (shown, str(error), repr(error), str(context), logged):
        assert SECRET not in text
        assert "X-Amz-" not in text
        assert "Signature=" not in text


# the directory alone


@pytest.fixture
def folder(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path / "store", lock_seconds=0.1)
    store.ensure()
    return store


def test_the_store_s_own_files_are_no_objects(folder: DirectoryStore) -> None:
    folder.put_bytes("k", b"x")
    assert [found.key for found in folder.list("")] == ["k"]
    assert list(folder.folders("")) == []
    with pytest.raises(KeyRefused, match="own"):
        folder.put_bytes(".mistudio/lock", b"x")


def test_folders_go_with_their_last_object(folder: DirectoryStore, tmp_path: Path) -> None:
    folder.put_bytes("jobs/a/x", b"x")
    folder.delete(["jobs/a/x"])
    assert not (tmp_path / "store" / "jobs").exists()


def test_a_lock_that_is_held_is_waited_for_and_told(folder: DirectoryStore, tmp_path: Path) -> None:
    with (tmp_path / "store" / ".mistudio" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="has been locked"):
            folder.put_bytes("k", b"x")
    folder.put_bytes("k", b"x")
    assert [path.name for path in (tmp_path / "store" / ".mistudio").iterdir()] == ["lock"]


def test_a_folder_that_is_gone_is_unavailable_and_no_empty_store(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    for call in [call for call in every_call(store, tmp_path) if call != store.ensure]:
        with pytest.raises(StoreUnavailable, match="ENOENT") as raised:
            call()
        assert "STORE_PATH" in raised.value.hint


def test_a_place_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match=r"cannot be written to: E(EXIST|NOTDIR)"):
        DirectoryStore(tmp_path / "file").ensure()


# which one


def test_the_settings_choose_the_store(tmp_path: Path) -> None:
    folder = open_store(Settings(store_path=tmp_path, store_prefix="team/"))
    assert isinstance(folder, DirectoryStore)
    assert (folder.bucket, folder.prefix) == (str(tmp_path), "team/")
    assert folder.uri("team/a b") == f"file://{tmp_path}/team/a%20b"
    assert folder.uri("team/") == f"file://{tmp_path}/team/"
    with closing(open_store(Settings(minio_bucket="bucket"))) as s3:
        assert isinstance(s3, S3Store)
        assert (s3.bucket, s3.prefix) == ("bucket", "")
        assert s3.uri("a/b") == "s3://bucket/a/b"
        assert s3.uri("a/") == "s3://bucket/a/"


def test_a_disk_that_is_full_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="is full"):
        receive(tmp_path / "out", chunks())
    assert list(tmp_path.iterdir()) == []
