"""Live sinks hold the curves of the training logs; and whatever becomes of them, the job does not care."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mistudio_schemas import TrainCompleted, TrainRequested
from mistudio_train.errors import ChildDied
from mistudio_train.messages import JobSpec, Lease, Logged
from mistudio_train.sae.trainer import Trainer
from mistudio_train.settings import SINK_NAMES, Settings
from mistudio_train.training import reporter
from mistudio_train.training.run import run_job
from mistudio_train.worker.sinks import feeds
from mistudio_train.worker.sinks.feeds import Sinks
from mistudio_train.worker.sinks.sink import Line, Outcome
from tests.models import tiny_model
from tests.training.conftest import Listener

from . import curves, jobs
from .bus import events, publish, reading, request, running_worker

TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds" for number in range(60)]
SAES = [{"kind": "topk", "k": k, "hidden_dim": 64, "batch_size": 128, "name": f"k{k}"} for k in (2, 4)]
SECRET = "hf_very_secret"


class Killed(BaseException):
    """The end of a child, as far as a test in one process can have it."""


@pytest.fixture
def sinks_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of all three, each in a folder of the test's own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    return Settings.model_validate(
        {"sinks": SINK_NAMES, "data_path": tmp_path, "mlflow_tracking_uri": str(tmp_path / "mlruns")}
    )


def spec(folder: Path, **fields: Any) -> JobSpec:
    """A job with a token that nobody may see."""
    asked: dict[str, Any] = {"model_name": str(folder / "model"), "corpus_file": "corpus.txt", "job_id": "job-1"}
    request = TrainRequested.model_validate(asked | fields)
    one = JobSpec(
        "job-1", 1, 1, request, folder / "corpus.txt", folder, Lease(None), "s3://b/p/", 1 << 30, token=SECRET
    )
    return replace(one, tell_log=True, model_folders=(folder,))


@contextlib.asynccontextmanager
async def closed(sinks: Sinks) -> AsyncIterator[Sinks]:
    yield sinks
    await sinks.close(60)


# -- what they hold ---------------------------------------------------------------------------------------------------


async def test_after_a_death_every_sink_holds_the_curves_of_the_training_log(
    sinks_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second SAE's training dies in the middle, before its first checkpoint; another worker goes on."""
    monkeypatch.setattr(reporter, "INTERVAL", 0.0)
    tiny_model("llama", tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    asked = {"pooling": "token", "max_epochs": 3, "layer_number": 1, "max_sequence_length": 16, "saes": SAES}
    one, warned = replace(spec(tmp_path, **asked), checkpoint_seconds=3600.0), list[str]()
    said, again = dies_in_step(18, one), Listener()
    run_job(one, again)
    for heard, error in ((said, ChildDied("it died", "")), (again.heard, None)):
        async with closed(Sinks(sinks_settings.model_copy(update={"sink_close_seconds": 60}))) as sinks:
            with contextlib.suppress(ChildDied), sinks.following(one, warned.append) as followed:
                for message in heard:
                    if isinstance(message, Logged):
                        followed.hear(message)
                if error:
                    raise error
    assert warned == []

    logs = {"k2": one.output / "training_log.jsonl", "k4": one.output / "saes" / "k4" / "training_log.jsonl"}
    expected = curves.of_logs(logs)
    assert {name.split("/")[1] for name in expected} == {"step", "epoch", "held_out"}
    assert len(expected["k4/step/loss"]) > 20
    assert sum(isinstance(message, Logged) and message.sae == "k4" for message in said) > 4, "it had a part of the log"

    assert curves.of_tensorboard(tmp_path / "tensorboard" / "job-1-r1") == curves.single(expected)
    config, newest = curves.of_wandb(tmp_path)
    assert newest == expected
    run, kept = curves.of_mlflow(str(tmp_path / "mlruns"))
    assert run.info.run_name == "job-1-r1"
    assert run.info.status == "FINISHED"
    assert without_seconds(kept) == without_seconds(expected), "what it had is as what it would have got"
    assert {name: [step for step, _ in points] for name, points in kept.items()} == {
        name: [step for step, _ in points] for name, points in expected.items()
    }
    assert (run.data.params["saes.k4.k"], config["saes.k4.k"]) == ("4", 4)
    assert not holds(tmp_path, SECRET.encode())


def holds(folder: Path, secret: bytes) -> bool:
    return any(secret in path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_of_a_log_that_is_taken_back_tensorboard_shows_the_second_try_and_mlflow_what_is_beyond_the_first(
    sinks_settings: Settings, tmp_path: Path
) -> None:
    """As after a divergence: the first line stays, the others come again with other figures, and one more."""
    tries = [[(10, 1.0), (20, 2.0), (30, float("nan"))], [(10, 1.0), (20, 0.5), (30, 0.25), (40, 0.125)]]
    settings = sinks_settings.model_copy(update={"sinks": ("tensorboard", "mlflow"), "sink_close_seconds": 60})
    async with closed(Sinks(settings)) as sinks:
        with sinks.following(spec(tmp_path), pytest.fail) as followed:
            for points in tries:
                for number, (step, loss) in enumerate(points):
                    followed.hear(jobs.log_line("a", number, step, loss))
    assert curves.of_tensorboard(tmp_path / "tensorboard" / "job-1-r1")["a/step/loss"] == tries[1]
    _, kept = curves.of_mlflow(str(tmp_path / "mlruns"))
    assert str(kept["a/step/loss"]) == str([*tries[0], tries[1][3]])


def dies_in_step(number: int, spec: JobSpec) -> list[Any]:
    """What a child says whose training of the second SAE dies in this step; another step saves nothing."""
    parent, real, seen = Listener(), Trainer.step, list[Trainer]()

    def step(trainer: Trainer, x_BD: Any) -> None:
        real(trainer, x_BD)
        if trainer not in seen:
            seen.append(trainer)
        if (len(seen), trainer.steps) == (2, number):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Killed):
            run_job(spec, parent)
    return parent.heard


def without_seconds(of: curves.Curves) -> curves.Curves:
    return {name: points for name, points in of.items() if not name.endswith("/seconds")}


LEAN = """
import asyncio, json, sys
from pathlib import Path
from mistudio_schemas import TrainRequested
from mistudio_train.messages import JobSpec, Lease, Logged
from mistudio_train.settings import Settings
from mistudio_train.worker.sinks.feeds import Sinks

def loaded():
    return sorted({"torch", "transformers", "tensorflow", "tensorboard", "mlflow", "wandb"} & set(sys.modules))

async def main():
    request, here = TrainRequested(model_name="m", corpus_file="c"), Path()
    sinks, spec = Sinks(Settings()), JobSpec("j", 1, 1, request, here, here, Lease(None), "", 1)
    with sinks.following(spec, lambda text: sys.exit(text)) as curves:
        before = loaded()
        curves.hear(Logged("a", 0, ('{"event": "step", "step": 1, "loss": 0.5}',)))
    await sinks.close(60)
    print(json.dumps([before, loaded(), sinks.hang]))

asyncio.run(main())
"""


def test_libraries_are_loaded_when_there_is_a_curve_and_bring_no_torch(tmp_path: Path) -> None:
    asked = {"SINKS": ",".join(SINK_NAMES), "MLFLOW_TRACKING_URI": str(tmp_path / "ml"), "WANDB_MODE": "offline"}
    env = os.environ | asked | {"DATA_PATH": str(tmp_path), "SINK_CLOSE_SECONDS": "60"}
    said = subprocess.run([sys.executable, "-c", LEAN], env=env, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == [[], ["mlflow", "tensorboard", "wandb"], False], said.stderr
    assert said.stderr == ""


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Hangs:
    """A sink that hangs for ever once it has something to show; or nearly."""

    def __init__(self) -> None:
        self.reached, self.freed = threading.Event(), threading.Event()

    def write(self, lines: Sequence[Line]) -> None:
        self.reached.set()
        self.freed.wait()

    def close(self, outcome: Outcome) -> None:
        pass


@pytest.fixture
def hangs() -> Iterator[Hangs]:
    sink = Hangs()
    yield sink
    sink.freed.set()


async def test_a_sink_that_hangs_is_left_behind_with_one_warning(
    hangs: Hangs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, warned = Settings(sinks=("wandb",), sink_close_seconds=0.05), list[str]()
    sinks = Sinks(settings, lambda *_: hangs)
    for job in range(feeds.MOST_HUNG + 1):
        with sinks.following(replace(spec(tmp_path), job_id=f"job-{job}"), warned.append) as followed:
            followed.hear(jobs.log_line("a", 0, 0, 0.5))
            await asyncio.to_thread(hangs.reached.wait)
            for number in range(1, feeds.MOST_WAITING + 3 if job == 0 else 1):
                followed.hear(jobs.log_line("a", number, number, 0.5))
            await asyncio.sleep(0)
        await sinks.close(60)
    assert sinks.hang
    dropped = "the sink wandb is dropped, and the job goes on without it:"
    assert warned == [
        f"{dropped} it does not keep up, 1000 messages wait for it",
        f"{dropped} it hangs since earlier jobs",
    ]
    late = [record.getMessage() for record in caplog.records]
    assert late == [
        f"job job-{job}: {dropped} it does not end; what it has not shown by now may be missing"
        for job in range(1, feeds.MOST_HUNG)
    ]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'mlflow'", name="mlflow"), "mlflow is not installed; pip install"),
        (OSError("http://me:hush@host/ and key-1234 refuse"), "OSError: http://[secret]@host/ and [secret] refuse"),
        (SystemExit("a library ends it all"), "SystemExit: a library ends it all"),
    ],
    ids=["missing", "secret", "exit"],
)
async def test_a_sink_that_cannot_be_opened_says_why_and_no_secret(
    error: BaseException, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key-1234")
    warned: asyncio.Queue[str] = asyncio.Queue()

    def fails(*_: object) -> Any:
        raise error

    with Sinks(Settings(sinks=("mlflow",)), fails).following(spec(tmp_path), warned.put_nowait) as followed:
        followed.hear(jobs.log_line("a", 0, 0, 0.5))
        text = await asyncio.wait_for(warned.get(), 60)
        followed.hear(jobs.log_line("a", 1, 1, 0.5))
    assert says in text
    assert warned.empty()


class MLflowServer:
    """As much of a tracking server as a client needs until its first metrics; they may get an answer, or none ever."""

    def __init__(self, *, answers: bool) -> None:
        self.answers, self.reached, self._freed = answers, threading.Event(), threading.Event()
        replies = {
            "experiments/create": {"experiment_id": "1"},
            "runs/search": {"runs": []},
            "runs/create": {"run": {"info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}},
            "runs/log-batch": {},
        }
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "metrics" in asked:
                    server.reached.set()
                    if not answers:
                        server._freed.wait()
                self._reply(200, replies[self.path.partition("/mlflow/")[2]])

            def do_GET(self) -> None:
                self._reply(404, {"error_code": "ENDPOINT_NOT_FOUND"})

            def _reply(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.uri = f"http://127.0.0.1:{self._http.server_port}"

    def die(self) -> None:
        """Nobody listens there any more."""
        self._http.shutdown()
        self._http.server_close()

    def free(self) -> None:
        self._freed.set()


@pytest.fixture
def mlflow_server(request: pytest.FixtureRequest) -> Iterator[MLflowServer]:
    server = MLflowServer(answers=request.param)
    yield server
    server.free()
    server.die()


@pytest.mark.parametrize("mlflow_server", [True, False], ids=["dies", "hangs"], indirect=True)
async def test_a_job_is_the_same_whatever_becomes_of_its_sinks(
    settings: Settings,
    mlflow_server: MLflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of the job MLflow's server dies, or hangs from then on, and TensorBoard's folder is removed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.mkfifo(tmp_path / "go")
    shown = {"sinks": ("tensorboard", "mlflow"), "mlflow_tracking_uri": mlflow_server.uri, "sink_close_seconds": 0.2}
    without, topics = settings.model_copy(update={"worker_id": "w"}), settings.topics
    async with reading(settings, topics.completed, topics.failed, topics.cancelled) as ends:
        await publish(settings, request("job-1", settings))
        async with running_worker(without, jobs.logs):
            await ends.until(lambda found: len(found) == 1)
        with_sinks = Settings.model_validate(without.model_dump() | shown)
        await publish(settings, request("job-2", settings, model_name=str(tmp_path / "go")))
        async with asyncio.timeout(60), running_worker(with_sinks, jobs.logs):
            assert await asyncio.to_thread(mlflow_server.reached.wait, 30)
            if mlflow_server.answers:
                mlflow_server.die()
            shutil.rmtree(settings.data_path / "tensorboard")
            await asyncio.to_thread((tmp_path / "go").write_text, "go")
            await ends.until(lambda found: len(found) == 2)
        undisturbed, disturbed = events(await ends.drained())
    assert isinstance(undisturbed, TrainCompleted)
    assert isinstance(disturbed, TrainCompleted)
    assert essence(disturbed) == essence(undisturbed)
    said = [record.getMessage() for record in caplog.records if "is dropped" in record.getMessage()]
    assert sorted(text.partition(", and")[0] for text in said) == [
        "job job-2: the sink mlflow is dropped",
        "job job-2: the sink tensorboard is dropped",
    ]
    assert all(f"job job-2: {warning}" in said for warning in disturbed.warnings)


def essence(event: TrainCompleted) -> str:
    """What is not of the moment."""
    moment = {"time", "duration_seconds", "warnings", "manifest"}
    said: str = event.model_copy(update={"job_id": "job-1"}).model_dump_json(exclude=moment)
    return said.replace("job-2", "job-1")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_sinks_are_named_with_commas_and_unknown_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().sinks == ()
    monkeypatch.setenv("SINKS", "tensorboard, wandb")
    assert Settings().sinks == ("tensorboard", "wandb")
    monkeypatch.setenv("SINKS", "tensorbord")
    with pytest.raises(ValidationError, match="'tensorboard', 'mlflow' or 'wandb'"):
        Settings()


def test_their_credentials_are_kept_from_children_and_from_being_printed() -> None:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI"):
        assert Settings.is_secret(name)
    assert "hush" not in repr(Settings.model_validate({"mlflow_tracking_uri": "https://me:hush@host"}))
