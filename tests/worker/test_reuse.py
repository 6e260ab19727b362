"""An identical request is answered by the earlier one's result, where the operator wants that, while it is whole."""

from mistudio_schemas import TrainCompleted
from mistudio_train.settings import Settings
from mistudio_train.worker.store import open_store

from . import jobs
from .bus import events, publish, reading, running_worker
from .test_ends import RESULT, ends, objects_of, request, settings

__all__ = ["settings"]


async def test_the_second_of_two_identical_requests_gets_the_first_ones_result(settings: Settings) -> None:
    reusing = settings.model_copy(update={"reuse_results": True})
    topics = settings.topics
    await publish(reusing, request("job-1", settings))
    async with running_worker(reusing, jobs.is_always_the_same), reading(settings, *ends(settings)) as reader:
        (first,) = events(await reader.of(topics.completed, 1))
        await publish(reusing, request("job-2", settings))
        *_, second = events(await reader.of(topics.completed, 2))
    assert isinstance(first, TrainCompleted)
    assert isinstance(second, TrainCompleted)
    assert (second.job_id, second.run, second.reused_from) == ("job-2", 1, "job-1/1")
    assert (second.artifacts, second.manifest) == (first.artifacts, first.manifest)
    assert objects_of(settings, "job-2") == ["run.json"]
    # one of its objects is gone: it is made again
    open_store(settings).delete([first.artifacts[0].key])
    await publish(reusing, request("job-3", settings))
    async with running_worker(reusing, jobs.is_always_the_same), reading(settings, *ends(settings)) as reader:
        await reader.until(lambda found: any(record.key == b"job-3" for record in found))
    assert objects_of(settings, "job-3") == RESULT


async def test_nothing_is_reused_unless_the_operator_wants_it(settings: Settings) -> None:
    await publish(settings, request("job-1", settings), request("job-2", settings))
    async with running_worker(settings, jobs.is_always_the_same), reading(settings, *ends(settings)) as reader:
        found = events(await reader.of(settings.topics.completed, 2))
    assert {one.reused_from for one in found if isinstance(one, TrainCompleted)} == {None}
    assert not list(open_store(settings).list("results/"))
