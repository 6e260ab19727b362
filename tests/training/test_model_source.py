"""Which model a name means, judged within seconds: allowed folders, the cache, and a hub that answers in every way."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from mistudio_schemas import ErrorCode, TrainRequested
from mistudio_train.errors import HubUnreachable, JobError, ModelRefused, RequestRefused
from mistudio_train.training import hub
from mistudio_train.training.model_source import ModelSource, inspect
from mistudio_train.training.sites import Ends, Site, resolve_sites
from tests.models import D_IN, FAMILIES, LAYERS, POSITIONS, VOCAB

TOKEN = "hf_ThisIsNoRealTokenAtAll"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_tells_all_that_the_plan_needs(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    source = inspect(str(folder), folders=[folder.parent])
    assert (source.architecture, source.total_layers, source.d_in) == (family, LAYERS, D_IN)
    assert (source.vocab_size, source.heads, source.d_mlp) == (VOCAB, 4, 128 if family == "gpt2" else 64)
    assert source.positions == (None if family == "t5" else POSITIONS)
    assert source.sequence_limit(512) == (512 if family == "t5" else POSITIONS)
    info = source.info(selected_layer=2)
    assert (info.model_name, info.actual_model_loaded, info.selected_layer) == (str(folder), str(folder), 2)


def config_folder(folder: Path, files: tuple[str, ...] = (), **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 6} | config))
    for name in files:
        (folder / name).touch()
    return folder


def refusal(name: str, **options: object) -> JobError:
    with pytest.raises(JobError) as caught:
        inspect(name, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("closed", ["models", "models/mine", "models/mine/config.json"])
def test_a_folder_that_may_not_be_read_is_refused_with_what_to_do(unprivileged: Path, closed: str) -> None:
    config_folder(unprivileged / "models" / "mine")
    (unprivileged / closed).chmod(0)
    error = refusal(str(unprivileged / "models" / "mine"), folders=[unprivileged / "models"])
    (unprivileged / closed).chmod(0o755)
    assert (error.code, "may not read" in str(error)) == (ErrorCode.MODEL_NOT_ALLOWED, True)
    assert "chmod" in error.hint


def test_weights_that_may_not_be_read_are_refused_before_they_are_loaded(unprivileged: Path) -> None:
    folder = config_folder(unprivileged / "mine", ("model.safetensors",))
    (folder / "model.safetensors").chmod(0)
    source = inspect(str(folder), folders=[unprivileged])
    with pytest.raises(ModelRefused, match=r"may not read .*model\.safetensors"):
        source.parameter_shapes()


def test_a_folder_may_be_named_absolutely_or_below_an_allowed_one(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "models" / "mine")
    roots = [tmp_path / "models"]
    assert inspect(str(folder), folders=roots).folder == folder
    assert inspect("mine", folders=roots).folder == folder
    assert inspect(str(folder), folders=[folder.parent.parent]).folder == folder


@pytest.mark.parametrize("way", ["absolute", "dots", "link", "link_inside", "home"])
def test_a_folder_outside_the_allowed_ones_is_refused_even_through_a_link(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, allowed = config_folder(tmp_path / "secret" / "model"), tmp_path / "models"
    allowed.mkdir()
    (allowed / "link").symlink_to(outside)
    monkeypatch.setenv("HOME", str(tmp_path / "secret"))
    name = {
        "absolute": str(outside), "dots": "../secret/model", "link": str(allowed / "link"), "home": "~/model",
        "link_inside": f"{allowed}/link/../model",
    }[way]  # fmt: skip
    assert refusal(name, folders=[allowed]).code is ErrorCode.MODEL_NOT_ALLOWED


def test_a_link_below_an_allowed_folder_does_not_lead_out_by_its_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(config_folder(tmp_path / "secret"))
    assert refusal("link", folders=[tmp_path / "models"]).code is ErrorCode.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("missing", ErrorCode.MODEL_NOT_FOUND),
        ("empty", ErrorCode.MODEL_NOT_FOUND),
        ("broken", ErrorCode.MODEL_UNSUPPORTED),
        ("pickled", ErrorCode.MODEL_NOT_ALLOWED),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, name: str, code: ErrorCode) -> None:
    (tmp_path / "empty").mkdir()
    (config_folder(tmp_path / "broken") / "config.json").write_text("{")
    config_folder(tmp_path / "pickled", files=("pytorch_model.bin",))
    assert refusal(str(tmp_path / name), folders=[tmp_path]).code is code


def test_pickled_weights_are_loaded_where_the_operator_wants_them(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "pickled", files=("pytorch_model.bin",))
    assert inspect(str(folder), folders=[tmp_path], allow_unsafe=True).folder == folder


def test_a_config_that_names_no_layers_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    source = inspect(str(config_folder(tmp_path / "m", num_hidden_layers=None)), folders=[tmp_path])
    with pytest.raises(ModelRefused, match="its number of layers"):
        _ = source.total_layers


def test_an_unknown_model_is_refused_within_seconds_when_the_worker_is_offline() -> None:
    code = (
        "import sys, time; from mistudio_train.errors import JobError\n"
        "from mistudio_train.training.model_source import inspect\n"
        "try: inspect('nobody/no-such-model')\n"
        "except JobError as error: print(error.code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["model.not_found", "False", "False"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["no/such/thing", "a b", "", "s3://bucket/model", "x" * 200])
def test_what_is_no_models_name_is_refused_without_asking_anyone(name: str) -> None:
    assert refusal(name).code is ErrorCode.MODEL_NOT_FOUND


class Hub:
    """A hub that answers every question with the same status and headers, and remembers what it was sent."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.authorizations: list[str | None] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.authorizations.append(self.headers.get("authorization"))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = Thread(target=self.server.serve_forever)


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (404, {"x-error-code": "RepoNotFound"}, ErrorCode.MODEL_NOT_FOUND),
        (404, {"x-error-code": "RevisionNotFound"}, ErrorCode.MODEL_NOT_FOUND),
        (403, {"x-error-code": "GatedRepo"}, ErrorCode.MODEL_NOT_ALLOWED),
        (401, {"x-error-message": "Invalid credentials"}, ErrorCode.MODEL_NOT_ALLOWED),
        (503, {}, ErrorCode.HUB_UNREACHABLE),
    ],
)
def test_what_the_hub_says_is_told_apart_and_never_shows_the_token(
    status: int, headers: dict[str, str], code: ErrorCode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = Hub(status, headers)
    asked.thread.start()
    try:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{asked.server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        error = refusal("owner/model", revision="v1", token=TOKEN)
    finally:
        asked.server.shutdown()
        asked.server.server_close()
        asked.thread.join()
    assert error.code is code
    assert error.retryable == (code is ErrorCode.HUB_UNREACHABLE)
    assert f"Bearer {TOKEN}" in asked.authorizations
    assert TOKEN not in f"{error} {error.hint} {error.__cause__}"


def unanswered(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A hub at a port where nobody listens, and a cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_a_hub_that_does_not_answer_is_worth_another_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unanswered(monkeypatch, tmp_path)
    began = time.monotonic()
    error = refusal("owner/model")
    assert isinstance(error, HubUnreachable)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_model_needs_no_hub_and_keeps_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    unanswered(monkeypatch, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    cached = tmp_path / "models--owner--model"
    config_folder(cached / "snapshots" / COMMIT, files=("model.safetensors",), hidden_size=8, vocab_size=3)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    source = inspect("owner/model")
    assert (source.commit, source.total_layers, source.files) == (COMMIT, 6, ("config.json", "model.safetensors"))
    assert source.folder == cached / "snapshots" / COMMIT
    assert source.info(5).actual_model_loaded == f"owner/model@{COMMIT}"


def test_a_token_is_starred_out_of_any_text() -> None:
    assert hub.without_token(f"Bearer {TOKEN}!", TOKEN) == "Bearer ***!"
    assert hub.without_token("nothing", None) == "nothing"


def source_of(**config: object) -> ModelSource:
    return ModelSource("m", None, None, {"model_type": "llama"} | config)


def test_the_text_part_of_a_larger_model_is_what_counts() -> None:
    source = source_of(num_hidden_layers=2, text_config={"num_hidden_layers": 7, "hidden_size": 5})
    assert (source.total_layers, source.d_in) == (7, 5)


def request(**fields: object) -> TrainRequested:
    return TrainRequested.model_validate({"model_name": "m", "corpus_file": "c"} | fields)


def test_the_default_layer_becomes_the_last_of_a_shallower_model_with_a_warning() -> None:
    sites = resolve_sites(request(), total_layers=6)
    assert sites.of_saes == (Ends(Site(5)),)
    assert sites.selected_layer == 5
    assert "12" in sites.warnings[0]
    assert "5" in sites.warnings[0]
    deep = resolve_sites(request(), total_layers=13)
    assert (deep.of_saes, deep.warnings) == ((Ends(Site(12)),), ())


@pytest.mark.parametrize(
    "fields", [{"layer_number": 6}, {"layer_number": 12}, {"sae": {"kind": "topk", "layer_number": 6}}]
)
def test_a_named_layer_that_is_not_there_is_refused_with_the_valid_range(fields: dict[str, object]) -> None:
    with pytest.raises(RequestRefused, match=r"0\.\.5") as caught:
        resolve_sites(request(**fields), total_layers=6)
    assert caught.value.code is ErrorCode.REQUEST_LAYER_OUT_OF_RANGE


def test_saes_of_different_layers_and_sites_are_extracted_once_each() -> None:
    saes = [
        {"kind": "topk", "layer_number": 3},
        {"kind": "topk", "layer_number": 1, "hook_site": "mlp_out"},
        {"kind": "topk", "layer_number": 3},
        {"kind": "topk"},
    ]
    sites = resolve_sites(request(layer_number=2, hook_site="attn_out", saes=saes), total_layers=6)
    expected = (Site(3, "attn_out"), Site(1, "mlp_out"), Site(3, "attn_out"), Site(2, "attn_out"))
    assert sites.of_saes == tuple(map(Ends, expected))
    assert sites.distinct == (Site(1, "mlp_out"), Site(2, "attn_out"), Site(3, "attn_out"))
    assert sites.selected_layer == 3


def test_a_transcoder_has_both_sites_extracted() -> None:
    saes = [{"kind": "topk", "hook_site": "mlp_in", "predicts": "mlp_out"}, {"kind": "topk", "hook_site": "mlp_out"}]
    sites = resolve_sites(request(layer_number=2, pooling="token", saes=saes), total_layers=6)
    ends = Ends(Site(2, "mlp_in"), Site(2, "mlp_out"))
    assert sites.of_saes == (ends, Ends(Site(2, "mlp_out")))
    assert sites.distinct == (Site(2, "mlp_in"), Site(2, "mlp_out"))
    assert (str(ends), ends.reconstructed) == ("2.mlp_in-mlp_out", Site(2, "mlp_out"))
