"""Every kind of store there is, empty: a test that asks for `store` runs against each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistudio_train.settings import Settings
from mistudio_train.worker.store import Store, open_store


@pytest.fixture(params=["s3", "directory"])
def store_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "s3":
        settings = request.getfixturevalue("worker_settings")
        assert isinstance(settings, Settings)
        return settings
    return Settings(store_path=tmp_path / "store", data_path=tmp_path / "data")


@pytest.fixture
def settings(worker_settings: Settings) -> Settings:
    """Of a worker with a corpus of its own, `corpus.txt`."""
    samples = worker_settings.data_path / "samples"
    samples.mkdir(parents=True)
    (samples / "corpus.txt").write_text("one\ntwo\nthree\n")
    return worker_settings


@pytest.fixture
def store(store_settings: Settings) -> Iterator[Store]:
    opened = open_store(store_settings)
    opened.ensure()
    yield opened
    opened.close()
