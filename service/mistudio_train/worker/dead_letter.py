"""Bytes that are no request, as they go to the dead-letter topic: untouched, with the reason in headers.

Header names are Spring Kafka's, which dead-letter tools read; numbers are decimal text.
"""

from mistudio_schemas import KafkaRecord
from mistudio_train.settings import Settings

from .intake import Message
from .kafka import MAX_MESSAGE_BYTES
from .records import sendable


def dead_letter(message: Message, reason: Exception, settings: Settings) -> KafkaRecord:
    """The record that keeps `message`, its own headers before the reason's.

    What no record can hold is left out, and said so: the original is where the headers tell.
    """
    why = {
        "kafka_dlt-original-topic": message.topic,
        "kafka_dlt-original-partition": str(message.partition),
        "kafka_dlt-original-offset": str(message.offset),
        "kafka_dlt-original-timestamp": str(message.timestamp),
        "kafka_dlt-original-consumer-group": settings.kafka_group_id,
        "kafka_dlt-exception-fqcn": f"{type(reason).__module__}.{type(reason).__qualname__}",
        "kafka_dlt-exception-message": str(reason)[:1000],
        "kafka_dlt-attempt": "1",
    }
    key, value = message.key, message.value
    headers = tuple((sendable(name), content) for name, content in message.headers)
    if headers != message.headers:
        why["mistudio-header-names-escaped"] = "true"
    if _size(headers) > MAX_MESSAGE_BYTES // 2:
        headers, why["mistudio-headers-left-out"] = (), f"{_size(headers)} bytes"
    if len(key or b"") + len(value or b"") + _size(headers) > MAX_MESSAGE_BYTES:
        # it came compressed
        key, value, why["mistudio-value-left-out"] = None, b"", f"{len(key or b'')} and {len(value or b'')} bytes"
    if key is None and value is None:
        # Kafka has such records, but the client refuses to send one
        value, why["mistudio-value-left-out"] = b"", "null"
    return KafkaRecord(
        topic=settings.topics.dead_letter,
        key=key,
        value=value,
        headers=[*headers, *((name, text.encode()) for name, text in why.items())],
    )


def _size(headers: tuple[tuple[str, bytes], ...]) -> int:
    return sum(len(name.encode()) + len(value or b"") for name, value in headers)
