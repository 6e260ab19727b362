"""`init` creates what is missing, once, and names it."""

import json

from mistudio_train.settings import Settings
from tests.cli.conftest import Cli


def test_init_creates_topics_and_bucket_once(cli_process: Cli, worker_settings: Settings) -> None:
    first = cli_process("init")
    assert first.status == 0, first.err
    assert set(first.out.split()) == set(worker_settings.topics.all())
    again = cli_process("init", "--json")
    assert json.loads(again.out) == {"topics_created": [], "bucket": worker_settings.minio_bucket}
    assert cli_process("corpus", "list").status == 0


def test_a_topic_that_is_not_as_it_should_be_is_named(cli_process: Cli, process_env: dict[str, str]) -> None:
    assert cli_process("init").status == 0
    process_env["KAFKA_REQUEST_PARTITIONS"] = "8"
    ended = cli_process("init")
    assert ended.status == 0
    assert "it has 4 partitions, 8 are wanted" in ended.err
