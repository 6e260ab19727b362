"""Checkpoints keep to their share of the time, however long one takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistudio_train.training import checkpoints
from mistudio_train.training.checkpoints import Checkpoints

WRITE_SECONDS = 3.0


def test_the_next_checkpoint_waits_fifty_times_as_long_as_the_last_one_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, write = SimpleNamespace(now=1000.0), checkpoints._write

    def slow(*args: Any) -> Any:
        clock.now += WRITE_SECONDS
        return write(*args)

    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(checkpoints, "_write", slow)
    kept = Checkpoints(tmp_path, {}, 1.0, lambda _: None)
    (log := tmp_path / "log").touch()

    def due_after(seconds: float) -> bool:
        clock.now += seconds
        return kept.due

    assert due_after(1.0)
    began = clock.now
    kept.keep_training(0, {}, log)
    took = clock.now - began
    assert took >= 2 * WRITE_SECONDS
    assert not due_after(49 * took)
    assert due_after(took)
