"""A job's progress events: at most one a second, the latest always, the last at once, and nothing that nobody said.

There is no heartbeat of the parent's own: while the child is silent, so is the topic, and a hung job looks hung.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from mistudio_schemas import TrainProgress
from mistudio_train.errors import brief
from mistudio_train.messages import ChildMessage, Loaded, Progress, Warned

logger = logging.getLogger(__name__)

MIN_INTERVAL = 1.0
RETRY_INTERVAL = 5.0
LAST_WORD_SECONDS = 60.0
"""The job is over, and its slot is not held longer by a broker that is away."""
LAST_TRIES = 5
"""Of the last event, which the compacted topic keeps as the job's status."""
WARNINGS = 100
"""The latest of them are in an event."""
CHILD_SHARE = 0.9
"""Of a job's progress that is the child's; the rest is fetching, uploading and publishing."""


class ProgressFeed:
    """Gathers what is known of a running job and publishes it.

    Args:
        publish: sends one event; its failure is logged and forgotten, progress never fails a job.
        first: the job's first event; later ones repeat what is still true of it.
        is_ours: whether the run is still this worker's; asked before speaking after a long silence.
        silence_seconds: so long a silence may mean that this process stood still and another one has the run.

    """

    def __init__(
        self,
        publish: Callable[[TrainProgress], Awaitable[None]],
        first: TrainProgress,
        is_ours: Callable[[], Awaitable[bool]] | None = None,
        silence_seconds: float = float("inf"),
    ) -> None:
        self._publish, self._is_ours, self._silence = publish, is_ours, silence_seconds
        self._awake_at, self._doubtful = asyncio.get_running_loop().time(), False
        self._first = first.model_dump(exclude={"time"})
        self._state = dict(self._first)
        self._sent_at = float("-inf")
        self._unsaid = self._published = False
        self._speaking: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.say()

    @property
    def current(self) -> TrainProgress:
        """How the job stands now."""
        return TrainProgress.model_validate(self._state)

    def say(self, **changes: Any) -> None:
        """Something has changed; it is published now, or when a second has passed since the last time."""
        self._wake()
        self._state |= changes
        self._unsaid = True
        if self._speaking is None or self._speaking.done():
            self._speaking = asyncio.create_task(self._speak())

    async def answer(self, **changes: Any) -> None:
        """Something has changed because somebody asked for it: it is published now, however little time has passed."""
        self._state |= changes
        await self._publish_current()

    def begin_again(self, attempt: int) -> None:
        """A new attempt: what the former one's child has said is not true of it."""
        self._state = self._first | {"attempt": attempt, "unknown_fields": []}
        self.say()

    def hear(self, message: ChildMessage) -> None:
        """The child has spoken."""
        match message:
            case Progress():
                said = asdict(message)
                del said["moved"]
                known = {key: value for key, value in said.items() if value is not None or key == "current_loss"}
                self._state |= {"step": None, "total_steps": None, "tokens_done": None, "tokens_per_second": None}
                self._state["estimated_time_remaining"] = None
                self.say(**known | {"progress": min(1.0, message.progress) * CHILD_SHARE})
            case Loaded():
                self.say(model_info=message.model_info.model_dump())
            case Warned():
                self.say(warnings=[*self._state["warnings"], brief(message.message)][-WARNINGS:])
            case _:
                pass

    async def close(self, **changes: Any) -> None:
        """The last word, which waits for no second to pass; returns when it is published, or cannot be."""
        self._closing.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_SECONDS):
                for _ in range(LAST_TRIES):
                    self.say(**changes)
                    assert self._speaking is not None  # `say` has just seen to it
                    await self._speaking
                    if self._published:
                        return
                    await asyncio.sleep(RETRY_INTERVAL)

    async def _speak(self) -> None:
        while self._unsaid:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._sent_at + MIN_INTERVAL):
                    await self._closing.wait()
            self._sent_at, self._unsaid = asyncio.get_running_loop().time(), False
            await self._publish_current()

    async def _publish_current(self) -> None:
        self._wake()
        self._published = False
        if not await self._may_speak():
            return
        event = self.current
        self._state["unknown_fields"] = []  # named once, in the first event
        try:
            await self._publish(event)
            self._published = True
        except Exception as error:
            logger.warning("progress of %s was not published: %s", event.job_id, type(error).__name__)

    def _wake(self) -> None:
        now = asyncio.get_running_loop().time()
        self._doubtful |= now - self._awake_at > self._silence
        self._awake_at = now

    async def _may_speak(self) -> bool:
        """A worker that stood still must not speak over its successor: the topic keeps the latest word for ever."""
        if self._doubtful and self._is_ours is not None:
            self._doubtful = not await self._is_ours()
            return not self._doubtful
        return True
