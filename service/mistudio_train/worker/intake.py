"""What a message is: no request, a request that we cannot accept, or a request. Judges bytes only; asks nobody."""

import logging
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import SecretStr, TypeAdapter, ValidationError

from mistudio_schemas import KINDS, ErrorCode, Limits, TrainRequested, header, read_object, unknown_fields
from mistudio_schemas.kafka import EVENT_TYPES
from mistudio_schemas.requests import JobId
from mistudio_train.errors import RequestRefused, brief

logger = logging.getLogger(__name__)

UNKNOWN_NAMED = 50
"""So many unknown fields are named."""
NAME_CHARACTERS = 200
SENTENCE_CHARACTERS = 300
REQUEST_TYPES = frozenset(name for name, model in EVENT_TYPES.items() if model is TrainRequested)
_JOB_ID: TypeAdapter[str] = TypeAdapter(JobId)
_WRONG_SHAPE = frozenset({"missing", "union_tag_invalid", "union_tag_not_found", "json_invalid"})


class NotARequest(Exception):
    """The bytes are no request at all: for the dead-letter topic."""


@dataclass(frozen=True)
class Message:
    """A record of `train.requested`, as the broker delivered it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    """Milliseconds since the epoch."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()

    @property
    def place(self) -> str:
        """For people: `train.requested-3@17`."""
        return f"{self.topic}-{self.partition}@{self.offset}"


@dataclass(frozen=True)
class Intake:
    """A message that names a job: either its request, or why there is none."""

    job_id: str
    request: TrainRequested | None
    refusal: RequestRefused | None
    token: SecretStr | None = None
    """The deprecated `huggingface_token`, taken out of the request."""
    unknown: list[str] = field(default_factory=list)
    traceparent: str | None = None


def read(message: Message, limits: Limits) -> Intake:
    """Read a message.

    Raises:
        NotARequest: if it is no JSON object, is of another type, or names neither a model nor a corpus; or if a defect
            of ours keeps it from being read: it would again, and for ever hold up what is queued behind it.

    """
    try:
        return _read(message, limits)
    except NotARequest:
        raise
    except Exception as defect:
        logger.exception("a defect keeps %s from being read", message.place)
        raise NotARequest(
            f"a defect of the worker: {type(defect).__name__}; publish it again to one without"
        ) from defect


def _read(message: Message, limits: Limits) -> Intake:
    raw = _object(message)
    job_id, valid = _job_id(raw.get("job_id"), message)
    request, refusal, token = None, None, None
    try:
        request = TrainRequested.model_validate(raw | {"job_id": job_id}, context={"limits": limits})
        token = request.huggingface_token
        request = request.model_copy(update={"huggingface_token": None})
        request.model_fields_set.discard("huggingface_token")
    except ValidationError as error:
        refusal = refusal_of(error)
    if not valid:
        refusal = RequestRefused(
            "job_id: letters, digits, '.', '_' and '-' only, 128 at most", "Choose another job_id."
        )
    return Intake(
        job_id,
        request if refusal is None else None,
        refusal,
        token,
        [brief(name, NAME_CHARACTERS) for name in islice(unknown_fields(TrainRequested, raw), UNKNOWN_NAMED)],
        _traceparent(message),
    )


def _traceparent(message: Message) -> str | None:
    """W3C's trace context, if it can be one: it is copied into every event of the job."""
    given = header(message.headers, "traceparent")
    return given if given is not None and len(given) <= NAME_CHARACTERS else None


def _object(message: Message) -> dict[str, Any]:
    kind = header(message.headers, "ce_type")
    if kind is not None and kind not in REQUEST_TYPES:
        raise NotARequest(f"ce_type {brief(kind, NAME_CHARACTERS)!r} is unknown to this version")
    if message.value is None:
        raise NotARequest("the message has no value")
    try:
        raw = read_object(message.value)
    except (ValueError, RecursionError) as error:
        raise NotARequest(f"no JSON object: {error}") from error
    if "model_name" not in raw and "corpus_file" not in raw:
        raise NotARequest("a JSON object without model_name and corpus_file")
    return raw


def _job_id(given: object, message: Message) -> tuple[str, bool]:
    """The job's id, and whether the one given may be used. A redelivery derives the same id."""
    derived = re.sub(r"[^A-Za-z0-9._-]", "_", f"job-{message.topic}-{message.partition}-{message.offset}")[-128:]
    if given is None:
        return derived.lstrip("._-"), True
    try:
        return _JOB_ID.validate_python(given, strict=True), True
    except ValidationError:
        return derived.lstrip("._-"), False


def refusal_of(error: ValidationError) -> RequestRefused:
    """One sentence for a person out of pydantic's findings, without the values (one may be a token)."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    sentences = []
    for one in found[:5]:
        where = ".".join(str(part) for part in one["loc"] if part not in KINDS)
        what = one["msg"].removeprefix("Value error, ")
        sentences.append(brief(f"{where}: {what}" if where else what, SENTENCE_CHARACTERS))
    shape = any(one["type"] in _WRONG_SHAPE or one["type"].endswith(("_type", "_parsing")) for one in found)
    code = ErrorCode.REQUEST_INVALID if shape else ErrorCode.REQUEST_OUT_OF_RANGE
    hint = "Correct the field and publish the request again; its schema is schemas/json/train.requested.v1.json."
    if any(one["type"].startswith("union_tag") for one in found):
        hint = f"The kinds of SAE that this version trains are {', '.join(KINDS)}."
    return RequestRefused("; ".join(sentences), hint, code)
