"""`cancel` and `stop` tell the workers, name the run that is meant, and never wait for a run nobody thought of."""

import getpass
import json

import pytest

from mistudio_schemas import TrainCancelled, TrainCompleted, TrainControl, TrainFailed, TrainProgress
from mistudio_train.settings import Settings
from tests.cli.conftest import Cli, running_command
from tests.cli.events import cancelled, completed, failed, running
from tests.cli.topics import publish, read_all


def queued(job_id: str) -> TrainProgress:
    return TrainProgress(job_id=job_id, status="queued", message="waiting for a worker")


def controls(settings: Settings) -> list[TrainControl]:
    return [TrainControl.from_json(record.value) for record in read_all(settings, settings.topics.control)]


def latest(settings: Settings) -> TrainProgress:
    return TrainProgress.from_json(read_all(settings, settings.topics.progress)[-1].value)


@pytest.mark.parametrize("action", ["cancel", "stop"])
def test_a_running_job_s_run_is_named_and_its_worker_speaks(action: str, cli: Cli, settings: Settings) -> None:
    publish(settings, running("another", run=7), running("j", run=1), failed("j", run=1), running("j", run=2))
    ended = cli(action, "j", "--reason", "wrong layer", "--by", "ada", "--json")
    assert ended.status == 0, ended.err
    [record] = read_all(settings, settings.topics.control)
    assert (record.key, record.headers["ce_type"]) == (b"j", "mistudio.train.control.v1")
    control = TrainControl.from_json(record.value)
    assert (control.job_id, control.run, control.action) == ("j", 2, action)
    assert (control.reason, control.requested_by) == ("wrong layer", "ada")
    assert TrainControl.from_json(ended.out.encode()) == control
    assert "j run 2" in ended.err
    assert latest(settings).status == "running"


def test_cancelling_a_queued_job_is_acknowledged_here(cli: Cli, settings: Settings) -> None:
    publish(settings, failed("j"), waits := queued("j"))
    ended = cli("cancel", "j", "--by", "ada")
    assert (ended.status, ended.out) == (0, "")
    [control] = controls(settings)
    assert control.run is None
    status = latest(settings)
    assert (status.status, status.phase, status.run, status.time) == ("cancelling", "queued", None, waits.time)
    assert status.message == "ada has asked to cancel it"
    again = cli("cancel", "j")
    assert again.status == 0
    assert "already" in again.err
    assert len(controls(settings)) == 1
    assert cli("cancel", "j", "--force").status == 0
    assert len(controls(settings)) == 2


def test_stopping_a_queued_job_leaves_its_status(cli: Cli, settings: Settings) -> None:
    publish(settings, queued("j"))
    assert cli("stop", "j").status == 0
    assert latest(settings).status == "queued"


@pytest.mark.parametrize("end", [completed("j"), failed("j"), cancelled("j")])
def test_a_job_that_has_ended_is_left_alone(
    end: TrainCompleted | TrainFailed | TrainCancelled, cli: Cli, settings: Settings
) -> None:
    publish(settings, running("j"), end)
    ended = cli("cancel", "j")
    assert (ended.status, ended.out) == (2, "")
    assert "j has ended: run 1 is" in ended.err
    assert "--force" in ended.err
    assert controls(settings) == []
    assert cli("cancel", "j", "--run", "2").status == 0
    assert cli("cancel", "j", "--force").status == 0
    assert [control.run for control in controls(settings)] == [2, None]


def test_a_control_can_be_earlier_than_its_job(cli: Cli, settings: Settings) -> None:
    ended = cli("cancel", "j")
    assert ended.status == 0
    assert "Nobody has heard of j yet; the control waits for it." in ended.err
    [control] = controls(settings)
    assert control.run is None
    assert (control.requested_by or "").startswith(f"{getpass.getuser()}@")
    assert read_all(settings, settings.topics.progress) == []


def test_a_user_without_a_name_can_cancel(cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert cli("stop", "j").status == 0
    assert (controls(settings)[0].requested_by or "").startswith("somebody@")


def test_wait_watches_the_job_to_its_end(settings: Settings, process_env: dict[str, str]) -> None:
    publish(settings, queued("j"))
    with running_command(process_env, "cancel", "j", "--wait", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["action"] == "cancel"
        assert json.loads(process.stdout.readline())["status"] == "cancelling"
        publish(settings, cancelled("j"))
        assert json.loads(process.stdout.readline())["requested_by"] == "ada"
        assert process.wait(30) == 3


def test_no_job_s_id(cli: Cli) -> None:
    ended = cli("cancel", "../j")
    assert (ended.status, ended.out) == (2, "")
    assert "is no job's id" in ended.err
