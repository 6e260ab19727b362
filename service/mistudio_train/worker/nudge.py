"""So that no slot idles while a job waits behind a busy one: an idle slot looks, and asks for a rebalance.

Reads offsets and asks the group to share out anew; who gets what, the assignor decides. It commits and stops nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from .assignor import BusyAwareAssignor
from .backoff import backoff
from .metrics import Metrics
from .slots import Slot

logger = logging.getLogger(__name__)

LOOK_SECONDS = (0.3, 0.7, 1.0, 2.0, 4.0)
"""Between looks, from when the slot has nothing to do."""
PAUSE_SECONDS = (1.0, 5.0, 30.0, 120.0, 600.0)
"""At least, between two nudges for the same backlog: the last one has not moved it."""
ANSWER_SECONDS = 10.0
DEFECT_SECONDS = 60.0

Backlog = dict[TopicPartition, int]
"""Partition to its uncommitted messages; only those that have any."""


class Nudge:
    """Watches over one slot.

    Args:
        consumer: the slot's, once it has started.

    """

    def __init__(self, slot: Slot, assignor: BusyAwareAssignor, consumer: Callable[[], Any], metrics: Metrics) -> None:
        self._slot, self._assignor, self._consumer, self._metrics = slot, assignor, consumer, metrics
        self._last: Backlog = {}
        self._pauses = backoff(PAUSE_SECONDS)
        self._not_before = 0.0

    async def watch(self) -> None:
        """Look again and again while the slot is idle; ends only by being cancelled."""
        while True:
            await self._slot.idle.wait()
            begun = self._slot.begun
            for seconds in backoff(LOOK_SECONDS):
                await asyncio.sleep(seconds)
                if self._slot.begun != begun or await self._look():
                    break

    async def _look(self) -> bool:
        """Ask for a rebalance if that brings work here; whether it was asked."""
        if (shares := self._assignor.shares) is None:
            return False
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                backlog = await read_backlog(self._consumer(), frozenset().union(*shares))
        except (KafkaError, IllegalStateError, OSError, TimeoutError) as error:
            logger.debug("slot %d cannot see what waits: %s", self._slot.number, type(error).__name__)
            return False
        except Exception:
            logger.exception("a defect keeps slot %d from seeing what waits", self._slot.number)
            await asyncio.sleep(DEFECT_SECONDS)
            return False
        # all may have changed meanwhile
        if self._slot.busy or self._assignor.shares is not shares or not self._is_due(shares, backlog):
            return False
        logger.info("slot %d is idle while jobs wait; it asks the group to share out anew", self._slot.number)
        self._metrics.nudges.inc()
        self._assignor.ask(backlog)
        request_rejoin(self._consumer())
        return True

    def _is_due(self, shares: Collection[frozenset[TopicPartition]], backlog: Backlog) -> bool:
        """Whether a rebalance is of use, and was not just tried in vain."""
        if not work_could_move(shares, backlog, self._slot.assigned or frozenset()):
            return False
        if backlog != self._last:
            self._last, self._pauses = backlog, backoff(PAUSE_SECONDS)
        elif time.monotonic() < self._not_before:
            return False
        self._not_before = time.monotonic() + next(self._pauses)
        return True


def work_could_move(
    shares: Iterable[frozenset[TopicPartition]], backlog: Mapping[TopicPartition, int], own: frozenset[TopicPartition]
) -> bool:
    """Whether some message waits that another member could begin at once.

    A member works on one partition at a time, and that one's messages stay with it. So of two of its partitions that
    have a backlog one waits, and of one nothing can be moved, however much it has. With work of its own nobody asks.
    """
    if any(partition in backlog for partition in own):
        return False
    return any(sum(partition in backlog for partition in share) > 1 for share in shares)


async def read_backlog(consumer: Any, partitions: Collection[TopicPartition]) -> Backlog:
    """What the group has not committed of all these partitions; two requests, and a third if there is anything.

    Raises:
        KafkaError: if the broker does not answer.

    """
    ends = await consumer.end_offsets(partitions)
    # private: the public way asks for one partition at a time
    committed = await consumer._coordinator.fetch_committed_offsets(partitions)
    passed = {partition: known.offset for partition, known in committed.items()}
    for partition in consumer.assignment() & ends.keys():
        # our own partitions we have read: behind the last message there may be the markers of a transaction
        passed[partition] = max(passed.get(partition, 0), await consumer.position(partition))
    behind = [partition for partition, end in ends.items() if end > passed.get(partition, 0)]
    starts = await consumer.beginning_offsets(behind) if behind else {}
    backlog = {partition: ends[partition] - max(passed.get(partition, 0), starts[partition]) for partition in behind}
    return {partition: count for partition, count in backlog.items() if count > 0}


def request_rejoin(consumer: Any) -> None:
    """Join the group again: private, but aiokafka has no other way to ask for a rebalance."""
    consumer._coordinator.request_rejoin()
