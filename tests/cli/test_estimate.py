"""`estimate` says before a job what the job itself then notes: the same amounts, plan and sizes."""

import json
from pathlib import Path

import pytest
import yaml

from mistudio_schemas import TrainRequested
from mistudio_train.cli.estimate import estimated
from mistudio_train.paces import AROUND, paces_in
from mistudio_train.settings import Settings
from tests.cli.conftest import Cli
from tests.models import tiny_model

TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds, which flew away" for number in range(80)]
SAES = [
    {"name": "a", "kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 64},
    {"name": "b", "kind": "batchtopk", "k": 8, "hidden_dim": 128, "batch_size": 64},
]


@pytest.fixture
def request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS) + "\n")
    asked = {"model_name": str(tiny_model("llama", tmp_path / "model")), "corpus_file": "corpus.txt", "saes": SAES}
    file = tmp_path / "request.yaml"
    file.write_text(
        yaml.safe_dump(asked | {"layer_number": 1, "pooling": "token", "max_epochs": 2, "cross_entropy_tokens": 64})
    )
    return file


def run(cli: Cli, request_file: Path, name: str) -> None:
    ended = cli("run", request_file, "--to", request_file.parent / name, "--corpus-folder", request_file.parent)
    assert ended.status == 0, ended.err


def test_without_an_earlier_job_nothing_is_said(cli: Cli, request_file: Path) -> None:
    ended = cli("estimate", request_file, "--corpus-folder", request_file.parent)
    assert (ended.status, ended.out) == (2, "")
    assert "no job on CPU" in ended.err
    assert "Let a small job be done there first" in ended.err


def test_a_job_is_told_beforehand_what_it_then_notes_itself(cli: Cli, request_file: Path) -> None:
    run(cli, request_file, "first")
    folder = request_file.parent
    (noted,) = paces_in(folder / "data" / "paces.jsonl")
    ended = cli("estimate", request_file, "--corpus-folder", folder, "--json")
    assert ended.status == 0, ended.err
    said = json.loads(ended.out)
    assert said["jobs"] == 1
    assert set(said["time"]["parts"]) == set(noted.parts) == {
        "planning", "loading", "extracting", "training topk", "training batchtopk", "predicting", "evaluating",
        "exporting", AROUND,
    }  # fmt: skip
    assert said["seconds"] == pytest.approx(sum(part.seconds for part in noted.parts.values()), rel=0.2)
    metadata = json.loads((folder / "first" / "metadata.json").read_text())
    assert said["tokens"] == metadata["data_info"]["corpus"]["tokens"]
    assert said["memory_bytes"] == pytest.approx(noted.memory_planned, rel=0.01)
    assert said["disk_bytes"] == pytest.approx(noted.disk_planned, rel=0.05)
    assert list((folder / "first").iterdir())
    assert not list((folder / "data").glob("cache/*"))


def test_the_amounts_are_those_of_the_job(cli: Cli, request_file: Path) -> None:
    run(cli, request_file, "first")
    (noted,) = paces_in(request_file.parent / "data" / "paces.jsonl")
    request = TrainRequested.model_validate(yaml.safe_load(request_file.read_text()))
    settings = Settings(data_path=request_file.parent / "data")
    twice = request.model_copy(update={"max_epochs": 4})
    one, other = (estimated(some, request_file.parent, settings) for some in (request, twice))
    for part in ("training topk", "training batchtopk"):
        assert other.time.parts[part] == pytest.approx(2 * one.time.parts[part])
        assert one.time.parts[part] == pytest.approx(noted.parts[part].seconds, rel=0.1)
    assert other.time.parts["extracting"] == one.time.parts["extracting"]
    half = estimated(request.model_copy(update={"token_budget": one.tokens // 2}), request_file.parent, settings)
    assert half.tokens == pytest.approx(one.tokens / 2, rel=0.05)


def test_it_is_said_in_words(cli: Cli, request_file: Path) -> None:
    run(cli, request_file, "first")
    run(cli, request_file, "second")
    ended = cli("estimate", request_file, "--corpus-folder", request_file.parent, "--set", "token_budget=100")
    assert ended.status == 0, ended.err
    assert "missed by" in ended.out
    assert "2 earlier jobs, each from the others" in ended.out
    assert "memory at its peak" in ended.out
    assert "tokens of" in ended.err


def test_what_a_worker_would_refuse_is_refused(cli: Cli, request_file: Path) -> None:
    run(cli, request_file, "first")
    ended = cli("estimate", request_file, "--corpus-folder", request_file.parent, "--set", "layer_number=9")
    assert (ended.status, ended.out) == (2, "")
    assert "Layer 9 is out of range" in ended.err
