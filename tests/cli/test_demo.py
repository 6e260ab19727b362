"""The whole demo on a tiny model: embedded broker, directory store, real worker, real training process."""

import json
from pathlib import Path

import pytest
import typer

from mistudio_schemas import TopKSAE, TrainRequested, new_job_id
from mistudio_train.cli.demo import EMBEDDED, Inputs, run_demo
from mistudio_train.cli.demo_outcome import Outcome, print_json, show
from mistudio_train.cli.feature_choice import Rule, halves
from tests.cli.conftest import Cli
from tests.models import tiny_model

TEXTS = [f"The quick brown fox number {number} jumps over the lazy dog {number % 7}." for number in range(60)]
EVERY = Rule(texts=1, frequency=1.0, on_one_word=1.0, distinct=1, plain=0.0, shared=1.0)
"""A model with random weights has no feature that anybody could name."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def inputs(model: Path, layer: int = 1) -> Inputs:
    request = TrainRequested(
        job_id=new_job_id(),
        model_name=str(model),
        corpus_file="demo.txt",
        layer_number=layer,
        max_sequence_length=64,
        pooling="token",
        max_epochs=2,
        sae=TopKSAE(name="demo", k=4, hidden_dim=64, learning_rate=3e-3, batch_size=256),
    )
    return Inputs(model, TEXTS, request, EVERY)


@pytest.fixture(scope="module")
def outcome(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_demo(inputs(model), tmp_path_factory.mktemp("demo") / "out", "embedded")


def test_the_files_are_all_there_and_nothing_else_is_left(outcome: Outcome) -> None:
    folder = outcome.folder
    assert list(folder.parent.iterdir()) == [folder]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {*(one.name for one in outcome.event.artifacts), "manifest.json"}
    assert "sae/sae_weights.safetensors" in names


def test_the_features_are_shown_by_marked_words_of_the_texts(outcome: Outcome) -> None:
    assert 1 <= len(outcome.features) <= 10
    to_choose = halves(TEXTS)
    contexts = [context for feature in outcome.features for context in feature.contexts]
    assert contexts
    for context in contexts:
        assert not to_choose[context.text]
        assert "«" in context.marked
        unmarked = context.marked.replace("«", "").replace("»", "").removeprefix("… ").removesuffix(" …")
        assert unmarked in TEXTS[context.text]


def test_for_a_person_it_says_how_good_what_and_where(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    show(outcome)
    out = capsys.readouterr().out
    for said in ("loss ", "L0 4", "FVU ", "dead", "chosen on one half of the texts", "feature ", "active on", "«"):
        assert said in out
    assert f"The files: {outcome.folder}" in out
    lines = [line.strip() for line in out.splitlines()[-3:]]
    assert lines[:2] == ["from sae_lens import SAE", f"sae = SAE.load_from_disk('{outcome.folder / 'sae'}')"]
    assert lines[2].startswith("features = sae.encode(x)  # x: resid_post of block 1, float32 [tokens, 32]")


def test_for_a_program_it_says_the_same(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    print_json(outcome)
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(outcome.folder)
    assert said["corpus"]["texts"] == len(TEXTS)
    assert said["sae"]["metrics"]["l0"] == pytest.approx(4.0, abs=0.5)
    assert 0 <= said["sae"]["metrics"]["fvu"] <= 1
    assert [one["feature"] for one in said["features"]] == [one.feature for one in outcome.features]
    first = said["features"][0]["contexts"][0]
    assert first["marked"] == outcome.features[0].contexts[0].marked
    assert said["features"][0]["words"] == outcome.features[0].words
    assert all(f"«{one['word']}»" in first["marked"] and 0 < one["strength"] <= 1 for one in first["words"])
    assert len(said["saelens"]) == 3


def test_a_job_without_a_result_says_why_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        run_demo(inputs(model, layer=9), tmp_path, "embedded")
    written = capsys.readouterr()
    assert ended.value.exit_code == 1
    assert written.out == ""
    assert "failed" in written.err
    assert "layer" in written.err.lower()
    assert list(tmp_path.iterdir()) == []


def test_the_first_line_says_what_stands_in_for_the_servers(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mistudio_train.cli.demo_inputs.find_spec", lambda _: None)
    ended = cli("demo", "--to", tmp_path)
    assert ended.status == 2
    assert EMBEDDED in ended.err.splitlines()[0]
    assert "is not installed" in ended.err


def test_an_unknown_stack_is_refused(cli: Cli) -> None:
    ended = cli("demo", "--stack", "cloud")
    assert ended.status == 2
    assert "embedded" in ended.err
