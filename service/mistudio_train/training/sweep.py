"""All SAEs of a job on one extraction: trained one after another, each able to fail alone, then judged and written.

Owns which SAE is where and what became of it; how one is trained, judged and written is in modules of their own.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from mistudio_schemas import Contract, CrossEntropy, SAEFailure, SAEResult, TrainRequested
from mistudio_train.errors import JobError, MemoryExhausted, ModelRefused, TrainingDiverged
from mistudio_train.messages import LeftEarly
from mistudio_train.sae.build import recipe_for

from .allocator import give_back
from .card import write_card
from .checkpoints import Checkpoints, KeptTraining
from .files import write_json
from .fit import HELD_OUT_ROWS, FailedBefore, Fitted, NothingTrained, fit
from .frontier import write_frontier, write_table
from .language_model import is_out_of_memory, load_with_head
from .memory_plan import GIB, MemoryPlan
from .promoted import Promoted, promoted_tokens
from .report.gathered import Gathered, gather
from .report.material import Material
from .report.neuronpedia import write_neuronpedia
from .report.report import write_report
from .reporter import Reporter
from .results import Context, Written, write_result
from .run import Accepted
from .shuffle import ShuffledRows
from .spliced import Splice, cross_entropies
from .start_weights import read_start
from .tokens import Tokens
from .wanted import Trained, Wanted

TRAINING: Final = (0.4, 0.85)
SPLICING: Final = (0.85, 0.9)
WRITING: Final = (0.9, 0.97)
REPORTING: Final = (0.97, 1.0)
FAILS_ALONE: Final = (TrainingDiverged, MemoryExhausted, FailedBefore)
"""What is the matter with one SAE and need not be with the others."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InModel:
    """What the language model says of one SAE."""

    cross_entropy: CrossEntropy | None = None
    """What it loses with the SAE in its place; `None` where that cannot be told."""
    promoted: Promoted | None = None


@dataclass(frozen=True)
class Sweep:
    """What became of all that were asked for."""

    written: list[Written]
    """The primary one first: the first of those that were trained."""
    failures: list[SAEFailure]
    stopped: bool
    """Whether the parent has wanted what there was before all were trained."""


def make_saes(
    wanted: Sequence[Wanted],
    context: Context,
    job: Accepted,
    tokens: Tokens,
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> Sweep:
    """Train, judge and write them.

    Raises:
        JobError: if none could be trained: the first one's; or if a file cannot be written.
        LeftEarly: if the parent wants the child to leave, or an end before there was anything.
    """
    with _memory_errors(job.plan):
        trained, failures = _train_all(wanted, context, job, checkpoints, reporter)
        in_model = _in_model(trained, job, tokens, reporter)
        written = _write_all(trained, in_model, context, job, reporter)
    results = [one.result for one in written]
    listed: dict[str, Sequence[Contract]] = {"saes": results, "failed": failures}
    write_json(
        job.spec.output / "saes.json",
        {name: [one.model_dump(mode="json") for one in of_kind] for name, of_kind in listed.items()},
    )
    if len(wanted) > 1:
        write_table(job.spec.output / "sweep" / "table.csv", results)
        write_frontier(job.spec.output / "sweep" / "frontier.png", results)
    missing = len(trained) + len(failures) < len(wanted)
    return Sweep(written, failures, missing or any(one.fitted.stop_reason == "stopped" for one in trained))


def _train_all(
    wanted: Sequence[Wanted], context: Context, job: Accepted, checkpoints: Checkpoints, reporter: Reporter
) -> tuple[list[Trained], list[SAEFailure]]:
    """Fewer than all if the parent has wanted what there was."""
    steps = [_steps(one, context) for one in wanted]
    trained: list[Trained] = []
    failures: list[SAEFailure] = []
    first_error: JobError | None = None
    for number, one in enumerate(wanted):
        share = _part(TRAINING, number, len(wanted))
        reporter.enter("training", f"training {one.config.name}", share, one.config.name)
        kept = KeptTraining(checkpoints, one.position, _log(one, job))
        try:
            fitted = _train(one, context, job, kept, reporter, sum(steps[number + 1 :]))
        except NothingTrained:
            if not trained:
                raise LeftEarly from None
            break
        except FAILS_ALONE as error:
            if len(wanted) == 1:
                raise
            failures.append(_failed(one, error, kept, reporter))
            first_error = first_error or error
        else:
            trained.append(Trained(one, fitted))
        free(job.plan)
    if not trained and first_error is not None:
        raise first_error
    return trained, failures


def _train(
    one: Wanted, context: Context, job: Accepted, kept: KeptTraining, reporter: Reporter, steps_after: int
) -> Fitted:
    buffer_bytes = job.spec.request.shuffle_bytes
    rows = ShuffledRows(*one.stores, selection=one.selection, seed=one.config.seed or 0, buffer_bytes=buffer_bytes)
    held_out = one.selection.held_out_rows(HELD_OUT_ROWS)
    with _memory_errors(job.plan):
        return fit(
            one.config,
            rows,
            torch.cat([store.gather(held_out) for store in one.stores], 1) if len(held_out) else None,
            mean_pooled=context.mean_pooled,
            device=context.device,
            reporter=reporter,
            log_path=_log(one, job),
            kept=kept,
            steps_after=steps_after,
            start=None if one.start is None else partial(read_start, one.start),
        )


def _failed(one: Wanted, error: JobError, kept: KeptTraining, reporter: Reporter) -> SAEFailure:
    """An SAE that the others go on without; kept, so that no later attempt trains it again to see the same."""
    name, kind = one.config.name or one.config.kind, one.config.kind
    if not isinstance(error, FailedBefore):
        reporter.warn(f"{name} failed: {error} {error.hint}")
        kept.save({"failed": {"message": str(error), "hint": error.hint, "code": error.code.value}})
    return SAEFailure(name=name, kind=kind, code=error.code, message=str(error), hint=error.hint)


def _log(one: Wanted, job: Accepted) -> Path:
    """Its training log, until it is known where the SAE's files are."""
    return job.spec.scratch / "logs" / f"{one.position}.jsonl"


def _in_model(trained: Sequence[Trained], job: Accepted, tokens: Tokens, reporter: Reporter) -> Sequence[InModel]:
    """What the language model loses with each SAE in its place, and which tokens that speaks for."""
    nothing = [InModel()] * len(trained)
    if not job.plan.splices or not trained[0].wanted.selection.counts.held_out or reporter.wish == "stop":
        return nothing

    def on_progress(done: float) -> None:
        if reporter.wish == "leave":
            raise LeftEarly
        if reporter.due:
            reporter.say(done)

    reporter.enter("evaluating", "predicting held-out tokens with each SAE in the model's place", SPLICING)
    spec, splices = job.spec, [Splice(one.wanted.ends, one.fitted.sae, one.wanted.selection) for one in trained]
    sites = list(dict.fromkeys(site for splice in splices for site in splice.ends.sites))
    try:
        with reporter.one_call():
            model = load_with_head(job.source, job.plan, sites, token=spec.token, allow_unsafe=spec.allow_unsafe_models)
        losses = cross_entropies(
            model, splices, tokens, limit=spec.request.cross_entropy_tokens, on_progress=on_progress
        )
        with reporter.one_call():
            shows = _shows_features(spec.request)
            promoted = [promoted_tokens(model, one.fitted.sae) if shows else None for one in trained]
    except ModelRefused as error:
        reporter.warn(f"no cross-entropy: {error}")
        return nothing
    del model
    free(job.plan)
    if losses is None:
        return [InModel(None, one) for one in promoted]
    return [InModel(loss, one) for loss, one in zip(losses, promoted, strict=True)]


def _write_all(
    trained: Sequence[Trained],
    in_model: Sequence[InModel],
    context: Context,
    job: Accepted,
    reporter: Reporter,
) -> list[Written]:
    written = []
    for number, (one, said) in enumerate(zip(trained, in_model, strict=True)):
        place, share = one.wanted.folder if number else "", _part(WRITING, number, len(trained))
        written.append(write_result(context, one, said.cross_entropy, place, reporter, share))
        shutil.copyfile(_log(one.wanted, job), job.spec.output / place / "training_log.jsonl")
        free(job.plan)
    if _shows_features(job.spec.request):
        _show_features(trained, in_model, written, context, reporter)
    _write_cards(trained, written, context, reporter)
    return written


def _write_cards(trained: Sequence[Trained], written: Sequence[Written], context: Context, reporter: Reporter) -> None:
    """Of those that SAELens loads; the last of an SAE's files, as a card says every warning."""
    for number, (one, result) in enumerate(zip(trained, (one.result for one in written), strict=True)):
        folder = context.spec.output / (one.wanted.folder if number else "")
        if (folder / "sae").exists():
            with reporter.optional(f"{result.name} has no model card"):
                write_card(folder, result, context.material(one.wanted.stores[0].index, reporter.warnings))


def _shows_features(request: TrainRequested) -> bool:
    return request.report or bool(request.exports)


def _show_features(
    trained: Sequence[Trained],
    in_model: Sequence[InModel],
    written: Sequence[Written],
    context: Context,
    reporter: Reporter,
) -> None:
    """A page an SAE, and what else was asked for; what cannot be made fails no job, as the files have all of it."""
    request, results = context.spec.request, [one.result for one in written]

    def on_progress() -> None:
        if reporter.due:
            reporter.say(0.0)

    for number, (one, said, result) in enumerate(zip(trained, in_model, results, strict=True)):
        share = _part(REPORTING, number, len(trained))
        reporter.enter("exporting", f"showing the features of {result.name}", share, result.name)
        folder = context.spec.output / (one.wanted.folder if number else "")
        material = context.material(one.wanted.stores[0].index, reporter.warnings)
        with reporter.optional(f"{result.name} has no {'report' if request.report else 'features to show'}"):
            gathered = gather(folder, one.fitted.sae, said.promoted, material, on_progress)
            if "neuronpedia" in request.exports:
                _export(folder, one, result, gathered, material, on_progress, reporter)
            if request.report:
                write_report(folder, result, results, gathered, material, on_progress)


def _export(
    folder: Path,
    one: Trained,
    result: SAEResult,
    gathered: Gathered,
    material: Material,
    on_progress: Callable[[], None],
    reporter: Reporter,
) -> None:
    with reporter.optional(f"{result.name} has no features for Neuronpedia"):
        write_neuronpedia(folder, result, gathered, material, one.wanted.origin.context_size, on_progress)
        if len(gathered.order) < gathered.living:
            reporter.warn(
                f"{result.name}: features/neuronpedia has the {len(gathered.order)} strongest of {gathered.living} "
                "features; features/activations.parquet has all"
            )


@contextmanager
def _memory_errors(plan: MemoryPlan) -> Iterator[None]:
    """Say in our words that the SAE did not fit after all."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"Memory ran out on {plan.device} while an SAE was trained or evaluated; {plan.sae_bytes / GIB:.2f} GiB "
            "were planned for it",
            "Lower hidden_dim or batch_size, or use a worker with more memory. See what else uses the device.",
        ) from error


def _part(share: tuple[float, float], number: int, parts: int) -> tuple[float, float]:
    """One of some equal parts of a share."""
    begin, end = share
    return begin + (end - begin) * number / parts, begin + (end - begin) * (number + 1) / parts


def _steps(one: Wanted, context: Context) -> int:
    rows = one.selection.counts.training
    return recipe_for(one.config, rows=rows, mean_pooled=context.mean_pooled).total_steps(rows)


def free(plan: MemoryPlan) -> None:
    """Give back what nobody uses, on the device and here."""
    if plan.device != "cpu":
        torch.cuda.empty_cache()
    give_back()
