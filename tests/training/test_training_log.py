"""The training log is one strict JSON object a line, on disk as soon as it is written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistudio_train.errors import ExportRefused
from mistudio_train.training import training_log
from mistudio_train.training.training_log import TrainingLog


def strictly(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(path: Path) -> list[Any]:
    return [strictly(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_is_there_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "output" / "training_log.jsonl"
    with TrainingLog(path) as log:
        log.write(sae="standard-0", epoch=1, loss=0.5)
        assert lines(path) == [{"sae": "standard-0", "epoch": 1, "loss": 0.5}]
        log.write(sae="standard-0", epoch=2, loss=0.25)
    assert [line["epoch"] for line in lines(path)] == [1, 2]


def test_numbers_that_json_cannot_hold_are_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "training_log.jsonl"
    with TrainingLog(path) as log:
        log.write(step=3, loss=float("nan"), l0=float("-inf"), mse=0.5)
    assert lines(path) == [
        {"step": 3, "loss": None, "l0": None, "mse": 0.5, "not_finite": {"loss": "nan", "l0": "-inf"}}
    ]


@pytest.mark.parametrize("torn", ['{"epoch": 2, "lo', '{"epoch": 2, "note": "' + "x" * 10_000])
def test_reopened_after_a_kill_it_goes_on_behind_the_last_whole_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"epoch": 1}\n' + torn)
    with TrainingLog(path) as log:
        log.write(epoch=2)
    assert lines(path) == [{"epoch": 1}, {"epoch": 2}]


def test_a_file_with_nothing_but_a_torn_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"epo')
    TrainingLog(path).close()
    assert path.read_bytes() == b""


def test_other_types_are_refused(tmp_path: Path) -> None:
    loss: Any = np.float32(0.5)
    with TrainingLog(tmp_path / "a.jsonl") as log, pytest.raises(ExportRefused, match="numpy"):
        log.write(loss=loss)


def test_a_listener_is_told_every_line_of_a_log_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_log, "LINES_AT_ONCE", 2)
    path, told = tmp_path / "training_log.jsonl", []
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"torn')

    def listen(first: int, lines: Sequence[str]) -> None:
        assert path.read_text().splitlines()[first : first + len(lines)] == lines, "they are on disk by then"
        told.append((first, len(lines)))

    with TrainingLog(path, listen) as log:
        log.write(epoch=4)
    assert told == [(0, 2), (2, 1), (3, 1)]
