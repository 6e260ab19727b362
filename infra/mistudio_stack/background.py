"""A stack that outlives the command that started it: `up` starts and records it, `down` ends just what is recorded.

All it knows lies in one folder (`.stack`): `env` for shells, `state.json` for `down`, the servers' data and logs.
"""

import fcntl
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from . import containers, external, native
from .choose import chosen_backend
from .stack import Backend, Stack

CLOCK_SECONDS = 2.0
"""A start time is read from the system's clock, which may have been set since."""


@dataclass(frozen=True)
class Started:
    """What `up` has started. A process is its id and its start time: an id alone may be another's by now."""

    backend: Backend
    processes: dict[str, tuple[int, float]] = field(default_factory=dict)
    containers: list[str] = field(default_factory=list)


def up(folder: Path, backend: Backend | None = None) -> tuple[dict[str, str], bool]:
    """Start a stack, unless the one recorded in `folder` is up; gives its environment, and whether it is new.

    Raises:
        StackError: if it cannot be started; nothing is left running then.

    """
    with _only_one(folder):
        if (started := _recorded(folder)) and _is_up(started):
            return _read_env(folder), False
        _clear(folder)
        with ExitStack() as servers:
            stack, started = _start(folder, backend or chosen_backend(), servers)
            _write(folder, stack, started)
            if isinstance(stack, native.NativeStack):
                stack.kafka.release()
                stack.minio.release()
            servers.pop_all()
        return stack.env(), True


def down(folder: Path) -> bool:
    """End what `up` has started in `folder`, and delete its data; says whether there was anything."""
    with _only_one(folder):
        found = _recorded(folder) is not None
        _clear(folder)
        return found


def _start(folder: Path, backend: Backend, servers: ExitStack) -> tuple[Stack, Started]:
    match backend:
        case "external":
            return external.external_stack(), Started(backend)
        case "docker":
            stack, ids = containers.start(servers, outlive=True)
            return stack, Started(backend, containers=ids)
        case "native":
            data = folder.absolute() / "data"
            data.mkdir()
            native_stack = native.start(data, servers)
            pids = {"kafka": native_stack.kafka.pid, "minio": native_stack.minio.pid}
            processes = {name: (pid, psutil.Process(pid).create_time()) for name, pid in pids.items()}
            return native_stack, Started(backend, processes=processes)


def _is_up(started: Started) -> bool:
    if started.backend == "external":
        return False  # Nothing of ours runs; looking again is cheap.
    processes = (_process(*process) is not None for process in started.processes.values())
    return all(processes) and all(containers.is_running(container) for container in started.containers)


def _clear(folder: Path) -> None:
    """End what is recorded, then forget it."""
    if started := _recorded(folder):
        for process in started.processes.values():
            _end(*process)
        for container in started.containers:
            containers.remove(container)
    for name in ("state.json", "env"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "data", ignore_errors=True)


def _end(pid: int, start_time: float) -> None:
    if process := _process(pid, start_time):
        process.kill()  # Its data is deleted next, so there is nothing that an orderly end would save.
        process.wait()


def _process(pid: int, start_time: float) -> psutil.Process | None:
    """The process that had this id when it started at this time, if it still runs."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - start_time) < CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return None
    return process if same and process.status() != psutil.STATUS_ZOMBIE else None


def _recorded(folder: Path) -> Started | None:
    state = folder / "state.json"
    return Started(**json.loads(state.read_text())) if state.exists() else None


def _write(folder: Path, stack: Stack, started: Started) -> None:
    env = folder / "env"
    env.touch(mode=0o600)
    env.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in stack.env().items()))
    (folder / "state.json").write_text(json.dumps(asdict(started), indent=2) + "\n")


def _read_env(folder: Path) -> dict[str, str]:
    assignments = shlex.split((folder / "env").read_text())
    return dict(assignment.split("=", 1) for assignment in assignments)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing((folder / "lock").open("w")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
