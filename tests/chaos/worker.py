"""The ordinary worker as a process that may die at a named point: `python -m tests.chaos.worker`.

Its children leave their process ids in `DATA_PATH/children`, for whoever wants to kill them or to see them gone.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mistudio_train.logs import setup_logging
from mistudio_train.messages import ChildMessage, Finished, JobSpec, Parent, Saved, Wish
from mistudio_train.settings import Settings
from mistudio_train.worker.child_main import train

from . import nursery, points

RETRY_SECONDS = (0.2, 0.5, 1.0)
"""Before a job's next attempt: a job that dies forty times would else wait for most of its life."""


STAGE = "stage"
"""The file in `DATA_PATH` that says where the worker is."""


@dataclass(frozen=True)
class Child:
    """A child's process, which no other can be mistaken for."""

    pid: int
    job_id: str
    created: float

    @property
    def alive(self) -> bool:
        """Whether it runs; one that is dead and waits to be noticed does not."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class CountingParent:
    """The parent, and a line in a file for each checkpoint that it is told of."""

    def __init__(self, parent: Parent, path: Path) -> None:
        self._parent, self._path = parent, path

    def __call__(self, message: ChildMessage, /) -> None:
        self._parent(message)
        if isinstance(message, Saved):
            with self._path.open("a") as file:
                file.write(f"{message.number}\n")

    @property
    def wish(self) -> Wish | None:
        return self._parent.wish


def job(spec: JobSpec, parent: Parent) -> Finished:
    """The real work, by a child that can be found."""
    data_path = spec.workspace.parents[2]
    for folder in ("children", "saved"):
        (data_path / folder).mkdir(exist_ok=True)
    pid = os.getpid()
    (data_path / "children" / f"{pid}.json").write_text(
        json.dumps({"pid": pid, "job_id": spec.job_id, "created": psutil.Process().create_time()})
    )
    points.set_in_child(points.Passers(points.Trapper(data_path)))
    return train(spec, CountingParent(parent, data_path / "saved" / spec.job_id))


def end_with_the_driver() -> None:
    """Whoever has started this worker holds the other end of its stdin, and never writes."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Serve until told to stop, or killed."""
    threading.Thread(target=end_with_the_driver, daemon=True).start()
    settings = Settings()
    setup_logging(settings.logging)
    from mistudio_train.worker import app, runner

    if nursery.ADDRESS in os.environ:
        nursery.use(os.environ[nursery.ADDRESS])
    settings.data_path.mkdir(parents=True, exist_ok=True)
    stage = points.Stage(settings.data_path / STAGE)
    points.set_in_worker(points.Passers(stage, points.Trapper(settings.data_path)))
    vars(runner)["BACKOFF_SECONDS"] = RETRY_SECONDS
    options: dict[str, Any] = {"host": settings.api_host, "port": settings.api_port, "log_config": None}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(app.build_app(settings, job).run(log_level=30, run_extra_options=options))


def children_of(data_path: Path) -> list[Child]:
    """Every child that a worker with this folder has now."""
    children = []
    for path in (data_path / "children").glob("*.json"):
        with suppress(ValueError, OSError):  # it is just being written
            children.append(Child(**json.loads(path.read_text())))
    return [child for child in children if child.alive]


if __name__ == "__main__":
    main()
