"""What a job is told from outside while it runs: to leave, to be cancelled, to stop. Knows not who says so, or why.

An order to leave or to cancel ends whatever is awaited under `interruptible`, unless somebody attends to orders who
knows a better end: a child that can save what it has.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Order = Literal["stop", "cancel", "leave"]
"""`stop`: deliver what there is; `cancel`: throw it away; `leave`: save it, somebody else goes on."""
ENDING: frozenset[Order] = frozenset({"cancel", "leave"})
"""After which there is no result."""


class Interrupted(Exception):
    """The work has ended as it was ordered to, without a result."""


class Orders:
    """The orders that one job is given; each counts once."""

    def __init__(self) -> None:
        self.given: set[Order] = set()
        self.deadline = float("inf")
        """By the loop's clock: when a job that is to leave will be ended without being asked."""
        self._work: asyncio.Task[Any] | None = None
        self._ends_work = ENDING
        self._attendant: Callable[[Order], None] | None = None

    @property
    def ending(self) -> bool:
        """Whether the job is to end without a result."""
        return bool(self.given & ENDING)

    def leave(self, seconds: float) -> None:
        """Give the job so long to leave in good order."""
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.give("leave")

    def give(self, order: Order) -> None:
        """Order something."""
        if order in self.given:
            return
        self.given.add(order)
        if self._attendant is not None:
            self._attendant(order)
        elif order in self._ends_work and self._work is not None:
            self._work.cancel()

    async def interruptible(self, work: Coroutine[Any, Any, T], by: frozenset[Order] = ENDING) -> T:
        """Await `work`, as long as no order ends it.

        Args:
            by: the orders that do.

        Raises:
            Interrupted: if one does.

        """
        if self.given & by:
            work.close()
            raise Interrupted
        task, ours = asyncio.create_task(work), asyncio.current_task()
        assert ours is not None  # a coroutine that runs has one
        self._work, self._ends_work = task, by
        try:
            return await task
        except asyncio.CancelledError:
            if self.given & by and not ours.cancelling():
                raise Interrupted from None
            raise
        finally:
            self._work = None

    @contextmanager
    def attended(self, attendant: Callable[[Order], None]) -> Iterator[None]:
        """While the block lasts, `attendant` is told of every order, those given before included."""
        self._attendant = attendant
        try:
            for order in tuple(self.given):
                attendant(order)
            yield
        finally:
            self._attendant = None
