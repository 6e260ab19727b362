import json
from pathlib import Path

import pytest
from benchmarks.memory import (
    CASES,
    D_IN,
    LIMIT,
    Case,
    Compared,
    Measured,
    Resident,
    compare,
    main,
    make_corpus,
    report,
    show,
    verdict,
)
from rich.console import Console

from mistudio_schemas import CorpusInfo, StandardSAE, TopKSAE

ROWS = 400
SAES = (
    TopKSAE(name="topk", hidden_dim=64, k=4, batch_size=32, max_epochs=1),
    StandardSAE(name="standard", hidden_dim=64, batch_size=32, max_epochs=1),
)
STEPS = [
    "extracting",
    "training topk",
    "training standard",
    "evaluating topk",
    "exporting topk",
    "evaluating standard",
    "exporting standard",
]


def measured(above: int, rows: int = 10) -> Measured:
    corpus = CorpusInfo(
        texts=rows, texts_dropped=0, tokens=rows, tokens_truncated=0, windows=rows, rows=rows, sha256="0" * 64
    )
    peaks = {"extracting": Resident(peak=1000), "training topk": Resident(peak=1000 + above)}
    return Measured(corpus, 1000, peaks)


def test_real_children_are_measured_in_every_step_and_leave_nothing(tmp_path: Path) -> None:
    compared = compare(Case("mean", SAES), ROWS * D_IN * 4, tmp_path)
    assert (compared.small.corpus.rows, compared.large.corpus.rows) == (ROWS // 10, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for one in (compared.small, compared.large):
        assert list(one.steps) == STEPS
        # A process that has torch in it holds more than this, and no peak is below what was there when it began.
        assert one.base_bytes > 100_000_000
        assert all(step.peak > 0.5 * one.base_bytes for step in one.steps.values())
        assert one.above_bytes > 0


def test_the_peak_is_of_the_largest_step_and_above_the_loaded_model() -> None:
    assert measured(above=300).above_bytes == 300
    assert Compared(CASES[0], measured(above=200), measured(above=230)).ratio == pytest.approx(1.15)


def test_growth_and_a_small_corpus_are_refused() -> None:
    enough = 10**9 // (D_IN * 4) + 1
    assert verdict([Compared(CASES[0], measured(200), measured(220, enough))]) == []
    grown = verdict([Compared(CASES[0], measured(200), measured(221, enough))])
    assert grown == [f"token: the peak grows 1.105 times, and {LIMIT} is the limit."]
    short = verdict([Compared(CASES[1], measured(200), measured(200, enough - 2))])
    assert short == ["mean: 1.000 GB of activations are fewer than the 1 GB that is to be shown."]


def test_corpora_have_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    make_corpus(tmp_path / "mean.txt", 50, "mean")
    assert len((tmp_path / "mean.txt").read_text().splitlines()) == 50
    make_corpus(tmp_path / "token.txt", 5000, "token")
    *all_but_last, _ = lines = (tmp_path / "token.txt").read_text().splitlines()
    assert sum(len(line.split()) for line in all_but_last) < 5000 <= sum(len(line.split()) for line in lines)


def test_the_report_and_the_table_say_what_was_measured() -> None:
    compared = [Compared(CASES[0], measured(200_000_000), measured(210_000_000, 600_000))]
    case = json.loads(json.dumps(report(compared)))["cases"][0]
    assert (case["pooling"], case["ratio"]) == ("token", 1.05)
    assert case["whole"]["activation_bytes"] == 600_000 * D_IN * 4
    assert case["whole"]["steps"]["training topk"]["peak_above_base"] == 210_000_000
    console = Console(record=True, width=120, quiet=False)
    show(compared, console)
    text = console.export_text()
    assert "210.0 MB" in text
    assert "1.050" in text


def test_a_mistyped_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--case", "median"])
    assert "median" in capsys.readouterr().err
