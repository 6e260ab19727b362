"""The parent's view of a child: start it, read what it says until it ends, notice silence and death, end it.

Knows nothing of Kafka or the store. Nothing here speaks for the child: what it does not say is not said.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from multiprocessing.connection import Connection
from typing import Self

from mistudio_train.errors import ChildDied, ChildFailed, ChildStalled
from mistudio_train.messages import ChildMessage, Failed, Finished, JobSpec, Left, LeftEarly, Progress, Wish

from .child_main import Job, child_main, train

logger = logging.getLogger(__name__)

STDERR_LINES = 50
_SPAWN = multiprocessing.get_context("spawn")


class Child:
    """One job's process, as an async context manager: on the way out it is gone, whatever happened.

    Args:
        stall_seconds: a child that has not moved for this long is ended.
        loading_stall_seconds: the same while it fetches a dataset or loads a model.
        job: what the child does.

    """

    def __init__(self, spec: JobSpec, stall_seconds: float, loading_stall_seconds: float, job: Job = train) -> None:
        self._spec, self._job = spec, job
        self._stall = {"loading": loading_stall_seconds, "fetching": loading_stall_seconds}
        self._default_stall = stall_seconds
        self._queue: asyncio.Queue[ChildMessage | None] = asyncio.Queue()
        self._threads: list[threading.Thread] = []
        self._ended = False
        self.stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @property
    def pid(self) -> int | None:
        """Of the process, once it is started."""
        return self._process.pid

    async def __aenter__(self) -> Self:
        receive, send = _SPAWN.Pipe(duplex=False)
        wishes, self._wishes = _SPAWN.Pipe(duplex=False)
        read_stderr, stderr = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(
            target=child_main,
            args=(self._spec, send, wishes, stderr, self._job),
            name=f"job-{self._spec.job_id}",
            daemon=True,
        )
        await asyncio.to_thread(self._process.start)
        for ours in (send, wishes, stderr):
            ours.close()  # else the pipes never end
        loop = asyncio.get_running_loop()
        self._start_thread(self._read_messages, receive, loop)
        self._start_thread(self._read_stderr, read_stderr)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.kill()
        await asyncio.to_thread(self._process.join)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._wishes.close()
        self._process.close()
        self._ended = True

    def kill(self) -> None:
        """End the process at once, and what it started, which may outlive it and hold its pipes."""
        if self._ended or (pid := self._process.pid) is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self._process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def ask(self, wish: Wish) -> None:
        """Tell the child what is wanted; it looks between two steps, and its last word comes when it has done so."""
        with contextlib.suppress(OSError):  # it has ended, as its messages tell
            self._wishes.send(wish)

    async def result(self, hear: Callable[[ChildMessage], None]) -> Finished:
        """Wait for the child's work.

        Args:
            hear: takes each message.

        Raises:
            LeftEarly: if it ended as it was asked to.
            ChildFailed: if the child says why it cannot go on; its token is in no text of it.
            ChildStalled, ChildDied: as `messages`.

        """
        async for message in self.messages():
            hear(message)
            if isinstance(message, Left):
                raise LeftEarly
            if isinstance(message, Failed):
                raise self._failed(message)
            if isinstance(message, Finished):
                return message
        raise AssertionError("a child's messages end with its last word, or with an error")

    async def messages(self) -> AsyncIterator[ChildMessage]:
        """What the child says; the last one is `Finished`, `Left` or `Failed`.

        Raises:
            ChildStalled: if it has not moved for too long.
            ChildDied: if it ended without a last word.

        """
        phase, loop = "accepting", asyncio.get_running_loop()
        moved_at = loop.time()
        while True:
            limit = self._stall.get(phase, self._default_stall)
            try:
                async with asyncio.timeout_at(moved_at + limit):
                    message = await self._queue.get()
            except TimeoutError:
                raise self._stalled(phase, limit) from None
            if message is None:
                raise await self._died()
            if not isinstance(message, Progress) or message.moved:
                moved_at = loop.time()
            phase = message.phase if isinstance(message, Progress) else phase
            yield message
            if isinstance(message, Finished | Left | Failed):
                return

    def _failed(self, said: Failed) -> ChildFailed:
        secrets = self._spec.secrets
        return ChildFailed(
            redact(said.message, secrets),
            redact(said.hint, secrets),
            said.code,
            retryable=said.retryable,
            traceback=[redact(line, secrets) for line in said.traceback],
        )

    def _stalled(self, phase: str, limit: float) -> ChildStalled:
        return ChildStalled(
            f"the training process has not moved for {limit:.0f} s while {phase}",
            "Look at the worker's log and the GPU; STALL_SECONDS sets the limit. The job is tried again.",
            traceback=list(self.stderr),
        )

    async def _died(self) -> ChildDied:
        await asyncio.to_thread(self._process.join)
        self.kill()  # what it has started
        code = self._process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            often = " (often the kernel, out of memory)" if name == "SIGKILL" else ""
            how = f"was ended by {name}{often}"
        else:
            how = f"ended with status {code} before its work was done"
        for thread in self._threads:
            await asyncio.to_thread(thread.join)  # so that its last lines are in
        return ChildDied(
            f"the training process {how}",
            "Its last lines are in the traceback. The job is tried again.",
            traceback=list(self.stderr),
        )

    def _start_thread(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _read_messages(self, receive: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Until the pipe ends, which it does when the child does, however it ended."""
        message: ChildMessage | None
        with receive:
            while True:
                try:
                    message = receive.recv()
                except Exception as error:
                    if not isinstance(error, EOFError):
                        logger.warning("unreadable message from the child: %s", type(error).__name__)
                    message = None
                with contextlib.suppress(RuntimeError):  # the loop has ended before us
                    loop.call_soon_threadsafe(self._queue.put_nowait, message)
                if message is None:
                    return

    def _read_stderr(self, stream: Connection) -> None:
        """Pass the child's lines on to our own stderr, its tokens removed, and keep the last ones."""
        descriptor = os.dup(stream.fileno())
        stream.close()
        with os.fdopen(descriptor, errors="replace") as lines:
            for raw in lines:
                line = redact(raw.rstrip("\n"), self._spec.secrets)
                self.stderr.append(line)
                print(line, file=sys.stderr, flush=True)


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` without the secrets."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text
