"""The servers of the native stack can be broken and mended, and never outlive their owner."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import urllib3

from mistudio_stack import NativeStack, Server, StackError, native_stack

from .servers import create_topic, get, put, read_committed, topics, wait_until_gone, write

OWNER = """
import sys
from pathlib import Path
from mistudio_stack import Server
command = ["/bin/sh", "-c", "echo up; exec tail -f /dev/null"]
server = Server("Thing", command, Path(sys.argv[1]), lambda said: "up" in said)
server.start()
if sys.argv[2] == "released":
    server.release()
print(server.pid, flush=True)
sys.stdin.read()
"""


async def test_kafka_keeps_port_and_records_through_a_kill(native: NativeStack) -> None:
    await create_topic(native, "kept")
    await write(native, "kept", b"before")
    first = native.kafka.pid
    native.kafka.restart()
    assert native.kafka.pid != first
    await write(native, "kept", b"after")
    assert await read_committed(native, "kept", 2) == [b"before", b"after"]


def test_the_store_keeps_its_objects_through_an_orderly_stop(native: NativeStack) -> None:
    put(native, "kept", "key", b"value")
    native.minio.stop()
    native.minio.start()
    assert get(native, "kept", "key") == b"value"


def test_a_paused_server_takes_connections_and_is_silent(native: NativeStack) -> None:
    url = f"http://{native.minio_endpoint}/minio/health/cluster"
    with urllib3.PoolManager(retries=False, timeout=1.0) as http:
        native.minio.pause()
        with pytest.raises(urllib3.exceptions.ReadTimeoutError):
            http.request("GET", url)
        native.minio.resume()
        assert http.request("GET", url, timeout=30.0).status == 200


async def test_two_stacks_side_by_side_share_nothing_and_each_ends_whole(native: NativeStack) -> None:
    with native_stack() as other:
        await create_topic(native, "mine")
        await create_topic(other, "theirs")
        assert "theirs" not in await topics(native)
        assert "mine" not in await topics(other)
        pids = [other.kafka.pid, other.minio.pid]
        data = other.kafka.log.parent
    assert wait_until_gone(pids) == []
    assert not data.exists()
    assert "mine" in await topics(native)


def test_a_server_dies_with_its_owner(tmp_path: Path) -> None:
    assert wait_until_gone([_server_of_a_killed_owner(tmp_path / "log", "owned")]) == []


def test_a_released_server_outlives_its_owner(tmp_path: Path) -> None:
    pid = _server_of_a_killed_owner(tmp_path / "log", "released")
    assert psutil.Process(pid).is_running()
    psutil.Process(pid).kill()
    assert wait_until_gone([pid]) == []


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "echo no such setting; exit 3"]
    server = Server("Thing", command, tmp_path / "log", lambda _said: False)
    with pytest.raises(StackError, match=r"(?s)Thing ended with status 3.*no such setting"):
        server.start()
    with pytest.raises(StackError, match="Thing is not running"):
        server.pause()


def _server_of_a_killed_owner(log: Path, how: str) -> int:
    command = [sys.executable, "-c", OWNER, str(log), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()
    return pid
