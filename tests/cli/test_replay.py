"""`replay` runs old requests again: as new messages, or by setting the group back, and only what was confirmed."""

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import ProducerFenced
from aiokafka.structs import OffsetAndMetadata

from mistudio_schemas import KafkaRecord, Limits, TrainCompleted, TrainRequested, record_for
from mistudio_train.cli import group
from mistudio_train.cli.requests_log import Chosen, repeated
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.deliveries import transactional_id
from mistudio_train.worker.intake import Message, read
from tests.cli.conftest import Cli, Outcome
from tests.cli.events import completed, running
from tests.cli.topics import Seen, publish, read_all, send
from tests.worker import jobs
from tests.worker.bus import events, reading, running_worker

RAW = b'{"model_name": "gpt2",  "corpus_file": "stories.txt", "colour": "blue"}'


def requested(settings: Settings, job_id: str, **fields: Any) -> KafkaRecord:
    asked = TrainRequested.model_validate({"model_name": "gpt2", "corpus_file": "a.txt", "job_id": job_id} | fields)
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    return record_for(asked, source="/test", topics=settings.topics, traceparent=trace)


def raw(settings: Settings, value: bytes | None, key: bytes | None = None, **headers: bytes) -> KafkaRecord:
    return KafkaRecord(settings.topics.requested, key, value, list(headers.items()))


def requests(settings: Settings) -> list[Seen]:
    return sorted(read_all(settings, settings.topics.requested), key=lambda seen: seen.milliseconds)


def shown(ended: Outcome) -> list[dict[str, Any]]:
    assert ended.status == 0, ended.err
    messages: list[dict[str, Any]] = json.loads(ended.out)["messages"]
    return messages


def commit(settings: Settings, offsets: dict[int, int]) -> None:
    async def commit() -> None:
        consumer = AIOKafkaConsumer(**kafka.client_options(settings), group_id=settings.kafka_group_id)
        async with kafka.started(consumer):
            places = {TopicPartition(settings.topics.requested, number): at for number, at in offsets.items()}
            consumer.assign(list(places))
            await consumer.commit({place: OffsetAndMetadata(at, "") for place, at in places.items()})

    asyncio.run(commit())


def committed(settings: Settings) -> dict[int, int]:
    return asyncio.run(group.committed(settings, range(settings.kafka_request_partitions)))


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


@contextmanager
def typed(text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", Terminal(text))
        yield


def test_a_job_s_newest_request_is_published_again_byte_for_byte(cli: Cli, settings: Settings) -> None:
    send(settings, [requested(settings, "another"), requested(settings, "j", seed=1)], partition=2)
    send(settings, [requested(settings, "j", seed=2)], partition=1)
    ended = cli("replay", "--job", "j", "--yes")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[1].split()[:2] == ["1", "0"]
    assert "j is published again" in ended.err
    [*_, old, new] = requests(settings)
    assert (new.key, new.value) == (old.key, old.value)
    assert TrainRequested.from_json(new.value).seed == 2
    changed = ("ce_id", "ce_time")
    assert all(new.headers[name] != old.headers[name] for name in changed)
    kept = {name: value for name, value in old.headers.items() if name not in (*changed, "traceparent")}
    assert {name: value for name, value in new.headers.items() if name not in changed} == kept
    [status] = read_all(settings, settings.topics.progress)
    assert (status.key, json.loads(status.value)["status"]) == (b"j", "queued")


def test_a_raw_request_keeps_the_id_that_its_first_place_gave(cli: Cli, settings: Settings) -> None:
    send(settings, [raw(settings, RAW)], partition=3)
    job_id = f"job-{settings.topics.requested}-3-0"
    assert cli("replay", "--job", job_id, "--yes").status == 0
    first, second = requests(settings)
    assert json.loads(second.value) == json.loads(RAW) | {"job_id": job_id}
    assert (second.key, second.headers) == (job_id.encode(), {})
    assert cli("replay", "--job", job_id, "--yes").status == 0
    assert requests(settings)[2].value == second.value
    assert first.value == RAW


def test_a_dry_run_shows_and_changes_nothing(cli: Cli, settings: Settings) -> None:
    send(settings, [requested(settings, "done"), requested(settings, "runs"), requested(settings, "new")], partition=0)
    publish(settings, running("done"), completed("done"), completed("runs", 1), running("runs", 2))
    before = len(read_all(settings, settings.topics.progress))
    ended = cli("replay", "--from-time", "0", "--dry-run")
    assert ended.status == 0
    rows = [" ".join(row.split()) for row in ended.out.splitlines()[1:]]
    assert [row.rpartition(" a.txt ")[2] for row in rows] == ["completed, run 1", "running, run 2", "not heard of"]
    messages = shown(cli("replay", "--from-time", "0", "--dry-run", "--json"))
    assert [(one["job_id"], one["ended"], one["published"]) for one in messages] == [
        ("done", True, None),
        ("runs", False, None),
        ("new", False, None),
    ]
    assert len(requests(settings)) == 3
    assert len(read_all(settings, settings.topics.progress)) == before


def test_ranges(cli: Cli, settings: Settings) -> None:
    send(settings, [requested(settings, f"a{number}") for number in range(4)], partition=0)
    send(settings, [requested(settings, f"b{number}") for number in range(3)], partition=1)
    times = sorted(seen.milliseconds for seen in requests(settings))

    def chosen(*arguments: str) -> set[str]:
        return {str(one["job_id"]) for one in shown(cli("replay", *arguments, "--dry-run", "--json"))}

    assert chosen("--from-offset", "0:2") == {"a2", "a3"}
    assert chosen("--from-offset", "0:1", "--to-offset", "0:2", "--from-offset", "1:2") == {"a1", "a2", "b2"}
    assert chosen("--from-time", "2020-01-01", "--to-offset", "1:0") == {"a0", "a1", "a2", "a3", "b0"}
    assert chosen("--from-time", "0", "--to-time", str(times[-1])) == {f"a{n}" for n in range(4)} | {"b0", "b1", "b2"}
    assert cli("replay", "--from-time", "0", "--to-time", str(times[0] - 1), "--dry-run").status == 2
    assert cli("replay", "--from-time", "2200-01-01T00:00:00Z", "--dry-run").status == 2
    assert chosen("--job", "a1", "--job", "b2") == {"a1", "b2"}


def test_bytes_that_are_no_request_are_listed_and_left_out(cli: Cli, settings: Settings) -> None:
    hostile = [
        raw(settings, b"\xff\xfe", b"j"),
        raw(settings, None, b"j"),
        raw(settings, b"[]", b"\xff", name=b"\xff"),
        raw(settings, b'{"model_name": "\\u001b[31m", "corpus_file": "a.txt", "job_id": "red"}', ce_type=b"x"),
        raw(settings, b'{"model_name": "\\u001b[31m", "corpus_file": "a.txt", "job_id": "../etc"}'),
        raw(settings, b'{"model_name": "\\u001b[31m[b]", "corpus_file": "a.txt", "job_id": "red"}', header=b"\xff"),
    ]
    send(settings, hostile, partition=0)
    ended = cli("replay", "--from-offset", "0:0", "--dry-run")
    assert ended.status == 0, ended.err
    rows = ended.out.splitlines()[1:]
    assert ["no request: " in row for row in rows] == [True] * 4 + [False] * 2
    assert "its job_id cannot be one" in rows[4]
    assert "�[31m[b]" in rows[5]
    assert "\x1b" not in ended.out
    published = [one["published"] for one in shown(cli("replay", "--from-offset", "0:0", "--yes", "--json"))]
    assert published[:5] == [None] * 5
    assert str(published[5]).startswith(settings.topics.requested)
    refused = cli("replay", "--job", "j", "--yes")
    assert refused.status == 2
    assert "no request" in refused.out
    assert "no such request" in refused.err


def test_a_header_whose_name_is_no_text_is_sent_written_out() -> None:
    headers = (("n\udcff", b"1"), ("none", None), ("tracestate", b"x"), ("ce_id", b"y"))
    message = Message("train.requested", 0, 7, 0, None, RAW, headers)  # type: ignore[arg-type]
    again = repeated(Chosen(message, read(message, Limits())))
    assert again.headers == [("n\\xff", b"1"), ("none", None)]


def test_it_asks_first(cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    send(settings, [requested(settings, "j")])
    unasked = cli("replay", "--job", "j")
    assert unasked.status == 2
    assert "--yes" in unasked.err
    for answer in ("n\n", ""):
        with typed(answer, monkeypatch):
            ended = cli("replay", "--job", "j")
        assert ended.status == 2
        assert "Publish 1 request again?" in ended.err
        assert "Nothing was changed." in ended.err
    assert len(requests(settings)) == 1
    with typed("y\n", monkeypatch):
        ended = cli("replay", "--job", "j", "--json")
    assert [one["job_id"] for one in shown(ended)] == ["j"]
    assert "not heard of" in ended.err
    assert len(requests(settings)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give one of --job, --from-time and --from-offset"),
        (("--job", "j", "--from-time", "0"), "Give one of"),
        (("--job", "j", "--to-time", "0"), "end a range"),
        (("--from-offset", "0:1", "--to-offset", "0:1", "--reset-group"), "end a range"),
        (("--from-time", "yesterday"), "'yesterday' is no time"),
        (("--from-time", "9" * 30), "is no time"),
        (("--from-offset", "0"), "'0' is no place"),
        (("--from-offset", "0:-1"), "'0:-1' is no place"),
        (("--job", "../j"), "is no job's id"),
    ],
)
def test_what_cannot_be_meant(arguments: tuple[str, ...], says: str, cli: Cli) -> None:
    ended = cli("replay", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_places_that_are_not_there(cli: Cli, settings: Settings) -> None:
    send(settings, [requested(settings, "j")] * 2, partition=1)
    assert "The partition is from 0 to 1." in cli("replay", "--from-offset", "1:2").err
    assert "The partition is empty." in cli("replay", "--from-offset", "0:0").err
    assert "It has 0 to 3." in cli("replay", "--from-offset", "9:0").err
    assert cli("replay", "--job", "nobody").status == 2


def test_the_group_is_set_back_and_never_forward(cli: Cli, settings: Settings) -> None:
    for partition in range(3):
        send(settings, [requested(settings, f"p{partition}m{number}") for number in range(4)], partition=partition)
    commit(settings, {0: 4, 1: 1})
    places = ("--from-offset", "0:2", "--from-offset", "1:3", "--from-offset", "2:1")
    dry = cli("replay", *places, "--reset-group", "--dry-run", "--json")
    assert [one["job_id"] for one in shown(dry)] == ["p0m2", "p0m3"]
    assert json.loads(dry.out)["offsets"] == [{"partition": 0, "old": 4, "new": 2}]
    assert committed(settings) == {0: 4, 1: 1}
    ended = cli("replay", *places, "--reset-group", "--yes")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[1].split() == ["0", "4", "2"]
    assert committed(settings) == {0: 2, 1: 1}
    again = cli("replay", *places, "--reset-group", "--yes")
    assert again.status == 2
    assert "nothing to set back" in again.err
    assert len(requests(settings)) == 12
    assert read_all(settings, settings.topics.progress) == []


def test_a_group_without_an_offset_is_set_to_the_beginning(cli: Cli, settings: Settings) -> None:
    send(settings, [requested(settings, "j")] * 2, partition=0)
    assert cli("replay", "--from-offset", "0:0", "--reset-group", "--yes").status == 0
    assert committed(settings) == {0: 0}


def test_a_reset_fences_a_worker_that_is_cut_off(cli: Cli, settings: Settings) -> None:
    send(settings, [requested(settings, "j")] * 2, partition=0)
    commit(settings, {0: 1})
    place = TopicPartition(settings.topics.requested, 0)

    async def zombie() -> Outcome:
        producer = kafka.producer(settings, transactional_id(settings, place))
        async with kafka.started(producer):
            await producer.begin_transaction()
            await producer.send_offsets_to_transaction({place: OffsetAndMetadata(2, "")}, settings.kafka_group_id)
            ended = await asyncio.to_thread(cli, "replay", "--from-offset", "0:0", "--reset-group", "--yes")
            with pytest.raises(ProducerFenced):
                await producer.commit_transaction()
        return ended

    ended = asyncio.run(zombie())
    assert ended.status == 0, ended.err
    assert committed(settings) == {0: 0}


@pytest.fixture
def corpus(settings: Settings) -> None:
    samples = settings.data_path / "samples"
    samples.mkdir(parents=True)
    (samples / "a.txt").write_text("one\ntwo\n")


async def done(settings: Settings, *commands: tuple[str, ...], cli: Cli) -> tuple[list[TrainCompleted], list[Outcome]]:
    """A worker runs the job; then the commands, each of which is to make it run once more if it succeeds."""
    outcomes = []
    topic = settings.topics.completed
    async with running_worker(settings, jobs.works), reading(settings, topic) as reader:
        await reader.of(topic, 1)
        for command in commands:
            outcomes.append(await asyncio.to_thread(cli, *command))
        found = events(await reader.of(topic, 1 + sum(outcome.status == 0 for outcome in outcomes)))
    return [event for event in found if isinstance(event, TrainCompleted)], outcomes


@pytest.mark.usefixtures("corpus")
async def test_a_worker_runs_what_was_published_again_and_no_reset_touches_its_group(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(send, settings, [requested(settings, "j")], 0)
    reset = ("replay", "--job", "j", "--reset-group", "--yes")
    ends, (refused, sent) = await done(settings, reset, ("replay", "--job", "j", "--yes"), cli=cli)
    assert [(end.job_id, end.run) for end in ends] == [("j", 1), ("j", 2)]
    assert refused.status == 2
    assert "has 2 members" in refused.err
    assert sent.status == 0
    async with running_worker(settings, jobs.works):

        async def empty(_: Settings) -> None:
            """A worker that joins after the look."""

        monkeypatch.setattr(group, "require_empty", empty)
        late = await asyncio.to_thread(cli, *reset)
    assert late.status == 2
    assert "has just joined" in late.err


@pytest.mark.usefixtures("corpus")
async def test_after_a_reset_a_worker_runs_it_again(cli: Cli, settings: Settings) -> None:
    await asyncio.to_thread(send, settings, [requested(settings, "j")], 0)
    await done(settings, cli=cli)
    reset = await asyncio.to_thread(cli, "replay", "--from-offset", "0:0", "--reset-group", "--yes")
    assert reset.status == 0, reset.err
    topic = settings.topics.completed
    async with running_worker(settings, jobs.works), reading(settings, topic) as reader:
        found = events(await reader.of(topic, 2))
    assert [event.run for event in found if isinstance(event, TrainCompleted)] == [1, 2]
