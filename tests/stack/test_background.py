"""`up` leaves a stack running for any shell, `down` ends it and nothing else."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mistudio_stack import Backend, Stack, background

from .servers import create_topic, topics, wait_until_gone

PRINT_ENV = 'set -a; . "$0"; exec env'


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a stack may be recorded; whatever a test leaves up there is ended."""
    yield tmp_path / ".stack"
    background.down(tmp_path / ".stack")


def _run(command: str, folder: Path, backend: Backend = "native") -> str:
    module = [sys.executable, "-m", "mistudio_stack", command, "--folder", str(folder), "--backend", backend]
    result = subprocess.run(module, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _pids(folder: Path) -> dict[str, int]:
    processes = json.loads((folder / "state.json").read_text())["processes"]
    return {name: pid for name, (pid, _start) in processes.items()}


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _sourced(folder: Path) -> Stack:
    """The stack as a shell sees it that has sourced the file."""
    shell = subprocess.run(
        ["/bin/sh", "-c", PRINT_ENV, str(folder / "env")], capture_output=True, text=True, check=True, env={}
    )
    env = dict(line.split("=", 1) for line in shell.stdout.splitlines())
    return Stack(
        backend="external",
        bootstrap_servers=env["KAFKA_BOOTSTRAP_SERVERS"],
        minio_endpoint=env["MINIO_ENDPOINT"],
        access_key=env["MINIO_ACCESS_KEY"],
        secret_key=env["MINIO_SECRET_KEY"],
    )


async def test_up_twice_is_one_stack_a_dead_one_is_replaced_and_down_leaves_no_process(folder: Path) -> None:
    said = _run("up", folder)
    assert "The stack is up" in said
    stack = _sourced(folder)
    assert f"KAFKA_BOOTSTRAP_SERVERS={stack.bootstrap_servers}" in said
    await create_topic(stack, "here")

    assert "was already up" in _run("up", folder)
    assert _sourced(folder) == stack
    assert await topics(stack) == {"here"}

    first = _pids(folder)
    psutil.Process(first["kafka"]).kill()
    assert wait_until_gone([first["kafka"]]) == []
    assert "The stack is up" in _run("up", folder)
    assert await topics(_sourced(folder)) == set()
    assert wait_until_gone(first.values(), 0) == []

    second = _pids(folder)
    assert len(second) == 2
    assert "Stack ended" in _run("down", folder)
    assert wait_until_gone(second.values(), 0) == []
    assert _names(folder) == ["lock"]
    assert "No stack was up" in _run("down", folder)


def test_down_leaves_alone_a_process_that_only_has_the_same_id(folder: Path) -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as bystander:
        started = psutil.Process(bystander.pid).create_time() - 3600
        folder.mkdir()
        state = {"backend": "native", "processes": {"kafka": [bystander.pid, started]}, "containers": []}
        (folder / "state.json").write_text(json.dumps(state))
        assert background.down(folder)
        assert bystander.poll() is None
        bystander.communicate(b"")
    assert bystander.returncode == 0


@pytest.mark.containers
async def test_containers_stay_up_and_are_removed(folder: Path) -> None:
    _run("up", folder, "docker")
    await create_topic(_sourced(folder), "here")
    assert "was already up" in _run("up", folder, "docker")
    assert await topics(_sourced(folder)) == {"here"}
    assert "Stack ended" in _run("down", folder, "docker")
    assert "No stack was up" in _run("down", folder, "docker")
