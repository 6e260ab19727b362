"""Several SAEs of one job: one that fails leaves the others alone, now and after a death; one table, one plot."""

import csv
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mistudio_schemas import ErrorCode
from mistudio_train.errors import JobError, TrainingDiverged
from mistudio_train.messages import Finished, JobSpec, Saved, Warned
from mistudio_train.sae.trainer import Trainer
from mistudio_train.training.fit import fit
from mistudio_train.training.run import run_job
from mistudio_train.training.shuffle import ShuffledRows

from .conftest import Listener
from .test_run import hashes, spec

Folder = Callable[..., Path]
TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds" for number in range(80)]
BAD = 66
"""Latents of the SAE that diverges."""


def sae(name: str, hidden_dim: int = 64, **fields: Any) -> dict[str, Any]:
    return {"kind": "topk", "k": 4, "batch_size": 64, "name": name, "hidden_dim": hidden_dim} | fields


def job_of(folder: Path, workspace: Path, *saes: dict[str, Any]) -> JobSpec:
    return spec(folder, workspace, TEXTS, pooling="token", saes=list(saes), checkpoint_seconds=0.01)


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SAEs of so many latents diverge at their third step; the widths of all that made a first one."""
    real, widths = Trainer.step, []

    def step(self: Trainer, x_BD: Tensor) -> None:
        if self.steps == 0:
            widths.append(self.sae.d_sae)
        if self.sae.d_sae == BAD and self.steps == 2:
            raise TrainingDiverged("Training diverged: on purpose.", "Do not.")
        real(self, x_BD)

    monkeypatch.setattr(Trainer, "step", step)
    return widths


def lines(one: JobSpec, place: str) -> list[dict[str, Any]]:
    text = (one.output / place / "training_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("bad_at", [0, 1, 2])
def test_one_that_diverges_leaves_the_others_alone(bad_at: int, model_folder: Folder, tmp_path: Path) -> None:
    good = [sae("a"), sae("b", 80)]
    alone = job_of(model_folder("llama"), tmp_path / "alone", *good)
    run_job(alone, Listener())
    several = [*good[:bad_at], sae("bad", BAD), *good[bad_at:]]
    one, parent = job_of(model_folder("llama"), tmp_path / "job", *several), Listener()
    finished = run_job(one, parent)
    assert [result.name for result in finished.saes] == ["a", "b"]
    (failure,) = finished.failed_saes
    assert (failure.name, failure.kind, failure.code) == ("bad", "topk", ErrorCode.TRAINING_DIVERGED)
    assert failure.message == "Training diverged: on purpose."
    assert sum("bad failed" in said.message for said in parent.heard if isinstance(said, Warned)) == 1
    for name in ("sae/sae_weights.safetensors", "saes/b/sae/sae_weights.safetensors", "features/activations.parquet"):
        assert hashes(one.output).get(name) == hashes(alone.output).get(name), name
    assert lines(one, "")[-1]["step"] == finished.saes[0].steps
    assert not (one.output / "saes" / "bad").exists()
    listed = json.loads((one.output / "saes.json").read_text())
    assert [entry["name"] for entry in listed["saes"]] == ["a", "b"]
    assert [entry["name"] for entry in listed["failed"]] == ["bad"]


def test_where_all_fail_the_job_does(model_folder: Folder, tmp_path: Path) -> None:
    one = job_of(model_folder("llama"), tmp_path / "job", sae("bad", BAD), sae("worse", BAD))
    with pytest.raises(TrainingDiverged, match="on purpose"):
        run_job(one, Listener())


def test_the_only_one_fails_as_itself(model_folder: Folder, tmp_path: Path) -> None:
    one = spec(model_folder("llama"), tmp_path / "job", TEXTS, pooling="token", sae=sae("bad", BAD))
    with pytest.raises(TrainingDiverged, match="on purpose"):
        run_job(one, Listener())


def test_an_attempt_that_goes_on_knows_what_has_failed(model_folder: Folder, tmp_path: Path, begun: list[int]) -> None:
    one = job_of(model_folder("llama"), tmp_path / "job", sae("a"), sae("bad", BAD), sae("b", 80))

    class Dies(BaseException):
        pass

    def die(said: Any) -> None:
        if 80 in begun and isinstance(said, Saved):
            raise Dies

    with pytest.raises(Dies):
        run_job(one, Listener(die))
    assert begun == [64, BAD, BAD, 80]  # the failing one had its second try
    begun.clear()
    parent = Listener()
    finished = run_job(one, parent)
    assert BAD not in begun
    assert 64 not in begun
    assert [failure.name for failure in finished.failed_saes] == ["bad"]
    assert finished.failed_saes[0].code is ErrorCode.TRAINING_DIVERGED


def test_what_failed_before_is_an_error_with_its_code_where_nothing_else_is_left(
    model_folder: Folder, tmp_path: Path, begun: list[int]
) -> None:
    one = job_of(model_folder("llama"), tmp_path / "job", sae("bad", BAD), sae("worse", BAD))
    for _ in range(2):
        with pytest.raises(JobError) as caught:
            run_job(one, Listener())
        assert caught.value.code is ErrorCode.TRAINING_DIVERGED
    assert begun == [BAD] * 4


@pytest.fixture
def swept(model_folder: Folder, tmp_path: Path) -> tuple[JobSpec, Finished]:
    saes = [sae(f"k{k}", k=k) for k in (2, 4, 8)]
    saes += [sae(f"deep{k}", k=k, layer_number=2, kind="batchtopk") for k in (2, 4)]
    one = job_of(model_folder("llama"), tmp_path / "job", *saes)
    return one, run_job(one, Listener())


def test_the_table_has_a_line_an_sae_with_the_figures_of_the_event(swept: tuple[JobSpec, Finished]) -> None:
    one, finished = swept
    with (one.output / "sweep" / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["name"] for line in table] == ["k2", "k4", "k8", "deep2", "deep4"]
    for line, result in zip(table, finished.saes, strict=True):
        assert float(line["fvu"]) == result.metrics.fvu
        assert float(line["l0"]) == result.metrics.l0
        assert one.uri_prefix + line["folder"] == result.prefix
        assert result.metrics.cross_entropy is not None
        assert float(line["cross_entropy_spliced"]) == result.metrics.cross_entropy.spliced


def test_the_plot_is_a_picture(swept: tuple[JobSpec, Finished]) -> None:
    from matplotlib.image import imread

    picture = imread(swept[0].output / "sweep" / "frontier.png")
    assert min(picture.shape[:2]) >= 400
    assert len(set(map(tuple, picture.reshape(-1, picture.shape[2]).tolist()))) > 10


def test_one_sae_alone_has_no_table(model_folder: Folder, tmp_path: Path) -> None:
    one = spec(model_folder("llama"), tmp_path / "job", TEXTS, pooling="token", sae=sae("a"))
    run_job(one, Listener())
    assert not (one.output / "sweep").exists()


def test_no_buffer_of_one_is_held_while_another_is_trained(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[ShuffledRows] = weakref.WeakSet()
    together = []

    def remembered(*given: Any, **options: Any) -> ShuffledRows:
        made = ShuffledRows(*given, **options)
        alive.add(made)
        return made

    def counted(*given: Any, **options: Any) -> Any:
        gc.collect()
        together.append(len(alive))
        return fit(*given, **options)

    monkeypatch.setattr("mistudio_train.training.sweep.ShuffledRows", remembered)
    monkeypatch.setattr("mistudio_train.training.sweep.fit", counted)
    run_job(job_of(model_folder("llama"), tmp_path / "job", *(sae(f"s{i}") for i in range(3))), Listener())
    assert together == [1, 1, 1]
