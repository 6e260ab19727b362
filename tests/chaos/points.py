"""Named moments in a job's life, and what dies there: functions of the worker's are wrapped, in this process only.

Production code knows nothing of it. A trap lies in the worker's
folder, can be set while the worker runs, and springs once: it leaves a mark.
"""

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from mistudio_train.messages import Progress

WORKER_POINTS = (
    "upload",  # of all artifacts
    "object",  # of one of them, in the midst of the others
    "manifest",
    "register",  # the swap to "finished"
    "begin",  # of the transaction
    "send",
    "offsets",
    "commit",  # after: its request is on the way, and no answer has come
    "answer",  # before: it has come, and nobody knows; after: the worker knows
    "read-back",
    "checkpoint-upload",
)
CHILD_POINTS = ("checkpoint",)  # the rename that makes a file of a checkpoint whole
PHASE_POINTS = ("loading", "extracting", "exporting")  # after: the child has said that it is there
POINTS = WORKER_POINTS + CHILD_POINTS
SIDES = ("before", "after")
BETWEEN_MANIFEST_AND_READ_BACK = ("register", "begin", "send", "offsets", "commit", "answer")
STAGES = ("attempt", *(point for point in WORKER_POINTS if point not in ("object", "checkpoint-upload")))
PASSINGS = {"object": 3, "checkpoint": 3}
"""Which passing of a point kills, where it is not the first."""
TRAP = "trap.json"
"""The file in a worker's folder that holds its trap."""
UNBLOCKING: ContextVar[bool] = ContextVar("unblocking", default=False)
"""While a producer ends what its predecessors have left open: that is not the transaction whose points are meant."""
SOON_SECONDS = 0.04
"""Within this long of a commit's answer a broker that is killed may lose it."""


@dataclass(frozen=True)
class Trap:
    """What dies, where and when."""

    point: str
    side: str
    victim: str
    """`worker`, `child`, `broker`, `store`; `broker-soon`: within 40 ms; `frozen`: the worker, stopped not killed."""
    mark: Path
    """A file that says that it has happened."""
    pids: Path
    """A folder with the process ids of the servers, each in a file of its name."""

    @property
    def sprung(self) -> bool:
        """Whether it has happened."""
        return self.mark.exists()

    def set(self, data_path: Path) -> None:
        """For the worker that has this folder, from its next passing on."""
        data_path.mkdir(parents=True, exist_ok=True)
        fields = {name: str(value) for name, value in vars(self).items()}
        aside = data_path / f"{TRAP}.new"
        aside.write_text(json.dumps(fields))
        aside.replace(data_path / TRAP)


class Trapper:
    """Springs the trap that lies in the folder of this worker, in the worker's process or in its child's."""

    def __init__(self, data_path: Path) -> None:
        self._path = data_path / TRAP
        self._mark, self._passed = Path(), 0

    def at(self, point: str, side: str) -> None:
        """Somebody is here."""
        try:
            fields = json.loads(self._path.read_text())
        except FileNotFoundError:
            return
        trap = Trap(**fields | {"mark": Path(fields["mark"]), "pids": Path(fields["pids"])})
        if (point, side) != (trap.point, trap.side) or trap.sprung:
            return
        self._passed = self._passed + 1 if trap.mark == self._mark else 1
        self._mark = trap.mark
        if self._passed >= PASSINGS.get(point, 1):
            _spring(trap)


def _spring(trap: Trap) -> None:
    try:
        with trap.mark.open("x") as mark:
            mark.write(f"{trap.point}:{trap.side} {trap.victim} {time.time()}\n")
    except FileExistsError:
        return
    parent = parent_process()
    worker = os.getpid() if parent is None or parent.pid is None else parent.pid
    match trap.victim:
        case "worker":
            _kill(worker)
            threading.Event().wait()  # a child ends by itself when its parent has
        case "frozen":
            os.kill(worker, signal.SIGSTOP)
        case "child":
            _kill(os.getpid())
        case "broker-soon":
            threading.Timer(random.uniform(0, SOON_SECONDS), _kill_server, (trap, "broker")).start()
        case server:
            _kill_server(trap, server)


def _kill_server(trap: Trap, name: str) -> None:
    _kill(int((trap.pids / name).read_text()))


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Stage:
    """A file that says at any moment where the worker is in the delivery of a job; `attempt` before its upload."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def at(self, point: str, side: str) -> None:
        """Write it down."""
        if point in STAGES:
            os.pwrite(self._file, f"{point}:{side}".ljust(32).encode(), 0)

    @staticmethod
    def read(path: Path) -> str:
        """What is written down; nothing of a worker that has never had a job."""
        return path.read_text().strip() if path.exists() else ""


class Passers:
    """All who want to know that a point is passed."""

    def __init__(self, *passers: Stage | Trapper) -> None:
        self._passers = passers

    def at(self, point: str, side: str) -> None:
        """Tell them, in their order."""
        for passer in self._passers:
            passer.at(point, side)


def set_in_worker(trap: Passers) -> None:
    """Wrap the functions of this process, which is a worker."""
    from aiokafka import AIOKafkaProducer
    from aiokafka.producer.sender import EndTxnHandler

    from mistudio_train.worker import attempt
    from mistudio_train.worker.checkpoints import CheckpointUploads
    from mistudio_train.worker.deliveries import Deliveries
    from mistudio_train.worker.delivery import Delivery
    from mistudio_train.worker.register import Register
    from mistudio_train.worker.s3_store import S3Store

    _wrap(attempt.Attempt, "run", trap, "attempt")
    _wrap_phases(attempt.Attempt, trap)
    _wrap(attempt, "fetch_corpus", trap, "fetching")
    _wrap(attempt, "upload", trap, "upload")
    _wrap(attempt, "write_manifest", trap, "manifest")
    _wrap(S3Store, "put_file", trap, "object", lambda _store, key, *_, **__: "/checkpoints/" not in key)
    _wrap(Register, "finish", trap, "register")
    _wrap(CheckpointUploads, "_upload", trap, "checkpoint-upload")
    _wrap(Delivery, "_reads_back", trap, "read-back")
    _mark_unblocking(Deliveries)
    for name, point in (
        ("begin_transaction", "begin"),
        ("send_and_wait", "send"),
        ("send_offsets_to_transaction", "offsets"),
    ):
        _wrap(AIOKafkaProducer, name, trap, point, _is_delivering)
    _wrap_commit(AIOKafkaProducer, EndTxnHandler, trap)


def _is_delivering(producer: Any, *_: object, **__: object) -> bool:
    return producer._txn_manager is not None and not UNBLOCKING.get()


def _mark_unblocking(deliveries: Any) -> None:
    unblock = deliveries.unblock

    async def new_unblock(self: Any, where: Any) -> None:
        token = UNBLOCKING.set(True)
        try:
            await unblock(self, where)
        finally:
            UNBLOCKING.reset(token)

    deliveries.unblock = new_unblock


def _wrap_phases(attempt: Any, trap: Passers) -> None:
    """Each word of the child's that tells of a phase is a point of that name."""
    hear = attempt._hear

    def new_hear(self: Any, message: Any) -> None:
        hear(self, message)
        if isinstance(message, Progress):
            trap.at(message.phase, "after")

    attempt._hear = new_hear


def _wrap_commit(producer: Any, handler: Any, trap: Passers) -> None:
    """The commit's request and its answer, one by one."""
    commit, do, handle_response = producer.commit_transaction, handler.do, handler.handle_response

    async def new_commit(self: Any) -> None:
        trap.at("commit", "before")
        await commit(self)
        trap.at("answer", "after")

    async def new_do(self: Any, node_id: Any) -> Any:
        sent = asyncio.ensure_future(do(self, node_id))
        if self._commit_result:
            await asyncio.sleep(0)  # it has been written now
            trap.at("commit", "after")
        return await sent

    def new_handle_response(self: Any, response: Any) -> Any:
        if self._commit_result:
            trap.at("answer", "before")
        return handle_response(self, response)

    producer.commit_transaction, handler.do, handler.handle_response = new_commit, new_do, new_handle_response


def set_in_child(trap: Passers) -> None:
    """Wrap the functions of this process, which is a child."""

    def is_checkpoint(path: Path, *_: object) -> bool:
        return path.suffix == ".partial" and path.parent.name == "checkpoints"

    _wrap(Path, "replace", trap, "checkpoint", is_checkpoint)


def _wrap(owner: Any, name: str, trap: Passers, point: str, if_: Callable[..., bool] = lambda *_, **__: True) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        if not if_(*args, **kwargs):
            return function(*args, **kwargs)
        trap.at(point, "before")
        result = function(*args, **kwargs)
        trap.at(point, "after")
        return result

    @wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        if not if_(*args, **kwargs):
            return await function(*args, **kwargs)
        trap.at(point, "before")
        result = await function(*args, **kwargs)
        trap.at(point, "after")
        return result

    setattr(owner, name, awaited if asyncio.iscoroutinefunction(function) else plain)
