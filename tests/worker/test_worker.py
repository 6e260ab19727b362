"""The worker's application on a real Kafka and a real MinIO, with children that work, refuse, die and stall."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer import message_accumulator, producer
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from mistudio_schemas import ErrorCode, TrainCompleted, TrainFailed, TrainProgress, header
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.child_main import Job
from mistudio_train.worker.intake import Message
from mistudio_train.worker.register import MessageId, Register
from mistudio_train.worker.store import open_store

from . import jobs
from .bus import events, publish, reading, request, running_worker

TOKEN = "hf_secret_token_of_a_requester"


async def ends_of(settings: Settings, job: Job, count: int, *records: dict[str, Any]) -> list[Any]:
    """The first `count` terminal events of a worker that gets these records."""
    topics = settings.topics
    await publish(settings, *records)
    async with running_worker(settings, job), reading(settings, topics.completed, topics.failed) as reader:
        return events(await reader.until(lambda found: len(found) >= count))


async def test_a_job_ends_in_a_completed_event_that_names_every_object(settings: Settings) -> None:
    (done,) = await ends_of(settings, jobs.works, 1, request("job-1", settings))
    assert isinstance(done, TrainCompleted)
    assert (done.job_id, done.run, done.attempt, done.worker) == ("job-1", 1, 1, settings.worker_id)
    prefix = f"s3://{settings.minio_bucket}/jobs/job-1/runs/1/a1/"
    assert done.model_path == prefix + "sae_model.pt"
    assert sorted(artifact.name for artifact in done.artifacts) == [
        "feature_activations.pt",
        "metadata.json",
        "sae_model.pt",
    ]
    store = open_store(settings)
    data, _ = store.get_bytes(done.manifest.key)
    assert {one["key"] for one in json.loads(data)["objects"]} == {artifact.key for artifact in done.artifacts}
    assert not any(settings.workspaces.iterdir())


async def test_progress_goes_up_and_its_latest_event_says_how_the_job_ended(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("job-1", settings))
    async with running_worker(settings, jobs.works), reading(settings, topics.progress) as reader:
        said = events(await reader.until(lambda found: bool(found) and b'"completed"' in found[-1].value))
    progress = [one.progress for one in said if isinstance(one, TrainProgress)]
    assert progress == sorted(progress)
    assert (said[0].status, said[-1].status, said[-1].phase) == ("running", "completed", "ended")  # type: ignore[attr-defined]


async def test_unknown_fields_of_a_raw_request_are_listed_in_the_first_progress_event(settings: Settings) -> None:
    raw = {"model_name": "m", "corpus_file": "corpus.txt", "job_id": "job-1", "colour": "blue"}
    await publish(settings, {"topic": settings.topics.requested, "value": json.dumps(raw).encode()})
    async with running_worker(settings, jobs.works), reading(settings, settings.topics.progress) as reader:
        (first,) = events((await reader.of(settings.topics.progress, 1))[:1])
    assert isinstance(first, TrainProgress)
    assert first.unknown_fields == ["colour"]


@pytest.mark.parametrize(
    ("job", "fields", "code"),
    [
        (jobs.refuses, {}, ErrorCode.CORPUS_UNREADABLE),
        (jobs.raises, {}, ErrorCode.INTERNAL),
        (jobs.works, {"corpus_file": "absent.txt"}, ErrorCode.CORPUS_NOT_FOUND),
        (jobs.works, {"corpus_file": "../secret.txt"}, ErrorCode.CORPUS_NOT_ALLOWED),
        (jobs.works, {"token_name": "nobody"}, ErrorCode.REQUEST_INVALID),
        (jobs.works, {"push_to_hub": "owner/name"}, ErrorCode.REQUEST_INVALID),
    ],
)
async def test_a_job_that_cannot_be_done_fails_with_its_code_and_a_hint(
    settings: Settings, job: Job, fields: dict[str, Any], code: ErrorCode
) -> None:
    (failed,) = await ends_of(settings, job, 1, request("job-1", settings, **fields))
    assert isinstance(failed, TrainFailed)
    assert (failed.code, failed.attempts, bool(failed.message), bool(failed.hint)) == (code, 1, True, True)


async def test_a_job_that_takes_more_of_the_disk_than_it_may_fails_and_leaves_nothing(settings: Settings) -> None:
    limited = settings.model_copy(update={"workspace_max_bytes": 2 * 2**20})
    (failed,) = await ends_of(limited, jobs.fills_the_disk, 1, request("job-1", settings))
    assert isinstance(failed, TrainFailed)
    assert (failed.code, failed.retryable, failed.attempts) == (ErrorCode.DISK_FULL, False, 1)
    assert "WORKSPACE_MAX_BYTES" in failed.hint
    assert not any(settings.workspaces.iterdir())


async def test_a_workspace_that_cannot_be_made_fails_its_job_and_holds_nothing_up(settings: Settings) -> None:
    settings.workspaces.mkdir(parents=True)
    (settings.workspaces / "job-1-r1-a1").touch()
    two = (request(job, settings) for job in ("job-1", "job-2"))
    failed, done = sorted(await ends_of(settings, jobs.works, 2, *two), key=lambda end: end.job_id)
    assert (failed.status, failed.code, failed.attempts) == ("failed", ErrorCode.INTERNAL, 1)
    assert "job-1-r1-a1" in "".join(failed.traceback)
    assert done.status == "completed"


async def test_a_request_out_of_range_fails_in_the_seeds_words(settings: Settings) -> None:
    raw = {"model_name": "m", "corpus_file": "corpus.txt", "job_id": "job-1", "hidden_dim": 1}
    record = {"topic": settings.topics.requested, "value": json.dumps(raw).encode()}
    (failed,) = await ends_of(settings, jobs.works, 1, record)
    assert isinstance(failed, TrainFailed)
    assert (failed.code, failed.message) == (
        ErrorCode.REQUEST_OUT_OF_RANGE,
        "hidden_dim: Hidden dimension too small (min 64)",
    )


async def test_a_child_that_dies_is_tried_again_up_to_the_limit(settings: Settings) -> None:
    twice = settings.model_copy(update={"max_attempts": 2})
    (failed,) = await ends_of(twice, jobs.killed, 1, request("job-1", settings))
    assert isinstance(failed, TrainFailed)
    assert (failed.code, failed.attempts, failed.retryable) == (ErrorCode.CHILD_DIED, 2, True)
    assert failed.traceback[-1] == "the last line before the end"


async def test_a_dataset_of_the_hub_is_the_childs_and_its_commit_is_kept_for_the_next_attempt(
    settings: Settings,
) -> None:
    asked = request("job-1", settings, corpus_file="hf://datasets/owner/name@main/data")
    (done,) = await ends_of(settings, jobs.finds_a_dataset, 1, asked)
    assert isinstance(done, TrainCompleted), done
    assert (done.attempt, done.corpus.commit) == (2, "a" * 40)


async def test_a_run_whose_workers_died_as_often_as_it_may_fail_is_given_up(settings: Settings) -> None:
    asked = request("job-1", settings)
    await publish(settings, asked | {"partition": 0, "timestamp_ms": 1_700_000_000_000})
    message = Message(asked["topic"], 0, 0, 1_700_000_000_000, asked["key"], asked["value"])
    store = open_store(settings)
    store.ensure()
    register = Register(store)
    claim = register.create("job-1", MessageId.of(message, settings.kafka_group_id), "dead-worker-1")
    for number in range(2, settings.max_attempts + 1):
        claim = register.take_over(claim, f"dead-worker-{number}")
    async with running_worker(settings, jobs.works), reading(settings, settings.topics.failed) as reader:
        (failed,) = events(await reader.of(settings.topics.failed, 1))
    assert isinstance(failed, TrainFailed)
    assert failed.code is ErrorCode.CHILD_DIED
    assert "the worker itself died" in failed.message


async def test_a_worker_that_is_told_to_stop_gives_its_run_back(settings: Settings) -> None:
    topics, hasty = settings.topics, settings.model_copy(update={"grace_seconds": 3.0})
    await publish(settings, request("job-1", settings))
    async with running_worker(hasty, jobs.goes_on), reading(settings, topics.progress) as reader:
        await reader.until(lambda found: bool(found) and b'"training"' in found[-1].value)
    (claim,) = Register(open_store(settings)).runs("job-1")
    assert [attempt.outcome for attempt in claim.record.attempts] == ["stopped"]
    async with running_worker(settings, jobs.works), reading(settings, topics.completed) as reader:
        (done,) = events(await reader.of(topics.completed, 1))
    assert isinstance(done, TrainCompleted)
    assert (done.run, done.attempt) == (1, 2)


async def test_a_stall_is_reported_and_nothing_is_said_meanwhile(settings: Settings) -> None:
    quick = settings.model_copy(update={"max_attempts": 1, "stall_seconds": 3.0})
    topics = settings.topics
    await publish(quick, request("job-1", settings))
    async with running_worker(quick, jobs.hangs), reading(quick, topics.progress, topics.failed) as reader:
        await reader.of(topics.failed, 1)
        said = [one for one in events(reader.records) if isinstance(one, TrainProgress) and one.status == "running"]
        (failed,) = [one for one in events(reader.records) if isinstance(one, TrainFailed)]
    assert failed.code is ErrorCode.CHILD_STALLED
    assert said[-1].message == "about to hang"
    assert (failed.time - said[-1].time).total_seconds() > 1.5


async def test_a_stopped_child_is_silent_and_then_a_stall(settings: Settings) -> None:
    quick = settings.model_copy(update={"max_attempts": 1, "stall_seconds": 4.0})
    topics = settings.topics
    await publish(quick, request("job-1", settings))
    async with running_worker(quick, jobs.goes_on), reading(quick, topics.progress, topics.failed) as reader:
        records = await reader.until(lambda found: bool(found) and b'"training"' in found[-1].value)
        child = psutil.Process(int(events(records)[-1].message))  # type: ignore[attr-defined]
        child.suspend()
        stopped = datetime.now(UTC)
        await reader.of(topics.failed, 1)
        said = [one for one in events(reader.records) if isinstance(one, TrainProgress) and one.status == "running"]
        (failed,) = [one for one in events(reader.records) if isinstance(one, TrainFailed)]
        assert not child.is_running()
    # what it had said before may still have waited for its second
    assert (said[-1].time - stopped).total_seconds() < 1.5
    assert (failed.time - stopped).total_seconds() > 3.5
    assert failed.code is ErrorCode.CHILD_STALLED
    assert "has not moved for 4 s while training" in failed.message


async def test_garbage_among_requests_goes_to_the_dead_letters_byte_for_byte(settings: Settings) -> None:
    topics, garbage = settings.topics, [b"\xff\xfe%d" % n for n in range(20)]
    wanted: list[dict[str, Any]] = [{"topic": topics.requested, "value": one, "partition": 0} for one in garbage]
    for n in range(5):
        wanted.insert(4 * n, request(f"job-{n}", settings) | {"partition": 0})
    await publish(settings, *wanted)
    async with running_worker(settings, jobs.works), reading(settings, topics.completed, topics.dead_letter) as reader:
        completed = await reader.of(topics.completed, 5)
        letters = await reader.of(topics.dead_letter, 20)
    assert sorted(record.key for record in completed) == [f"job-{n}".encode() for n in range(5)]
    assert [record.value for record in letters] == garbage
    assert {header(record.headers, "kafka_dlt-original-topic") for record in letters} == {topics.requested}


class RawName(str):
    """The name of a header that is no UTF-8, as clients in other languages can send it."""

    def encode(self, *_: Any) -> bytes:
        return b"h\xff\xfe"


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_a_header_whose_name_is_no_text_holds_nothing_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, compression: str | None
) -> None:
    topics = settings.topics
    await kafka.ensure_topics(settings)
    asked = request("job-1", settings)
    with monkeypatch.context() as patched:
        # the builder in C would refuse the name
        for module in (producer, message_accumulator):
            patched.setattr(module, "DefaultRecordBatchBuilder", _DefaultRecordBatchBuilderPy)
        sender = AIOKafkaProducer(**kafka.client_options(settings), compression_type=compression, linger_ms=200)
        async with kafka.started(sender):
            hostile = [(RawName("h"), b"value")]
            sends = [
                await sender.send(topics.requested, b"garbage", partition=0, headers=hostile),
                await sender.send(topics.requested, asked["value"], key=asked["key"], partition=0, headers=hostile),
                await sender.send(topics.requested, b"more garbage", partition=0),
            ]
            await asyncio.gather(*sends)
    async with running_worker(settings, jobs.works), reading(settings, topics.completed, topics.dead_letter) as reader:
        (done,) = await reader.of(topics.completed, 1)
        letters = await reader.of(topics.dead_letter, 2)
    assert done.key == b"job-1"
    assert [letter.value for letter in letters] == [b"garbage", b"more garbage"]
    assert header(letters[0].headers, "h\\xff\\xfe") == "value"
    assert header(letters[0].headers, "mistudio-header-names-escaped") == "true"


async def test_a_message_is_delivered_once_even_when_the_worker_starts_again(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, *(request(f"job-{n}", settings) for n in range(3)))
    for _ in range(2):
        async with running_worker(settings, jobs.works), reading(settings, topics.completed) as reader:
            await reader.of(topics.completed, 3)
    async with reading(settings, topics.completed) as reader:
        found = await reader.drained()
    assert sorted(record.key for record in found) == [b"job-0", b"job-1", b"job-2"]


async def test_a_token_in_a_request_is_nowhere_but_in_the_request(
    settings: Settings, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    topics = settings.topics
    raw = {"model_name": "m", "corpus_file": "corpus.txt", "job_id": "job-1", "huggingface_token": TOKEN}
    caplog.set_level("DEBUG", logger="mistudio_train")
    await publish(settings, {"topic": topics.requested, "value": json.dumps(raw).encode()})
    async with running_worker(settings, jobs.raises), reading(settings, topics.progress, topics.failed) as reader:
        (failed,) = events(await reader.of(topics.failed, 1))
        said = b"".join(record.value + b"".join(value for _, value in record.headers) for record in reader.records)
    assert isinstance(failed, TrainFailed)
    assert "repeats [secret]" in failed.message
    store = open_store(settings)
    objects = b"".join(store.get_bytes(found.key)[0] for found in store.list(""))
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())  # noqa: ASYNC240
    printed = "".join(capfd.readouterr()).encode() + caplog.text.encode()
    assert TOKEN.encode() not in said + objects + files + printed
