"""The store or the broker away in the middle of a job: it waits, goes on, and ends once with all its files."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from mistudio_stack import NativeStack, Stack
from mistudio_train.settings import Settings

from .bus import publish
from .outages import BROKER_MOMENTS, STORE_MOMENTS, Moment, Proxy, away, job_through, lay_corpus
from .test_ends import request
from .test_signals import environment, process, until_it_runs

pytestmark = pytest.mark.chaos

__all__ = ["environment"]

SECONDS = 3.0
PATIENCE = 90.0


@pytest.fixture
def native(stack: Stack) -> NativeStack:
    if not isinstance(stack, NativeStack):
        pytest.skip("only the native stack's servers can be broken")
    return stack


@pytest.fixture
def settings(worker_settings: Settings, tmp_path: Path) -> Settings:
    samples = worker_settings.data_path / "samples"
    samples.mkdir(parents=True)
    (samples / "corpus.txt").write_text("one\ntwo\nthree\n")
    lay_corpus(worker_settings, tmp_path)
    return worker_settings.model_copy(update={"max_concurrent_jobs": 1, "grace_seconds": 2.0})


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("moment", STORE_MOMENTS)
async def test_a_store_that_is_away_is_waited_for(
    native: NativeStack,
    settings: Settings,
    moment: Moment,
    how: Literal["killed", "paused"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited = await job_through(moment, away(native.minio, how, SECONDS), settings, PATIENCE)
    assert waited.done.attempt == 1
    if how == "killed":
        assert any(
            said in caplog.text for said in ("the store does not answer, trying again", "is not in the store yet")
        )


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("moment", BROKER_MOMENTS)
async def test_a_broker_that_is_away_is_waited_for(
    native: NativeStack, settings: Settings, moment: Moment, how: Literal["killed", "paused"]
) -> None:
    waited = await job_through(moment, away(native.kafka, how, SECONDS), settings, PATIENCE)
    assert waited.done.run == 1


@pytest.fixture
async def proxy(settings: Settings) -> AsyncIterator[Proxy]:
    async with Proxy(settings.minio_endpoint).running() as running:
        yield running


async def test_an_upload_whose_connection_is_cut_is_made_again(settings: Settings, proxy: Proxy) -> None:
    behind = settings.model_copy(update={"minio_endpoint": proxy.address})
    loop = asyncio.get_running_loop()

    def cut() -> None:
        proxy.cut_after = 10_000_000
        loop.call_soon_threadsafe(loop.call_later, SECONDS, setattr, proxy, "cut_after", None)

    await job_through("upload", cut, behind, PATIENCE)
    assert proxy.cuts


@pytest.mark.parametrize("moment", ["upload", "swap"])
async def test_a_store_that_is_too_busy_is_asked_again(settings: Settings, proxy: Proxy, moment: Moment) -> None:
    behind = settings.model_copy(update={"minio_endpoint": proxy.address})
    loop = asyncio.get_running_loop()

    def busy() -> None:
        proxy.busy = True
        loop.call_soon_threadsafe(loop.call_later, SECONDS, setattr, proxy, "busy", False)

    await job_through(moment, busy, behind, PATIENCE)
    assert proxy.refusals


async def test_told_to_stop_while_the_store_hangs_it_exits_in_time(
    native: NativeStack, settings: Settings, environment: dict[str, str]
) -> None:
    await publish(settings, request("job-1", settings))
    with process(environment, "training") as worker:
        await until_it_runs(settings, "training")
        native.minio.pause()
        try:
            began = time.monotonic()
            worker.send_signal(signal.SIGTERM)
            await asyncio.to_thread(worker.wait, 60)
            assert time.monotonic() - began < 6 + 3
        finally:
            native.minio.resume()
    assert worker.returncode == 0
