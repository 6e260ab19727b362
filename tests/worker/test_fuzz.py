"""Messages that nobody should send, on a real Kafka: each ends once, and the worker goes on."""

from pathlib import Path

import pytest

from mistudio_schemas import ErrorCode, TrainCompleted
from mistudio_train.settings import Settings

from . import hostile, jobs
from .bus import events, publish, reading, request, running_worker

MESSAGES = 250
"""About ten a second; `make bench-fuzz` sends as many as one likes."""


@pytest.mark.timeout(600)
async def test_every_message_ends_once_whatever_it_is(worker_settings: Settings, tmp_path: Path) -> None:
    settings = worker_settings.model_copy(update={"max_concurrent_jobs": 4, "kafka_request_partitions": 8})
    topics = settings.topics
    before = hostile.lay_canaries(tmp_path, settings.data_path / "samples")
    await publish(settings)
    source = hostile.Hostility(7, settings, tmp_path / "canary.txt")
    sent = await hostile.send(source.messages(MESSAGES, large_every=100), settings)
    assert len(sent) == MESSAGES
    ends = topics.dead_letter, topics.completed, topics.failed, topics.cancelled
    async with running_worker(settings, jobs.works), reading(settings, *ends) as reader:
        await reader.until(lambda found: len(found) >= MESSAGES, 500)
        account = hostile.accounted(sent, await reader.drained(), settings)
        await publish(settings, request("the-last", settings))
        *_, done = events(await reader.of(topics.completed, account.codes["completed"] + 1))
    assert account.wrong == []
    assert str(ErrorCode.INTERNAL) not in account.codes
    assert isinstance(done, TrainCompleted)
    assert done.job_id == "the-last"
    assert hostile.outside(tmp_path) == before
    assert not any(settings.workspaces.iterdir())
