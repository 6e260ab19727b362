"""A run that a worker has taken on: all that is known of it, in one record that the supervisor's parts share."""

import asyncio
from dataclasses import dataclass, field

from .checkpoints import Stored
from .intake import Intake, Message
from .orders import Orders
from .outcome import Who
from .progress import ProgressFeed
from .register import Claim
from .workspace import Workspace


@dataclass(eq=False)
class Running:
    """A run under way on this worker."""

    message: Message
    intake: Intake
    claim: Claim
    """As the register was read or written last."""
    feed: ProgressFeed
    orders: Orders
    workspace: Workspace
    """Held from the first attempt on, for as long as the run is."""
    checkpoints: list[Stored] = field(default_factory=list)
    """In the store, the newest first."""

    identity: str | None = None
    """Of its result, once the child has said it."""
    heeding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Controls are obeyed one after another."""

    def who(self, worker: str) -> Who:
        """Of which run and attempt events speak."""
        return Who(self.claim.record.job_id, self.claim.record.run, self.claim.attempt, worker)
