"""What a child may do to its parent, each a job in a few lines, run by real child processes."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from mistudio_schemas import CorpusInfo, ModelInfo, Phase, SAEMetrics, SAEResult
from mistudio_train.errors import CorpusRefused
from mistudio_train.messages import (
    ChildMessage,
    DatasetFound,
    Finished,
    Identified,
    JobSpec,
    LeftEarly,
    Logged,
    Parent,
    Progress,
    Saved,
)
from mistudio_train.worker.child_main import Job, train

Send = Callable[[ChildMessage], None]


def finished() -> Finished:
    metrics = SAEMetrics(
        final_loss=0.5,
        mse=0.4,
        fvu=0.3,
        explained_variance=0.7,
        cosine=0.9,
        l0=3.0,
        fraction_active=0.1,
        dead_share=0.0,
    )
    sae = SAEResult(
        name="standard-0",
        kind="standard",
        layer_number=1,
        hook_site="resid_post",
        input_dim=4,
        feature_count=64,
        epochs_trained=2,
        steps=10,
        stop_reason="max_epochs",
        metrics=metrics,
        prefix="s3://b/p/",
    )
    info = ModelInfo(
        model_name="m",
        actual_model_loaded="m",
        architecture="gpt2",
        total_layers=2,
        selected_layer=1,
        hidden_size=4,
        vocab_size=10,
        requires_token=False,
    )
    corpus = CorpusInfo(texts=3, tokens=9, rows=3, sha256="0" * 64)
    return Finished(info, corpus, [sae], {"final_loss": 0.5}, 3, "cpu", 1)


def works(spec: JobSpec, send: Send) -> Finished:
    send(Progress("training", "half way", 0.5, current_loss=1.0, step=5, total_steps=10))
    spec.output.mkdir(parents=True)
    for name in ("sae_model.pt", "feature_activations.pt", "metadata.json"):
        (spec.output / name).write_bytes(name.encode())
    return finished()


def hangs(spec: JobSpec, send: Send) -> Finished:
    send(Progress("training", "about to hang", 0.1))
    threading.Event().wait()
    return finished()


def fills_the_disk(spec: JobSpec, send: Send) -> Finished:
    (spec.workspace / "scratch.bin").write_bytes(b"x" * 3 * 2**20)
    return hangs(spec, send)


def goes_on(spec: JobSpec, send: Send) -> Finished:
    """Moves for ever, and says its process id: for a process that is stopped from outside."""
    while True:
        send(Progress("training", str(os.getpid()), 0.1))
        threading.Event().wait(0.02)


def murmurs(spec: JobSpec, send: Send) -> Finished:
    """Says that it is alive, and never moves."""
    while True:
        send(Progress("extracting", "still there", 0.1, moved=False))
        threading.Event().wait(0.02)


def killed(spec: JobSpec, send: Send) -> Finished:
    print("the last line before the end", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return finished()


def leaves_another_behind(spec: JobSpec, send: Send) -> Finished:
    """Dies and leaves a process that holds its pipes."""
    subprocess.Popen(["sleep", "600"])
    os._exit(4)


def exits(spec: JobSpec, send: Send) -> Finished:
    os._exit(3)


def refuses(spec: JobSpec, send: Send) -> Finished:
    raise CorpusRefused("line 3 is no UTF-8", "Save the file as UTF-8.")


def raises(spec: JobSpec, send: Send) -> Finished:
    raise RuntimeError(f"a library's error that repeats {spec.token}")


def shows_environment(spec: JobSpec, send: Send) -> Finished:
    send(Progress("training", " ".join(sorted(os.environ)), 0.1))
    return finished()


def shows_token(spec: JobSpec, send: Send) -> Finished:
    print(f"token={spec.token}", file=sys.stderr, flush=True)
    return finished()


def trains_and_keeps(spec: JobSpec, parent: Parent) -> Finished:
    """The real work, whose workspace stays to be looked at beside the data folder, under the job's name."""
    finished = train(spec, parent)
    shutil.copytree(spec.workspace, spec.workspace.parents[3] / "kept" / spec.job_id)
    return finished


def finds_a_dataset(spec: JobSpec, send: Send) -> Finished:
    """Dies after it has said its commit; at the next attempt it must have been told that."""
    if spec.corpus is not None:
        raise CorpusRefused("the parent has brought a corpus of the hub", "It is the child's.")
    if spec.corpus_commit is None:
        send(DatasetFound("a" * 40))
        threading.Event().wait(2.0)
        os._exit(3)
    done = works(spec, send)
    return replace(done, corpus=done.corpus.model_copy(update={"commit": spec.corpus_commit}))


def outlives(spec: JobSpec, send: Send) -> Finished:
    """Says its process id and waits for ever: for a parent that dies."""
    send(Progress("training", str(os.getpid()), 0.1))
    threading.Event().wait()
    return finished()


def counts(spec: JobSpec, parent: Parent) -> Finished:
    """Training in small: a step every 20 ms up to 100, a checkpoint after every tenth and when it leaves."""
    step = max((int(path.read_text()) for path in spec.checkpoints.glob("*.step")), default=0)
    while step < 100 and parent.wish != "stop":
        if parent.wish == "leave":
            save(spec, parent, step)
            raise LeftEarly
        step += 1
        parent(Progress("training", "counting", step / 100, step=step, total_steps=100))
        if step % 10 == 0:
            save(spec, parent, step)
        threading.Event().wait(0.02)
    return replace(works(spec, parent), stopped_early=parent.wish == "stop")


def save(spec: JobSpec, parent: Parent, step: int) -> None:
    """A checkpoint as the real work announces it."""
    spec.checkpoints.mkdir(exist_ok=True)
    number = max((int(path.stem) for path in spec.checkpoints.glob("*.json")), default=0) + 1
    name, data = f"checkpoints/{number:06d}.step", str(step).encode()
    (spec.workspace / name).write_bytes(data)
    ref = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (spec.checkpoints / f"{number:06d}.json").write_text(json.dumps({"number": number, "files": {name: ref}}))
    parent(Saved(number))


def logs(spec: JobSpec, send: Send) -> Finished:
    """Says ten lines of a log; in the middle it waits for a word in the pipe that its model's name is, if it is."""
    for number in range(10):
        if number == 5 and (go := Path(spec.request.model_name)).is_fifo():
            go.read_text()
        send(log_line("standard-0", number, 10 * number, 1.0 / (number + 1)))
    return works(spec, send)


def log_line(sae: str, number: int, step: int, loss: float) -> Logged:
    strange: dict[str, object] = {} if math.isfinite(loss) else {"loss": None, "not_finite": {"loss": str(loss)}}
    return Logged(sae, number, (json.dumps({"event": "step", "step": step, "loss": loss} | strange),))


def waits_in(phase: Phase) -> Job:
    """A job that waits in a phase until it is ended, and in training until it is asked to end."""
    return partial(_waits, phase)


def _waits(phase: Phase, spec: JobSpec, parent: Parent) -> Finished:
    while True:
        parent(Progress(phase, f"waiting while {phase}", 0.3))
        if parent.wish is not None and phase == "extracting":
            raise LeftEarly
        if parent.wish == "stop" and phase == "training":
            return replace(works(spec, parent), stopped_early=True)
        threading.Event().wait(0.05)


def works_until_told(spec: JobSpec, send: Send) -> Finished:
    """Leaves a mark beside the data folder when it begins, and ends when it finds the file `go` there."""
    folder = spec.workspace.parents[3]
    (folder / f"begun-{spec.job_id}-{os.getpid()}").touch()
    send(Progress("training", "has begun", 0.1))
    while not (folder / "go").exists():
        threading.Event().wait(0.02)
    return works(spec, send)


def holds_up_only_the_first(spec: JobSpec, send: Send) -> Finished:
    """The job named `long` works until told, every other one at once."""
    return works_until_told(spec, send) if spec.job_id == "long" else works(spec, send)


def is_always_the_same(spec: JobSpec, parent: Parent) -> Finished:
    """Would give what every job of it gives; takes its time where it is asked to say so."""
    parent(Progress("planning", "planning", 0.1))
    if spec.identify:
        parent(Identified("the-same"))
        for _ in range(40):
            threading.Event().wait(0.05)
    return works(spec, parent)
