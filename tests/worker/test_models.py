"""Models of buckets: which may be named, and one folder of each that jobs and workers share, whole or not there."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from mistudio_schemas import ErrorCode
from mistudio_train.errors import DiskFull, ModelRefused
from mistudio_train.settings import Settings
from mistudio_train.training.identity import content_of
from mistudio_train.training.model_source import inspect
from mistudio_train.worker.model_cache import ModelCache
from mistudio_train.worker.models import fetch_model
from mistudio_train.worker.orders import Interrupted
from mistudio_train.worker.store import Store, StoreForbids, StoreUnavailable, open_store

FILES = {
    "config.json": b'{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 9}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
}
OTHERS = {"README.md": b"#", "modeling_x.py": b"print()", "onnx/model.onnx": b"x", "pytorch_model.bin": b"pickle"}


@pytest.fixture
def s3(worker_settings: Settings) -> Iterator[Store]:
    store = open_store(worker_settings)
    store.ensure()
    yield store
    store.close()


def put(store: Store, folder: str = "models/mine", files: dict[str, bytes] = FILES) -> str:
    for name, content in files.items():
        store.put_bytes(f"{folder}/{name}", content)
    return f"s3://{store.bucket}/{folder}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class Counting:
    """A store that counts what is fetched from it, and may do something before each."""

    def __init__(self, store: Store, before: Any = lambda key: None) -> None:
        self._store, self._before = store, before
        self.fetched: list[str] = []

    def get_file(self, key: str, path: Path, bucket: str | None = None) -> object:
        self._before(key)
        self.fetched.append(key.rpartition("/")[2])
        return self._store.get_file(key, path, bucket)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def counting(store: Store, before: Any = lambda key: None) -> Any:
    return Counting(store, before)


def test_a_models_files_are_fetched_once_and_no_others(s3: Store, worker_settings: Settings) -> None:
    uri, store = put(s3, files=FILES | OTHERS), counting(s3)
    held = fetch_model(uri, worker_settings, store)
    assert {name: (held.folder / name).read_bytes() for name in names_in(held.folder)} == FILES
    assert fetch_model(f"{uri}/", worker_settings, store).folder == held.folder
    assert sorted(store.fetched) == sorted(FILES)
    unsafe = fetch_model(uri, worker_settings.model_copy(update={"allow_unsafe_models": True}), store)
    assert names_in(unsafe.folder) == sorted([*FILES, "modeling_x.py", "pytorch_model.bin"])


def test_the_same_files_elsewhere_are_the_same_model_and_changed_ones_another(
    s3: Store, worker_settings: Settings, tmp_path: Path
) -> None:
    sources = []
    for number, name in enumerate(("a", "b")):
        settings = worker_settings.model_copy(update={"data_path": tmp_path / str(number)})
        held = fetch_model(put(s3, name), settings, s3)
        sources.append(inspect("s3://any/name", brought=held.folder))
    assert sources[0].folder != sources[1].folder
    assert content_of(sources[0]) == content_of(sources[1])
    assert sources[0].info(1).actual_model_loaded == "s3://any/name"
    before = fetch_model(put(s3), worker_settings, s3)
    changed = put(s3, files={"model.safetensors": b"others!" * 1000})  # of the same size
    after = fetch_model(changed, worker_settings, s3)
    assert after.folder != before.folder
    assert (after.folder / "model.safetensors").read_bytes() == b"others!" * 1000


def refused(uri: str, settings: Settings, store: Store) -> ErrorCode:
    with pytest.raises(ModelRefused) as caught:
        fetch_model(uri, settings, store)
    assert caught.value.hint
    assert str(caught.value).isprintable()
    for secret in filter(None, (settings.minio_access_key, settings.minio_secret_key)):
        assert secret.get_secret_value() not in f"{caught.value} {caught.value.hint}"
    assert not settings.model_cache.exists() or not names_in(settings.model_cache)
    return caught.value.code


def test_what_is_missing_forbidden_or_no_model_is_told_apart(s3: Store, worker_settings: Settings) -> None:
    own, allowing = s3.bucket, worker_settings.model_copy(update={"model_buckets": ["no-such-bucket", "Not_A_Bucket"]})
    expected = {
        f"s3://{own}/nothing/here": ErrorCode.MODEL_NOT_FOUND,
        "s3://no-such-bucket/m": ErrorCode.MODEL_NOT_FOUND,
        "s3://Not_A_Bucket/m": ErrorCode.MODEL_NOT_FOUND,
        "s3://elsewhere/m": ErrorCode.MODEL_NOT_ALLOWED,
        f"s3://{own}": ErrorCode.MODEL_NOT_ALLOWED,
        f"s3://{own}//": ErrorCode.MODEL_NOT_ALLOWED,
        "s3:///m": ErrorCode.MODEL_NOT_ALLOWED,
        f"s3://{own}/a/../b": ErrorCode.MODEL_NOT_ALLOWED,
        f"s3://{own}/a\nb": ErrorCode.MODEL_NOT_ALLOWED,
        f"s3://x/../{own}/m": ErrorCode.MODEL_NOT_ALLOWED,
        put(s3, "bare", {"model.safetensors": b"x"}): ErrorCode.MODEL_UNSUPPORTED,
        put(s3, "deep", {"sub/config.json": b"{}"}): ErrorCode.MODEL_UNSUPPORTED,
        put(s3, "pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}): ErrorCode.MODEL_NOT_ALLOWED,
    }
    assert {uri: refused(uri, allowing, s3) for uri in expected} == expected


def test_a_bucket_that_the_credentials_do_not_open_is_the_operators_to_mend_unless_it_is_another(
    s3: Store, worker_settings: Settings
) -> None:
    class Closed(Counting):
        def list(self, prefix: str, bucket: str | None = None) -> Iterator[object]:
            raise StoreForbids("the object store did not list m: AccessDenied", "Check MINIO_ACCESS_KEY.")

    allowing, closed = worker_settings.model_copy(update={"model_buckets": ["theirs"]}), cast(Any, Closed(s3, None))
    assert refused("s3://theirs/m", allowing, closed) is ErrorCode.MODEL_NOT_ALLOWED
    with pytest.raises(StoreForbids):
        fetch_model(f"s3://{s3.bucket}/m", allowing, closed)


def test_another_bucket_is_read_where_the_operator_allows_it(s3: Store, worker_settings: Settings) -> None:
    other = open_store(worker_settings.model_copy(update={"minio_bucket": f"{s3.bucket}-other"}))
    other.ensure()
    uri = put(other)
    assert refused(uri, worker_settings, s3) is ErrorCode.MODEL_NOT_ALLOWED
    allowing = worker_settings.model_copy(update={"model_buckets": [other.bucket]})
    assert names_in(fetch_model(uri, allowing, s3).folder) == sorted(FILES)
    other.close()


def test_a_worker_whose_store_is_a_folder_reaches_no_bucket(tmp_path: Path) -> None:
    settings = Settings(store_path=tmp_path / "store", data_path=tmp_path, model_buckets=["b"])
    store = open_store(settings)
    store.ensure()
    assert refused("s3://b/m", settings, store) is ErrorCode.MODEL_NOT_FOUND


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(s3: Store, worker_settings: Settings) -> None:
    uri = put(s3)

    def replace(key: str) -> None:
        if key.endswith("tokenizer.json"):
            put(s3, files={"config.json": FILES["config.json"] + b" "})

    with pytest.raises(StoreUnavailable, match="changed while it was read"):
        fetch_model(uri, worker_settings, counting(s3, replace))
    assert (fetch_model(uri, worker_settings, s3).folder / "config.json").read_bytes().endswith(b" ")


def test_a_fetch_that_was_killed_goes_on_and_is_never_taken_for_whole(s3: Store, worker_settings: Settings) -> None:
    def die(key: str) -> None:
        if key.endswith("model.safetensors"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model(put(s3), worker_settings, counting(s3, die))
    store = counting(s3)
    held = fetch_model(put(s3), worker_settings, store)
    assert store.fetched == ["model.safetensors", "tokenizer.json"]
    assert names_in(held.folder) == sorted(FILES)
    assert [path.name for path in worker_settings.model_cache.iterdir()] == [held.folder.name]


def fill_with(size: int) -> Any:
    return lambda folder: (folder / "model.safetensors").write_bytes(b"x" * size)


def test_jobs_that_want_one_model_at_once_share_one_fetch(tmp_path: Path) -> None:
    cache, both = ModelCache(tmp_path, 1 << 20), threading.Barrier(4)
    fills: list[Path] = []

    def fill(folder: Path) -> None:
        fills.append(folder)
        fill_with(4096)(folder)

    def want(_: int) -> Path:
        both.wait()
        return cache.hold("m", 4096, fill).folder

    with ThreadPoolExecutor(4) as jobs:
        assert set(jobs.map(want, range(4))) == {tmp_path / "m"}
    assert len(fills) == 1


def test_the_model_longest_unused_makes_room_and_one_in_use_never_does(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, 4 * 4096)
    for number, name in enumerate(("old", "used", "new")):
        cache.hold(name, 4096, fill_with(4096)).release()
        os.utime(tmp_path / name, (number, number))
    held = cache.hold("old", 4096, fill_with(0))  # which is the newest now
    os.utime(tmp_path / "old", (0, 0))
    bigger = cache.hold("bigger", 3 * 4096, fill_with(3 * 4096))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bigger", "old"]
    with pytest.raises(DiskFull, match="beside those in use") as caught:
        cache.hold("another", 4096, fill_with(4096))
    assert caught.value.retryable
    held.release()
    cache.hold("another", 4096, fill_with(4096))
    assert bigger.folder.is_dir()
    with pytest.raises(ModelRefused, match="limit of all models"):
        cache.hold("huge", 5 * 4096, fill_with(0))


def test_a_worker_that_dies_gives_its_model_and_its_turn_back(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mistudio_train.worker.model_cache import ModelCache\n"
        "cache = ModelCache(Path(sys.argv[1]), 8192); "
        "held = cache.hold('used', 4096, lambda folder: (folder / 'a').write_bytes(b'x' * 4096))\n"
        "def fill(folder): (folder / 'a').touch(); print('filling', flush=True); time.sleep(60)\n"
        "cache.hold('half', 4096, fill)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "filling\n"
    waited: list[int] = []

    def go_on() -> None:
        waited.append(1)
        if len(waited) == 3:
            raise Interrupted

    cache = ModelCache(tmp_path, 8192)
    with pytest.raises(Interrupted):
        cache.hold("half", 4096, fill_with(4096), go_on)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    held = cache.hold("half", 4096, fill_with(4096))
    assert names_in(held.folder) == ["a", "model.safetensors"]
    cache.hold("next", 4096, fill_with(4096))
    assert not (tmp_path / "used").exists()
