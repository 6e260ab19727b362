"""How jobs end when somebody interferes: leaving workers, controls in every phase, offsets that Kafka has forgotten."""

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from mistudio_schemas import (
    Phase,
    TrainCancelled,
    TrainCompleted,
    TrainControl,
    TrainProgress,
    record_for,
)
from mistudio_train.messages import JobSpec
from mistudio_train.settings import Settings
from mistudio_train.worker.attempt import Attempt
from mistudio_train.worker.child_main import Job
from mistudio_train.worker.register import Register
from mistudio_train.worker.store import open_store

from . import bus, jobs
from .bus import Reader, events, publish, reading, running_worker

SLOW_TO_SAY = 2.0


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_concurrent_jobs": 1, "grace_seconds": 2.0})


request = partial(bus.request, partition=0)


def control(job_id: str, action: str, settings: Settings, **fields: Any) -> dict[str, Any]:
    said = TrainControl.model_validate({"job_id": job_id, "action": action, "requested_by": "ada"} | fields)
    return record_for(said, source="/test", topics=settings.topics).as_dict()


def ends(settings: Settings) -> tuple[str, ...]:
    topics = settings.topics
    return topics.completed, topics.failed, topics.cancelled


async def said_of(reader: Reader, job_id: str, **wanted: Any) -> TrainProgress:
    """The first progress event of the job with these values."""

    def fits(record: Any) -> bool:
        if record.key != job_id.encode():
            return False
        (event,) = events([record])
        return isinstance(event, TrainProgress) and all(getattr(event, key) == wanted[key] for key in wanted)

    records = await reader.until(lambda found: any(fits(record) for record in found))
    (event,) = events([next(record for record in records if fits(record))])
    assert isinstance(event, TrainProgress)
    return event


def objects_of(settings: Settings, job_id: str, run: int = 1) -> list[str]:
    store = open_store(settings)
    prefix = f"jobs/{job_id}/runs/{run}/"
    return [found.key.removeprefix(prefix) for found in store.list(prefix)]


def files(*names: str) -> list[str]:
    return sorted(["run.json", *names])


RESULT = files(*(f"a1/{name}" for name in ("feature_activations.pt", "manifest.json", "metadata.json", "sae_model.pt")))


async def test_a_leaving_worker_loses_no_step(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.counts), reading(settings, topics.progress) as reader:
        await reader.until(lambda found: any(getattr(one, "step", None) for one in events(found)))
    (claim,) = Register(open_store(settings)).runs("job-1")
    assert [attempt.outcome for attempt in claim.record.attempts] == ["stopped"]
    assert not any(settings.workspaces.iterdir())
    elsewhere = settings.model_copy(update={"data_path": settings.data_path.parent / "elsewhere"})
    (elsewhere.data_path / "samples").mkdir(parents=True)
    (elsewhere.data_path / "samples" / "corpus.txt").write_text("one\n")
    async with running_worker(elsewhere, jobs.counts), reading(settings, topics.progress, topics.completed) as reader:
        (done,) = events(await reader.of(topics.completed, 1))
        said = [one for one in events(reader.records) if isinstance(one, TrainProgress) and one.message == "counting"]
    assert isinstance(done, TrainCompleted)
    assert (done.run, done.attempt) == (1, 2)
    first, second = ([one.step or 0 for one in said if one.attempt == attempt] for attempt in (1, 2))
    assert max(first) <= min(second)
    assert objects_of(settings, "job-1") == [name.replace("a1/", "a2/") for name in RESULT]


@pytest.mark.parametrize("phase", ["loading", "extracting", "training", "exporting"])
async def test_a_worker_leaves_in_time_whatever_the_phase(settings: Settings, phase: Phase) -> None:
    """Its child does not answer in training and in extraction: it is ended when the time is over."""
    await publish(settings, request("job-1", settings))
    job: Job = jobs.waits_in(phase)
    async with running_worker(settings, job), reading(settings, settings.topics.progress) as reader:
        await said_of(reader, "job-1", phase=phase)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert not any(settings.workspaces.iterdir())
    async with reading(settings, *ends(settings)) as reader:
        assert await reader.drained() == []


@pytest.mark.parametrize("phase", ["planning", "loading", "extracting", "training", "evaluating"])
async def test_cancel_ends_a_running_job_and_leaves_nothing(settings: Settings, phase: Phase) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.waits_in(phase)), reading(settings, topics.progress, *ends(settings)) as r:
        await said_of(r, "job-1", phase=phase)
        sent = time.monotonic()
        await publish(settings, control("job-1", "cancel", settings), control("job-1", "cancel", settings))
        await said_of(r, "job-1", status="cancelling")
        assert time.monotonic() - sent < SLOW_TO_SAY
        (cancelled,) = events(await r.of(topics.cancelled, 1))
        await said_of(r, "job-1", status="cancelled")
    assert isinstance(cancelled, TrainCancelled)
    assert (cancelled.requested_by, cancelled.phase, cancelled.kept) == ("ada", phase, [])
    assert objects_of(settings, "job-1") == ["run.json"]
    assert not any(settings.workspaces.iterdir())
    async with reading(settings, *ends(settings)) as reader:
        assert len(await reader.drained()) == 1


@pytest.mark.parametrize("job", [jobs.works, jobs.refuses])
async def test_cancelled_while_its_child_says_its_last_word_a_job_is_cancelled(
    settings: Settings, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    result_of_child = Attempt._result_of_child

    async def cancelled_meanwhile(self: Attempt, spec: JobSpec) -> Any:
        try:
            return await result_of_child(self, spec)
        finally:
            self._running.orders.given.add("cancel")

    monkeypatch.setattr(Attempt, "_result_of_child", cancelled_meanwhile)
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, job), reading(settings, *ends(settings)) as reader:
        await reader.of(settings.topics.cancelled, 1)
    assert objects_of(settings, "job-1") == ["run.json"]


async def test_cancel_removes_the_checkpoints(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.counts), reading(settings, topics.progress, *ends(settings)) as reader:
        await reader.until(lambda found: any(getattr(one, "last_checkpoint", None) for one in events(found)))
        await publish(settings, control("job-1", "cancel", settings))
        await reader.of(topics.cancelled, 1)
    assert objects_of(settings, "job-1") == ["run.json"]


@pytest.mark.parametrize("wanted", [4, 64])
async def test_a_queued_job_is_acknowledged_behind_a_running_one_and_never_begun(
    settings: Settings, wanted: int
) -> None:
    """Also where the topic has fewer partitions than the worker would have given it."""
    topics = settings.topics
    await publish(settings, request("job-1", settings), request("job-2", settings))
    async with (
        running_worker(settings.model_copy(update={"kafka_request_partitions": wanted}), jobs.waits_in("training")),
        reading(settings, topics.progress, *ends(settings)) as r,
    ):
        await said_of(r, "job-1", phase="training")
        sent = time.monotonic()
        await publish(settings, control("job-2", "cancel", settings))
        await said_of(r, "job-2", status="cancelling")
        assert time.monotonic() - sent < SLOW_TO_SAY
        await publish(settings, control("job-1", "stop", settings))
        (cancelled,) = events(await r.of(topics.cancelled, 1))
        (completed,) = events(await r.of(topics.completed, 1))
        said = [one for one in events(r.records) if isinstance(one, TrainProgress) and one.job_id == "job-2"]
    assert isinstance(cancelled, TrainCancelled)
    assert isinstance(completed, TrainCompleted)
    assert (cancelled.job_id, cancelled.requested_by) == ("job-2", "ada")
    assert completed.stopped_early
    assert "training" not in {one.phase for one in said}
    assert objects_of(settings, "job-2") == ["run.json"]


async def test_a_control_waits_for_a_job_that_nobody_knows_also_across_a_restart(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, control("job-1", "cancel", settings))
    async with running_worker(settings, jobs.works):
        pass
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.works), reading(settings, *ends(settings)) as reader:
        await reader.of(topics.cancelled, 1)
    # asked for again, it is another run, and the control has acted
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.works), reading(settings, *ends(settings)) as reader:
        (done,) = events(await reader.of(topics.completed, 1))
    assert isinstance(done, TrainCompleted)
    assert done.run == 2


async def test_a_control_after_the_end_changes_nothing(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.works), reading(settings, topics.progress, *ends(settings)) as reader:
        await said_of(reader, "job-1", status="completed")
        await publish(settings, control("job-1", "cancel", settings), control("job-1", "stop", settings))
        await publish(settings, request("job-2", settings))
        await said_of(reader, "job-2", status="completed")
        before = len([one for one in reader.records if one.key == b"job-1"])
        await publish(settings, request("job-1", settings))
        completed = events(await reader.of(topics.completed, 3))
        assert len([one for one in reader.records if one.key == b"job-1"]) > before
    assert sorted((one.job_id, one.run) for one in completed if isinstance(one, TrainCompleted)) == [
        ("job-1", 1),
        ("job-1", 2),
        ("job-2", 1),
    ]
    assert objects_of(settings, "job-1") == RESULT


async def test_a_noted_cancel_is_obeyed_by_the_worker_that_takes_the_run_over(settings: Settings) -> None:
    """The one that noted it has left before it could end the run."""
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.waits_in("training")), reading(settings, topics.progress) as reader:
        await said_of(reader, "job-1", phase="training")
    await publish(settings, control("job-1", "cancel", settings))
    async with running_worker(settings, jobs.works), reading(settings, *ends(settings)) as reader:
        (cancelled,) = events(await reader.of(topics.cancelled, 1))
    assert isinstance(cancelled, TrainCancelled)
    assert (cancelled.run, cancelled.attempt) == (1, 2)


async def test_a_control_of_another_run_is_not_obeyed(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, control("job-1", "cancel", settings, run=2), request("job-1", settings))
    async with running_worker(settings, jobs.works), reading(settings, *ends(settings)) as reader:
        await reader.of(topics.completed, 1)
        await publish(settings, request("job-1", settings))
        (cancelled,) = events(await reader.of(topics.cancelled, 1))
    assert isinstance(cancelled, TrainCancelled)
    assert cancelled.run == 2


async def test_stop_delivers_what_there_is_and_says_so(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.counts), reading(settings, topics.progress, *ends(settings)) as reader:
        await said_of(reader, "job-1", phase="training")
        await publish(settings, control("job-1", "stop", settings))
        (done,) = events(await reader.of(topics.completed, 1))
    assert isinstance(done, TrainCompleted)
    assert done.stopped_early
    assert objects_of(settings, "job-1") == RESULT


async def test_stop_before_training_has_nothing_to_deliver(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with (
        running_worker(settings, jobs.waits_in("extracting")),
        reading(settings, topics.progress, *ends(settings)) as r,
    ):
        await said_of(r, "job-1", phase="extracting")
        await publish(settings, control("job-1", "stop", settings))
        (cancelled,) = events(await r.of(topics.cancelled, 1))
    assert isinstance(cancelled, TrainCancelled)
    assert "nothing to deliver" in cancelled.message


async def test_cancel_beats_stop(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, control("job-1", "stop", settings), control("job-1", "cancel", settings))
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.works), reading(settings, *ends(settings)) as reader:
        (cancelled,) = events(await reader.of(topics.cancelled, 1))
    assert isinstance(cancelled, TrainCancelled)
    assert cancelled.message == "cancelled by ada"


async def test_a_group_whose_offsets_are_forgotten_runs_nothing_again(settings: Settings) -> None:
    topics = settings.topics
    garbage = {"topic": topics.requested, "value": b"\xff", "partition": 0}
    await publish(settings, request("job-1", settings), garbage, request("job-2", settings))
    async with running_worker(settings, jobs.works), reading(settings, topics.dead_letter, *ends(settings)) as reader:
        await reader.of(topics.completed, 2)
        await reader.of(topics.dead_letter, 1)
    await forget_offsets(settings)
    async with running_worker(settings, jobs.works), reading(settings, topics.dead_letter, *ends(settings)) as reader:
        await publish(settings, request("job-3", settings))
        completed = await reader.of(topics.completed, 3)
        letters = [one for one in await reader.drained() if one.topic == topics.dead_letter]
    assert sorted(record.key for record in completed) == [b"job-1", b"job-2", b"job-3"]
    assert len(letters) == 1


async def test_a_group_that_is_set_back_runs_again(settings: Settings, tmp_path: Path) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings), request("job-2", settings))
    async with running_worker(settings, jobs.works), reading(settings, *ends(settings)) as reader:
        await reader.of(topics.completed, 2)
    other = settings.model_copy(update={"kafka_group_id": f"{settings.kafka_group_id}-other"})
    async with running_worker(other, jobs.works), reading(settings, *ends(settings)) as reader:
        completed = events(await reader.of(topics.completed, 4))
    assert sorted((one.job_id, one.run) for one in completed if isinstance(one, TrainCompleted)) == [
        ("job-1", 1),
        ("job-1", 2),
        ("job-2", 1),
        ("job-2", 2),
    ]


async def forget_offsets(settings: Settings) -> None:
    """As Kafka does with a group that was idle for a week."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    for future in admin.delete_consumer_groups([settings.kafka_group_id]).values():
        await asyncio.to_thread(future.result)
