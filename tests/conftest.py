"""What every test may ask for: a real Kafka and a real S3 store, and a corner of them that no other test sees."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from mistudio_stack import Stack, open_stack
from mistudio_train.settings import Settings


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One Kafka and one S3 store for all tests; nothing is started before a test asks."""
    with open_stack() as opened:
        yield opened


@pytest.fixture
def worker_env(stack: Stack, tmp_path: Path) -> dict[str, str]:
    """A worker's environment: topics, consumer group, bucket and folder are this test's own, and do not exist yet."""
    name = f"t{uuid4().hex[:12]}"
    return stack.env() | {
        "KAFKA_TOPIC_PREFIX": f"{name}.",
        "KAFKA_GROUP_ID": name,
        "KAFKA_REQUEST_PARTITIONS": "4",
        "MINIO_BUCKET": name,
        "DATA_PATH": str(tmp_path / "data"),
        "API_HOST": "127.0.0.1",
        "API_PORT": "0",
    }


@pytest.fixture
def worker_settings(worker_env: dict[str, str]) -> Settings:
    """The same as settings."""
    return Settings.model_validate({name.lower(): value for name, value in worker_env.items()})


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that anybody may read, and no rights beyond those of an ordinary user while the test runs."""
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), os.geteuid()
        folder.chmod(0o777)
        if before == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(before)
