"""Reads every topic and every object when all is over, and says what is not as promised; nothing when all is well."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from mistudio_schemas import TrainCompleted, parse_event
from mistudio_train.worker import kafka
from mistudio_train.worker.artifacts import Manifest
from mistudio_train.worker.register import RunRecord
from tests.worker.bus import reading

from .results import digests
from .world import World, until_async


@dataclass
class Checked:
    """What was found."""

    violations: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """Objects that nobody can reach: of a worker that wrote after its successor had cleared away."""
    runs: dict[str, RunRecord] = field(default_factory=dict)
    """By job."""


class Checker:
    """Checks everything.

    Args:
        references: digests of each request's undisturbed result, by the request's name.

    """

    def __init__(self, world: World, references: dict[str, dict[str, str]]) -> None:
        self._world, self._references = world, references
        self._found = Checked()

    async def check(self) -> Checked:
        """Everything."""
        records = await self._terminal_records()
        for job in self._world.asked:
            self._check_job(job, records.get(job, []))
        for job in set(records) - set(self._world.asked):
            self._say(f"{job} has a terminal event and nobody has asked for it")
        await self._check_offsets()
        self._check_processes()
        self._check_workspaces()
        return self._found

    def _say(self, violation: str) -> None:
        self._found.violations.append(violation)

    async def _terminal_records(self) -> dict[str, list[ConsumerRecord]]:
        """By job. A reader that is held up by a transaction that nobody ends would never see the rest."""
        topics = self._world.settings.topics
        names = (topics.completed, topics.failed, topics.cancelled)
        try:
            await until_async(self._no_open_transaction, 90)
        except TimeoutError:
            self._say("a transaction is still open, and holds up all read_committed readers")
        async with reading(self._world.settings, *names) as reader:
            found: dict[str, list[ConsumerRecord]] = defaultdict(list)
            for record in await reader.drained():
                found[(record.key or b"").decode()].append(record)
        return found

    async def _no_open_transaction(self) -> bool:
        """Whether every topic's last stable offset is its end."""
        topics, ends = self._world.settings.topics, []
        for isolation in ("read_committed", "read_uncommitted"):
            options = kafka.client_options(self._world.settings)
            async with kafka.started(AIOKafkaConsumer(**options, isolation_level=isolation)) as consumer:
                places = []
                for topic in (topics.completed, topics.failed, topics.cancelled):
                    numbers = (await consumer._client.fetch_all_metadata()).partitions_for_topic(topic) or set()
                    places += [TopicPartition(topic, number) for number in numbers]
                ends.append(await consumer.end_offsets(places))
        return bool(ends[0] == ends[1])

    def _check_job(self, job: str, records: list[ConsumerRecord]) -> None:
        if len(records) != 1:
            places = [f"{one.topic}-{one.partition}@{one.offset}" for one in records]
            self._say(f"{job} has {len(records)} terminal events: {places}")
            return
        event = parse_event(records[0].value, records[0].headers)
        if not isinstance(event, TrainCompleted):
            self._say(f"{job} did not complete: {event.to_json().decode()[:2000]}")
            return
        self._check_register(job, event)
        self._check_artifacts(job, event)
        if (expected := self._references.get(self._world.asked[job])) is not None:
            got = digests(self._world.store, event)
            if wrong := sorted(name for name in expected | got if expected.get(name) != got.get(name)):
                self._say(f"{job} differs from the undisturbed {self._world.asked[job]} in {wrong}")

    def _check_register(self, job: str, event: TrainCompleted) -> None:
        store, prefix = self._world.store, f"jobs/{job}/runs/"
        runs = list(store.folders(prefix))
        if runs != ["1"]:
            self._say(f"{job} has the runs {runs}, where one was asked for")
        record = RunRecord.from_json(store.get_bytes(f"{prefix}{event.run}/run.json")[0])
        self._found.runs[job] = record
        named = record.manifest.key if record.manifest else None
        if record.state != "finished" or named != event.manifest.key or record.event != event.to_json().decode():
            self._say(f"{job}: the register says {record.state} with {named}, the event {event.manifest.key}")
        reachable = {f"{prefix}{event.run}/run.json", event.manifest.key, *(ref.key for ref in event.artifacts)}
        self._found.leftovers += [found.key for found in store.list(prefix) if found.key not in reachable]

    def _check_artifacts(self, job: str, event: TrainCompleted) -> None:
        store = self._world.store
        for ref in (*event.artifacts, event.manifest):
            try:
                data = store.get_bytes(ref.key)[0]
            except KeyError:
                self._say(f"{job}: {ref.key} is missing")
                return
            if (len(data), hashlib.sha256(data).hexdigest()) != (ref.size, ref.sha256):
                self._say(f"{job}: {ref.key} is not what the event says")
        listed = Manifest.from_json(store.get_bytes(event.manifest.key)[0])
        if listed.objects != event.artifacts:
            self._say(f"{job}: its manifest lists other objects than its event")

    async def _check_offsets(self) -> None:
        settings = self._world.settings
        admin = AIOKafkaAdminClient(**kafka.client_options(settings))
        await admin.start()
        try:
            offsets = await admin.list_consumer_group_offsets(settings.kafka_group_id)
        finally:
            await admin.close()
        async with kafka.started(kafka.reader(settings)) as consumer:
            numbers = range(settings.kafka_request_partitions)
            ends = await consumer.end_offsets([TopicPartition(settings.topics.requested, one) for one in numbers])
        for place, end in ends.items():
            committed = offsets[place].offset if place in offsets else 0
            if committed != end:
                self._say(f"partition {place.partition} is committed up to {committed} and ends at {end}")

    def _check_processes(self) -> None:
        for worker in self._world.workers:
            if worker.alive:
                self._say(f"{worker.name} still runs")
            if worker.children:
                self._say(f"children of {worker.name} still run: {worker.children}")

    def _check_workspaces(self) -> None:
        for data_path in sorted((self._world.folder / "data").iterdir()):
            left = sorted(path.name for path in (data_path / "cache" / "workspaces").glob("*"))
            if left:
                self._say(f"{data_path.name} has left the workspaces {left}")
