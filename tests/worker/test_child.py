"""Real child processes that work, hang, die and lie; and a parent that dies."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mistudio_schemas import ErrorCode, TrainRequested
from mistudio_train.errors import ChildDied, ChildStalled
from mistudio_train.messages import ChildMessage, Failed, Finished, JobSpec, Lease, Progress
from mistudio_train.worker.child import Child
from mistudio_train.worker.child_main import Job

from . import jobs

TOKEN = "hf_very_secret_token"


def spec(folder: Path) -> JobSpec:
    request = TrainRequested(job_id="job-1", model_name="m", corpus_file="c.txt")
    return JobSpec("job-1", 1, 1, request, folder / "c.txt", folder, Lease(None), "s3://b/p/", 1 << 30, token=TOKEN)


async def said(job: Job, folder: Path, stall: float = 60.0) -> tuple[list[ChildMessage], Child]:
    child = Child(spec(folder), stall, stall, job)
    async with child:
        messages = [message async for message in child.messages()]
    return messages, child


async def test_messages_arrive_in_order_and_end_with_the_last_word(tmp_path: Path) -> None:
    messages, _ = await said(jobs.works, tmp_path)
    assert [type(message) for message in messages] == [Progress, Finished]
    assert (tmp_path / "output" / "metadata.json").read_bytes() == b"metadata.json"


async def test_a_refusal_keeps_its_code_and_hint(tmp_path: Path) -> None:
    messages, _ = await said(jobs.refuses, tmp_path)
    expected = Failed(ErrorCode.CORPUS_UNREADABLE, "line 3 is no UTF-8", "Save the file as UTF-8.", False)
    assert messages == [expected]


async def test_an_unexpected_error_becomes_an_internal_failure_with_its_traceback(tmp_path: Path) -> None:
    messages, _ = await said(jobs.raises, tmp_path)
    (failed,) = messages
    assert isinstance(failed, Failed)
    assert failed.code is ErrorCode.INTERNAL
    assert any("in raises" in line for line in failed.traceback)


async def test_a_killed_child_is_named_by_its_signal_and_its_last_line_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ChildDied, match="SIGKILL") as caught:
        await said(jobs.killed, tmp_path)
    assert caught.value.retryable
    assert caught.value.traceback[-1] == "the last line before the end"


async def test_a_child_that_exits_without_a_word_has_died(tmp_path: Path) -> None:
    with pytest.raises(ChildDied, match="status 3"):
        await said(jobs.exits, tmp_path)


async def test_what_a_dead_child_has_started_dies_with_it_and_holds_nothing_up(tmp_path: Path) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(ChildDied, match="status 4"):
            await said(jobs.leaves_another_behind, tmp_path)


@pytest.mark.parametrize("job", [jobs.hangs, jobs.murmurs])
async def test_a_child_that_does_not_move_is_ended(job: Job, tmp_path: Path) -> None:
    child = Child(spec(tmp_path), 1.0, 60.0, job)
    async with child:
        process = psutil.Process(child.pid)
        with pytest.raises(ChildStalled, match="has not moved for 1 s"):
            async for _ in child.messages():
                pass
    assert not process.is_running()


async def test_the_token_is_in_no_line_of_the_child(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, child = await said(jobs.shows_token, tmp_path)
    assert list(child.stderr) == ["token=[secret]"]
    assert TOKEN not in "".join(capfd.readouterr())


async def test_the_parents_credentials_are_not_in_the_childs_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("MINIO_SECRET_KEY", "MINIO_ACCESS_KEY", "KAFKA_SASL_PASSWORD", "HF_TOKEN", "HF_TOKEN_TEAM")
    for name in (*secrets, "MINIO_ENDPOINT"):
        monkeypatch.setenv(name, "value")
    (said_so, _), _ = await said(jobs.shows_environment, tmp_path)
    assert isinstance(said_so, Progress)
    assert not set(secrets) & set(said_so.message.split())
    assert "MINIO_ENDPOINT" in said_so.message.split()


def parent_of_an_immortal(folder: str) -> None:
    """Runs in a process of its own, which the test kills."""
    import asyncio

    async def run() -> None:
        async with Child(spec(Path(folder)), 60, 60, jobs.outlives) as child:
            async for message in child.messages():
                print(getattr(message, "message", ""), flush=True)

    asyncio.run(run())


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = f"from tests.worker.test_child import parent_of_an_immortal as p; p({str(tmp_path)!r})"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=5)[1] == []
