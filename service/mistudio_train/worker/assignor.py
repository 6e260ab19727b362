"""Who reads which partition: a busy one stays where it is, and idle members come first. Pure: knows no client, no lag.

It goes by Kafka's name "roundrobin" and is one: any leader's answer is as good as any other's for what the others do
with it. So it stands beside stock members and older workers, whose round robin may then stop jobs, but loses none.
(Two strategies side by side would do so too, but aiokafka 0.14 joins once for each: every rebalance is then two.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, Self

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from pydantic import BaseModel, ConfigDict, ValidationError

SHARES_BYTES = 256 * 1024
"""The shares are told to all members if the copies together are no larger: the broker keeps them in one record."""


class Holder(Protocol):
    """Of an assignor: what it has now."""

    assigned: frozenset[TopicPartition] | None
    busy: TopicPartition | None


class _Said(BaseModel):
    """What travels as user data, as JSON; another version of it is as good as nothing."""

    model_config = ConfigDict(frozen=True)
    v: Literal[1]
    round: int = 0
    """Of the assignment that it speaks of: counts up, so that whoever was thrown out speaks of an old one."""

    @classmethod
    def read(cls, data: bytes | None) -> Self | None:
        """What was said; `None` of anything else."""
        try:
            return cls.model_validate_json(data or b"")
        except ValidationError:
            return None

    def to_bytes(self) -> bytes:
        """As it travels."""
        return self.model_dump_json().encode()


class Claim(_Said):
    """What a member says of itself when it joins."""

    owned: dict[str, list[int]] = {}
    """Topic to partitions."""
    busy: TopicPartition | None = None
    waiting: list[tuple[TopicPartition, int]] = []
    """Uncommitted messages of every partition that has any, as a member saw it that asks for a rebalance."""
    nonce: int = 0
    """Differs from the last one when a rebalance is asked for: the broker passes by a join that says nothing new."""


class Shares(_Said):
    """What the leader tells every member of all."""

    shares: list[dict[str, list[int]]] | None = None
    """Each member's partitions; `None` where some member does not say what it is busy with."""


class BusyAwareAssignor:
    """One slot's assignor, as an instance in `partition_assignment_strategy`.

    Args:
        holder: the slot.

    """

    name = "roundrobin"

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._round = self._nonce = 0
        self._waiting: list[tuple[TopicPartition, int]] = []
        self.shares: list[frozenset[TopicPartition]] | None = None
        """Every member's partitions, from the last assignment to the next join; `None` while they are not known."""

    def ask(self, waiting: Mapping[TopicPartition, int]) -> None:
        """Say at the next join that these messages wait, so that the group is shared out anew."""
        self._waiting = sorted(waiting.items())
        self._nonce += 1

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member says when it joins."""
        self.shares = None
        owned, busy = self._holder.assigned or frozenset(), self._holder.busy
        claim = Claim(
            v=1,
            round=self._round,
            owned=_by_topic(owned),
            busy=busy if busy in owned else None,
            waiting=self._waiting,
            nonce=self._nonce,
        )
        return ConsumerProtocolMemberMetadata(0, list(topics), claim.to_bytes())

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """As the group's leader: share the partitions out."""
        said = {member: Claim.read(metadata.user_data) for member, metadata in members.items()}
        claims = {member: claim or Claim(v=1) for member, claim in said.items()}
        topics = {member: frozenset(metadata.subscription) for member, metadata in members.items()}
        partitions = {
            TopicPartition(topic, partition)
            for topic in frozenset().union(*topics.values())
            for partition in cluster.partitions_for_topic(topic) or ()
        }
        shares = share_out(partitions, topics, claims)
        told = Shares(
            v=1,
            round=1 + max(claim.round for claim in claims.values()),
            shares=[_by_topic(share) for share in shares.values()] if None not in said.values() else None,
        )
        if len(told.to_bytes()) * len(members) > SHARES_BYTES:
            told = Shares(v=1, round=told.round)
        return {
            member: ConsumerProtocolMemberAssignment(0, list(_by_topic(share).items()), told.to_bytes())
            for member, share in shares.items()
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """As every member: hear the leader's answer, which a stock leader leaves empty."""
        told = Shares.read(assignment.user_data) or Shares(v=1, round=self._round)
        self._round, self._waiting = told.round, []
        self.shares = None if told.shares is None else [frozenset(_partitions(share)) for share in told.shares]


def _by_topic(partitions: Iterable[TopicPartition]) -> dict[str, list[int]]:
    topics: dict[str, list[int]] = {}
    for topic, partition in sorted(partitions):
        topics.setdefault(topic, []).append(partition)
    return topics


def _partitions(topics: Mapping[str, Iterable[int]]) -> Iterator[TopicPartition]:
    return (TopicPartition(topic, partition) for topic in topics for partition in topics[topic])


def share_out(
    partitions: Iterable[TopicPartition], topics: Mapping[str, frozenset[str]], claims: Mapping[str, Claim]
) -> dict[str, set[TopicPartition]]:
    """Every partition to one member that subscribes to its topic; the same input has the same answer.

    Args:
        topics: what each member subscribes to.
        claims: what each member says of itself.

    """
    table = _Table(partitions, topics, claims)
    table.leave_busy()
    table.spread_waiting()
    table.leave_owned()
    table.spread_rest()
    return table.shares


class _Table:
    """Partitions being given out, in steps; each takes from what the ones before have left."""

    def __init__(
        self, partitions: Iterable[TopicPartition], topics: Mapping[str, frozenset[str]], claims: Mapping[str, Claim]
    ) -> None:
        self._topics, self._claims, self._free = topics, claims, set(partitions)
        self.shares: dict[str, set[TopicPartition]] = {member: set() for member in sorted(claims)}
        # of two claims the later assignment's is right: the other member was thrown out meanwhile
        self._by_trust = sorted(claims, key=lambda member: (-claims[member].round, member))
        self._owner: dict[TopicPartition, str] = {}
        for member in reversed(self._by_trust):
            self._owner |= dict.fromkeys(_partitions(claims[member].owned), member)
        self._backlog: dict[TopicPartition, int] = {}
        for claim in claims.values():
            for partition, count in claim.waiting:
                self._backlog[partition] = max(count, self._backlog.get(partition, 0))
        self._busy: dict[str, TopicPartition] = {}

    def leave_busy(self) -> None:
        """A partition whose message is being worked on stays."""
        for member in self._by_trust:
            busy = self._claims[member].busy
            if busy in self._free and self._may_read(member, busy):
                self._give(busy, member)
                self._busy[member] = busy

    def spread_waiting(self) -> None:
        """Each next partition with work goes to whoever will be through first, so an idle member is never passed by."""
        load = dict.fromkeys(self.shares, 0)
        for member, busy in self._busy.items():
            load[member] = max(1, 2 * self._backlog.get(busy, 1) - 1)  # in half jobs; the running one is half done
        waiting = [partition for partition in self._free if self._backlog.get(partition, 0) > 0]
        for partition in sorted(waiting, key=lambda one: (-self._backlog[one], one)):
            reader = self._best(partition, load.__getitem__)
            if reader is not None:
                self._give(partition, reader)
                load[reader] += 2 * self._backlog[partition]

    def leave_owned(self) -> None:
        """Of the rest, a member keeps what it has, as far as that is no more than its even share."""
        quota = self._quotas()
        for partition in sorted(self._free):
            owner = self._owner.get(partition)
            if owner is not None and len(self.shares[owner]) < quota[owner] and self._may_read(owner, partition):
                self._give(partition, owner)

    def spread_rest(self) -> None:
        """What nobody has or may keep goes to whoever has least."""
        for partition in sorted(self._free):
            reader = self._best(partition, lambda member: len(self.shares[member]))
            if reader is not None:
                self._give(partition, reader)

    def _quotas(self) -> dict[str, int]:
        """Even shares; the odd ones go to who has them already, then to the idle."""
        given = sum(map(len, self.shares.values()))
        even, odd = divmod(given + len(self._free), len(self.shares))
        has = {member: len(share) for member, share in self.shares.items()}
        for partition in self._free & self._owner.keys():
            has[self._owner[partition]] += 1

        def rank(member: str) -> tuple[bool, bool, bool, str]:
            return len(self.shares[member]) <= even, has[member] <= even, member in self._busy, member

        return {member: even + (place < odd) for place, member in enumerate(sorted(self.shares, key=rank))}

    def _best(self, partition: TopicPartition, load: Callable[[str], int]) -> str | None:
        """The least loaded reader; of equal ones who has it, then an idle one."""
        owner = self._owner.get(partition)

        def rank(member: str) -> tuple[int, bool, bool, str]:
            return load(member), member != owner, member in self._busy, member

        return min((member for member in self.shares if self._may_read(member, partition)), key=rank, default=None)

    def _may_read(self, member: str, partition: TopicPartition) -> bool:
        return partition.topic in self._topics[member]

    def _give(self, partition: TopicPartition, member: str) -> None:
        self.shares[member].add(partition)
        self._free.discard(partition)
