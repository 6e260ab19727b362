"""`estimate` says before a job what the job itself then notes: the same amounts, plan and sizes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mistudio_schemas import TrainRequested
from mistudio_train.cli import main
from mistudio_train.cli.estimate import estimated
from mistudio_train.paces import AROUND, Pace, paces_in
from mistudio_train.settings import Settings
from tests.cli.conftest import Cli
from tests.models import tiny_model

TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds, which flew away" for number in range(80)]
SAES = [
    {"name": "a", "kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 64},
    {"name": "b", "kind": "batchtopk", "k": 8, "hidden_dim": 128, "batch_size": 64},
]


@dataclass(frozen=True)
class Done:
    """A job that was done here, and what it noted."""

    folder: Path
    request: Path
    noted: Pace


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("once")
    (folder / "data").mkdir()
    (folder / "corpus.txt").write_text("\n".join(TEXTS) + "\n")
    asked = {"model_name": str(tiny_model("llama", folder / "model")), "corpus_file": "corpus.txt", "saes": SAES}
    request = folder / "request.yaml"
    request.write_text(
        yaml.safe_dump(asked | {"layer_number": 1, "pooling": "token", "max_epochs": 2, "cross_entropy_tokens": 64})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(folder / "data"))
        with pytest.raises(SystemExit) as ended:
            main(["run", str(request), "--to", str(folder / "run"), "--corpus-folder", str(folder)])
    assert not ended.value.code
    (noted,) = paces_in(folder / "data" / "paces.jsonl")
    return Done(folder, request, noted)


@pytest.fixture
def done(once: Done, monkeypatch: pytest.MonkeyPatch) -> Done:
    monkeypatch.setenv("DATA_PATH", str(once.folder / "data"))
    return once


def test_without_an_earlier_job_nothing_is_said(
    cli: Cli, once: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    ended = cli("estimate", once.request, "--corpus-folder", once.folder)
    assert (ended.status, ended.out) == (2, "")
    assert "no job on CPU" in ended.err
    assert "Let a small job be done there first" in ended.err


def test_a_job_is_told_beforehand_what_it_then_notes_itself(cli: Cli, done: Done) -> None:
    ended = cli("estimate", done.request, "--corpus-folder", done.folder, "--json")
    assert ended.status == 0, ended.err
    said, noted = json.loads(ended.out), done.noted
    assert said["jobs"] == 1
    assert set(said["time"]["parts"]) == set(noted.parts) == {
        "planning", "loading", "extracting", "training topk", "training batchtopk", "predicting", "evaluating",
        "exporting", AROUND,
    }  # fmt: skip
    assert said["seconds"] == pytest.approx(sum(part.seconds for part in noted.parts.values()), rel=0.2)
    metadata = json.loads((done.folder / "run" / "metadata.json").read_text())
    assert said["tokens"] == metadata["data_info"]["corpus"]["tokens"]
    assert said["memory_bytes"] == pytest.approx(noted.memory_planned, rel=0.01)
    assert said["disk_bytes"] == pytest.approx(noted.disk_planned, rel=0.05)
    assert [path.name for path in (done.folder / "data").iterdir()] == ["paces.jsonl"]


def test_the_amounts_are_those_of_the_job(done: Done) -> None:
    request = TrainRequested.model_validate(yaml.safe_load(done.request.read_text()))
    settings = Settings(data_path=done.folder / "data")
    twice = request.model_copy(update={"max_epochs": 4})
    one, other = (estimated(some, done.folder, settings) for some in (request, twice))
    for part in ("training topk", "training batchtopk"):
        assert other.time.parts[part] == pytest.approx(2 * one.time.parts[part])
        assert one.time.parts[part] == pytest.approx(done.noted.parts[part].seconds, rel=0.1)
    assert other.time.parts["extracting"] == one.time.parts["extracting"]
    half = estimated(request.model_copy(update={"token_budget": one.tokens // 2}), done.folder, settings)
    assert half.tokens == pytest.approx(one.tokens / 2, rel=0.05)


def test_it_is_said_in_words(cli: Cli, once: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (once.folder / "data" / "paces.jsonl").read_text()
    (tmp_path / "paces.jsonl").write_text(2 * line)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    ended = cli("estimate", once.request, "--corpus-folder", once.folder, "--set", "token_budget=100")
    assert ended.status == 0, ended.err
    assert "missed by 0%, at worst 0% (2 earlier jobs, each from the others)" in ended.out
    assert "memory at its peak" in ended.out
    assert "tokens of" in ended.err
    assert "What is known: 2 jobs on CPU" in ended.err


@pytest.mark.parametrize(
    ("setting", "said"),
    [("layer_number=9", "Layer 9 is out of range"), ("push_to_hub=owner/name", "into repositories of owner")],
)
def test_what_a_worker_would_refuse_is_refused(cli: Cli, done: Done, setting: str, said: str) -> None:
    ended = cli("estimate", done.request, "--corpus-folder", done.folder, "--set", setting)
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err
