"""`init` creates what is missing, once, and names it."""

import json

import pytest

from mistudio_train.settings import Settings
from tests.cli.conftest import Cli


def test_init_creates_topics_and_bucket_once(
    cli_process: Cli,
    cli: Cli,
    worker_env: dict[str, str],
    worker_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = cli_process("init")
    assert first.status == 0, first.err
    assert set(first.out.split()) == set(worker_settings.topics.all())
    for name, value in worker_env.items():
        monkeypatch.setenv(name, value)
    again = cli("init", "--json")
    assert json.loads(again.out) == {"topics_created": [], "bucket": worker_settings.minio_bucket}
    assert cli("corpus", "list").status == 0


def test_a_topic_that_is_not_as_it_should_be_is_named(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.kafka_request_partitions == 4
    monkeypatch.setenv("KAFKA_REQUEST_PARTITIONS", "8")
    ended = cli("init")
    assert (ended.status, ended.out) == (0, "")
    assert "it has 4 partitions, 8 are wanted" in ended.err
