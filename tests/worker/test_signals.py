"""A worker as a process: how it ends at a signal, at a second one, and what is left of it when it is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from mistudio_schemas import TrainProgress
from mistudio_train.settings import Settings

from . import jobs
from .bus import events, publish, reading, running_worker
from .test_ends import ends, request, settings

__all__ = ["settings"]


@contextmanager
def process(environment: dict[str, str], job: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.worker.serving", job]
    worker = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate()


@pytest.fixture
def environment(worker_env: dict[str, str]) -> dict[str, str]:
    return worker_env | {"MAX_CONCURRENT_JOBS": "1", "GRACE_SECONDS": "6", "KAFKA_SESSION_TIMEOUT_MS": "6000"}


async def until_it_runs(settings: Settings, phase: str) -> None:
    async with reading(settings, settings.topics.progress) as reader:
        await reader.until(lambda found: any(getattr(one, "phase", None) == phase for one in events(found)))


def ended_in(worker: subprocess.Popen[Any], seconds: float) -> float:
    began = time.monotonic()
    worker.wait(seconds)
    return time.monotonic() - began


@pytest.mark.parametrize("job", ["loading", "training", "counts", "exporting"])
async def test_told_to_stop_it_exits_with_0_within_the_grace_period(
    settings: Settings, environment: dict[str, str], job: str
) -> None:
    await publish(settings, request("job-1", settings))
    with process(environment, job) as worker:
        await until_it_runs(settings, "training" if job == "counts" else job)
        worker.send_signal(signal.SIGTERM)
        ended_in(worker, 6 + 2)
        assert worker.returncode == 0
        assert not any(settings.workspaces.iterdir())
    async with reading(settings, *ends(settings)) as reader:
        assert await reader.drained() == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(
    settings: Settings, environment: dict[str, str], second: signal.Signals
) -> None:
    await publish(settings, request("job-1", settings))
    with process(environment | {"GRACE_SECONDS": "60"}, "training") as worker:
        await until_it_runs(settings, "training")
        children = psutil.Process(worker.pid).children(recursive=True)
        worker.send_signal(signal.SIGTERM)
        assert worker.stderr is not None
        assert any("told to stop" in line for line in worker.stderr)  # reads until it comes
        worker.send_signal(second)
        assert ended_in(worker, 10) < 5
        assert worker.returncode == 128 + second
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


async def test_told_to_stop_while_it_waits_for_kafka_it_exits(environment: dict[str, str]) -> None:
    with process(environment | {"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9"}, "works") as worker:
        assert worker.stderr is not None
        assert any("waiting for Kafka" in line for line in worker.stderr)
        worker.send_signal(signal.SIGTERM)
        ended_in(worker, 5)
        assert worker.returncode == 0


@pytest.mark.parametrize("job", ["loading", "training", "counts", "exporting"])
async def test_killed_it_leaves_no_process_and_another_goes_on(
    settings: Settings, environment: dict[str, str], job: str
) -> None:
    await publish(settings, request("job-1", settings))
    with process(environment, job) as worker:
        await until_it_runs(settings, "training" if job == "counts" else job)
        children = psutil.Process(worker.pid).children(recursive=True)
        assert children
        worker.kill()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    async with running_worker(settings, jobs.counts), reading(settings, settings.topics.progress, *ends(settings)) as r:
        (done,) = events(await r.of(settings.topics.completed, 1))
        assert (done.run, done.attempt) == (1, 2)  # type: ignore[attr-defined]
        assert all(one.run == 1 for one in events(r.records) if isinstance(one, TrainProgress))
