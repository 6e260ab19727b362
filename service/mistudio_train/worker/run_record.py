"""What the register keeps of a run, as values: nothing here reads or writes. `register.py` does, and it alone."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Self
from uuid import uuid4

from pydantic import ConfigDict, Field

from mistudio_schemas import Contract, ErrorCode, JobId, TrainCancelled, TrainCompleted, TrainFailed

from .delivery import Place
from .intake import Message

State = Literal["running", "finished", "failed", "cancelled"]
Terminal = TrainCompleted | TrainFailed | TrainCancelled
_ENDS: dict[type[Terminal], State] = {TrainCompleted: "finished", TrainFailed: "failed", TrainCancelled: "cancelled"}


class Kept(Contract):
    """A value that keeps the fields of newer versions when it is written again."""

    model_config = ConfigDict(extra="allow", frozen=True)


class MessageId(Kept):
    """One delivery of one message to one group: the same again means that it was delivered again."""

    group: str
    topic: str
    partition: int
    offset: int
    timestamp: int
    """Milliseconds since the epoch."""
    value_sha256: str

    @classmethod
    def of(cls, message: Message, group: str) -> Self:
        """The identity of `message` as `group` reads it."""
        return cls(
            group=group,
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            timestamp=message.timestamp,
            value_sha256=hashlib.sha256(message.value or b"").hexdigest(),
        )


class AttemptRecord(Kept):
    """One try of a run."""

    attempt: int = Field(ge=1)
    worker: str
    started: datetime
    ended: datetime | None = None
    outcome: Literal["running", "failed", "stopped", "abandoned", "ended"] = "running"
    """`stopped`: given back in good order; `abandoned`: its worker died or lost the run; `ended`: the run's end."""
    code: ErrorCode | None = None
    message: str = ""


class ObeyedControl(Kept):
    """A message of `train.control` that this run has obeyed, so that no later run does."""

    partition: int
    offset: int
    action: Literal["cancel", "stop"]
    requested_by: str | None = None

    def is_same(self, other: "ObeyedControl") -> bool:
        """Whether both are of the same message."""
        return (self.partition, self.offset) == (other.partition, other.offset)


ReadTo = dict[int, int]
"""Partition of `train.control` to the offset of the first control that has not been read."""


class ManifestRef(Kept):
    """Where a finished run's manifest is."""

    key: str
    sha256: str


class RunRecord(Kept):
    """A run, as `run.json` holds it."""

    version: Literal[1] = 1
    """A reader of another version must leave the record alone."""
    job_id: JobId
    run: int = Field(ge=1)
    message: MessageId
    state: State = "running"
    published: bool = False
    """The terminal event is known to be in its topic; false says nothing."""
    owner: str
    """Made anew by whoever takes the run: two attempts never look alike."""
    revision: str
    """Made anew by every write: two records never look alike."""
    attempts: tuple[AttemptRecord, ...]
    model_commit: str | None = None
    """What `model_revision` was resolved to; every attempt uses it."""
    corpus_commit: str | None = None
    """The same of a dataset of the hub."""
    controls: tuple[ObeyedControl, ...] = ()
    controls_before: ReadTo | None = None
    """How far the controls had been read when the run began; `None`: an older version has begun it."""
    controls_until: ReadTo | None = None
    """The same at its end."""
    manifest: ManifestRef | None = None
    event: str | None = None
    """The terminal event's JSON."""
    terminal: Place | None = None
    """Where to look for the event."""
    created: datetime
    updated: datetime

    @classmethod
    def begun(
        cls, job_id: str, run: int, message: MessageId, worker: str, controls_before: ReadTo | None = None
    ) -> Self:
        """A new run at its first attempt."""
        now = _now()
        return cls(
            job_id=job_id,
            run=run,
            message=message,
            owner=new_name(),
            revision=new_name(),
            attempts=(AttemptRecord(attempt=1, worker=worker, started=now),),
            controls_before=controls_before,
            created=now,
            updated=now,
        )

    def taken_over(self, worker: str, owner: str | None = None) -> Self:
        """At its next attempt, owned by `worker`; `owner` is to be a new one."""
        now, last = _now(), self.attempts[-1]
        if last.outcome == "running":
            last = last.model_copy(update={"ended": now, "outcome": "abandoned"})
        following = AttemptRecord(attempt=last.attempt + 1, worker=worker, started=now)
        return self._with(owner=owner or new_name(), attempts=(*self.attempts[:-1], last, following))

    def attempt_ended(
        self, outcome: Literal["failed", "stopped", "ended"], code: ErrorCode | None = None, message: str = ""
    ) -> Self:
        """With the reason why the present attempt is over."""
        last = {"ended": _now(), "outcome": outcome, "code": code, "message": message}
        return self._with(attempts=(*self.attempts[:-1], self.attempts[-1].model_copy(update=last)))

    def ended(self, event: Terminal, place: Place, controls_until: ReadTo | None = None) -> Self:
        """At its end; an attempt that has failed keeps its reason."""
        over = self.attempt_ended("ended") if self.attempts[-1].outcome == "running" else self
        manifest = None
        if isinstance(event, TrainCompleted):
            manifest = ManifestRef(key=event.manifest.key, sha256=event.manifest.sha256)
        return over._with(
            state=_ENDS[type(event)],
            event=event.to_json().decode(),
            terminal=place,
            manifest=manifest,
            published=False,
            controls_until=controls_until,
        )

    def obeyed(self, control: ObeyedControl) -> Self:
        """With a control that it obeys; once is enough, and after its end nothing is obeyed."""
        if self.state != "running" or any(control.is_same(done) for done in self.controls):
            return self
        return self._with(controls=(*self.controls, control))

    def with_model_commit(self, commit: str) -> Self:
        """With the commit that every attempt shall use; the first one said stays."""
        return self if self.model_commit is not None else self._with(model_commit=commit)

    def with_corpus_commit(self, commit: str) -> Self:
        """The same of a dataset's."""
        return self if self.corpus_commit is not None else self._with(corpus_commit=commit)

    def marked_published(self) -> Self:
        """With its terminal event known to be out."""
        return self if self.published else self._with(published=True)

    @property
    def created_at(self) -> int:
        """When the run began, in milliseconds since the epoch."""
        return int(self.created.timestamp() * 1000)

    @property
    def ended_at(self) -> int | None:
        """When its end was decided, in milliseconds since the epoch; `None` while it runs."""
        times = [attempt.ended for attempt in self.attempts if attempt.ended is not None]
        return None if self.state == "running" or not times else int(max(times).timestamp() * 1000)

    def age_seconds(self) -> float:
        """Since the run was created, by this machine's clock; never below 0."""
        return max(0.0, (_now() - self.created).total_seconds())

    def _with(self, **changes: object) -> Self:
        return self.model_copy(update={**changes, "revision": new_name(), "updated": _now()})


@dataclass(frozen=True)
class Claim:
    """A run's record as it was read or written, and the etag that lets its holder swap it."""

    key: str
    """Of `run.json`."""
    record: RunRecord
    etag: str

    @property
    def attempt(self) -> int:
        """Counts the tries within the run."""
        return self.record.attempts[-1].attempt

    @property
    def failed_attempts(self) -> int:
        """Tries that count against the limit: failed or abandoned ones, not those stopped in good order."""
        return sum(attempt.outcome in ("failed", "abandoned") for attempt in self.record.attempts)

    @property
    def run_prefix(self) -> str:
        """Keys of everything of the run begin with this."""
        return self.key.removesuffix("run.json")

    @property
    def attempt_prefix(self) -> str:
        """Keys of everything that this attempt may write begin with this."""
        return f"{self.run_prefix}a{self.attempt}/"

    def ended(self) -> tuple[Terminal, Place]:
        """The terminal event as it was decided, and where to look for it.

        Raises:
            ValueError: if the run has not ended.

        """
        for kind, state in _ENDS.items():
            if state == self.record.state and self.record.event is not None and self.record.terminal is not None:
                return kind.from_json(self.record.event.encode()), self.record.terminal
        raise ValueError(f"job {self.record.job_id} run {self.record.run} has not ended")


def _now() -> datetime:
    return datetime.now(UTC)


def new_name() -> str:
    """Of an owner or a revision: no other has it."""
    return uuid4().hex
