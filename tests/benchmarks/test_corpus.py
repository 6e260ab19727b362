"""Both sides on a model too small to mean anything, and what the figures are made of on numbers worked by hand."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.corpus import (
    READINGS,
    Phases,
    Ran,
    Setting,
    cores,
    held_out_rows,
    main,
    ordinary,
    ratios,
    report,
    request_of,
    show,
    split,
    summary,
    windows,
)
from rich.console import Console

from benchmarks import corpus
from tests.models import SENTENCES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tiny_model("llama", tmp_path_factory.mktemp("corpus") / "llama")
    return Setting(folder, layer=1, context=32, d_sae=64, k=4, batch=64)


def ran(side: str, seed: int, seconds: float, fvu: float) -> Ran:
    judged = {reading: {"fvu": fvu, "l0": 32.0, "rows": 10.0} for reading in READINGS}
    phases = {"training": 0.75 * seconds, "exporting": 0.25 * seconds}
    return Ran(side, seed, 1000, phases, {"extracting": 1.0} if side == "saelens" else {}, judged)


RAN = [ran("ours", 0, 10, 0.1), ran("saelens", 0, 30, 0.2), ran("ours", 1, 20, 0.2), ran("saelens", 1, 30, 0.2)]


def test_both_sides_do_the_whole_work_and_are_judged_by_the_same_rows(
    tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{one} {other}" for one in SENTENCES for other in SENTENCES]
    monkeypatch.setattr(corpus, "setting_of", lambda options: tiny)
    monkeypatch.setattr(corpus, "english", lambda tokens: texts)
    to = tmp_path / "corpus.json"
    assert main(["--tokens", "600", "--runs", "1", "--threads", "1", "--to", str(to)]) == 0
    found = json.loads(to.read_text())
    mine, theirs = found["runs"]
    assert (mine["side"], theirs["side"]) == ("ours", "saelens")
    assert mine["rows"] == theirs["rows"] > 500
    assert list(mine["phases"]) == [
        "starting", "planning", "loading", "extracting", "training", "evaluating", "exporting",
    ]  # fmt: skip
    assert list(theirs["phases"]) == ["starting", "loading", "training", "exporting"]
    assert 0 < theirs["within"]["extracting"] < theirs["phases"]["training"]
    for reading in READINGS:
        assert mine["judged"][reading]["rows"] == theirs["judged"][reading]["rows"] > 20
        assert all(one["judged"][reading]["fvu"] > 0 for one in found["runs"])
    assert found["ratios"]["times as fast"] == pytest.approx(theirs["seconds"] / mine["seconds"])
    assert str(tiny.model.parent) not in to.read_text()
    assert "1 cores" in found["about"]
    assert "times as fast" in capsys.readouterr().out


def dies(*arguments: Any) -> None:
    os._exit(1)


def test_a_peer_that_dies_is_no_figure(tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "peer_process", dies)
    with pytest.raises(SystemExit, match="ended before its work was done"):
        corpus.peer(tiny, tmp_path / "corpus.txt", 64, 0, tmp_path / "out", print)


def test_ours_is_trained_on_all_texts_unless_the_model_is_to_predict_some(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "model")
    request = request_of(setting, tmp_path / "corpus.txt", seed=3)
    assert (request.held_out, request.cross_entropy_tokens, request.resolved_saes()[0].seed) == (0, 0, 3)
    request = request_of(replace(setting, cross_entropy_tokens=64), tmp_path / "corpus.txt", seed=3)
    assert (request.held_out, request.cross_entropy_tokens) == (0.05, 64)


def test_no_text_is_on_both_sides_and_every_tenth_token_is_held_out() -> None:
    texts = [f"{number} " + "word " * (number % 7 + 1) for number in range(2000)]
    training, held_out = split(texts, 1000, lambda text: len(text.split()))
    assert not set(training) & set(held_out)
    assert 1000 <= sum(len(text.split()) for text in training) < 1010
    assert 100 <= sum(len(text.split()) for text in held_out) < 110
    assert [text for text in texts if text in {*training, *held_out}] == texts[: len(training) + len(held_out)]


def test_a_text_by_itself_is_cut_and_texts_joined_are_full() -> None:
    ids = [[1, 2, 3, 4, 5], [6, 7]]
    assert list(windows(ids, 3, None)) == [[1, 2, 3], [4, 5], [6, 7]]
    assert list(windows(ids, 4, 0)) == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 6, 7]]


def test_rows_are_the_blocks_output_without_first_and_special_tokens(tiny: Setting) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = held_out_rows(tiny, [SENTENCES[0]])
    ids = AutoTokenizer.from_pretrained(tiny.model)(SENTENCES[0], return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.inference_mode():
        states = model(ids[:, : tiny.context], output_hidden_states=True).hidden_states[tiny.layer + 1][0]
    assert torch.allclose(found["by itself"][:5], ordinary(states[1:])[:5], atol=1e-5)


def test_high_norms_are_left_out() -> None:
    rows_ND = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 6.0], [6.1, 0.0]])
    assert torch.equal(ordinary(rows_ND), rows_ND[:4])


def test_phases_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    said: list[str] = []
    phases = Phases(said.append, _began=time.perf_counter())
    for name in ("training", "training", "saving", "training"):
        phases.enter(name)
    phases.end()
    assert phases.seconds == {"starting": 1, "training": 2 + 4, "saving": 1}
    assert said == ["  training …", "  saving …", "  training …"]


def test_ratios_are_of_medians() -> None:
    found = ratios(summary(RAN))
    assert found["times as fast"] == pytest.approx(2)
    assert found["fvu joined"] == pytest.approx(0.75)
    assert summary(RAN)["ours"]["rows_per_second"] == pytest.approx(75)


def test_the_report_and_the_table_say_what_was_measured(tmp_path: Path) -> None:
    found = json.loads(json.dumps(report(Setting(tmp_path / "model"), RAN, "about")))
    assert found["setting"]["model"] == "model"
    assert [one["seconds"] for one in found["runs"]] == [10, 30, 20, 30]
    console = Console(record=True, width=126, quiet=False)
    show(RAN, "about", console)
    text = console.export_text()
    assert "times as fast 2.000" in text
    assert "saelens, seconds: training 22.5, exporting 7.5 (within: extracting 1.0)" in text


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with cores(1):
        assert len(os.sched_getaffinity(0)) == 1
    with cores(None):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


def test_a_mistyped_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--tokens", "many"])
    assert "many" in capsys.readouterr().err
