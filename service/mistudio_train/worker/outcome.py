"""How a run ends, as events: one place for both ways to run a job, from Kafka and right here."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from mistudio_schemas import ArtifactRef, TrainCancelled, TrainCompleted, TrainFailed, TrainProgress
from mistudio_schemas.events import StatusFields
from mistudio_train import __version__
from mistudio_train.errors import JobError
from mistudio_train.messages import Finished

ENDED = ("completed", "failed", "cancelled")
"""What a job's status is when it has ended."""
LISTED = 1000
"""Entries of a list in an event at most; the files have all."""


@dataclass(frozen=True)
class Who:
    """Of which run an event speaks, and who says it."""

    job_id: str
    run: int
    attempt: int
    worker: str


def completed(
    who: Who,
    finished: Finished,
    artifacts: Sequence[ArtifactRef],
    manifest: ArtifactRef,
    *,
    warnings: list[str],
    seconds: float,
) -> TrainCompleted:
    """The event of a run whose files are where `artifacts` say."""
    uri = {artifact.name: artifact.uri for artifact in artifacts}
    primary = finished.saes[0]
    return TrainCompleted(
        **vars(who),
        current_epoch=primary.epochs_trained,
        current_loss=primary.metrics.final_loss,
        estimated_time_remaining=0,
        message=_trained(len(finished.saes), len(finished.failed_saes)),
        model_info=finished.model_info,
        model_path=uri["sae_model.pt"],
        activations_path=uri["feature_activations.pt"],
        metadata_path=uri["metadata.json"],
        training_stats={name: _thinned(value) for name, value in finished.training_stats.items()},
        feature_count=primary.feature_count,
        ready_for_find_service=True,
        saes=finished.saes,
        failed_saes=finished.failed_saes,
        corpus=finished.corpus,
        manifest=manifest,
        artifacts=list(artifacts),
        bundle_rows=finished.bundle_rows,
        warnings=warnings,
        device=finished.device,
        duration_seconds=seconds,
        memory_peak_bytes=finished.memory_peak_bytes,
        stopped_early=finished.stopped_early,
        version=__version__,
    )


def _trained(saes: int, failed: int) -> str:
    return f"{saes} SAE{'s' if saes > 1 else ''} trained" + (f", {failed} failed" if failed else "")


def reused(who: Who, earlier: TrainCompleted, *, seconds: float) -> TrainCompleted:
    """The event of a run that was asked for what an earlier one has given."""
    of = f"{earlier.job_id}/{earlier.run}"
    now = {"time": datetime.now(UTC), "message": f"the result of {of}: it was asked for the same"}
    return earlier.model_copy(update=vars(who) | now | {"reused_from": of, "duration_seconds": seconds})


def _thinned(value: object) -> object:
    """Of a list of an entry an epoch so many that an event can hold them, the first and the last among them."""
    if not isinstance(value, list) or len(value) <= LISTED:
        return value
    return [value[round(i * (len(value) - 1) / (LISTED - 1))] for i in range(LISTED)]


def failed(who: Who, error: JobError, now: TrainProgress, attempts: int) -> TrainFailed:
    """The event of a run that ended for `error` when it stood as `now` says."""
    return TrainFailed(
        **vars(who),
        progress=now.progress,
        current_epoch=now.current_epoch,
        current_loss=now.current_loss,
        model_info=now.model_info,
        message=str(error),
        code=error.code,
        hint=error.hint,
        retryable=error.retryable,
        attempts=attempts,
        traceback=error.traceback,
        phase=now.phase,
    )


def cancelled(who: Who, now: TrainProgress, requested_by: str | None, message: str) -> TrainCancelled:
    """The event of a run that somebody did not want any more when it stood as `now` says; nothing of it is kept."""
    return TrainCancelled(
        **vars(who),
        progress=now.progress,
        current_epoch=now.current_epoch,
        current_loss=now.current_loss,
        model_info=now.model_info,
        message=message,
        requested_by=requested_by,
        phase=now.phase,
        step=now.step,
    )


def last_status(end: StatusFields) -> TrainProgress:
    """What the compacted topic of statuses is to say of a run that has ended."""
    told = end.model_dump(include=set(StatusFields.model_fields))
    return TrainProgress.model_validate(told | {"phase": "ended"})
