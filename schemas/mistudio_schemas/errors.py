"""Why a job ended without a result: the closed set of codes that `train.failed` carries.

A code is stable and for programs; the event's `message` and `hint` are for people.
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, as `area.reason`. The area says whom to ask: the requester, the operator or us."""

    REQUEST_INVALID = "request.invalid"
    REQUEST_OUT_OF_RANGE = "request.out_of_range"
    REQUEST_LAYER_OUT_OF_RANGE = "request.layer_out_of_range"
    REQUEST_HOOK_SITE_UNSUPPORTED = "request.hook_site_unsupported"
    CORPUS_NOT_FOUND = "corpus.not_found"
    CORPUS_NOT_ALLOWED = "corpus.not_allowed"
    CORPUS_UNREADABLE = "corpus.unreadable"
    CORPUS_EMPTY = "corpus.empty"
    CORPUS_COLUMN = "corpus.column"
    MODEL_NOT_FOUND = "model.not_found"
    MODEL_NOT_ALLOWED = "model.not_allowed"
    MODEL_UNSUPPORTED = "model.unsupported"
    MODEL_LOAD_FAILED = "model.load_failed"
    SAE_NOT_FOUND = "sae.not_found"
    SAE_NOT_ALLOWED = "sae.not_allowed"
    SAE_UNSUITABLE = "sae.unsuitable"
    MEMORY_INSUFFICIENT = "memory.insufficient"
    MEMORY_EXHAUSTED = "memory.exhausted"
    GPU_UNAVAILABLE = "gpu.unavailable"
    TRAINING_DIVERGED = "training.diverged"
    EXPORT_REFUSED = "export.refused"
    DISK_FULL = "disk.full"
    CHILD_DIED = "child.died"
    CHILD_STALLED = "child.stalled"
    STORE_UNAVAILABLE = "store.unavailable"
    HUB_UNREACHABLE = "hub.unreachable"
    INTERNAL = "internal"
