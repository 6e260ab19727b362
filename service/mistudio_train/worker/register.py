"""The register of runs: who owns a run, at which attempt it is, and how it ended. Writes `run.json` and nothing else.

Every write is conditional on the record that was read; one whose answer is lost is looked up, never guessed.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import count

from mistudio_schemas import ErrorCode
from mistudio_train.errors import StoreUnavailable

from .delivery import Place
from .objects import NotFound, Store
from .run_record import Claim, MessageId, ObeyedControl, ReadTo, RunRecord, Terminal

logger = logging.getLogger(__name__)

PUT_TRIES = 3

__all__ = ["Claim", "MessageId", "ObeyedControl", "RecordUnreadable", "Register", "RunLost", "RunRecord"]


class RunLost(Exception):
    """Another attempt owns the run: stop, and write nothing more that a reader could reach."""

    def __init__(self, job_id: str, run: int, present: Claim | None) -> None:
        holder = present.record.attempts[-1] if present else None
        whose = f"attempt {holder.attempt} of {holder.worker} has it" if holder else "its record is gone"
        super().__init__(f"job {job_id} run {run} is no longer ours: {whose}")
        self.present = present


class RecordUnreadable(StoreUnavailable):
    """A record that this version cannot read and so must not touch; a newer worker may."""


class Register:
    """The runs of all jobs, one `run.json` each. Every method may be called from any thread.

    Every method raises `StoreUnavailable` when the store does not answer; what was asked may then have happened or not,
    and calling again is safe.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, job_id: str, message: MessageId) -> Claim | None:
        """The newest run of that very message; another topic, group or publication of it is another message."""
        return next((claim for claim in self.runs(job_id) if claim.record.message == message), None)

    def runs(self, job_id: str, only: int | None = None) -> Iterator[Claim]:
        """The job's runs, the newest first; or the one of that number."""
        for run in sorted(self._numbers(job_id), reverse=True):
            if only not in (None, run):
                continue
            claim = self._read(self._key(job_id, run))
            if claim is not None:
                yield claim

    def jobs(self) -> Iterator[str]:
        """The ids of all jobs that ever began."""
        return self._store.folders(f"{self._store.prefix}jobs/")

    def create(
        self,
        job_id: str,
        message: MessageId,
        worker: str,
        controls_before: ReadTo | None = None,
        after: int = 0,
    ) -> Claim:
        """A new run with the next number.

        Args:
            controls_before: how far the worker has read the controls.
            after: the newest run of this very message that the worker knows of; 0: none.

        Raises:
            RunLost: if there is a newer one, or it is running: another worker was first.

        """
        for run in count(max(self._numbers(job_id), default=0) + 1):
            present = self.find(job_id, message)
            if present is not None and (present.record.run > after or present.record.state == "running"):
                raise RunLost(job_id, present.record.run, present)
            try:
                return self._put(
                    self._key(job_id, run), RunRecord.begun(job_id, run, message, worker, controls_before), None
                )
            except RunLost:
                logger.info("job %s: run %d was begun by another worker", job_id, run)
        raise AssertionError("numbers have no end")

    def take_over(self, claim: Claim, worker: str) -> Claim:
        """The next attempt of a run that its owner has left.

        Raises:
            RunLost: if the record is another one by now.
            ValueError: if the run has ended.

        """
        if claim.record.state != "running":
            raise ValueError(f"job {claim.record.job_id} run {claim.record.run} has ended")
        return self._put(claim.key, claim.record.taken_over(worker), claim.etag)

    def try_again(self, claim: Claim, worker: str, owner: str) -> Claim:
        """The next attempt of a run that this worker still owns. Raises `RunLost`.

        Args:
            owner: a new one, by which a repeated call knows what an earlier one has done.

        """
        try:
            return self._as_owner(claim, lambda record: record.taken_over(worker, owner))
        except RunLost as lost:
            if lost.present is not None and lost.present.record.owner == owner:
                return lost.present
            raise

    def attempt_failed(self, claim: Claim, code: ErrorCode, message: str) -> Claim:
        """Note why the present attempt failed; the run goes on. Raises `RunLost`."""
        return self._as_owner(claim, lambda record: record.attempt_ended("failed", code, message))

    def attempt_stopped(self, claim: Claim, message: str) -> Claim:
        """Note that the present attempt gave the run back in good order; it counts as no failure. Raises `RunLost`."""
        return self._as_owner(claim, lambda record: record.attempt_ended("stopped", message=message))

    def require_ours(self, claim: Claim) -> Claim:
        """The record as it is now, while `claim`'s attempt owns it. Raises `RunLost`."""
        present = self._read(claim.key)
        if present is None or present.record.owner != claim.record.owner:
            raise RunLost(claim.record.job_id, claim.record.run, present)
        return present

    def keep_model_commit(self, claim: Claim, commit: str) -> Claim:
        """Keep the model's commit for every attempt; the first one said stays. Raises `RunLost`."""
        return self._as_owner(claim, lambda record: record.with_model_commit(commit))

    def keep_corpus_commit(self, claim: Claim, commit: str) -> Claim:
        """The same of the corpus' commit. Raises `RunLost`."""
        return self._as_owner(claim, lambda record: record.with_corpus_commit(commit))

    def obey(self, claim: Claim, control: ObeyedControl) -> Claim:
        """Note that the run obeys a control, so that no later run does. Raises `RunLost`."""
        return self._as_owner(claim, lambda record: record.obeyed(control))

    def finish(self, claim: Claim, event: Terminal, place: Place, controls_until: ReadTo | None = None) -> Claim:
        """End the run with `event`, to be looked for from `place` on; the controls have been read so far.

        A run that this attempt has ended already keeps its first end: publish the event of the claim that comes back.

        Raises:
            RunLost: if another attempt owns the run.

        """
        return self._as_owner(
            claim, lambda now: now if now.state != "running" else now.ended(event, place, controls_until)
        )

    def published(self, claim: Claim) -> Claim:
        """Note that the terminal event is out. Raises `RunLost`."""
        return self._as_owner(claim, RunRecord.marked_published)

    def _as_owner(self, claim: Claim, change: Callable[[RunRecord], RunRecord]) -> Claim:
        """Change the record while `claim`'s attempt owns it, whatever else of it was written meanwhile.

        That may be an earlier write of ours that arrived late, or somebody's note that our event is published.
        """
        while True:
            record = change(claim.record)
            if record is claim.record:
                return claim
            try:
                return self._put(claim.key, record, claim.etag)
            except RunLost as lost:
                if lost.present is None or lost.present.record.owner != claim.record.owner:
                    raise
                claim = lost.present

    def _put(self, key: str, record: RunRecord, etag: str | None) -> Claim:
        """Swap the record with `etag` for `record`; `None`: there must be none."""
        data = record.to_json()
        unknown: StoreUnavailable | None = None
        for _ in range(PUT_TRIES):
            try:
                new = self._put_once(key, data, etag)
                if new is not None:
                    return Claim(key, record, new)
            except StoreUnavailable as error:
                unknown = error
            present = self._read(key)
            if present is not None and present.record.revision == record.revision:
                return present  # it was stored, though nobody said so
            if (present.etag if present else None) != etag:
                raise RunLost(record.job_id, record.run, present)
            # still the record that we know: the put has failed, or is on its way; the same put again settles it
        raise unknown or StoreUnavailable(
            f"the store refuses to swap {key}", "Check that it honours If-Match and If-None-Match."
        )

    def _put_once(self, key: str, data: bytes, etag: str | None) -> str | None:
        if etag is None:
            return self._store.put_if_absent(key, data)
        return self._store.put_if_match(key, data, etag)

    def _read(self, key: str) -> Claim | None:
        try:
            data, etag = self._store.get_bytes(key)
        except NotFound:
            return None
        try:
            return Claim(key, RunRecord.from_json(data), etag)
        except ValueError:
            raise RecordUnreadable(
                f"{key} is no record that this version can read",
                "A newer version may have written it: upgrade this worker. Else somebody has damaged it.",
            ) from None

    def _numbers(self, job_id: str) -> list[int]:
        names = self._store.folders(f"{self._store.prefix}jobs/{job_id}/runs/")
        return [int(name) for name in names if name.isdecimal() and name.isascii()]

    def _key(self, job_id: str, run: int) -> str:
        return f"{self._store.prefix}jobs/{job_id}/runs/{run}/run.json"
