"""Bytes that are no request, as they go to the dead-letter topic: untouched, with the reason in headers.

Header names are Spring Kafka's, which dead-letter tools read; numbers are decimal text.
"""

from mistudio_schemas import KafkaRecord
from mistudio_train.settings import Settings

from .intake import Message


def dead_letter(message: Message, reason: Exception, settings: Settings) -> KafkaRecord:
    """The record that keeps `message`, its own headers before the reason's."""
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
    return KafkaRecord(
        topic=settings.topics.dead_letter,
        key=message.key,
        value=message.value,
        headers=[*message.headers, *((name, text.encode()) for name, text in why.items())],
    )
