"""`run` does a job in a real child process and leaves its files, or nothing."""

import hashlib
import json
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from mistudio_train.messages import Finished, JobSpec
from mistudio_train.worker.artifacts import Manifest
from tests.cli.conftest import Cli
from tests.models import SENTENCES, tiny_model
from tests.worker import curves, jobs


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "stories.txt").write_text("Once upon a time.\n")
    file = tmp_path / "request.yaml"
    file.write_text("job_id: j\nmodel_name: m\ncorpus_file: stories.txt\n")
    return file


@pytest.fixture
def corpus_folder(request_file: Path) -> Path:
    return request_file.parent / "texts"


def child_does(job: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the real child process do another job than training."""
    monkeypatch.setattr("mistudio_train.cli.local.train", job)


def interrupts_its_parent(spec: JobSpec, send: jobs.Send) -> Finished:
    spec.output.mkdir(parents=True)
    (spec.output / "metadata.json").write_text("{}")
    os.kill(os.getppid(), signal.SIGTERM)
    threading.Event().wait()
    return jobs.finished()


def test_a_completed_job_leaves_its_files_and_their_manifest(
    cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_does(jobs.works, monkeypatch)
    to = tmp_path / "results"
    ended = cli("run", request_file, "--to", to, "--corpus-folder", corpus_folder, "--json")
    assert ended.status == 0, ended.err
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert events[-1]["status"] == "completed"
    assert events[-1]["model_path"] == (to / "sae_model.pt").as_uri()
    assert {event["job_id"] for event in events} == {"j"}
    manifest = Manifest.from_json((to / "manifest.json").read_bytes())
    assert [ref.name for ref in manifest.objects] == ["feature_activations.pt", "metadata.json", "sae_model.pt"]
    for ref in manifest.objects:
        data = (to / ref.name).read_bytes()
        assert (ref.size, ref.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(path.name for path in to.iterdir()) == [
        "feature_activations.pt",
        "manifest.json",
        "metadata.json",
        "sae_model.pt",
    ]


def test_a_transcoder_from_a_request_to_the_folder_that_saelens_loads(cli: Cli, tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "models" / "tiny")
    (tmp_path / "corpus.txt").write_text("\n".join(f"{text} {n}" for n in range(8) for text in SENTENCES))
    request = tmp_path / "request.yaml"
    request.write_text(
        f"model_name: {folder}\ncorpus_file: corpus.txt\nlayer_number: 1\npooling: token\nmax_epochs: 1\n"
        "sae: {kind: batchtopk, k: 4, hidden_dim: 64, batch_size: 64, hook_site: mlp_in, predicts: mlp_out}\n"
    )
    to = tmp_path / "results"
    ended = cli("run", request, "--to", to, "--corpus-folder", tmp_path)
    assert ended.status == 0, ended.err
    assert "1 mlp_in to mlp_out" in ended.out
    cfg = json.loads((to / "sae" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_out"]) == ("jumprelu_transcoder", 32, 32)
    assert cfg["metadata"]["hook_name"] == "transformer.h.1.ln_2"
    assert cfg["metadata"]["hook_name_out"] == "transformer.h.1.mlp"


def test_the_phases_and_the_saes_are_shown(
    cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_does(jobs.works, monkeypatch)
    ended = cli("run", request_file, "--to", tmp_path / "results", "--corpus-folder", corpus_folder)
    assert "standard-0" in ended.out
    assert "j run 1 is completed" in ended.err


@pytest.mark.parametrize(
    ("job", "says"),
    [(jobs.refuses, "line 3 is no UTF-8 (corpus.unreadable)"), (jobs.killed, "SIGKILL"), (jobs.exits, "status 3")],
)
def test_a_failed_job_says_why_and_leaves_nothing(
    job: object,
    says: str,
    cli: Cli,
    request_file: Path,
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child_does(job, monkeypatch)
    to = tmp_path / "results"
    ended = cli("run", request_file, "--to", to, "--corpus-folder", corpus_folder)
    assert ended.status == 1
    assert says in ended.err
    assert list(to.iterdir()) == []


def test_a_token_is_in_nothing_that_is_shown(
    cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN_TEAM", "hf_very_secret")
    child_does(jobs.raises, monkeypatch)
    arguments = ("--corpus-folder", corpus_folder, "--set", "token_name=team", "--json")
    ended = cli("run", request_file, "--to", tmp_path / "results", *arguments)
    assert ended.status == 1
    assert "a library's error that repeats [secret]" in ended.out
    assert "hf_very_secret" not in ended.out + ended.err


def test_sinks_show_the_curves_of_the_training_log(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real job."""
    asked = {"SINKS": "tensorboard,mlflow,wandb", "TENSORBOARD_DIR": tmp_path / "boards", "WANDB_MODE": "offline"}
    folders = {"MLFLOW_TRACKING_URI": tmp_path / "mlruns", "WANDB_DIR": tmp_path, "SINK_CLOSE_SECONDS": 60}
    for name, value in (asked | folders).items():
        monkeypatch.setenv(name, str(value))
    model, sae = tiny_model("llama", tmp_path / "model"), {"kind": "topk", "k": 2, "hidden_dim": 64, "batch_size": 16}
    (tmp_path / "corpus.txt").write_text("\n".join(f"text number {number} is about mats" for number in range(80)))
    request = {"job_id": "j", "model_name": str(model), "corpus_file": "corpus.txt", "pooling": "token", "sae": sae}
    (tmp_path / "request.json").write_text(json.dumps(request | {"layer_number": 1, "max_epochs": 40}))
    ended = cli("run", tmp_path / "request.json", "--to", tmp_path / "to", "--corpus-folder", tmp_path, "--json")
    assert ended.status == 0, ended.err
    assert "is dropped" not in ended.out + ended.err
    expected = curves.of_logs({"topk-0": tmp_path / "to" / "training_log.jsonl"})
    assert {"topk-0/epoch/loss", "topk-0/step/l0", "topk-0/held_out/fvu"} <= set(expected)
    assert curves.of_tensorboard(tmp_path / "boards" / "j-r1") == curves.single(expected)
    assert curves.of_mlflow(str(tmp_path / "mlruns"))[1] == expected
    assert curves.of_wandb(tmp_path)[1] == expected


def test_a_sink_that_never_answers_keeps_a_run_from_ending_for_its_time_only(
    cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_does(jobs.logs, monkeypatch)
    ended_at_once: list[int] = []

    def end_at_once(status: int) -> None:
        ended_at_once.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", end_at_once)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("SINKS", "mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("SINK_CLOSE_SECONDS", "0.2")
        ended = cli("run", request_file, "--to", tmp_path / "results", "--corpus-folder", corpus_folder)
    assert (ended.status, ended_at_once) == (0, [0])
    assert (tmp_path / "results" / "sae_model.pt").exists()


def test_a_terminated_run_leaves_nothing(
    cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_does(interrupts_its_parent, monkeypatch)
    to = tmp_path / "results"
    ended = cli("run", request_file, "--to", to, "--corpus-folder", corpus_folder)
    assert ended.status == 130
    assert list(to.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone_unless_forced(
    cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_does(jobs.works, monkeypatch)
    to = tmp_path / "results"
    to.mkdir()
    (to / "metadata.json").write_text("precious")
    arguments = ("run", request_file, "--to", to, "--corpus-folder", corpus_folder)
    ended = cli(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "--force" in ended.err
    assert (to / "metadata.json").read_text() == "precious"
    assert cli(*arguments, "--force").status == 0
    assert (to / "metadata.json").read_text() == "metadata.json"


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("corpus_file=missing.txt", "there is no corpus"),
        ("hidden_dim=1", "Hidden dimension too small (min 64)"),
        ("hiden_dim=64", "did you mean 'hidden_dim'?"),
        ("huggingface_token=x", "HF_TOKEN"),
        ("token_name=nobody", "HF_TOKEN_NOBODY"),
    ],
)
def test_what_cannot_be_run_is_refused(
    assignment: str, says: str, cli: Cli, request_file: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    to = tmp_path / "results"
    ended = cli("run", request_file, "--to", to, "--corpus-folder", corpus_folder, "--set", assignment)
    assert (ended.status, ended.out) == (2, "")
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_an_sae_goes_on_from_a_folder_of_an_earlier_run(cli: Cli, tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "models" / "tiny")
    (tmp_path / "corpus.txt").write_text("\n".join(f"{text} {n}" for n in range(8) for text in SENTENCES))
    request = tmp_path / "request.yaml"
    request.write_text(
        f"model_name: {folder}\ncorpus_file: corpus.txt\nlayer_number: 1\npooling: token\nmax_epochs: 1\n"
        "sae: {kind: gated, hidden_dim: 64, batch_size: 64}\n"
    )
    common = ("--corpus-folder", tmp_path)
    assert cli("run", request, "--to", tmp_path / "first", *common).status == 0
    start = f"sae.init_from={tmp_path / 'first' / 'sae'}"
    ended = cli("run", request, "--to", tmp_path / "second", *common, "--set", start)
    assert ended.status == 0, ended.err
    config = json.loads((tmp_path / "second" / "metadata.json").read_text())["sae_config"]
    assert config["init_from"] == str(tmp_path / "first" / "sae")
    refused = cli("run", request, "--to", tmp_path / "third", *common, "--set", start, "--set", "sae.hidden_dim=128")
    assert refused.status == 1
    assert "Set hidden_dim to 64" in refused.err
    absent = cli("run", request, "--to", tmp_path / "third", *common, "--set", "sae.init_from=some-job/1")
    assert absent.status == 2
    assert "init_from is a local folder" in absent.err
