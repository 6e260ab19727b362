"""The workers' consumer group seen from outside: how far it is, who is in it, where to put a request, and a reset.

Joins no group, and shows nothing to anybody.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CommitFailedError, KafkaError, for_code
from aiokafka.structs import OffsetAndMetadata

from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.deliveries import transactional_id

from .errors import CliError

logger = logging.getLogger(__name__)

READ_BACK_SECONDS = 10.0


@dataclass(frozen=True)
class Move:
    """A partition's committed offset now, and as it shall be."""

    partition: int
    old: int | None
    """`None`: the group has none."""
    new: int


async def committed(settings: Settings, partitions: Iterable[int]) -> dict[int, int]:
    """The group's committed offsets; no entry for a partition where it has none.

    Raises:
        KafkaError: if they cannot be read.

    """
    wanted = _places(settings, partitions)
    if not wanted:
        return {}
    async with _admin(settings) as admin:
        found = await admin.list_consumer_group_offsets(settings.kafka_group_id, partitions=wanted)
    if missing := set(wanted) - set(found):  # aiokafka does not look at the answer's own error
        raise KafkaError(f"the broker says nothing of {len(missing)} partitions")
    return {place.partition: at.offset for place, at in found.items() if at.offset >= 0}


async def waiting(settings: Settings, partitions: Collection[int]) -> dict[int, int]:
    """How many messages of each partition the group has not passed; empty if this client may not know."""
    places = _places(settings, partitions)
    try:
        passed = await committed(settings, partitions)
        async with kafka.started(kafka.reader(settings)) as reader:
            ends = await reader.end_offsets(places)
            begins = await reader.beginning_offsets(places)
    except (KafkaError, NotImplementedError) as error:
        logger.info("the group's offsets cannot be read (%s): keys choose the partitions", type(error).__name__)
        return {}
    return {place.partition: ends[place] - max(begins[place], passed.get(place.partition, 0)) for place in places}


def emptiest(waiting: dict[int, int]) -> int | None:
    """The partition where a request is begun first, which then counts as one longer; `None`: let the key choose.

    Of equals any, so that clients that ask at the same moment do not all choose the same.
    """
    if not waiting:
        return None
    least = min(waiting.values())
    chosen = secrets.choice([partition for partition, count in waiting.items() if count == least])
    waiting[chosen] += 1
    return chosen


async def moves_back(settings: Settings, places: Mapping[int, int], begins: Mapping[int, int]) -> list[Move]:
    """The moves to these places. Never forward: that would pass requests by which nobody has run.

    Args:
        places: partition to offset.
        begins: the first offset that each partition still has, which is where a group without an offset begins.

    """
    now = await committed(settings, places)
    moves = [Move(partition, now.get(partition), new) for partition, new in sorted(places.items())]
    return [
        move for move in moves if (move.new < move.old if move.old is not None else move.new <= begins[move.partition])
    ]


async def require_empty(settings: Settings) -> None:
    """Raise CliError while a worker is in the group."""
    group = settings.kafka_group_id
    async with _admin(settings) as admin:
        (answer,) = await admin.describe_consumer_groups([group])
    code, _, _, _, _, members, *_ = answer.groups[0]
    if code:
        raise for_code(code)(f"cannot describe the group {group}")
    if members:
        raise _in_use(group, f"{len(members)} members (each worker has one a slot)")


async def reset(settings: Settings, moves: list[Move]) -> None:
    """Move the group's offsets, and see that they have moved.

    A worker that is cut off from the broker may still hold a transaction that would undo it: each partition's
    producer is fenced first, which also ends what it left open.

    Raises:
        CliError: if a worker is in the group, the group has moved since `moves` was made, or nothing has moved.
        KafkaError: if the broker does not do it.

    """
    partitions = [move.partition for move in moves]
    await require_empty(settings)
    if settings.kafka_transactions:
        await asyncio.gather(*(_fence(settings, place) for place in _places(settings, partitions)))
    now = await committed(settings, partitions)
    if any(now.get(move.partition) != move.old for move in moves):
        raise CliError("the group's offsets have moved meanwhile, so nothing was changed", "Look again and repeat it.")
    await _commit(settings, moves)
    await _read_back(settings, {move.partition: move.new for move in moves})


async def _fence(settings: Settings, place: TopicPartition) -> None:
    async with kafka.started(kafka.producer(settings, transactional_id(settings, place))):
        pass


async def _commit(settings: Settings, moves: list[Move]) -> None:
    """As a consumer that is no member, which the broker allows only while nobody is one."""
    consumer = AIOKafkaConsumer(
        **kafka.client_options(settings), group_id=settings.kafka_group_id, enable_auto_commit=False
    )
    places = {TopicPartition(settings.topics.requested, move.partition): move.new for move in moves}
    async with kafka.started(consumer):
        consumer.assign(list(places))
        try:
            await consumer.commit({place: OffsetAndMetadata(offset, "") for place, offset in places.items()})
        except CommitFailedError:
            raise _in_use(settings.kafka_group_id, "a member that has just joined") from None


async def _read_back(settings: Settings, wanted: dict[int, int]) -> None:
    try:
        async with asyncio.timeout(READ_BACK_SECONDS):
            while await committed(settings, wanted) != wanted:  # noqa: ASYNC110 - only the broker knows
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise CliError(
            f"the offsets of {settings.kafka_group_id} do not read back as they were set",
            "Look with --dry-run where they are; something else may have moved them.",
        ) from None


def _in_use(group: str, who: str) -> CliError:
    return CliError(
        f"the group {group} has {who}, so its offsets stay as they are",
        "Stop its workers and wait until they have left, or leave out --reset-group: the requests are published again.",
    )


def _places(settings: Settings, partitions: Iterable[int]) -> list[TopicPartition]:
    return [TopicPartition(settings.topics.requested, partition) for partition in partitions]


@asynccontextmanager
async def _admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**kafka.client_options(settings))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()
