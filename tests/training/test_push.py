"""Results put on the hub, or a warning: a stand-in that speaks as much of its HTTP interface as its client calls."""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from huggingface_hub import constants
from pydantic import SecretStr, ValidationError

from mistudio_schemas import ErrorCode, TrainRequested
from mistudio_train.errors import RequestRefused
from mistudio_train.messages import JobSpec, Push, Warned
from mistudio_train.settings import Settings
from mistudio_train.training.run import run_job
from mistudio_train.worker.hub_push import push_of

from .conftest import Listener
from .test_run import TEXTS, TOPK, spec

# The hub's client passes a file to its own client as that no longer wants it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Folder = Callable[..., Path]
TOKEN = "hf_ThisIsNoRealTokenAtAll"
NAME = "owner/an-sae"


class Hub:
    """Repositories that can be made and committed to; answers otherwise where it is told to."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.fails: dict[str, int] = {}
        """Step to status."""
        self.hangs: str | None = None
        self.go_on = Event()
        self.steps: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                step = hub.step_of(self.path)
                hub.steps.append(step)
                if hub.hangs == step:
                    hub.go_on.wait(60)
                if step != "store" and self.headers.get("authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": f"Invalid token {self.headers.get('authorization')}"})
                if status := hub.fails.get(step):
                    return self.answer(status, {"error": f"no, {self.headers.get('authorization')}"})
                return self.answer(*getattr(hub, step)(self.path, body))

            do_PUT = do_POST  # noqa: N815

            def do_GET(self) -> None:
                self.answer(404, {})

            def answer(self, status: int, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def step_of(path: str) -> str:
        names = {"/repos/create": "create", "/validate-yaml": "check", "/preupload/": "modes", "/lfs/objects/": "batch"}
        names |= {"/commit/": "commit", "/store/": "store"}
        return next((step for part, step in names.items() if part in path), path)

    def create(self, _: str, body: bytes) -> tuple[int, dict[str, Any]]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
        self.repositories[name] = {"visibility": asked.get("visibility"), "commits": []}
        return 200, {"url": f"{self.endpoint}/{name}"}

    def check(self, _: str, body: bytes) -> tuple[int, dict[str, Any]]:
        assert json.loads(body)["content"].startswith("---\n")
        return 200, {"errors": [], "warnings": []}

    def modes(self, _: str, body: bytes) -> tuple[int, dict[str, Any]]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        large = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return 200, {
            "files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in large.items()]
        }

    def batch(self, _: str, body: bytes) -> tuple[int, dict[str, Any]]:
        objects = json.loads(body)["objects"]
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.endpoint}/store/{one['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.stored[path.rpartition("/")[2]] = body
        return 200, {}

    def commit(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
                assert hashlib.sha256(self.stored[value["oid"]]).hexdigest() == value["oid"]
        name = "/".join(path.split("/")[3:5])
        self.repositories[name]["commits"].append(files)
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    thread = Thread(target=made.server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks no Xet
    yield made
    made.go_on.set()
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def pushing(model: Path, workspace: Path, *, token: str = TOKEN, seconds: float = 60, **fields: Any) -> JobSpec:
    asked: dict[str, Any] = {"pooling": "token", "max_epochs": 1, "push_to_hub": NAME, "report": False}
    if "saes" not in fields:
        asked["sae"] = TOPK
    return replace(spec(model, workspace, TEXTS, **(asked | fields)), push=Push(NAME, token, seconds))


def warned(parent: Listener) -> list[str]:
    return [one.message for one in parent.heard if isinstance(one, Warned) and "hub" in one.message]


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_result_is_put_into_a_new_private_repository_in_one_commit(
    hub: Hub, model_folder: Folder, tmp_path: Path
) -> None:
    job, parent = pushing(model_folder("llama"), tmp_path / "job"), Listener()
    run_job(job, parent)
    assert warned(parent) == []
    repository = hub.repositories[NAME]
    assert repository["visibility"] == "private"
    assert repository["commits"] == [files_below(job.output / "sae")]
    assert {"README.md", "cfg.json", "sae_weights.safetensors"} <= set(repository["commits"][0])
    assert hub.steps[:4] == ["create", "check", "modes", "batch"]


def test_several_saes_lie_as_in_the_result_and_a_repository_that_is_there_is_used(
    hub: Hub, model_folder: Folder, tmp_path: Path
) -> None:
    hub.repositories[NAME] = {"visibility": "public", "commits": []}
    saes = [TOPK | {"name": "a"}, TOPK | {"name": "b", "kind": "batchtopk"}]
    job, parent = pushing(model_folder("llama"), tmp_path / "job", saes=saes), Listener()
    run_job(job, parent)
    assert warned(parent) == []
    (commit,) = hub.repositories[NAME]["commits"]
    second = {f"saes/b/{name}": data for name, data in files_below(job.output / "saes" / "b" / "sae").items()}
    assert commit == files_below(job.output / "sae") | second


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ({"create": 401}, r"refuses this worker's token \(401\); its operator must let HF_TOKEN write for owner"),
        ({"create": 403}, r"refuses this worker's token \(403\)"),
        ({"create": 500}, "the hub answers 500; try again"),
        ({"commit": 500}, "the hub answers 500; try again"),
        ({"commit": 403}, r"refuses this worker's token \(403\)"),
        ({"store": 403}, r"refuses this worker's token \(403\)"),
        ({"check": 500}, "the hub answers 500; try again"),
    ],
    ids=str,
)
def test_a_refusal_is_a_warning_with_what_to_do(
    hub: Hub,
    model_folder: Folder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fails: dict[str, int],
    said: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fails = fails
    job, parent = pushing(model_folder("llama"), tmp_path / "job"), Listener()
    finished = run_job(job, parent)
    assert finished.saes
    (warning,) = warned(parent)
    assert re.search(said, warning)
    assert warning.endswith(f"hf upload {NAME} sae")
    assert not any(repository["commits"] for repository in hub.repositories.values())
    assert TOKEN not in caplog.text + repr(parent.heard)
    assert not [name for name, data in files_below(tmp_path).items() if TOKEN.encode() in data]


def test_a_wrong_token_is_told_and_not_shown(
    hub: Hub, model_folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    parent = Listener()
    run_job(pushing(model_folder("llama"), tmp_path / "job", token="hf_another"), parent)
    assert "refuses this worker's token (401)" in warned(parent)[0]
    assert "hf_another" not in caplog.text + repr(parent.heard)


def test_a_dead_hub_is_a_warning(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    parent = Listener()
    assert run_job(pushing(model_folder("llama"), tmp_path / "job"), parent).saes
    assert "the hub does not answer; try again when it does" in warned(parent)[0]


@pytest.mark.parametrize("step", ["create", "commit"])
def test_a_hub_that_never_answers_holds_the_job_up_for_no_longer_than_it_may(
    hub: Hub, model_folder: Folder, tmp_path: Path, step: str
) -> None:
    hub.hangs = step
    parent = Listener()
    assert run_job(pushing(model_folder("llama"), tmp_path / "job", seconds=3), parent).saes
    assert "it took longer than 3 s (HUB_PUSH_SECONDS)" in warned(parent)[0]


def test_a_kind_that_saelens_has_no_words_for_is_not_pushed(hub: Hub, model_folder: Folder, tmp_path: Path) -> None:
    parent = Listener()
    transcoder = TOPK | {"hook_site": "mlp_in", "predicts": "mlp_out"}
    run_job(pushing(model_folder("llama"), tmp_path / "job", sae=transcoder), parent)
    assert "SAELens has no words for this kind" in warned(parent)[0]
    assert hub.steps == []


ALLOWED = {"hub_push_owners": ["Owner"], "hf_token": SecretStr(TOKEN)}


def asked(repository: str | None) -> TrainRequested:
    fields = {"model_name": "m", "corpus_file": "c", "push_to_hub": repository}
    return TrainRequested.model_validate(fields)


def test_the_operator_says_whose_repositories_and_the_token_is_the_workers_own() -> None:
    push = push_of(asked(NAME), Settings(**ALLOWED))  # type: ignore[arg-type]
    assert push == Push(NAME, TOKEN, 300)
    assert TOKEN not in repr(push)
    assert push_of(asked(None), Settings()) is None
    for owners in ([], ["other"]):
        with pytest.raises(RequestRefused, match="puts no result into repositories of owner") as caught:
            push_of(asked(NAME), Settings(hub_push_owners=owners, hf_token=SecretStr(TOKEN)))
        assert caught.value.code is ErrorCode.REQUEST_INVALID
        assert "HUB_PUSH_OWNERS" in caught.value.hint
    with pytest.raises(RequestRefused, match="no token of its own"):
        push_of(asked(NAME), Settings(hub_push_owners=["owner"], hf_token=None))


@pytest.mark.parametrize(
    "name", ["", "name", "a/b/c", "../b", "a/..", "a b/c", "https://x/y", "a/b?c", "a/-b", "é/b\n"]
)
def test_what_is_no_repositorys_name_is_no_request(name: str) -> None:
    with pytest.raises(ValidationError, match="push_to_hub"):
        asked(name)


def run_command(model: Path, folder: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """The command `run` in a process of its own: the job's last event, and all that was printed."""
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    request = {
        "model_name": str(model), "corpus_file": "corpus.txt", "layer_number": 1, "pooling": "token",
        "max_epochs": 1, "sae": TOPK, "push_to_hub": NAME, "max_sequence_length": 32,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", "from mistudio_train.cli import main; main()", "run", str(folder / "request.json")]
    command += ["--to", str(folder / "results"), "--corpus-folder", str(folder), "--json"]
    env = os.environ | environment
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ended.stdout, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stdout + ended.stderr


@pytest.mark.parametrize("fails", [{}, {"commit": 500}], ids=["pushed", "refused"])
def test_the_token_is_in_no_line_event_or_file_of_a_whole_job(
    hub: Hub, model_folder: Folder, tmp_path: Path, fails: dict[str, int]
) -> None:
    hub.fails = fails
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    settings = {"HF_TOKEN": TOKEN, "HUB_PUSH_OWNERS": '["owner"]', "LOG_LEVEL": "DEBUG"}
    event, printed = run_command(model_folder("llama"), tmp_path, **environment, **settings)
    assert event["status"] == "completed", printed
    assert bool(fails) == any(NAME in warning for warning in event["warnings"])
    assert [len(repository["commits"]) for repository in hub.repositories.values()] == [0 if fails else 1]
    assert TOKEN not in printed
    assert not [name for name, data in files_below(tmp_path / "results").items() if TOKEN.encode() in data]


def test_a_push_that_the_operator_does_not_allow_is_refused_before_it_costs(
    hub: Hub, model_folder: Folder, tmp_path: Path
) -> None:
    event, _ = run_command(model_folder("llama"), tmp_path, HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    assert (event["status"], event["code"]) == ("failed", "request.invalid")
    assert "HUB_PUSH_OWNERS" in event["hint"]
    assert hub.steps == []
