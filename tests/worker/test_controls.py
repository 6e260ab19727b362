"""Which run a control is for: one, and never one that was asked for after it; what is no control."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord

from mistudio_schemas import TrainControl, TrainProgress, record_for
from mistudio_train.settings import Settings
from mistudio_train.worker import controls as controls_module
from mistudio_train.worker import kafka
from mistudio_train.worker.controls import Control, Controls, read
from mistudio_train.worker.intake import Message
from mistudio_train.worker.run_record import MessageId, RunRecord

from .bus import publish

HOUR = 3_600_000
NOON = int(datetime(2026, 8, 2, 12, tzinfo=UTC).timestamp() * 1000)


def control(at: int, run: int | None = None, offset: int = 0) -> Control:
    return Control(0, offset, at, "job-1", run, "cancel", "ada")


def run(number: int, asked: int, ended: int | None = None, offset: int | None = None, **changes: Any) -> RunRecord:
    message = Message("train.requested", 0, number if offset is None else offset, asked, None, b"{}")
    record = RunRecord.begun("job-1", number, MessageId.of(message, "group"), "worker")
    created = datetime.fromtimestamp(asked / 1000, UTC)
    if ended is not None:
        last = record.attempts[-1].model_copy(update={"ended": datetime.fromtimestamp(ended / 1000, UTC)})
        changes |= {"state": "finished", "attempts": (last,)}
    return record.model_copy(update={"created": created} | changes)


@pytest.mark.parametrize(
    ("sent", "record", "others", "expected"),
    [
        (control(NOON), run(1, NOON - HOUR), [], True),
        (control(NOON - HOUR), run(1, NOON), [], True),  # it has waited for the job
        (control(NOON, run=1), run(1, NOON), [], True),
        (control(NOON, run=2), run(1, NOON), [], False),
        # sent while the first run went on, or after its end: not for one that was asked for later
        (control(NOON), run(2, NOON + HOUR), [run(1, NOON - HOUR, NOON + 1)], False),
        (control(NOON), run(2, NOON + HOUR), [run(1, NOON - 2 * HOUR, NOON - HOUR)], False),
        # sent for the second one, which still waits
        (control(NOON), run(2, NOON - 1), [run(1, NOON - 2 * HOUR, NOON - HOUR)], True),
        (control(NOON, run=2), run(2, NOON + HOUR), [run(1, NOON - HOUR, NOON - 1)], True),
        # the group was set back: the request is the old one, and only a control for the new run counts
        (control(NOON), run(2, NOON - 3 * HOUR, offset=1, created=datetime.fromtimestamp(NOON / 1000 + 60, UTC)),
         [run(1, NOON - 3 * HOUR, NOON - HOUR)], False),
        (control(NOON + 2 * HOUR), run(2, NOON - 3 * HOUR, offset=1), [run(1, NOON - 3 * HOUR, NOON - HOUR)], True),
    ],
)  # fmt: skip
def test_for_which_run(sent: Control, record: RunRecord, others: list[RunRecord], expected: bool) -> None:
    assert sent.is_for(record, record.message.timestamp, others) is expected


def test_what_was_read_counts_and_no_clock_of_a_worker() -> None:
    """The first run's worker was a day ahead."""
    first = run(1, NOON - HOUR, NOON + 24 * HOUR, controls_until={0: 5})
    second = run(2, NOON)
    assert control(NOON + 1, offset=5).is_for(second, NOON, [first])
    assert not control(NOON + 1, offset=4).is_for(second, NOON, [first])
    again = run(2, NOON - HOUR, offset=1, controls_before={0: 7}, created=datetime.fromtimestamp(NOON / 1000, UTC))
    assert control(NOON - 1, offset=7).is_for(again, NOON - HOUR, [first])
    assert not control(NOON + 1, offset=6).is_for(again, NOON - HOUR, [first])


def test_it_acts_once() -> None:
    sent = control(NOON)
    first = run(1, NOON - HOUR).obeyed(sent.obeyed)
    assert not sent.is_for(run(2, NOON - HOUR), NOON - HOUR, [first])
    assert control(NOON, offset=1).is_for(run(2, NOON - HOUR), NOON - HOUR, [first])


def test_a_run_that_has_ended_obeys_nothing() -> None:
    ended = run(1, NOON, NOON + 1)
    assert ended.obeyed(control(NOON).obeyed) is ended


def record_of(value: bytes | None, headers: list[tuple[str, bytes]]) -> ConsumerRecord:
    return ConsumerRecord("train.control", 0, 3, NOON, 0, None, value, None, 0, 0, tuple(headers))


@pytest.mark.parametrize(
    "value", [None, b"", b"\xff", b"[" * 100_000, b'{"job_id": "../x", "action": "cancel"}', b"{}"]
)
def test_what_is_no_control_is_passed_by(value: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    headers = record_for(TrainControl(job_id="j", action="stop"), source="/t").headers
    assert read(record_of(value, headers)) is None
    assert read(record_of(value, [])) is None
    assert "is no control" in caplog.text


def test_an_event_of_another_kind_is_no_control() -> None:
    said = record_for(TrainProgress(job_id="j", status="running"), source="/t")
    assert read(record_of(said.value, said.headers)) is None


@asynccontextmanager
async def following(settings: Settings) -> AsyncIterator[Controls]:
    controls = Controls(settings, lambda _: None)
    task = asyncio.create_task(controls.follow())
    try:
        yield controls
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_control_that_was_sent_in_a_transaction_holds_nobody_up(worker_settings: Settings) -> None:
    await publish(worker_settings)
    sent = record_for(TrainControl(job_id="job", action="cancel"), source="/t", topics=worker_settings.topics)
    async with kafka.started(kafka.producer(worker_settings, "theirs")) as producer, producer.transaction():
        await producer.send_and_wait(sent.topic, sent.value, key=sent.key, headers=sent.headers)
    async with following(worker_settings) as controls, asyncio.timeout(30):
        await controls.caught_up()
        assert len(controls.of("job")) == 1


async def test_without_the_topic_no_job_begins(worker_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """It may be hidden from the worker, and hold controls."""
    async with following(worker_settings) as controls, asyncio.timeout(30):
        caught_up = asyncio.create_task(controls.caught_up())
        while "controls cannot be read (UnknownTopicOrPartitionError)" not in caplog.text:  # noqa: ASYNC110 - a log
            await asyncio.sleep(0.05)
        assert not caught_up.done()
        await kafka.ensure_topics(worker_settings)
        await caught_up


async def test_a_reader_that_has_fallen_asleep_is_replaced(
    worker_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controls_module, "SILENT_SECONDS", 0.5)
    getmany = AIOKafkaConsumer.getmany
    asleep: list[AIOKafkaConsumer] = []

    async def sleeping(self: AIOKafkaConsumer, *places: Any, timeout_ms: int) -> Any:
        if not asleep or self is asleep[0]:
            asleep[:] = [self]
            await asyncio.sleep(timeout_ms / 1000)
            return {}
        return await getmany(self, *places, timeout_ms=timeout_ms)

    sent = record_for(TrainControl(job_id="job", action="cancel"), source="/t", topics=worker_settings.topics)
    await publish(worker_settings, sent.as_dict())
    monkeypatch.setattr(AIOKafkaConsumer, "getmany", sleeping)
    async with following(worker_settings) as controls, asyncio.timeout(30):
        await controls.caught_up()
        assert len(controls.of("job")) == 1
    assert "controls cannot be read" in caplog.text


async def test_everything_sent_before_is_known_once_it_has_caught_up(worker_settings: Settings) -> None:
    sent = [TrainControl(job_id=f"job-{n % 7}", action="cancel", requested_by=f"u{n}") for n in range(500)]
    topics = worker_settings.topics
    await publish(worker_settings, *(record_for(one, source="/t", topics=topics).as_dict() for one in sent))
    heard: list[Control] = []
    controls = Controls(worker_settings, heard.append)
    task = asyncio.create_task(controls.follow())
    try:
        async with asyncio.timeout(30):
            await controls.caught_up()
        assert [one.requested_by for one in controls.of("job-3")] == [f"u{n}" for n in range(3, 500, 7)]
        assert heard == []  # old ones are not new
        await publish(worker_settings, record_for(sent[0], source="/t", topics=topics).as_dict())
        async with asyncio.timeout(30):
            await controls.caught_up()
        assert len(controls.of("job-0")) == 73
        assert len(heard) == 1
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
