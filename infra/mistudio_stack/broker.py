"""The settings of a broker that stands alone and is quick to start, join and restart, for every backend alike.

Listeners and folders are not here: they are the backend's.
"""

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "message.max.bytes": "10485760",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # The default of 128 MiB does not fit a small heap.
    "log.cleaner.dedupe.buffer.size": "8388608",
    # A broker that was killed may register again after this long; the default makes a restart wait for 9 s.
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "500",
}
STARTED = "Kafka Server started"


def as_properties(settings: dict[str, str]) -> str:
    """The text of a `server.properties`."""
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def as_environment(settings: dict[str, str]) -> dict[str, str]:
    """The variables that the official image turns into the same settings."""
    return {f"KAFKA_{name.upper().replace('.', '_')}": value for name, value in settings.items()}
