"""The store or the broker away in the middle of a job: it waits, goes on, and ends once with all its files."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest
from minio import Minio
from pydantic import SecretStr

from mistudio_stack import NativeStack, native_stack
from mistudio_train.settings import Settings
from mistudio_train.worker.app import prepare_outside
from mistudio_train.worker.store import open_store

from .bus import publish
from .outages import BROKER_MOMENTS, STORE_MOMENTS, Moment, Proxy, away, job_through, lay_corpus, refusal
from .test_ends import request
from .test_signals import environment, process, until_it_runs

pytestmark = pytest.mark.chaos

__all__ = ["environment"]

SECONDS = 3.0
PATIENCE = 90.0


@pytest.fixture(scope="module")
def stack() -> Iterator[NativeStack]:
    """Native whatever the other tests use: only such servers can be broken."""
    with native_stack() as opened:
        yield opened


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    lay_corpus(settings, tmp_path)
    return settings.model_copy(update={"max_concurrent_jobs": 1, "grace_seconds": 2.0})


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("moment", STORE_MOMENTS)
async def test_a_store_that_is_away_is_waited_for(
    stack: NativeStack,
    settings: Settings,
    moment: Moment,
    how: Literal["killed", "paused"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited = await job_through(moment, away(stack.minio, how, SECONDS), settings, PATIENCE)
    assert waited.done.attempt == 1
    if how == "killed":
        assert any(
            said in caplog.text for said in ("the store does not answer, trying again", "is not in the store yet")
        )


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("moment", BROKER_MOMENTS)
async def test_a_broker_that_is_away_is_waited_for(
    stack: NativeStack, settings: Settings, moment: Moment, how: Literal["killed", "paused"]
) -> None:
    waited = await job_through(moment, away(stack.kafka, how, SECONDS), settings, PATIENCE)
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


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refusal("503 Slow Down", "SlowDown"), "SlowDown"),
        (refusal("403 Forbidden", "AccessDenied"), "AccessDenied"),
        (refusal("403 Forbidden", "RequestTimeTooSkewed"), "RequestTimeTooSkewed"),
        (refusal("507 Insufficient Storage", "XMinioStorageFull"), "XMinioStorageFull"),
    ],
    ids=["too busy", "no permission", "clocks apart", "full"],
)
@pytest.mark.parametrize("moment", ["upload", "swap"])
async def test_a_store_that_refuses_is_asked_again_and_the_reason_is_said(
    settings: Settings, proxy: Proxy, moment: Moment, answer: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    behind = settings.model_copy(update={"minio_endpoint": proxy.address})
    loop = asyncio.get_running_loop()

    def refuse() -> None:
        proxy.answer = answer
        loop.call_soon_threadsafe(loop.call_later, SECONDS, setattr, proxy, "answer", None)

    waited = await job_through(moment, refuse, behind, PATIENCE)
    assert proxy.refusals
    assert waited.done.attempt == 1
    assert said in caplog.text


async def test_a_bucket_that_is_gone_is_waited_for_and_the_job_begins_again(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lose() -> None:
        store = open_store(settings)
        for found in list(store.list("")):
            store.delete([found.key])
        client = Minio(
            settings.minio_endpoint,
            settings.minio_access_key.get_secret_value() if settings.minio_access_key else None,
            settings.minio_secret_key.get_secret_value(),
            secure=settings.minio_secure,
        )
        client.remove_bucket(settings.minio_bucket)
        threading.Timer(SECONDS, lay_corpus, (settings, tmp_path)).start()

    waited = await job_through("upload", lose, settings, PATIENCE)
    assert "NoSuchBucket" in caplog.text
    assert waited.done.status == "completed"


@pytest.mark.parametrize("days", [3, -3])
async def test_a_clock_that_jumps_changes_nothing(settings: Settings, days: int) -> None:
    true_time = time.time

    def jump() -> None:
        time.time = lambda: true_time() + days * 86_400

    try:
        waited = await job_through("checkpoint", jump, settings, PATIENCE)
    finally:
        time.time = true_time
    assert waited.done.attempt == 1


async def test_a_worker_with_the_wrong_key_says_what_to_do_and_waits(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = settings.model_copy(update={"minio_secret_key": SecretStr("not the right one")})
    store = open_store(wrong)
    preparing = asyncio.create_task(prepare_outside(wrong, store))
    async with asyncio.timeout(30):
        while "waiting for Kafka and the store" not in caplog.text:  # noqa: ASYNC110 - the log tells nobody
            await asyncio.sleep(0.05)
    preparing.cancel()
    await asyncio.gather(preparing, return_exceptions=True)
    store.close()
    assert "MINIO_SECRET_KEY" in caplog.text
    assert "not the right one" not in caplog.text


async def test_told_to_stop_while_the_store_hangs_it_exits_in_time(
    stack: NativeStack, settings: Settings, environment: dict[str, str]
) -> None:
    await publish(settings, request("job-1", settings))
    with process(environment, "training") as worker:
        await until_it_runs(settings, "training")
        stack.minio.pause()
        try:
            began = time.monotonic()
            worker.send_signal(signal.SIGTERM)
            await asyncio.to_thread(worker.wait, 60)
            assert time.monotonic() - began < 6 + 3
        finally:
            stack.minio.resume()
    assert worker.returncode == 0
