"""The README's Python does what it says, on a real broker: its blocks are run as they stand."""

import asyncio
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from mistudio_schemas import TrainRequested, parse_event, record_for
from mistudio_train.settings import Settings
from tests.worker import jobs
from tests.worker.bus import publish, reading, running_worker

README = (Path(__file__).parents[1] / "README.md").read_text()
PUBLISH, CONSUME = re.findall(r"```python\n(import asyncio\n.*?)```", README, re.DOTALL)


def adapted(block: str, settings: Settings) -> str:
    """A block for this test's broker and topics; it defines `main`, which the test awaits."""
    block = block.replace("localhost:9092", settings.kafka_bootstrap_servers).removesuffix("asyncio.run(main())\n")
    block = block.replace(
        'source="/my-service")', f'source="/my-service", topics=Topics({settings.kafka_topic_prefix!r}))'
    )
    block = block.replace('"train.completed"', repr(settings.topics.completed))
    return f"from mistudio_schemas import Topics\n{block}"


def defined(block: str) -> Any:
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names["main"]


async def test_the_block_that_publishes_sends_a_valid_request(worker_settings: Settings) -> None:
    topic = worker_settings.topics.requested
    async with reading(worker_settings, topic) as reader:
        await defined(adapted(PUBLISH, worker_settings))()
        (record,) = await reader.of(topic, 1)
    asked = parse_event(record.value, record.headers)
    assert isinstance(asked, TrainRequested)
    assert record.key == str(asked.job_id).encode()


async def test_the_block_that_consumes_sees_a_completed_job_and_its_files(worker_settings: Settings) -> None:
    samples = worker_settings.data_path / "samples"
    samples.mkdir(parents=True)
    (samples / "corpus.txt").write_text("one\ntwo\n")
    asked = TrainRequested(model_name="m", corpus_file="corpus.txt", job_id="job-1")
    topics = worker_settings.topics
    await publish(worker_settings, record_for(asked, source="/test", topics=topics).as_dict())
    async with running_worker(worker_settings, jobs.works), reading(worker_settings, topics.completed) as reader:
        await reader.of(topics.completed, 1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        consumer = asyncio.create_task(defined(adapted(CONSUME, worker_settings))())
        while not said.getvalue().endswith("\n"):  # noqa: ASYNC110 - it prints, and goes on for ever
            await asyncio.sleep(0.05)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
    assert said.getvalue().startswith("job-1 s3://")
    assert "feature_activations.pt" in said.getvalue()
