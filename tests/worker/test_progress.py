"""Progress: what is true of a former attempt is not said of the next, and the last word is not lost to one failure."""

import asyncio
import time

import pytest

from mistudio_schemas import TrainProgress
from mistudio_train.messages import Progress, Warned
from mistudio_train.worker import progress
from mistudio_train.worker.progress import ProgressFeed


class Topic:
    """Takes events; the first `failures` are refused."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.events: list[TrainProgress] = []

    async def publish(self, event: TrainProgress) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the broker is away")
        self.events.append(event)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MIN_INTERVAL", 0.0)
    monkeypatch.setattr(progress, "RETRY_INTERVAL", 0.0)


def feed_of(topic: Topic) -> ProgressFeed:
    first = TrainProgress(
        job_id="job-1", run=1, attempt=1, status="running", phase="accepting", message="taken", unknown_fields=["x"]
    )
    return ProgressFeed(topic.publish, first)


async def test_a_new_attempt_begins_with_nothing_that_the_former_child_said() -> None:
    topic = Topic()
    feed = feed_of(topic)
    feed.hear(Progress("training", "half way", 0.5, current_loss=1.0, step=5, current_epoch=2))
    feed.hear(Warned("something"))
    feed.begin_again(2)
    now = feed.current
    assert (now.attempt, now.phase, now.progress, now.warnings, now.unknown_fields) == (2, "accepting", 0.0, [], [])
    assert (now.current_loss, now.step, now.current_epoch) == (None, None, 0)
    await feed.close(status="failed")


async def test_the_last_word_is_said_again_until_it_is_published() -> None:
    topic = Topic()
    feed = feed_of(topic)
    while not topic.events:  # noqa: ASYNC110 - the feed speaks by itself
        await asyncio.sleep(0)
    topic.failures = 2
    await feed.close(phase="ended", status="completed")
    assert (topic.events[-1].phase, topic.events[-1].status) == ("ended", "completed")


async def test_the_last_word_waits_for_no_second_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MIN_INTERVAL", 60.0)
    topic = Topic()
    feed = feed_of(topic)
    while not topic.events:  # noqa: ASYNC110 - the feed speaks by itself
        await asyncio.sleep(0)
    feed.say(message="never said by itself")
    async with asyncio.timeout(1):
        await feed.close(status="failed")
    assert [one.status for one in topic.events] == ["running", "failed"]


async def test_a_topic_that_is_gone_does_not_hold_up_the_end() -> None:
    topic = Topic(failures=1000)
    await feed_of(topic).close(status="completed")
    assert topic.events == []


async def test_warnings_have_bounds() -> None:
    feed = feed_of(Topic())
    for number in range(200):
        feed.hear(Warned(f"{number} " + "x" * 10_000))
    assert len(feed.current.warnings) == progress.WARNINGS
    assert feed.current.warnings[-1].startswith("199 ")
    assert len(feed.current.to_json()) < 1_000_000
    await feed.close(status="failed")


@pytest.mark.parametrize("ours", [True, False])
async def test_after_a_long_silence_it_speaks_only_if_the_run_is_still_ours(ours: bool) -> None:
    topic = Topic()

    async def is_ours() -> bool:
        return ours

    first = TrainProgress(job_id="job-1", run=1, attempt=1, status="running", phase="accepting", message="taken")
    feed = ProgressFeed(topic.publish, first, is_ours, 0.05)
    while not topic.events:  # noqa: ASYNC110 - the feed speaks by itself
        await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - this process stands still
    await feed.close(phase="ended", status="completed")
    assert (topic.events[-1].phase == "ended") is ours
