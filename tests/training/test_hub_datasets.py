"""Datasets of the hub, from a stand-in that speaks its HTTP interface: commits, files, cut downloads, the cache."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused, DiskFull, HubUnreachable, JobError
from mistudio_train.messages import DatasetFound, Progress
from mistudio_train.training.hub_datasets import HubDataset, fetch_dataset
from mistudio_train.training.run import run_job

from .conftest import Listener
from .test_conversations import parquet_bytes
from .test_run import TEXTS as LINES
from .test_run import hashes, job, spec

Folder = Callable[..., Path]
TOKEN = "hf_ThisIsNoRealTokenAtAll"
FIRST, SECOND = "a" * 40, "b" * 40
NAME = "owner/stories"
URI = f"hf://datasets/{NAME}"
FILES = {
    "README.md": b"# Stories",
    "dataset_infos.json": b"{}",
    "data/train-00001.parquet": parquet_bytes(text=["three", "four"]),
    "data/train-00000.parquet": parquet_bytes(text=["one", "two"]),
    "copies/all.jsonl": b'{"text": "five"}\n',
    "notes [v1].txt": b"six\nseven\n",
}


class Hub:
    """One dataset at some commits; answers otherwise where it is told to, and remembers what it was asked."""

    def __init__(self, commits: dict[str, dict[str, bytes]]) -> None:
        self.commits, self.refs = commits, {"main": next(iter(commits))}
        self.status, self.error, self.cut = 200, "", 0
        self.asked: list[tuple[str, str, str | None]] = []
        self.authorizations: set[str | None] = set()
        self.stalled, self.go_on = Event(), Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append((self.command, path, self.headers.get("range")))
                hub.authorizations.add(self.headers.get("authorization"))
                if hub.status != 200:
                    return self.answer(hub.status, b"{}", {"x-error-code": hub.error})
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "datasets"]:
                    return self.tell("/".join(parts[2:4]), parts[4:])
                return self.give("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))

            def do_HEAD(self) -> None:
                self.do_GET()

            def tell(self, name: str, rest: list[str]) -> None:
                revision = rest[1] if len(rest) > 1 else "main"
                commit = hub.refs.get(revision, revision)
                if name != NAME:
                    return self.answer(404, b"{}", {"x-error-code": "RepoNotFound"})
                if commit not in hub.commits:
                    return self.answer(404, b"{}", {"x-error-code": "RevisionNotFound"})
                found: Any = {"id": name, "sha": commit, "siblings": []}
                if rest[:1] == ["tree"]:
                    found = [
                        {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
                        for path, data in hub.commits[commit].items()
                    ]
                return self.answer(200, json.dumps(found).encode(), {"content-type": "application/json"})

            def give(self, name: str, commit: str, path: str) -> None:
                data = hub.commits[commit][path]
                start = int((self.headers.get("range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
                about = {
                    "etag": f'"{sha1(data).hexdigest()}"',
                    "x-repo-commit": commit,
                    "accept-ranges": "bytes",
                }
                if start:
                    about["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self.answer(206 if start else 200, data[start:], about)

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in (headers | {"content-length": str(len(body))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.cut and len(body) > hub.cut:
                    self.wfile.write(body[: hub.cut])
                    hub.cut = 0
                    self.wfile.flush()
                    hub.stalled.set()
                    hub.go_on.wait(60)
                    self.close_connection = True
                    return
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = Thread(target=self.server.serve_forever)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def given(self) -> list[str]:
        """Files whose bytes were asked for."""
        return [path.split("/resolve/")[1][41:] for how, path, _ in self.asked if how == "GET" and "/resolve/" in path]


def _at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub({FIRST: FILES})
    made.thread.start()
    _at(made.endpoint, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield made
    made.go_on.set()
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


def fetched(uri: str, commit: str | None = None, token: str | None = None) -> HubDataset:
    return fetch_dataset(uri, commit, token, lambda number, count, name: None)


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("", ["data/train-00000.parquet", "data/train-00001.parquet"]),
        ("/data", ["data/train-00000.parquet", "data/train-00001.parquet"]),
        ("/data/train-00001.parquet", ["data/train-00001.parquet"]),
        ("/data/*1.parquet", ["data/train-00001.parquet"]),
        ("/copies", ["copies/all.jsonl"]),
        ("/*.jsonl", ["copies/all.jsonl"]),
        ("/dataset_infos.json", ["dataset_infos.json"]),
        ("/notes [v1].txt", ["notes [v1].txt"]),
        ("@main/data", ["data/train-00000.parquet", "data/train-00001.parquet"]),
        (f"@{FIRST}/copies/", ["copies/all.jsonl"]),
    ],
)
def test_a_name_means_its_files_in_order_and_no_others_are_fetched(hub: Hub, path: str, files: list[str]) -> None:
    dataset = fetched(URI + path)
    assert dataset.commit == FIRST
    assert {name: file.read_bytes() for name, file in dataset.files.items()} == {f"{NAME}/{f}": FILES[f] for f in files}
    assert list(dataset.files) == [f"{NAME}/{file}" for file in files]
    assert hub.given() == files


def refused(uri: str, token: str | None = None) -> JobError:
    with pytest.raises(JobError) as caught:
        fetched(uri, token=token)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("hf://datasets/owner/nothing", ErrorCode.CORPUS_NOT_FOUND),
        (f"{URI}@v9", ErrorCode.CORPUS_NOT_FOUND),
        (f"{URI}/no/such/file.txt", ErrorCode.CORPUS_NOT_FOUND),
        (f"{URI}/*.csv", ErrorCode.CORPUS_NOT_FOUND),
        (f"{URI}/../../etc/passwd", ErrorCode.CORPUS_NOT_FOUND),
        ("hf://datasets/stories", ErrorCode.CORPUS_NOT_ALLOWED),
        ("hf://owner/model", ErrorCode.CORPUS_NOT_ALLOWED),
        ("hf://spaces/owner/x", ErrorCode.CORPUS_NOT_ALLOWED),
        ("hf://datasets/../x", ErrorCode.CORPUS_NOT_ALLOWED),
        ("hf://", ErrorCode.CORPUS_NOT_ALLOWED),
        (f"{URI}@..%2F..%2Fsecret", ErrorCode.CORPUS_NOT_ALLOWED),
        (f"{URI}@a%2F..%2Fb", ErrorCode.CORPUS_NOT_ALLOWED),
        (f"{URI}@%2Fetc%2Fpasswd", ErrorCode.CORPUS_NOT_ALLOWED),
        (f"{URI}@a%00b", ErrorCode.CORPUS_NOT_ALLOWED),
    ],
)
def test_names_that_mean_nothing_or_lead_out_are_refused(hub: Hub, uri: str, code: ErrorCode) -> None:
    error = refused(uri)
    assert (error.code, error.retryable) == (code, False)
    assert str(error).isprintable()
    assert not hub.given()


def test_a_path_without_texts_is_told_with_those_there_are(hub: Hub) -> None:
    error = refused(f"{URI}/train.csv")
    assert f"{NAME} has no file of texts at 'train.csv'" in str(error)
    assert "data/train-00000.parquet" in error.hint


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [
        (403, "GatedRepo", ErrorCode.CORPUS_NOT_ALLOWED),
        (401, "", ErrorCode.CORPUS_NOT_ALLOWED),
        (404, "RepoNotFound", ErrorCode.CORPUS_NOT_FOUND),
        (503, "", ErrorCode.HUB_UNREACHABLE),
    ],
)
def test_what_the_hub_says_is_told_apart_and_never_shows_the_token(
    hub: Hub, status: int, said: str, code: ErrorCode
) -> None:
    hub.status, hub.error = status, said
    error = refused(URI, token=TOKEN)
    assert (error.code, error.retryable) == (code, code is ErrorCode.HUB_UNREACHABLE)
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    assert TOKEN not in f"{error} {error.hint} {error.__cause__}"


@pytest.mark.parametrize("away", ["offline", "unreachable"])
def test_what_is_cached_needs_no_hub_and_what_is_not_all_there_is_not_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    online = fetched(f"{URI}/data/train-00000.parquet")
    if away == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        _at("http://127.0.0.1:9", monkeypatch)
    assert fetched(f"{URI}/data/train-00000.parquet") == online
    error = refused(f"{URI}/data")
    expected = CorpusRefused if away == "offline" else HubUnreachable
    assert isinstance(error, expected)
    assert isinstance(refused("hf://datasets/owner/never"), expected)


def test_a_commit_stays_when_the_branch_moves_on(hub: Hub) -> None:
    first = fetched(f"{URI}/copies")
    hub.commits[SECOND] = FILES | {"copies/all.jsonl": b'{"text": "other"}\n'}
    hub.refs["main"] = SECOND
    assert fetched(f"{URI}/copies", commit=first.commit) == first
    moved = fetched(f"{URI}/copies")
    assert (moved.commit, next(iter(moved.files.values())).read_bytes()) == (SECOND, b'{"text": "other"}\n')


def test_a_download_whose_process_is_killed_goes_on_with_the_file_it_was_at(hub: Hub, tmp_path: Path) -> None:
    large = b"".join(b"text %07d\n" % number for number in range(2_000_000))  # of which 10 MB are written at a time
    hub.commits[FIRST] = {"a.txt": b"first\n", "b.txt": large}
    hub.cut = len(large) - 1000
    code = (
        f"from mistudio_train.training.hub_datasets import fetch_dataset\n"
        f"fetch_dataset({URI!r}, None, None, lambda *file: None)\n"
    )
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": ":".join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], env=env)
    assert hub.stalled.wait(60)
    while not any(path.stat().st_size >= 10_000_000 for path in (tmp_path / "hub").rglob("*.incomplete")):
        assert child.poll() is None
    child.kill()
    child.wait()
    hub.go_on.set()
    hub.asked.clear()
    dataset = fetched(URI)
    assert [path.read_bytes() for path in dataset.files.values()] == [b"first\n", large]
    assert hub.given() == ["b.txt"]


def test_a_download_whose_connection_breaks_goes_on_in_the_middle_of_the_file(hub: Hub) -> None:
    large = b"".join(b"text %07d\n" % number for number in range(2_000_000))
    hub.commits[FIRST] = {"b.txt": large}
    hub.cut = len(large) - 1000
    hub.go_on.set()
    (path,) = fetched(URI).files.values()
    assert path.read_bytes() == large
    starts = [said for how, path, said in hub.asked if how == "GET" and path.endswith("b.txt")]
    assert starts[0] is None
    assert starts[1] is not None
    assert int(starts[1].removeprefix("bytes=").split("-")[0]) >= 10_000_000


def test_a_dataset_that_does_not_fit_is_refused_before_its_first_file(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(DiskFull, match="hub's cache"):
        fetched(URI)
    assert not hub.given()


def test_a_job_reads_a_dataset_like_any_corpus_and_says_its_commit(
    hub: Hub, model_folder: Folder, tmp_path: Path
) -> None:
    halves = {"data/1.jsonl": LINES[20:], "data/0.txt.gz": [], "data/0.jsonl": LINES[:20]}
    hub.commits[FIRST] = {
        name: "\n".join(json.dumps({"text": line}) for line in lines).encode() for name, lines in halves.items()
    }
    plain = spec(model_folder("llama"), tmp_path / "plain", LINES)
    job(plain)
    one = spec(model_folder("llama"), tmp_path / "hubs", [], corpus_file=URI)
    finished, said = job(replace(one, corpus=None))
    assert [message.commit for message in said if isinstance(message, DatasetFound)] == [FIRST]
    assert (finished.corpus.texts, finished.corpus.commit) == (40, FIRST)
    assert any(
        message.phase == "fetching" and "data/1.jsonl, file 2 of 2" in message.message
        for message in said
        if isinstance(message, Progress)
    )
    weights = "sae/sae_weights.safetensors"
    assert hashes(one.output)[weights] == hashes(plain.output)[weights]
    hub.refs["main"] = SECOND  # which nobody has: the commit of the first attempt is what counts
    again = spec(model_folder("llama"), tmp_path / "again", [], corpus_file=URI)
    assert job(replace(again, corpus=None, corpus_commit=FIRST))[0].corpus.sha256 == finished.corpus.sha256


def test_an_error_in_one_of_many_files_names_it(hub: Hub, model_folder: Folder, tmp_path: Path) -> None:
    hub.commits[FIRST] = {"0.jsonl": b'{"text": "good"}', "1.jsonl": b'{"text": "good"}\n{"text": 3}'}
    one = spec(model_folder("llama"), tmp_path / "job", [], corpus_file=URI)
    with pytest.raises(CorpusRefused, match=rf"{NAME}/1\.jsonl, line 2: a text is expected, not int"):
        run_job(replace(one, corpus=None), Listener())
