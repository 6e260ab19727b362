"""What `submit` sends, and what it does not."""

import json
from pathlib import Path

import pytest

from mistudio_schemas import TrainProgress, TrainRequested
from mistudio_train.settings import Settings
from tests.cli.conftest import Cli, running_command
from tests.cli.events import failed
from tests.cli.topics import publish, read_all

MINIMAL = ("submit", "--model-name", "gpt2", "--corpus-file", "stories.txt")


def test_a_submitted_request_is_one_record_after_a_queued_status(cli: Cli, settings: Settings) -> None:
    ended = cli(*MINIMAL, "--layer-number", "6", "--kind", "topk", "--k", "16")
    assert ended.status == 0, ended.err
    job_id = ended.out.removesuffix("\n")
    [request] = read_all(settings, settings.topics.requested)
    [status] = read_all(settings, settings.topics.progress)
    assert request.key == status.key == job_id.encode()
    assert json.loads(request.value) == {
        "job_id": job_id,
        "model_name": "gpt2",
        "corpus_file": "stories.txt",
        "layer_number": 6,
        "sae": json.loads(request.value)["sae"],
    }
    sae = TrainRequested.from_json(request.value).resolved_saes()[0]
    assert (sae.kind, sae.model_dump()["k"], sae.layer_number) == ("topk", 16, 6)
    assert request.headers["ce_type"] == "mistudio.train.requested.v1"
    assert request.headers["ce_specversion"] == "1.0"
    assert request.headers["ce_subject"] == job_id
    assert request.headers["content-type"] == "application/json"
    queued = TrainProgress.from_json(status.value)
    assert (queued.job_id, queued.status, queued.phase, queued.run) == (job_id, "queued", "queued", None)
    assert status.milliseconds <= request.milliseconds


def test_flags_win_over_the_file_and_set_over_both(cli: Cli, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text(
        "job_id: mine\nmodel_name: gpt2\ncorpus_file: a.txt\nlearning_rate: 1e-3\nmax_epochs: 5\n"
        "saes:\n  - {kind: topk, k: 8}\n  - {kind: topk, k: 16}\n"
    )
    ended = cli("submit", file, "-c", "b.txt", "--max-epochs", "7", "--set", "saes.1.k=32", "--set", "seed=9", "--json")
    assert json.loads(ended.out) == {"job_id": "mine", "topic": settings.topics.requested}
    [record] = read_all(settings, settings.topics.requested)
    request = TrainRequested.from_json(record.value)
    assert (request.corpus_file, request.learning_rate, request.max_epochs, request.seed) == ("b.txt", 1e-3, 7, 9)
    assert [sae.model_dump()["k"] for sae in request.resolved_saes()] == [8, 32]


def test_a_json_file_is_a_request_too(cli: Cli, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text('{"job_id": "j", "model_name": "gpt2", "corpus_file": "a.txt", "sparsity_coeff": 1e-4}')
    assert cli("submit", file).out == "j\n"
    [record] = read_all(settings, settings.topics.requested)
    assert TrainRequested.from_json(record.value).sparsity_coeff == 1e-4


REFUSALS = {
    "unknown field": (("--set", "hiden_dim=128"), "'hiden_dim' (did you mean 'hidden_dim'?)"),
    "unknown nested field": (("--kind", "topk", "--set", "sae.kk=3"), "'sae.kk' (did you mean 'k'?)"),
    "hidden_dim too small": (("--hidden-dim", "63"), "Hidden dimension too small (min 64)"),
    "hidden_dim too large": (("--hidden-dim", "32769"), "Hidden dimension too large (max 32768)"),
    "layer too high": (("--layer-number", "49"), "Layer number seems too high (max 48)"),
    "layer negative": (("--layer-number=-1",), "Layer number must be non-negative"),
    "batch too large": (("--batch-size", "129"), "Batch size too large (max 128)"),
    "sparsity zero": (("--sparsity-coeff", "0"), "Sparsity coefficient must be positive"),
    "not a number": (("--set", "learning_rate=.nan"), "learning_rate"),
    "unknown kind": (("--kind", "transcoder"), "standard, topk"),
    "k without topk": (("--k", "3"), "'sae.k'"),
    "token": (("--set", "huggingface_token=hf_secret"), "token_name"),
    "set without a value": (("--set", "seed"), "--set key=value"),
    "set through a number": (("--set", "seed=1", "--set", "seed.x=1"), "'seed.x=1'"),
    "bad job id": (("--job-id", "a/b"), "job_id"),
    "no whole number": (("--hidden-dim", "many"), "'--hidden-dim'"),
}


@pytest.mark.parametrize(("arguments", "says"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_request_is_not_sent(
    arguments: tuple[str, ...], says: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[TrainRequested] = []
    monkeypatch.setattr("mistudio_train.cli.submit._publish", lambda settings, request: sent.append(request))
    ended = cli(*MINIMAL, *arguments)
    assert (ended.status, ended.out, sent) == (2, "", [])
    assert says in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert "hf_secret" not in ended.err


def test_refusals_leave_the_topics_empty(cli: Cli, settings: Settings) -> None:
    for arguments in (("--hidden-dim", "1"), ("--set", "hiden_dim=128"), ("--set", "huggingface_token=x")):
        assert cli(*MINIMAL, *arguments).status == 2
    assert read_all(settings, settings.topics.requested) == []
    assert read_all(settings, settings.topics.progress) == []


def test_an_operator_can_widen_the_limits(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[TrainRequested] = []
    monkeypatch.setattr("mistudio_train.cli.submit._publish", lambda settings, request: sent.append(request))
    monkeypatch.setenv("LIMITS__MAX_HIDDEN_DIM", "65536")
    assert cli(*MINIMAL, "--hidden-dim", "65536").status == 0
    assert [request.hidden_dim for request in sent] == [65536]


def test_missing_topics_are_said_at_once(cli: Cli, worker_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in worker_env.items():
        monkeypatch.setenv(name, value)
    ended = cli(*MINIMAL)
    assert (ended.status, ended.out) == (2, "")
    assert "mistudio-train init" in ended.err
    assert "Traceback" not in ended.err


def test_wait_watches_the_job_to_its_end(settings: Settings, process_env: dict[str, str]) -> None:
    with running_command(process_env, *MINIMAL, "--wait", "--json") as process:
        assert process.stdout is not None
        job_id = json.loads(process.stdout.readline())["job_id"]
        assert json.loads(process.stdout.readline())["status"] == "queued"
        publish(settings, failed(job_id))
        assert json.loads(process.stdout.readline())["code"] == "corpus.not_found"
        assert process.wait(30) == 1
