"""Every way a job can end without a result, each with a stable code, a sentence for a person and what to do.

JobError
├── ChildFailed         any                  what the child reported, as the parent sees it
├── RequestRefused      request.*            the request must change
├── CorpusRefused       corpus.*             the corpus must change
├── ModelRefused        model.*              the model, its name or its folder must change
├── StartRefused        sae.*                the SAE that `init_from` names, or the request, must change
├── NotEnoughMemory     memory.insufficient  planned before any training; a smaller job or a larger machine
├── MemoryExhausted     memory.exhausted     ran out although the plan had shrunk                  retryable
├── GpuUnavailable      gpu.unavailable      the GPU asked for is not there
├── TrainingDiverged    training.diverged    the loss is no number
├── ExportRefused       export.refused       a file would have been wrong, so it was not written
├── DiskFull            disk.full            the workspace's disk is full                          retryable
├── ChildDied           child.died           the training process ended without a word             retryable
├── ChildStalled        child.stalled        the training process was silent for too long          retryable
├── StoreUnavailable    store.unavailable    the object store does not answer                      retryable
└── HubUnreachable      hub.unreachable      the model hub does not answer                         retryable
"""

from collections.abc import Sequence

from mistudio_schemas import ErrorCode

MESSAGE_CHARACTERS = 2000
TRACEBACK_LINES = 50
LINE_CHARACTERS = 500


def brief(text: str, most: int = MESSAGE_CHARACTERS) -> str:
    """`text`, cut where it is too long for an event: it may repeat what a request says, which has no bounds."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


class JobError(Exception):
    """A job cannot go on. `str(error)` is the sentence for a person; `hint` says what to do."""

    code: ErrorCode = ErrorCode.INTERNAL
    retryable: bool = False

    def __init__(
        self, message: str, hint: str, code: ErrorCode | None = None, *, traceback: Sequence[str] = ()
    ) -> None:
        super().__init__(brief(message))
        self.hint = brief(hint)
        self.traceback = [brief(line, LINE_CHARACTERS) for line in traceback][-TRACEBACK_LINES:]
        if code is not None:
            self.code = code


class ChildFailed(JobError):
    """The child said itself why it could not go on; code and retryability are its own."""

    def __init__(
        self, message: str, hint: str, code: ErrorCode, *, retryable: bool, traceback: Sequence[str] = ()
    ) -> None:
        super().__init__(message, hint, code, traceback=traceback)
        self.retryable = retryable


class RequestRefused(JobError):
    """The request cannot be accepted as it is."""

    code = ErrorCode.REQUEST_INVALID


class CorpusRefused(JobError):
    """The corpus is missing, forbidden, or no text."""

    code = ErrorCode.CORPUS_UNREADABLE


class ModelRefused(JobError):
    """The language model is missing, forbidden, or of a shape that we cannot read."""

    code = ErrorCode.MODEL_NOT_FOUND


class StartRefused(JobError):
    """The SAE to go on from is missing, forbidden, or not what the request asks for."""

    code = ErrorCode.SAE_UNSUITABLE


class NotEnoughMemory(JobError):
    """The plan does not fit the device."""

    code = ErrorCode.MEMORY_INSUFFICIENT


class MemoryExhausted(JobError):
    """The device ran out of memory even with the smallest batch."""

    code = ErrorCode.MEMORY_EXHAUSTED
    retryable = True


class GpuUnavailable(JobError):
    """The request names a GPU that this worker does not have."""

    code = ErrorCode.GPU_UNAVAILABLE


class TrainingDiverged(JobError):
    """The loss became NaN or infinite."""

    code = ErrorCode.TRAINING_DIVERGED


class ExportRefused(JobError):
    """A file would have been wrong for its readers."""

    code = ErrorCode.EXPORT_REFUSED


class DiskFull(JobError):
    """No space left in the workspace."""

    code = ErrorCode.DISK_FULL
    retryable = True


class DiskLimit(DiskFull):
    """The job takes more of the disk than the operator allows to one."""

    retryable = False

    def __init__(self, taken: int, limit: int) -> None:
        super().__init__(
            f"the job takes {taken / 1e9:.1f} GB of the worker's disk; {limit / 1e9:.1f} GB are the limit of one job",
            "Ask for fewer tokens (token_budget) or layers, or have the operator raise WORKSPACE_MAX_BYTES.",
        )


class ChildDied(JobError):
    """The training process ended without a result or an error."""

    code = ErrorCode.CHILD_DIED
    retryable = True


class ChildStalled(JobError):
    """The training process said nothing for too long and was ended."""

    code = ErrorCode.CHILD_STALLED
    retryable = True


class StoreUnavailable(JobError):
    """The object store does not answer, or refuses."""

    code = ErrorCode.STORE_UNAVAILABLE
    retryable = True


class HubUnreachable(JobError):
    """The model hub does not answer."""

    code = ErrorCode.HUB_UNREACHABLE
    retryable = True
