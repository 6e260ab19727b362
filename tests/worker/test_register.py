"""A run's record: one owner at a time, whatever is lost on the way."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from mistudio_schemas import ErrorCode, TrainCancelled, TrainFailed
from mistudio_train.errors import StoreUnavailable
from mistudio_train.settings import Settings
from mistudio_train.worker.delivery import Place
from mistudio_train.worker.intake import Message
from mistudio_train.worker.register import (
    Claim,
    MessageId,
    ObeyedControl,
    RecordUnreadable,
    Register,
    RunLost,
)
from mistudio_train.worker.store import Store, open_store

MESSAGE = Message(
    topic="train.requested", partition=3, offset=17, timestamp=1_700_000_000_000, key=b"job", value=b'{"a": 1}'
)
ID = MessageId.of(MESSAGE, "group")
PLACE = Place("train.failed", 5, 42)


@pytest.fixture
def register(store: Store) -> Register:
    return Register(store)


def failed(run: int = 1, message: str = "no") -> TrainFailed:
    return TrainFailed(
        job_id="job", run=run, code=ErrorCode.CORPUS_EMPTY, hint="another", retryable=False, message=message
    )


def outcomes(claim: Claim) -> list[str]:
    return [attempt.outcome for attempt in claim.record.attempts]


class TestLifecycle:
    def test_a_run_from_its_beginning_to_its_publication(self, register: Register, store: Store) -> None:
        claim = register.create("job", ID, "worker-1")
        assert (claim.record.run, claim.attempt, claim.record.state) == (1, 1, "running")
        assert claim.key == "jobs/job/runs/1/run.json"
        assert claim.attempt_prefix == "jobs/job/runs/1/a1/"
        claim = register.keep_model_commit(claim, "abc")
        claim = register.keep_corpus_commit(register.keep_corpus_commit(claim, "def"), "later")
        event = failed()
        claim = register.finish(claim, event, PLACE)
        assert (claim.record.state, claim.record.published, outcomes(claim)) == ("failed", False, ["ended"])
        claim = register.published(claim)
        found = register.find("job", ID)
        assert found == claim
        assert found.ended() == (event, PLACE)
        assert found.record.published
        assert (found.record.model_commit, found.record.corpus_commit) == ("abc", "def")
        assert [found.key for found in store.list("")] == [claim.key]

    def test_an_attempt_that_failed_keeps_its_reason(self, register: Register) -> None:
        claim = register.create("job", ID, "worker-1")
        claim = register.attempt_failed(claim, ErrorCode.CHILD_DIED, "signal 9")
        assert claim.failed_attempts == 1
        claim = register.take_over(claim, "worker-1")
        assert (claim.attempt, claim.attempt_prefix) == (2, "jobs/job/runs/1/a2/")
        claim = register.finish(claim, failed(), PLACE)
        first = claim.record.attempts[0]
        assert (first.outcome, first.code, first.message) == ("failed", ErrorCode.CHILD_DIED, "signal 9")
        assert outcomes(claim) == ["failed", "ended"]

    def test_only_attempts_that_went_wrong_count(self, register: Register) -> None:
        claim = register.create("job", ID, "worker-1")
        claim = register.take_over(register.attempt_stopped(claim, "SIGTERM"), "worker-2")
        claim = register.take_over(claim, "worker-3")  # worker-2 was killed
        claim = register.attempt_failed(claim, ErrorCode.STORE_UNAVAILABLE, "away")
        assert outcomes(claim) == ["stopped", "abandoned", "failed"]
        assert claim.failed_attempts == 2

    def test_a_run_that_has_not_ended_has_no_event(self, register: Register) -> None:
        with pytest.raises(ValueError, match="has not ended"):
            register.create("job", ID, "w").ended()

    def test_a_run_that_has_ended_cannot_be_taken_over(self, register: Register) -> None:
        claim = register.finish(register.create("job", ID, "w"), failed(), PLACE)
        with pytest.raises(ValueError, match="has ended"):
            register.take_over(claim, "w")

    def test_the_first_end_stays(self, register: Register) -> None:
        claim = register.create("job", ID, "w")
        first = register.finish(claim, failed(message="first"), PLACE)
        again = register.finish(claim, failed(message="second"), Place("train.failed", 6, 1))
        assert again == first
        assert again.ended()[0].message == "first"

    def test_a_control_is_obeyed_once(self, register: Register) -> None:
        control = ObeyedControl(partition=0, offset=9, action="cancel")
        claim = register.obey(register.create("job", ID, "w"), control)
        assert register.obey(claim, control) == claim
        claim = register.finish(claim, TrainCancelled(job_id="job", run=1), PLACE)
        assert [one for run in register.runs("job") for one in run.record.controls] == [control]
        assert claim.record.state == "cancelled"

    def test_keys_begin_with_the_settings_prefix(self, store_settings: Settings, store: Store) -> None:
        prefixed = open_store(store_settings.model_copy(update={"store_prefix": "team/"}))
        register = Register(prefixed)
        claim = register.create("job", ID, "w")
        assert claim.attempt_prefix == "team/jobs/job/runs/1/a1/"
        assert register.find("job", ID) == claim
        assert [found.key for found in store.list("")] == ["team/jobs/job/runs/1/run.json"]
        prefixed.close()


class TestWhichRun:
    """Redelivered, or run again."""

    def test_a_running_one_is_taken_over(self, register: Register) -> None:
        claim = register.take_over(register.create("job", ID, "w1"), "w2")
        assert (claim.record.run, claim.attempt, outcomes(claim)) == (1, 2, ["abandoned", "running"])
        assert register.find("job", ID) == claim

    def test_an_ended_one_is_not(self, register: Register) -> None:
        ended = register.finish(register.create("job", ID, "w1"), failed(), PLACE)
        with pytest.raises(ValueError, match="has ended"):
            register.take_over(ended, "w2")

    def test_a_published_one_is_run_again(self, register: Register) -> None:
        register.published(register.finish(register.create("job", ID, "w1"), failed(), PLACE))
        claim = register.create("job", ID, "w2", after=1)
        assert (claim.record.run, claim.attempt) == (2, 1)
        assert [run.record.run for run in register.runs("job")] == [2, 1]

    @pytest.mark.parametrize(
        "other",
        [
            replace(MESSAGE, partition=4),
            replace(MESSAGE, offset=18),
            replace(MESSAGE, timestamp=1),
            replace(MESSAGE, value=b"{}"),
            replace(MESSAGE, topic="other"),
        ],
    )
    def test_another_message_of_the_job_is_another_run(self, register: Register, other: Message) -> None:
        register.create("job", ID, "w")
        for run, identity in enumerate((MessageId.of(other, "group"), MessageId.of(MESSAGE, "group-2")), start=2):
            assert register.find("job", identity) is None
            assert register.create("job", identity, "w").record.run == run

    def test_who_did_not_know_of_a_run_begins_none_after_it(self, register: Register) -> None:
        """It stood still between its look and its beginning; another worker has begun and ended a run meanwhile."""
        register.published(register.finish(register.create("job", ID, "w1"), failed(), PLACE))
        with pytest.raises(RunLost):
            register.create("job", ID, "w2")
        assert register.create("job", ID, "w2", after=1).record.run == 2

    def test_runs_count_as_numbers_and_jobs_are_apart(self, register: Register) -> None:
        for offset in range(11):
            register.create("job", ID.model_copy(update={"offset": offset}), "w")
        register.create("job-2", ID, "w")
        assert [run.record.run for run in register.runs("job")] == list(range(11, 0, -1))
        assert set(register.jobs()) == {"job", "job-2"}

    def test_a_number_is_never_given_twice(self, register: Register, store: Store) -> None:
        first = register.create("job", ID.model_copy(update={"offset": 1}), "w")
        store.put_bytes(f"{first.attempt_prefix}sae_model.pt", b"x")
        store.delete([first.key])
        assert register.create("job", ID, "w").record.run == 2


class TestRaces:
    def test_of_eight_takers_one_wins(self, register: Register) -> None:
        claim = register.create("job", ID, "first")
        results = at_once(8, lambda n: register.take_over(claim, f"w{n}"))
        (winner,) = [result for result in results if isinstance(result, Claim)]
        assert all(isinstance(result, RunLost) for result in results if result is not winner)
        assert register.find("job", ID) == winner
        assert winner.attempt == 2

    def test_of_eight_creators_for_one_message_one_wins(self, register: Register) -> None:
        results = at_once(8, lambda n: register.create("job", ID, f"w{n}"))
        (winner,) = [result for result in results if isinstance(result, Claim)]
        assert all(isinstance(result, RunLost) for result in results if result is not winner)
        assert list(register.runs("job")) == [winner]

    def test_eight_messages_of_one_job_are_eight_runs(self, register: Register) -> None:
        results = at_once(8, lambda n: register.create("job", ID.model_copy(update={"offset": n}), f"w{n}"))
        assert sorted(result.record.run for result in results if isinstance(result, Claim)) == list(range(1, 9))

    @pytest.mark.parametrize(
        "write",
        [
            lambda register, claim: register.finish(claim, failed(), PLACE),
            lambda register, claim: register.attempt_failed(claim, ErrorCode.CHILD_DIED, ""),
            lambda register, claim: register.attempt_stopped(claim, ""),
            lambda register, claim: register.keep_model_commit(claim, "abc"),
            lambda register, claim: register.take_over(claim, "zombie"),
            lambda register, claim: register.try_again(claim, "zombie", "new"),
        ],
    )
    def test_who_has_lost_the_run_writes_nothing(
        self, register: Register, write: Callable[[Register, Claim], Claim]
    ) -> None:
        stale = register.create("job", ID, "zombie")
        present = register.take_over(stale, "successor")
        with pytest.raises(RunLost, match="attempt 2 of successor has it"):
            write(register, stale)
        assert register.find("job", ID) == present

    def test_a_taker_does_not_undo_an_end(self, register: Register) -> None:
        claim = register.create("job", ID, "slow")
        ended = register.finish(claim, failed(), PLACE)
        with pytest.raises(RunLost):
            register.take_over(claim, "hasty")
        assert register.find("job", ID) == ended

    def test_an_owner_s_stale_claim_is_brought_up_to_date(self, register: Register) -> None:
        claim = register.create("job", ID, "w")
        register.keep_model_commit(claim, "abc")
        ended = register.finish(claim, failed(), PLACE)
        assert (ended.record.model_commit, ended.record.state) == ("abc", "failed")

    def test_whoever_publishes_may_say_so(self, register: Register) -> None:
        ended = register.finish(register.create("job", ID, "w1"), failed(), PLACE)
        assert register.published(ended).record.published
        assert register.published(ended).record.published

    def test_a_record_that_is_gone_is_lost(self, register: Register, store: Store) -> None:
        claim = register.create("job", ID, "w")
        store.delete([claim.key])
        with pytest.raises(RunLost, match="its record is gone"):
            register.finish(claim, failed(), PLACE)


class Flaky:
    """A store whose next conditional puts go wrong: `lost` (done, the answer is lost) or `away` (not done)."""

    def __init__(self, store: Store, *faults: str) -> None:
        self._store, self._faults = store, iter(faults)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        return self._put(lambda: self._store.put_if_absent(key, data))

    def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        return self._put(lambda: self._store.put_if_match(key, data, etag))

    def _put(self, put: Callable[[], str | None]) -> str | None:
        fault = next(self._faults, None)
        result = put() if fault != "away" else None
        if fault is not None:
            raise StoreUnavailable("no answer in time", "wait")
        return result


class TestUnknownOutcomes:
    """What a put did whose answer never came is looked up."""

    def test_an_attempt_that_was_begun_unawares_is_not_lost(self, register: Register) -> None:
        claim = register.attempt_failed(register.create("job", ID, "w"), ErrorCode.CHILD_DIED, "")
        begun = register.try_again(claim, "w", "new")
        assert register.try_again(claim, "w", "new") == begun
        assert (begun.attempt, outcomes(begun)) == (2, ["failed", "running"])

    @pytest.mark.parametrize("faults", [["lost"], ["away"], ["away", "lost"], ["away", "away"]])
    def test_every_write_is_done_once(self, store: Store, faults: list[str]) -> None:
        def register() -> Register:
            return Register(Flaky(store, *faults))

        claim = register().create("job", ID, "w1")
        assert claim.record.run == 1
        claim = register().take_over(claim, "w2")
        assert claim.attempt == 2
        claim = register().finish(claim, failed(), PLACE)
        claim = register().published(claim)
        assert list(register().runs("job")) == [claim]

    def test_a_store_that_stays_away_is_told_and_asked_again_later(self, store: Store) -> None:
        claim = Register(store).create("job", ID, "w")
        flaky = Register(Flaky(store, "away", "away", "away"))
        with pytest.raises(StoreUnavailable):
            flaky.finish(claim, failed(), PLACE)
        assert flaky.finish(claim, failed(), PLACE).record.state == "failed"

    def test_a_write_that_arrived_after_all_is_ours(self, store: Store) -> None:
        claim = Register(store).create("job", ID, "w")
        late = Register(Flaky(store, "away", "away", "away"))
        with pytest.raises(StoreUnavailable):
            late.attempt_failed(claim, ErrorCode.CHILD_DIED, "signal 9")
        arrived = Register(store).attempt_failed(claim, ErrorCode.CHILD_DIED, "signal 9")
        again = late.attempt_failed(claim, ErrorCode.CHILD_DIED, "signal 9")
        assert outcomes(again) == outcomes(arrived) == ["failed"]
        assert again.record.owner == claim.record.owner

    def test_a_loser_whose_answer_is_lost_knows_that_it_lost(self, store: Store) -> None:
        claim = Register(store).create("job", ID, "w")
        winner = Register(store).take_over(claim, "w2")
        with pytest.raises(RunLost):
            Register(Flaky(store, "lost")).take_over(claim, "w3")
        assert Register(store).find("job", ID) == winner

    def test_a_store_that_always_says_no_is_told(self, store: Store) -> None:
        class Refuses(Flaky):
            def put_if_absent(self, key: str, data: bytes) -> str | None:
                return None

        with pytest.raises(StoreUnavailable, match="refuses to swap"):
            Register(Refuses(store)).create("job", ID, "w")


class TestOtherVersions:
    def test_fields_of_a_newer_writer_survive(self, register: Register, store: Store) -> None:
        claim = register.create("job", ID, "w")
        data, etag = store.get_bytes(claim.key)
        store.put_if_match(claim.key, data[:-1] + b', "fingerprint": "f00"}', etag)
        found = register.find("job", ID)
        assert found is not None
        ended = register.finish(found, failed(), PLACE)
        assert b'"fingerprint": "f00"' in store.get_bytes(ended.key)[0]

    @pytest.mark.parametrize("data", [b'{"version": 2}', b"", b"\xff", b"[]"])
    def test_a_record_that_cannot_be_read_is_left_alone(self, register: Register, store: Store, data: bytes) -> None:
        store.put_bytes("jobs/job/runs/1/run.json", data)
        with pytest.raises(RecordUnreadable, match=r"runs/1/run\.json"):
            register.find("job", ID)
        assert [found.key for found in store.list("")] == ["jobs/job/runs/1/run.json"]


def at_once(n: int, act: Callable[[int], Claim]) -> list[Claim | RunLost]:
    """The results of `n` threads that start together."""
    barrier = threading.Barrier(n)

    def run(i: int) -> Claim | RunLost:
        barrier.wait(10)
        try:
            return act(i)
        except RunLost as lost:
            return lost

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))
