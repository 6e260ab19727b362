"""The events of miStudioTrain: all that a service needs to ask for an SAE, watch it and pick it up.

Depends on pydantic and the standard library only.
"""

from .base import Contract, UnknownFields, read_object, refuse_unknown_fields, unknown_fields
from .errors import ErrorCode
from .events import (
    ArtifactRef,
    CorpusInfo,
    ModelInfo,
    Phase,
    SAEMetrics,
    SAEResult,
    Status,
    StatusFields,
    TrainCancelled,
    TrainCompleted,
    TrainControl,
    TrainFailed,
    TrainProgress,
)
from .kafka import (
    EVENT_TYPES,
    KafkaRecord,
    ce_headers,
    event_id,
    header,
    parse_event,
    record_for,
    terminal_event_id,
)
from .requests import DEFAULT_LAYER, JobId, Limits, TrainRequested, new_job_id
from .sae import (
    KINDS,
    BatchTopKSAE,
    HookSite,
    KSparseFields,
    MatryoshkaSAE,
    SAEConfig,
    SAEFields,
    StandardSAE,
    TopKSAE,
)
from .topics import Topics

__all__ = [
    "DEFAULT_LAYER",
    "EVENT_TYPES",
    "KINDS",
    "ArtifactRef",
    "BatchTopKSAE",
    "Contract",
    "CorpusInfo",
    "ErrorCode",
    "HookSite",
    "JobId",
    "KSparseFields",
    "KafkaRecord",
    "Limits",
    "MatryoshkaSAE",
    "ModelInfo",
    "Phase",
    "SAEConfig",
    "SAEFields",
    "SAEMetrics",
    "SAEResult",
    "StandardSAE",
    "Status",
    "StatusFields",
    "TopKSAE",
    "Topics",
    "TrainCancelled",
    "TrainCompleted",
    "TrainControl",
    "TrainFailed",
    "TrainProgress",
    "TrainRequested",
    "UnknownFields",
    "ce_headers",
    "event_id",
    "header",
    "new_job_id",
    "parse_event",
    "read_object",
    "record_for",
    "refuse_unknown_fields",
    "terminal_event_id",
    "unknown_fields",
]
