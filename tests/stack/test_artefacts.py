"""A program is built once a machine, whoever asks and whatever goes wrong."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from mistudio_stack.artefacts import cached


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path))
    return tmp_path


def test_two_that_ask_at_once_build_once(cache: Path) -> None:
    builds: list[Path] = []
    begun, second_asks = Event(), Event()

    def build(folder: Path) -> None:
        builds.append(folder)
        begun.set()
        assert second_asks.wait(10)
        (folder / "program").write_text("done")

    def ask_second() -> str:
        assert begun.wait(10)
        second_asks.set()
        return (cached("thing", build) / "program").read_text()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached, "thing", build)
        second = threads.submit(ask_second)
    assert first.result() == cache / "thing"
    assert second.result() == "done"
    assert len(builds) == 1


def test_a_build_that_fails_leaves_nothing_behind(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        cached("thing", fail)
    assert [path.name for path in cache.iterdir()] == [".thing.lock"]


def test_what_a_killed_build_left_is_cleared(cache: Path) -> None:
    (cache / ".thing.part-killed").mkdir()
    cached("thing", lambda folder: (folder / "program").touch())
    assert sorted(path.name for path in cache.iterdir()) == [".thing.lock", "thing"]
