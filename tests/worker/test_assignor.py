"""Who gets which partition: the rules of the assignor, for groups of any shape, and what it hears from strangers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.cluster import ClusterMetadata
from aiokafka.consumer import group_coordinator
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from hypothesis import given
from hypothesis import strategies as st

from mistudio_train.worker.assignor import SHARES_BYTES, BusyAwareAssignor, Claim, Shares, share_out
from mistudio_train.worker.nudge import work_could_move

TOPIC = "train.requested"


def parts(*numbers: int) -> set[TopicPartition]:
    return {TopicPartition(TOPIC, number) for number in numbers}


def claim(*owned: int, busy: int | None = None, made: int = 1, waiting: Mapping[int, int] | None = None) -> Claim:
    return Claim(
        v=1,
        round=made,
        owned={TOPIC: list(owned)},
        busy=None if busy is None else TopicPartition(TOPIC, busy),
        waiting=[(TopicPartition(TOPIC, number), count) for number, count in (waiting or {}).items()],
    )


def shared(partitions: int, claims: Mapping[str, Claim]) -> dict[str, set[int]]:
    topics = dict.fromkeys(claims, frozenset({TOPIC}))
    shares = share_out(parts(*range(partitions)), topics, claims)
    return {member: {partition.partition for partition in share} for member, share in shares.items()}


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, dict[str, Claim]]:
    """A group as it may come: members own anything, also twice, are busy with it or not, may know what waits."""
    partitions = draw(st.integers(1, 24))
    number = st.integers(0, partitions + 1)  # some that are no partition (any more)
    claims = {}
    for member in draw(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)):
        owned = draw(st.lists(number, max_size=8, unique=True))
        busy = draw(st.sampled_from([None, *owned]))
        waiting = draw(st.dictionaries(number, st.integers(-1, 5), max_size=draw(st.sampled_from([0, 0, 8]))))
        claims[member] = claim(*owned, busy=busy, made=draw(st.integers(0, 2)), waiting=waiting)
    return partitions, claims


def without_waiting(claims: Mapping[str, Claim]) -> dict[str, Claim]:
    return {member: one.model_copy(update={"waiting": []}) for member, one in claims.items()}


def winners(partitions: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Member to the partition that it is busy with and must keep."""
    winner: dict[int, str] = {}
    for member, one in sorted(claims.items(), key=lambda item: (-item[1].round, item[0])):
        if one.busy is not None and one.busy.partition < partitions:
            winner.setdefault(one.busy.partition, member)
    return {member: partition for partition, member in winner.items()}


@given(groups())
def test_every_partition_has_one_reader_and_every_busy_one_keeps_its_own(group: tuple[int, dict[str, Claim]]) -> None:
    partitions, claims = group
    shares = shared(partitions, claims)
    assert sorted(number for share in shares.values() for number in share) == list(range(partitions))
    assert shares.keys() == claims.keys()
    for member, busy in winners(partitions, claims).items():
        assert busy in shares[member]


@given(groups(), st.randoms())
def test_the_order_in_which_members_are_told_of_does_not_matter(group: tuple[int, dict[str, Claim]], draw: Any) -> None:
    partitions, claims = group
    shuffled = draw.sample(list(claims.items()), len(claims))
    assert shared(partitions, dict(shuffled)) == shared(partitions, claims)


@given(groups())
def test_shares_are_even_while_nobody_knows_what_waits(group: tuple[int, dict[str, Claim]]) -> None:
    partitions, claims = group
    sizes = [len(share) for share in shared(partitions, without_waiting(claims)).values()]
    assert max(sizes) - min(sizes) <= 1


@given(groups())
def test_a_partition_moves_only_to_make_shares_even(group: tuple[int, dict[str, Claim]]) -> None:
    partitions, claims = group
    claims, taken = without_waiting(claims), set[int]()
    for member, one in claims.items():
        owned = {number for number in one.owned[TOPIC] if number < partitions} - taken
        claims[member], taken = claim(*owned), taken | owned
    for member, share in shared(partitions, claims).items():
        owned = set(claims[member].owned[TOPIC])
        assert len(owned & share) >= min(len(owned), partitions // len(claims))


@given(groups())
def test_nothing_moves_when_nothing_has_changed(group: tuple[int, dict[str, Claim]]) -> None:
    partitions, claims = group
    shares = shared(partitions, without_waiting(claims))
    busy = winners(partitions, claims)
    again = {member: claim(*share, busy=busy.get(member), made=3) for member, share in shares.items()}
    assert shared(partitions, again) == shares


@given(groups())
def test_no_idle_member_goes_without_while_work_waits_elsewhere(group: tuple[int, dict[str, Claim]]) -> None:
    partitions, claims = group
    shares, busy = shared(partitions, claims), winners(partitions, claims)
    waiting = {one.partition for each in claims.values() for one, count in each.waiting if count > 0}
    waiting = {number for number in waiting if number < partitions} - set(busy.values())
    load = {member: len(share & waiting) for member, share in shares.items()}
    idle = [load[member] for member in claims if member not in busy]
    working = [load[member] for member in busy]
    assert not idle or min(idle) > 0 or max(idle + working) <= 1
    assert not idle or min(idle) > 0 or not any(working)


def test_waiting_jobs_go_to_the_idle_first_and_are_then_spread_by_their_number() -> None:
    claims = {
        "busy": claim(0, 1, 2, 3, busy=0),
        "deep": claim(4, 5, 6, 7, busy=4),
        "idle": claim(8, 9, waiting={0: 1, 1: 1, 2: 1, 4: 9, 5: 1, 6: 1}),
    }
    shares = shared(10, claims)
    waiting = {member: share & {1, 2, 5, 6} for member, share in shares.items()}
    assert {member: len(share) for member, share in waiting.items()} == {"busy": 2, "deep": 0, "idle": 2}


def test_of_two_claims_the_one_of_the_later_assignment_is_right() -> None:
    claims = {"a-thrown-out": claim(0, 1, busy=0, made=4), "b-owner": claim(0, 1, busy=0, made=5)}
    assert 0 in shared(2, claims)["b-owner"]


def test_a_newcomer_takes_no_busy_partition() -> None:
    claims = {"a": claim(0, 1, 2, 3, busy=3), "b": claim(4, 5, 6, 7, busy=7), "new": claim(made=0)}
    assert shared(8, claims) == {"a": {0, 1, 3}, "b": {4, 5, 7}, "new": {2, 6}}


def test_members_beyond_the_partitions_have_none_and_the_busy_keep_theirs() -> None:
    claims = {"a": claim(), "b": claim(), "c": claim(0, busy=0), "d": claim(1, busy=1)}
    assert shared(2, claims) == {"a": set(), "b": set(), "c": {0}, "d": {1}}


def test_who_does_not_subscribe_to_a_topic_gets_nothing_of_it() -> None:
    other = TopicPartition("other", 0)
    topics = {"a": frozenset({TOPIC}), "b": frozenset({"other"})}
    claims = {"a": claim(0), "b": claim(0, 1, busy=1)}
    assert share_out(parts(0, 1) | {other}, topics, claims) == {"a": parts(0, 1), "b": {other}}


@dataclass
class Holder:
    assigned: frozenset[TopicPartition] | None = None
    busy: TopicPartition | None = None


CLUSTER = SimpleNamespace(partitions_for_topic=lambda topic: set(range(6)) if topic == TOPIC else None)


def joined(*holders: Holder) -> tuple[list[BusyAwareAssignor], dict[str, ConsumerProtocolMemberMetadata]]:
    assignors = [BusyAwareAssignor(holder) for holder in holders]
    return assignors, {f"m{number}": one.metadata([TOPIC]) for number, one in enumerate(assignors)}


def over_the_wire(assignment: ConsumerProtocolMemberAssignment) -> ConsumerProtocolMemberAssignment:
    return ConsumerProtocolMemberAssignment.decode(assignment.encode())


def test_a_group_of_ours_knows_who_has_what_until_the_next_join() -> None:
    (first, second), members = joined(Holder(frozenset(parts(0, 1, 2, 3, 4, 5)), TopicPartition(TOPIC, 5)), Holder())
    answer = first.assign(CLUSTER, members)
    second.on_assignment(over_the_wire(answer["m1"]))
    assert second.shares == [frozenset(one.partitions()) for one in answer.values()]
    assert TopicPartition(TOPIC, 5) in second.shares[0]
    second.metadata([TOPIC])
    assert second.shares is None


def test_a_join_says_something_new_only_if_a_rebalance_is_asked_for() -> None:
    assignor = BusyAwareAssignor(Holder(frozenset(parts(0))))
    before = assignor.metadata([TOPIC])
    assert assignor.metadata([TOPIC]).encode() == before.encode()
    assignor.ask({TopicPartition(TOPIC, 4): 2})
    asked = Claim.read(assignor.metadata([TOPIC]).user_data)
    assert asked is not None
    assert (asked.waiting, asked.nonce) == ([(TopicPartition(TOPIC, 4), 2)], 1)
    assignor.on_assignment(assignor.assign(CLUSTER, {"m": assignor.metadata([TOPIC])})["m"])
    heard = Claim.read(assignor.metadata([TOPIC]).user_data)
    assert heard is not None
    assert (heard.waiting, heard.nonce, heard.round) == ([], 1, 1)


def test_a_partition_that_is_no_longer_ours_is_not_claimed_as_busy() -> None:
    said = Claim.read(BusyAwareAssignor(Holder(frozenset(parts(0)), TopicPartition(TOPIC, 1))).metadata([]).user_data)
    assert said is not None
    assert said.busy is None


GARBAGE = [
    b"",
    b"\xff\xfe",
    b"{}",
    b"null",
    b"[" * 100_000,
    b'{"v":2,"owned":{}}',
    b'{"v":1,"owned":{"t":["x"]}}',
    b'{"v":1,"busy":7}',
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_a_stranger_owns_nothing_is_idle_and_ends_the_nudging(data: bytes) -> None:
    (ours,), members = joined(Holder(frozenset(parts(0, 1, 2, 3)), TopicPartition(TOPIC, 3)))
    members["stranger"] = ConsumerProtocolMemberMetadata(3, [TOPIC], data)
    answer = ours.assign(CLUSTER, members)
    assert TopicPartition(TOPIC, 3) in answer["m0"].partitions()
    assert [len(one.partitions()) for one in answer.values()] == [3, 3]
    ours.on_assignment(over_the_wire(answer["m0"]))
    assert ours.shares is None
    ours.on_assignment(ConsumerProtocolMemberAssignment(0, [(TOPIC, [1])], data))
    assert ours.shares is None


@given(st.binary(max_size=200))
def test_no_user_data_breaks_a_leader(data: bytes) -> None:
    (ours,), members = joined(Holder())
    answer = ours.assign(CLUSTER, members | {"stranger": ConsumerProtocolMemberMetadata(0, [TOPIC], data)})
    assert sum(len(one.partitions()) for one in answer.values()) == 6


def test_a_topic_that_the_cluster_does_not_know_is_no_ones() -> None:
    (ours,), _ = joined(Holder())
    assert ours.assign(CLUSTER, {"m0": ours.metadata(["absent"])})["m0"].partitions() == []


def test_a_group_too_large_for_telling_shares_is_still_shared_out() -> None:
    holders = [Holder() for _ in range(300)]
    assignors, members = joined(*holders)
    cluster = SimpleNamespace(partitions_for_topic=lambda topic: set(range(1200)))
    answer = assignors[0].assign(cluster, members)
    assert sum(len(one.encode()) for one in answer.values()) < SHARES_BYTES
    told = Shares.read(answer["m0"].user_data)
    assert told is not None
    assert (told.shares, told.round) == (None, 1)


def test_only_work_that_could_begin_elsewhere_is_worth_a_rebalance() -> None:
    shares = [frozenset(parts(0, 1)), frozenset(parts(2, 3)), frozenset(parts(4, 5))]
    own = shares[2]

    def could(backlog: Mapping[int, int]) -> bool:
        return work_could_move(shares, {TopicPartition(TOPIC, one): count for one, count in backlog.items()}, own)

    assert not could({})
    assert not could({0: 1, 2: 1})  # both may be running
    assert not could({0: 7})  # in one partition they run one after the other anyway
    assert could({0: 1, 1: 1})  # one of the two waits
    assert not could({0: 1, 1: 1, 4: 1})  # work of its own comes first


class TestWhatAiokafkaDoes:
    """Private parts of aiokafka that the assignor and the nudge rest on; look there first when these fail."""

    def test_one_assignor_is_asked_by_its_name_and_may_be_an_instance(self) -> None:
        ours = BusyAwareAssignor(Holder())
        coordinator = SimpleNamespace(_assignors=[ours])
        lookup: Any = group_coordinator.GroupCoordinator._lookup_assignor
        assert lookup(coordinator, "roundrobin") is ours
        assert ours.name == RoundRobinPartitionAssignor.name

    def test_user_data_reach_the_leader_and_come_back(self) -> None:
        said = BusyAwareAssignor(Holder()).metadata([TOPIC])
        assert ConsumerProtocolMemberMetadata.decode(said.encode()).user_data == said.user_data

    async def test_a_consumer_can_be_made_to_rejoin_and_asked_for_all_committed_offsets(self) -> None:
        consumer = AIOKafkaConsumer(group_id="g")
        assert "_coordinator" in vars(consumer)
        coordinator: Any = group_coordinator.GroupCoordinator
        assert coordinator.request_rejoin.__code__.co_varnames[:1] == ("self",)
        assert coordinator.fetch_committed_offsets.__code__.co_varnames[:2] == ("self", "partitions")
        assert callable(ClusterMetadata.partitions_for_topic)
        consumer._closed = True
