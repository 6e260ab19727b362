"""The names of the topics. One place, so that a prefix (a team, a test) is applied everywhere alike."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topics:
    """Topic names under an optional prefix: `Topics("dev.").requested == "dev.train.requested"`."""

    prefix: str = ""

    @property
    def requested(self) -> str:
        """In: requests; replay it to run jobs again."""
        return f"{self.prefix}train.requested"

    @property
    def control(self) -> str:
        """In, read by every worker: cancel or stop a job."""
        return f"{self.prefix}train.control"

    @property
    def progress(self) -> str:
        """Out, compacted: the latest event of a job is its status."""
        return f"{self.prefix}train.progress"

    @property
    def completed(self) -> str:
        """Out, transactional: a result and where its files lie."""
        return f"{self.prefix}train.completed"

    @property
    def failed(self) -> str:
        """Out, transactional: a job that ended without a result, and why."""
        return f"{self.prefix}train.failed"

    @property
    def cancelled(self) -> str:
        """Out, transactional: a job that somebody cancelled."""
        return f"{self.prefix}train.cancelled"

    @property
    def dead_letter(self) -> str:
        """Out: bytes that are no request, untouched, with the reason in headers."""
        return f"{self.prefix}train.requested.dlq"

    def all(self) -> tuple[str, ...]:
        """Every topic of the contract."""
        return (
            self.requested,
            self.control,
            self.progress,
            self.completed,
            self.failed,
            self.cancelled,
            self.dead_letter,
        )
