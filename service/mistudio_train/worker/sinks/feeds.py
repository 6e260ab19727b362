"""Brings what children say of their training logs to the sinks: each on a daemon thread of its own, which may hang.

Whoever speaks to a feed never waits for it. A sink that fails, or does not keep up, is dropped with one warning.
"""

import asyncio
import contextlib
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial

from mistudio_train.errors import JobError, brief
from mistudio_train.messages import JobSpec, Logged
from mistudio_train.settings import SINK_NAMES, Settings, SinkName

from .sink import Line, Outcome, Shown, Sink, lines_of

logger = logging.getLogger(__name__)

Open = Callable[[SinkName, Settings, Shown], Sink]
MOST_WAITING = 1000
"""Messages that wait for a sink: eight minutes of training."""
MOST_HUNG = 4
"""Dropped sinks of a kind whose threads still hang; while there are so many, no further one is opened."""
WHY_CHARACTERS = 500


_importing = threading.Lock()
"""Two threads that import libraries with modules in common may each see one half made; NumPy warned of it."""


def open_sink(name: SinkName, settings: Settings, shown: Shown) -> Sink:
    """Open a sink; its library is imported here and nowhere else.

    Raises:
        Exception: of any kind, from the library.

    """
    with _importing:
        opening = _opening(name)
    return opening(settings, shown)


def _opening(name: SinkName) -> Callable[[Settings, Shown], Sink]:
    if name == "tensorboard":
        from .tensorboard_files import TensorBoardFiles

        return lambda settings, shown: TensorBoardFiles(settings.tensorboard_folder, shown)
    if name == "mlflow":
        from .mlflow_run import MLflowRun

        return lambda settings, shown: MLflowRun(settings.mlflow_tracking_uri, settings.mlflow_experiment_name, shown)
    from .wandb_run import WandbRun

    return lambda settings, shown: WandbRun(settings.wandb_project, settings.wandb_folder, shown)


class Sinks:
    """The sinks of a process' jobs, as the settings want them."""

    def __init__(self, settings: Settings, open_: Open = open_sink) -> None:
        self._settings, self._open = settings, open_
        self._feeds: list[Feed] = []

    @contextlib.contextmanager
    def following(self, spec: JobSpec, warn: Callable[[str], None]) -> Iterator["Curves"]:
        """The curves of one attempt, until the block ends; what is still on its way then arrives while others go on.

        Args:
            spec: of the attempt.
            warn: called in the event loop, and not after the block.

        """
        self._feeds = [feed for feed in self._feeds if feed.alive or not feed.ended]
        curves = Curves(spec.job_id, warn, self._settings.sink_close_seconds)
        curves.feeds = [feed for name in self._settings.sinks if (feed := self._feed(name, spec, curves))]
        self._feeds += curves.feeds
        outcome: Outcome = "interrupted"
        try:
            yield curves
            outcome = "finished"
        except JobError:
            outcome = "failed"
            raise
        finally:
            curves.end(outcome)

    async def close(self, seconds: float) -> None:
        """After the last job: wait for what is on its way, so long at most."""
        seconds = max(0.0, min(seconds, self._settings.sink_close_seconds))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for feed in self._feeds:
                    await asyncio.to_thread(feed.join, seconds)
        for feed in self._feeds:
            feed.overdue()
        await asyncio.sleep(0)  # for the warnings

    @property
    def hang(self) -> bool:
        """Whether some thread is still at it; a library may then wait for it at the end of the process."""
        return any(feed.alive for feed in self._feeds)

    def _feed(self, name: SinkName, spec: JobSpec, curves: "Curves") -> "Feed | None":
        say = partial(curves.dropped, name)
        if sum(feed.name == name and feed.dropped and feed.alive for feed in self._feeds) >= MOST_HUNG:
            say("it hangs since earlier jobs")
            return None
        shown = Shown.of(spec)
        earlier = [feed for feed in self._feeds if (feed.name, feed.of) == (name, shown.name)]
        wait = partial(earlier[-1].join, self._settings.sink_close_seconds) if earlier else None
        return Feed(name, shown.name, partial(self._open, name, self._settings, shown), say, wait)


class Curves:
    """One attempt's, on their way to all of its sinks. Belongs to the event loop."""

    def __init__(self, job_id: str, warn: Callable[[str], None], close_seconds: float) -> None:
        self._job_id, self._warn, self._close_seconds = job_id, warn, close_seconds
        self._loop, self._ended = asyncio.get_running_loop(), False
        self.feeds: list[Feed] = []

    def hear(self, said: Logged) -> None:
        """The child has spoken."""
        for feed in self.feeds:
            feed.hear(said)

    def end(self, outcome: Outcome) -> None:
        """The attempt is over, and nobody waits for its sinks."""
        self._ended = True
        for feed in self.feeds:
            feed.end(outcome)
            if feed.alive:
                self._loop.call_later(self._close_seconds, feed.overdue)

    def dropped(self, name: str, why: str) -> None:
        """A sink is no more; called from any thread."""
        text = f"the sink {name} is dropped, and the job goes on without it: {why}"
        with contextlib.suppress(RuntimeError):  # the loop has ended before it
            self._loop.call_soon_threadsafe(self._tell, text)

    def _tell(self, text: str) -> None:
        if self._ended:
            logger.warning("job %s: %s", self._job_id, text)
        else:
            self._warn(text)


class Feed:
    """The way of one attempt's lines to one sink, which is opened when the first of them comes.

    Args:
        name: the sink's.
        of: the run that it shows.
        open_: opens it.
        say: told why it is dropped, once, from any thread.
        wait: for an earlier attempt's, which may still write to the same place.

    """

    def __init__(
        self,
        name: SinkName,
        of: str,
        open_: Callable[[], Sink],
        say: Callable[[str], None],
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.name, self.of, self._open, self._say, self._wait = name, of, open_, say, wait
        self._queue: queue.Queue[Logged | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._lock, self._over, self.dropped, self.ended = threading.Lock(), False, False, False
        self._outcome: Outcome = "interrupted"

    @property
    def alive(self) -> bool:
        """Whether its thread is at work, or hangs."""
        return self._thread.is_alive()

    def hear(self, said: Logged) -> None:
        """Pass it on; never waits."""
        if self.dropped:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._put(said)

    def end(self, outcome: Outcome) -> None:
        """Nothing more comes; never waits."""
        self._outcome, self.ended = outcome, True
        if self.alive and not self.dropped:
            self._put(None)

    def overdue(self) -> None:
        """The time that it has after the end is over; it may end yet, but nobody counts on it."""
        if self.alive:
            self._drop("it does not end; what it has not shown by now may be missing")

    def join(self, seconds: float) -> None:
        """Wait for its end, so long at most."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _put(self, said: Logged | None) -> None:
        try:
            self._queue.put_nowait(said)
        except queue.Full:
            self._drop(f"it does not keep up, {MOST_WAITING} messages wait for it")

    def _drop(self, why: str) -> None:
        with self._lock:
            before, self.dropped = self.dropped, True
        if not before:
            self._say(why)

    def _work(self) -> None:
        if self._wait is not None:
            self._wait()
        sink: Sink | None = None
        try:
            while not self.dropped and (lines := self._next_lines()):
                sink = sink or self._open()
                sink.write(lines)
        except BaseException as error:  # a library may end more than itself
            self._drop(_why(error))
        try:
            if sink is not None:
                sink.close(self._outcome)
        except BaseException as error:
            self._drop(_why(error))

    def _next_lines(self) -> list[Line]:
        """All that waits, at least one; none after the end."""
        lines: list[Line] = []
        while not self._over and not (lines and self._queue.empty()):
            said = self._queue.get()
            self._over = said is None
            lines += lines_of(said) if said is not None else ()
        return lines


def _why(error: BaseException) -> str:
    """For a log and an event, with no secret in it."""
    if isinstance(error, ModuleNotFoundError) and error.name in SINK_NAMES:
        return f"{error.name} is not installed; pip install 'mistudio-train[sinks]' brings it"
    text = re.sub(r"//[^/@\s]+@", "//[secret]@", f"{type(error).__name__}: {error}")
    for name, value in os.environ.items():
        if Settings.is_secret(name) and value and "//" not in value:
            text = text.replace(value, "[secret]")
    return brief(text, WHY_CHARACTERS)
