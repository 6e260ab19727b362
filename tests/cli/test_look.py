"""`report`, `show`, `compare` and `reproduce` on runs that were really made: in a folder, and in the real store."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mistudio_schemas import SAEResult
from mistudio_train.cli import main
from mistudio_train.settings import Settings
from mistudio_train.worker.artifacts import upload, write_manifest
from mistudio_train.worker.corpora import put_corpus
from mistudio_train.worker.delivery import Place
from mistudio_train.worker.register import MessageId, Register
from mistudio_train.worker.store import Store, open_store
from tests.cli.conftest import Cli
from tests.cli.events import completed
from tests.models import tiny_model

HOSTILE = "\x1b[31mred \u202eevil [bold]markup[/bold] <script>alert(1)</script>"
TEXTS = [HOSTILE, *(f"the cat sat on mat {number} and looked at {number % 7} birds" for number in range(60))]


@dataclass(frozen=True)
class Made:
    """A run's folder and what it was made of."""

    folder: Path
    corpus: Path
    request: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    model = tiny_model("llama", root / "model")
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    saes = [
        {"name": "small", "kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 64},
        {"name": "large", "kind": "batchtopk", "k": 8, "hidden_dim": 128, "batch_size": 64},
    ]
    asked = {"job_id": "j", "model_name": str(model), "corpus_file": corpus.name, "layer_number": 1, "saes": saes}
    request = root / "request.yaml"
    request.write_text(yaml.safe_dump(asked | {"pooling": "token", "max_epochs": 2, "max_sequence_length": 32}))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(request), "--to", str(root / "run"), "--corpus-folder", str(root)])
    assert not ended.value.code
    return Made(root / "run", corpus, request)


@pytest.fixture
def stored(
    made: Made, worker_env: dict[str, str], worker_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Store]:
    """The same run as a worker leaves it."""
    for name, value in worker_env.items():
        monkeypatch.setenv(name, value)
    store = open_store(worker_settings)
    store.ensure()
    put_corpus(store, made.corpus.name, made.corpus)
    message = MessageId(group="g", topic="t", partition=0, offset=0, timestamp=0, value_sha256="0" * 64)
    claim = Register(store).create("j", message, "w")
    shutil.copytree(made.folder, tmp_path / "files", ignore=shutil.ignore_patterns("manifest.json"))
    refs = upload(store, claim, tmp_path / "files")
    manifest = write_manifest(store, claim, refs)
    saes = [SAEResult.model_validate(one) for one in json.loads((made.folder / "saes.json").read_text())["saes"]]
    event = completed("j", 1).model_copy(update={"artifacts": refs, "manifest": manifest, "saes": saes})
    Register(store).finish(claim, event, Place("t", 0, 0))
    yield store
    store.close()


@contextmanager
def changed(path: Path, before: str, after: str) -> Iterator[None]:
    kept = path.read_text()
    assert before in kept
    path.write_text(kept.replace(before, after))
    try:
        yield
    finally:
        path.write_text(kept)


def test_the_report_of_a_folder_is_where_it_lies(cli: Cli, made: Made) -> None:
    ended = cli("report", made.folder, "--no-open")
    assert (ended.status, ended.out.strip()) == (0, str(made.folder / "report" / "index.html")), ended.err
    ended = cli("report", made.folder, "--no-open", "--sae", "large")
    assert ended.out.strip() == str(made.folder / "saes" / "large" / "report" / "index.html")


def test_the_report_of_a_job_is_brought_and_opened(
    cli: Cli, made: Made, stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    ended = cli("report", "j", "--to", tmp_path / "there")
    page = tmp_path / "there" / "report" / "index.html"
    assert (ended.status, ended.out.strip()) == (0, str(page)), ended.err
    assert page.read_bytes() == (made.folder / "report" / "index.html").read_bytes()
    assert opened == [page.as_uri()]
    assert (tmp_path / "there" / "saes" / "large" / "report" / "index.html").exists()
    assert not (tmp_path / "there" / "sae_model.pt").exists()


def test_figures_and_features_are_shown_and_nothing_steers_the_terminal(cli: Cli, made: Made) -> None:
    ended = cli("show", made.folder)
    assert ended.status == 0, ended.err
    assert "explained_variance" in ended.out
    assert ended.out.count("\nfeature ") == 5
    everything = json.loads(cli("show", made.folder, "--json").out)["features"]
    assert [f"feature {card['n']}:" in ended.out for card in everything] == [True] * 5
    wanted = everything[3]["n"]
    ended = cli("show", made.folder, "--feature", str(wanted))
    assert ended.out.count("\nfeature ") == 1
    assert f"feature {wanted}:" in ended.out
    strongest = max(everything[3]["c"][0]["s"])
    assert strongest > 30
    assert "«" in ended.out
    every = [cli("show", made.folder, "--feature", str(card["n"])).out for card in everything]
    assert not set("\x1b\u202e") & set("".join(every))


def test_a_feature_without_a_card_is_said(cli: Cli, made: Made) -> None:
    ended = cli("show", made.folder, "--feature", "100000")
    assert (ended.status, ended.out) == (2, "")
    assert "features 0 to 63" in ended.err
    assert "It has small, large" in cli("show", made.folder, "--sae", "huge").err


def test_a_job_of_the_store_is_shown(cli: Cli, stored: Store) -> None:
    ended = cli("show", "j", "--sae", "large")
    assert ended.status == 0, ended.err
    assert "large" in ended.out


def test_runs_are_compared_in_one_table_and_one_plot(cli: Cli, made: Made, stored: Store, tmp_path: Path) -> None:
    plot = tmp_path / "frontier.png"
    ended = cli("compare", made.folder, "j", "--plot", plot)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert len(lines) == 5
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(cli("compare", made.folder, "j", "--json").out)
    fvus = [row["metrics"]["fvu"] for row in rows]
    assert fvus == sorted(fvus)
    assert {(row["run"], row["name"]) for row in rows} == {
        (run, name) for run in (str(made.folder), "j") for name in ("small", "large")
    }


def test_a_run_done_again_has_the_same_weights_and_is_not_put_on_the_hub_again(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    with changed(made.folder / "request.json", '{"job_id"', '{"push_to_hub": "owner/name", "job_id"'):
        ended = cli("reproduce", made.folder, "--corpus-folder", made.corpus.parent, "--to", tmp_path / "again")
    assert ended.status == 0, ended.err
    assert "same, bit for bit" in ended.err
    assert ended.out.count("same") == 8
    assert "differs" not in ended.out
    assert (tmp_path / "again" / "saes" / "large" / "sae" / "sae_weights.safetensors").exists()


def test_a_job_of_the_store_is_done_again_with_its_corpus(cli: Cli, stored: Store) -> None:
    ended = cli("reproduce", "j", "--json")
    assert ended.status == 0, ended.err
    said = json.loads(ended.out)
    assert said["same_weights"]
    assert said["differences"] == []
    assert all(file["before"] == file["after"] for file in said["files"])


def test_what_differs_is_said(cli: Cli, made: Made, tmp_path: Path) -> None:
    import torch

    manifest = json.loads((made.folder / "manifest.json").read_text())
    digest = next(one["sha256"] for one in manifest["objects"] if one["name"] == "sae/sae_weights.safetensors")
    with (
        changed(made.folder / "metadata.json", f'"torch": "{torch.__version__}"', '"torch": "1.13.1"'),
        changed(made.folder / "manifest.json", digest, "0" * 64),
    ):
        ended = cli("reproduce", made.folder, "--corpus-folder", made.corpus.parent)
    assert ended.status == 1
    assert "The weights differ" in ended.err
    assert f"torch was 1.13.1, and is {torch.__version__}" in ended.err


def test_another_corpus_is_refused_before_any_work(cli: Cli, made: Made, tmp_path: Path) -> None:
    (tmp_path / made.corpus.name).write_text('{"text": "another"}\n')
    ended = cli("reproduce", made.folder, "--corpus-folder", tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert "is not the corpus of that run" in ended.err


def test_no_such_run(cli: Cli, stored: Store, tmp_path: Path) -> None:
    for command in ("report", "show", "compare", "reproduce"):
        ended = cli(command, "nobody")
        assert (ended.status, ended.out) == (2, ""), command
        assert "no run of nobody" in ended.err
