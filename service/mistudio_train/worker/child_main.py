"""The child's first function. Before anything heavy is imported it takes over its streams and watches its parent.

Owns the process, not the work: that is `train`, whose import is the one step from `worker` into `training`.
"""

import contextlib
import logging
import os
import resource
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from mistudio_schemas import ErrorCode
from mistudio_train.errors import JobError
from mistudio_train.logs import setup_logging
from mistudio_train.messages import ChildMessage, Failed, Finished, JobSpec, Left, LeftEarly, Parent, Wish
from mistudio_train.settings import Settings

Job = Callable[[JobSpec, Parent], Finished]
"""The work: takes the job's spec and the parent to speak to, returns the last word or raises."""

TRACEBACK_LINES = 20
ORPHANED = 83
"""Exit status of a child whose parent has gone."""


def child_main(spec: JobSpec, messages: Connection, wishes: Connection, stderr: Connection, job: Job) -> None:
    """Run one job and end.

    Args:
        messages: where `ChildMessage`s go; its last one is `Finished`, `Left` or `Failed`.
        wishes: carries the parent's; its end means that the parent is gone.
        stderr: takes the place of both standard streams, so that the parent can keep the last lines.
        job: what to do.

    """
    _forget_secrets()
    _open_as_many_files_as_allowed()
    for stream in (1, 2):
        os.dup2(stderr.fileno(), stream)
    os.setpgid(0, 0)  # the terminal's Ctrl-C is for the parent; it decides what happens to us
    parent = _Pipe(messages)
    threading.Thread(target=parent.listen, args=(wishes,), name="parent-watch", daemon=True).start()
    setup_logging(spec.logging)
    try:
        messages.send(_run(job, spec, parent))
    except BrokenPipeError:
        os._exit(ORPHANED)


class _Pipe:
    """The parent, as the work sees it."""

    def __init__(self, messages: Connection) -> None:
        self._messages = messages
        self.wish: Wish | None = None

    def __call__(self, message: ChildMessage) -> None:
        self._messages.send(message)

    def listen(self, wishes: Connection) -> None:
        """Until the parent is gone, and then this process is too: nobody is left to tell it anything."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                wish = wishes.recv()
                if self.wish != "leave":  # what is left can be finished later
                    self.wish = wish
        os._exit(ORPHANED)


def train(spec: JobSpec, parent: Parent) -> Finished:
    """The job that every worker's child does: the one step from `worker` into `training`."""
    from mistudio_train.training.run import run_job

    return run_job(spec, parent)


def _run(job: Job, spec: JobSpec, parent: Parent) -> ChildMessage:
    try:
        return job(spec, parent)
    except BrokenPipeError:
        raise
    except LeftEarly:
        return Left()
    except JobError as error:
        return Failed(error.code, str(error), error.hint, error.retryable)
    except BaseException as error:
        logging.getLogger(__name__).exception("the job failed unexpectedly")
        lines = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK_LINES:]
        hint = "This is a defect of the worker or of a library; the traceback says where."
        return Failed(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}", hint, False, lines)


def _open_as_many_files_as_allowed() -> None:
    """Every site has a file a shard: more of both than the 1,024 that many systems begin with."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _forget_secrets() -> None:
    """The environment comes from the parent; the only credential that the work may see is in its spec."""
    for name in [name for name in os.environ if Settings.is_secret(name)]:
        del os.environ[name]
