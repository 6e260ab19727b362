"""Events as Kafka records: CloudEvents 1.0, binary content mode. Plain bytes in and out; no Kafka client is needed.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from .base import Contract
from .events import TrainCancelled, TrainCompleted, TrainControl, TrainFailed, TrainProgress
from .requests import TrainRequested
from .topics import Topics

Headers = list[tuple[str, bytes]]
Event = TrainRequested | TrainProgress | TrainCompleted | TrainFailed | TrainCancelled | TrainControl

EVENT_TYPES: dict[str, type[Contract]] = {
    "mistudio.train.requested.v1": TrainRequested,
    "mistudio.train.progress.v1": TrainProgress,
    "mistudio.train.completed.v1": TrainCompleted,
    "mistudio.train.failed.v1": TrainFailed,
    "mistudio.train.cancelled.v1": TrainCancelled,
    "mistudio.train.control.v1": TrainControl,
}
"""`ce_type` of each model. A breaking change is a new type, never a changed meaning."""

_TYPE_OF = {model: name for name, model in EVENT_TYPES.items()}
_RUNS = uuid.UUID("6f6dba0e-5b3c-5f0a-9a63-0c7d1c8a3a52")


@dataclass(frozen=True)
class KafkaRecord:
    """What a producer sends: `await producer.send_and_wait(**record.as_dict())` with aiokafka."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers

    def as_dict(self) -> dict[str, object]:
        """The fields as keyword arguments."""
        return {"topic": self.topic, "key": self.key, "value": self.value, "headers": self.headers}


def record_for(
    event: Event, *, source: str, topics: Topics | None = None, traceparent: str | None = None
) -> KafkaRecord:
    """The record that carries `event`, keyed by its job.

    Args:
        source: who speaks, a URI reference such as `/my-service`.
        traceparent: W3C trace context to carry through.

    Raises:
        ValueError: if a request has no job id (`new_job_id()` makes one), or a number is not finite.

    """
    if event.job_id is None:
        raise ValueError("the request needs a job_id: TrainRequested(job_id=new_job_id(), ...)")
    return KafkaRecord(
        topic=_topic_of(event, topics or Topics()),
        key=event.job_id.encode(),
        value=event.to_json(),
        headers=ce_headers(event, source=source, traceparent=traceparent),
    )


def ce_headers(event: Event, *, source: str, traceparent: str | None = None) -> Headers:
    """The CloudEvents attributes of `event` as Kafka headers."""
    time = getattr(event, "time", None) or datetime.now(UTC)
    attributes = {
        "ce_specversion": "1.0",
        "ce_id": event_id(event),
        "ce_source": source,
        "ce_type": _TYPE_OF[type(event)],
        "ce_time": time.isoformat(),
        "ce_subject": event.job_id or "",
        "content-type": "application/json",
    }
    if traceparent:
        attributes["traceparent"] = traceparent
    return [(name, value.encode()) for name, value in attributes.items()]


def event_id(event: Event) -> str:
    """`ce_id`. A run has one end, so its terminal event has one id, whichever worker publishes it and however often."""
    if isinstance(event, TrainCompleted | TrainFailed | TrainCancelled):
        return terminal_event_id(event.job_id, event.run)
    return str(uuid.uuid4())


def terminal_event_id(job_id: str, run: int | None) -> str:
    """uuid5 of job and run."""
    return str(uuid.uuid5(_RUNS, f"{job_id}/{run}"))


def header(headers: Iterable[tuple[str, bytes]] | Mapping[str, bytes], name: str) -> str | None:
    """A header's text; `None` where it is missing or is no UTF-8."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    for key, value in pairs:
        if key == name and value is not None:
            try:
                return value.decode()
            except UnicodeDecodeError:
                return None
    return None


def parse_event(value: bytes, headers: Iterable[tuple[str, bytes]]) -> Contract:
    """The event in a record.

    Raises:
        ValueError: if `ce_type` is missing or unknown, or the value does not fit it.

    """
    kind = header(headers, "ce_type")
    model = EVENT_TYPES.get(kind or "")
    if model is None:
        raise ValueError(f"unknown ce_type {kind!r}; this version knows {', '.join(EVENT_TYPES)}")
    return model.from_json(value)


def _topic_of(event: Event, topics: Topics) -> str:
    return {
        TrainRequested: topics.requested,
        TrainProgress: topics.progress,
        TrainCompleted: topics.completed,
        TrainFailed: topics.failed,
        TrainCancelled: topics.cancelled,
        TrainControl: topics.control,
    }[type(event)]
