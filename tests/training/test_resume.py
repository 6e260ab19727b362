"""A job that is interrupted anywhere and goes on gives the very bytes of one that never was, whatever became of it."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mistudio_schemas import KINDS
from mistudio_train.messages import ChildMessage, Finished, JobSpec, LeftEarly, Loaded, Progress, Saved, Warned
from mistudio_train.sae.trainer import Trainer
from mistudio_train.training import checkpoints, extract
from mistudio_train.training.extract import _Run
from mistudio_train.training.run import run_job

from .conftest import Listener
from .test_run import CHANGING, Folder, hashes, spec

TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds and {number % 3} dogs" for number in range(160)]
SAES: dict[str, dict[str, Any]] = {
    "standard": {"kind": "standard", "hidden_dim": 64, "batch_size": 128, "reinitialize_dead_every": 1},
    "topk": {"kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 128, "dead_after": 0.05},
    "batchtopk": {"kind": "batchtopk", "k": 4, "hidden_dim": 64, "batch_size": 128, "dead_after": 0.05},
    "jumprelu": {"kind": "jumprelu", "target_l0": 4, "hidden_dim": 64, "batch_size": 128, "dead_after": 0.05},
    "gated": {"kind": "gated", "hidden_dim": 64, "batch_size": 128, "dead_after": 0.05},
    "decoder_norm": {"kind": "standard", "penalty": "decoder_norm", "hidden_dim": 64, "batch_size": 128},
    "resampled": {"kind": "topk", "k": 2, "hidden_dim": 64, "batch_size": 128, "dead_after": 0.1, "resample_at": [0.5]},
    "transcoder": {"kind": "batchtopk", "k": 4, "hidden_dim": 64, "batch_size": 128, "dead_after": 0.05}
    | {"hook_site": "mlp_in", "predicts": "mlp_out", "resample_at": [0.5]},
    "matryoshka": {"kind": "matryoshka", "k": 4, "hidden_dim": 64, "batch_size": 128, "dead_after": 0.05},
}
INTERRUPTIONS = int(os.environ.get("INTERRUPTIONS", "4"))
"""Of each kind, in extraction and in training; more of them take longer and show more."""


@pytest.fixture(scope="module", autouse=True)
def _many_shards() -> Iterator[None]:
    """Of few texts, as they would be of many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "ENOUGH_WINDOWS", 16)
        yield


class Killed(BaseException):
    """The end of the process, as far as a test in one process can have it."""


@pytest.fixture(scope="module")
def undisturbed(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], JobSpec]:
    """A kind's job that ran through, made once."""
    made: dict[str, JobSpec] = {}

    def of(kind: str) -> JobSpec:
        if kind not in made:
            made[kind] = job_of(kind, model_folder, tmp_path_factory.mktemp(kind) / "job")
            run_job(made[kind], Listener())
        return made[kind]

    return of


def job_of(kind: str, model_folder: Folder, workspace: Path, **fields: Any) -> JobSpec:
    several = [SAES[kind] | {"name": "first"}, SAES[kind] | {"name": "second", "layer_number": 0}]
    asked: dict[str, Any] = {"pooling": "token", "max_epochs": 3, "saes": several, "max_sequence_length": 16}
    asked["report"] = False  # it is made of the files, whoever has written them
    one = spec(model_folder("llama"), workspace, TEXTS, **asked | fields)
    return replace(one, checkpoint_seconds=0.05)


def exact_files(spec: JobSpec, *, cards: bool = True) -> dict[str, str]:
    """Of all that does not say when it was made; of a job that was warned of what it had kept without the model cards,
    which say so."""
    left_out = (*CHANGING, *(() if cards else ("sae/README.md",)))
    return {name: digest for name, digest in hashes(spec.output).items() if not name.endswith(left_out)}


def total_steps(spec: JobSpec) -> int:
    return sum(json.loads(path.read_text())["training_results"]["steps"] for path in spec.output.rglob("metadata.json"))


def kill(spec: JobSpec, owner: type, method: str, call: int) -> None:
    """Do the job in a process that ends in the `call`th call of the method."""
    calls, real = 0, getattr(owner, method)

    def dies(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, dies)
        with pytest.raises(Killed):
            run_job(spec, Listener())


def goes_on(spec: JobSpec) -> tuple[Finished, list[ChildMessage]]:
    """The next attempt, which has of the workspace what a parent would have brought to it."""
    shutil.rmtree(spec.output, ignore_errors=True)
    parent = Listener()
    return run_job(spec, parent), parent.heard


def test_every_kind_is_tested() -> None:
    assert {fields["kind"] for fields in SAES.values()} == set(KINDS)


@pytest.mark.parametrize("kind", SAES)
def test_killed_at_any_step_of_training(
    kind: str, undisturbed: Callable[[str], JobSpec], model_folder: Folder, tmp_path: Path
) -> None:
    whole = undisturbed(kind)
    steps = total_steps(whole)
    for step in random.Random(kind).sample(range(2, steps), INTERRUPTIONS):
        one = job_of(kind, model_folder, tmp_path / str(step))
        kill(one, Trainer, "step", step)
        _, heard = goes_on(one)
        assert exact_files(one) == exact_files(whole), f"killed at step {step}"
        assert not any(isinstance(said, Progress) and said.tokens_done == 0 for said in heard)


@pytest.mark.parametrize("kind", SAES)
def test_killed_at_any_batch_of_extraction(
    kind: str, undisturbed: Callable[[str], JobSpec], model_folder: Folder, tmp_path: Path
) -> None:
    whole = undisturbed(kind)
    batches = count_calls(_Run, "_run", lambda: run_job(job_of(kind, model_folder, tmp_path / "all"), Listener()))
    for batch in random.Random(kind).choices(range(1, batches + 1), k=INTERRUPTIONS):
        one = job_of(kind, model_folder, tmp_path / f"batch-{batch}")
        kill(one, _Run, "_run", batch)
        again = count_calls(_Run, "_run", lambda one=one: goes_on(one))  # type: ignore[misc]
        assert again <= batches - batch + batches // 10 + 2, "whole shards are not made again"
        assert exact_files(one) == exact_files(whole), f"killed at batch {batch}"
        shutil.rmtree(one.workspace)


def count_calls(owner: type, method: str, run: Callable[[], object]) -> int:
    calls, real = 0, getattr(owner, method)

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, counted)
        run()
    return calls


@pytest.mark.parametrize("kind", SAES)
def test_a_job_that_leaves_loses_no_step(
    kind: str,
    undisturbed: Callable[[str], JobSpec],
    model_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = undisturbed(kind)
    one, steps = replace(job_of(kind, model_folder, tmp_path / "job"), checkpoint_seconds=3600.0), 0
    real = Trainer.step

    def step(trainer: Trainer, x_BD: Tensor) -> None:
        nonlocal steps
        steps += 1
        real(trainer, x_BD)

    monkeypatch.setattr(Trainer, "step", step)
    for leave_after in (3, 11, total_steps(whole) - 2):
        parent = LeavesAfter(lambda limit=leave_after: steps >= limit)  # type: ignore[misc]
        with pytest.raises(LeftEarly):
            run_job(one, parent)
        shutil.rmtree(one.output)
    run_job(one, Listener())
    assert steps == total_steps(whole)
    assert exact_files(one) == exact_files(whole)


class LeavesAfter(Listener):
    """Wants the child to leave once that is so."""

    def __init__(self, so: Callable[[], bool]) -> None:
        self._so = so
        super().__init__()

    @property
    def wish(self) -> Any:
        return "leave" if self._so() else None

    @wish.setter
    def wish(self, value: Any) -> None:
        pass


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, whatever it costs."""
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))


@pytest.mark.usefixtures("often")
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(
    undisturbed: Callable[[str], JobSpec], model_folder: Folder, tmp_path: Path
) -> None:
    whole = undisturbed("topk")
    for damage in (half, flipped, gone):
        one = replace(job_of("topk", model_folder, tmp_path / damage.__name__), checkpoint_seconds=0.0)
        kill(one, Trainer, "step", 20)
        states = sorted(one.checkpoints.glob("*.pt"))
        assert len(states) == 2
        damage(states[-1])
        _, heard = goes_on(one)
        assert any("damaged" in said.message for said in heard if isinstance(said, Warned))
        assert exact_files(one, cards=False) == exact_files(whole, cards=False)


def test_a_damaged_shard_or_index_is_made_again(
    undisturbed: Callable[[str], JobSpec], model_folder: Folder, tmp_path: Path
) -> None:
    whole = undisturbed("topk")
    one = job_of("topk", model_folder, tmp_path / "job")
    kill(one, Trainer, "step", 20)
    flipped(next(one.scratch.rglob("shard-00001.bin")))
    flipped(max(one.checkpoints.glob("*.json")))
    goes_on(one)
    assert exact_files(one, cards=False) == exact_files(whole, cards=False)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


def test_what_another_request_has_kept_is_not_used(model_folder: Folder, tmp_path: Path) -> None:
    one = job_of("topk", model_folder, tmp_path / "job")
    run_job(one, Listener())
    other = replace(one, request=one.request.model_copy(update={"seed": 1}))
    finished, heard = goes_on(other)
    fresh = job_of("topk", model_folder, tmp_path / "fresh", seed=1)
    run_job(fresh, Listener())
    assert exact_files(other, cards=False) == exact_files(fresh, cards=False)
    assert any("request was" in said.message for said in heard if isinstance(said, Warned))
    assert finished.corpus.texts == len(TEXTS)


def test_what_another_model_in_the_same_folder_has_left_is_not_used(model_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    one = job_of("topk", lambda _: tmp_path / "model", tmp_path / "job")
    run_job(one, Listener())
    flipped(tmp_path / "model" / "model.safetensors")
    _, heard = goes_on(one)
    assert any("model was" in said.message for said in heard if isinstance(said, Warned))


@pytest.mark.usefixtures("often")
def test_the_last_two_checkpoints_are_kept_and_announced_when_they_are_whole(
    model_folder: Folder, tmp_path: Path
) -> None:
    one = replace(job_of("standard", model_folder, tmp_path / "job"), checkpoint_seconds=0.0)
    seen: list[int] = []

    def on_message(message: ChildMessage) -> None:
        if isinstance(message, Saved):
            index = json.loads((one.checkpoints / f"{message.number:06d}.json").read_bytes())
            assert all((one.workspace / name).stat().st_size == ref["size"] for name, ref in index["files"].items())
            assert len(list(one.checkpoints.glob("*.json"))) <= 2
            seen.append(message.number)

    run_job(one, Listener(on_message))
    assert seen == list(range(1, len(seen) + 1))
    assert len(list(one.checkpoints.glob("*.pt"))) <= 3


@pytest.mark.parametrize("names", [["first"], ["first", "second"]])
def test_stop_delivers_what_there_is(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """It comes in the fifth step of the last of these SAEs."""
    one, parent, real = job_of("standard", model_folder, tmp_path / "job"), Listener(), Trainer.step
    seen: list[Trainer] = []

    def step(trainer: Trainer, x_BD: Tensor) -> None:
        real(trainer, x_BD)
        if trainer not in seen:
            seen.append(trainer)
        if len(seen) == len(names) and trainer.steps == 5:
            parent.wish = "stop"

    monkeypatch.setattr(Trainer, "step", step)
    finished = run_job(one, parent)
    assert finished.stopped_early
    assert [sae.name for sae in finished.saes] == names
    assert (finished.saes[-1].stop_reason, finished.saes[-1].steps) == ("stopped", 5)
    assert (one.output / "saes" / "second").exists() == ("second" in names)


@pytest.mark.parametrize("phase", ["planning", "loading", "extracting"])
def test_stop_before_training_leaves_nothing(model_folder: Folder, tmp_path: Path, phase: str) -> None:
    one = job_of("standard", model_folder, tmp_path / "job")
    with pytest.raises(LeftEarly):
        run_job(one, Listener(lambda said: "stop" if isinstance(said, Progress) and said.phase == phase else None))


def test_the_log_goes_on_where_the_checkpoint_was(model_folder: Folder, tmp_path: Path) -> None:
    one = job_of("topk", model_folder, tmp_path / "job")
    kill(one, Trainer, "step", 20)
    goes_on(one)
    lines = [json.loads(line) for line in (one.output / "training_log.jsonl").read_text().splitlines()]
    assert [line["epochs"] for line in lines if line["event"] == "epoch"] == [1, 2, 3]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)


def test_the_models_commit_is_said_once_and_then_used(model_folder: Folder, tmp_path: Path) -> None:
    one = job_of("topk", model_folder, tmp_path / "job")
    _, heard = goes_on(one)
    assert [said.commit for said in heard if isinstance(said, Loaded)] == [None]
