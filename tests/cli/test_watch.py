"""`watch` ends as the job does, and `jobs` lists what was said last."""

import json

import pytest

from mistudio_schemas import KafkaRecord, TrainCancelled, TrainCompleted, TrainFailed, TrainProgress
from mistudio_train.settings import Settings
from tests.cli.conftest import Cli, running_command
from tests.cli.events import cancelled, completed, failed, running
from tests.cli.topics import publish, send


def queued(job_id: str) -> TrainProgress:
    return TrainProgress(job_id=job_id, status="queued", message="waiting for a worker")


def test_watch_follows_a_job_that_nobody_has_heard_of_to_its_end(
    settings: Settings, process_env: dict[str, str]
) -> None:
    publish(settings, running("another"), completed("another"))
    with running_command(process_env, "watch", "j", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "Nobody has heard of j yet; waiting for it.\n"
        publish(settings, queued("j"))
        assert json.loads(process.stdout.readline())["status"] == "queued"
        publish(settings, running("another", step=11), running("j"))
        assert json.loads(process.stdout.readline())["step"] == 10
        publish(settings, failed("another"), completed("j"))
        assert json.loads(process.stdout.readline())["model_path"] == "s3://b/sae_model.pt"
        assert process.wait(30) == 0
        assert process.stdout.read() == ""


@pytest.mark.parametrize(("end", "status"), [(completed("j"), 0), (failed("j"), 1), (cancelled("j"), 3)])
def test_the_exit_status_tells_how_the_job_ended(
    end: TrainCompleted | TrainFailed | TrainCancelled, status: int, cli: Cli, settings: Settings
) -> None:
    publish(settings, queued("j"), running("j"), end)
    ended = cli("watch", "j", "--json")
    assert ended.status == status
    [line] = ended.out.splitlines()
    assert json.loads(line)["status"] == end.status


def test_a_completed_job_shows_its_saes(cli: Cli, settings: Settings) -> None:
    publish(settings, running("j"), completed("j"))
    ended = cli("watch", "j")
    assert "j run 1 is completed in 0:01:30 on cpu." in ended.err
    row = ended.out.splitlines()[1].split()
    assert row == [
        "standard-0",
        "6",
        "resid_post",
        "1024",
        "50",
        "0.125",
        "32",
        "0.0625",
        "-",
        "-",
        "s3://b/jobs/j/runs/1/a1/",
    ]


def test_a_failed_job_shows_why_and_what_to_do(cli: Cli, settings: Settings) -> None:
    publish(settings, failed("j"))
    ended = cli("watch", "j")
    assert ended.out == ""
    assert "there is no corpus stories.txt (corpus.not_found)" in ended.err
    assert "Put it with `mistudio-train corpus put`." in ended.err


def test_an_earlier_run_s_end_does_not_end_the_newest(cli: Cli, settings: Settings) -> None:
    publish(settings, running("j"), failed("j"), running("j", run=2))
    assert cli("watch", "j", "--timeout", "2").status == 4
    assert cli("watch", "j", "--run", "1").status == 1
    publish(settings, completed("j", run=2))
    assert cli("watch", "j").status == 0


def test_a_job_submitted_again_is_waited_for(cli: Cli, settings: Settings) -> None:
    publish(settings, running("j"), failed("j"))
    publish(settings, queued("j"))
    ended = cli("watch", "j", "--timeout", "2", "--json")
    assert ended.status == 4
    assert [json.loads(line)["status"] for line in ended.out.splitlines()] == ["queued"]


def test_records_that_are_no_status_are_passed_over(cli: Cli, settings: Settings) -> None:
    progress = settings.topics.progress
    send(settings, [KafkaRecord(progress, b"j", b"\xff", []), KafkaRecord(progress, b"gone", None, [])])
    publish(settings, cancelled("j"))
    assert cli("watch", "j").status == 3
    assert json.loads(cli("jobs", "--json").out) == []


def test_jobs_lists_the_latest_status_of_each(cli: Cli, settings: Settings) -> None:
    publish(settings, queued("one"), running("one"), queued("two"))
    publish(settings, running("one", step=99))
    listed = {job["job_id"]: job for job in json.loads(cli("jobs", "--json").out)}
    assert {name: (job["status"], job["step"]) for name, job in listed.items()} == {
        "one": ("running", 99),
        "two": ("queued", None),
    }
    table = cli("jobs").out
    assert "50%" in table
    assert "waiting for a worker" in table


def test_jobs_knows_of_an_end_whose_worker_died_before_it_said_so(cli: Cli, settings: Settings) -> None:
    publish(settings, running("one"), completed("one"), running("two"), completed("two"), running("two", run=2))
    listed = {job["job_id"]: job for job in json.loads(cli("jobs", "--json").out)}
    assert {name: (job["status"], job["phase"], job["run"]) for name, job in listed.items()} == {
        "one": ("completed", "ended", 1),
        "two": ("running", "training", 2),
    }


def test_no_jobs(cli: Cli, settings: Settings) -> None:
    ended = cli("jobs")
    assert (ended.status, ended.out) == (0, "")
    assert "No job has said anything" in ended.err
