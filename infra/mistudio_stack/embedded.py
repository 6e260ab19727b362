"""A broker inside this process: librdkafka's mock cluster, out of the confluent-kafka wheel, by ctypes.

It speaks the Kafka protocol on loopback ports, all in memory: enough for a demo and for fast tests of one
worker, at least once. It has no transactions and no topic creation, and is no evidence about either. Whoever joins a
group after its first member waits for the session timeout, less a second.
"""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import StackError

PRODUCER = 0
ERRORS_ONLY = b"3"
FIRST_JOIN_DELAY_MS = 50
"""How long a new group waits for further members; the mock's own default is 3 s."""

# Results and arguments of each function that we call; a handle is a pointer.
_HANDLE, _TEXT, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "rd_kafka_conf_new": (_HANDLE, []),
    "rd_kafka_conf_set": (_INT, [_HANDLE, _TEXT, _TEXT, _TEXT, ctypes.c_size_t]),
    "rd_kafka_new": (_HANDLE, [_INT, _HANDLE, _TEXT, ctypes.c_size_t]),
    "rd_kafka_destroy": (None, [_HANDLE]),
    "rd_kafka_mock_cluster_new": (_HANDLE, [_HANDLE, _INT]),
    "rd_kafka_mock_cluster_destroy": (None, [_HANDLE]),
    "rd_kafka_mock_cluster_bootstraps": (_TEXT, [_HANDLE]),
    "rd_kafka_mock_topic_create": (_INT, [_HANDLE, _TEXT, _INT, _INT]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [_HANDLE, ctypes.c_int32]),
}


@contextmanager
def embedded_kafka(topics: Mapping[str, int]) -> Iterator[str]:
    """A broker with these topics, by name and number of partitions; yields its bootstrap servers.

    Raises:
        StackError: if the confluent-kafka wheel is missing or other than expected, or a topic is refused.

    """
    library = _library()
    client = _client(library)
    cluster = library.rd_kafka_mock_cluster_new(client, 1)
    try:
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, FIRST_JOIN_DELAY_MS)
        for name, partitions in topics.items():
            if library.rd_kafka_mock_topic_create(cluster, name.encode(), partitions, 1):
                raise StackError(f"The embedded broker refused the topic {name!r}", "Choose another name")
        yield library.rd_kafka_mock_cluster_bootstraps(cluster).decode()
    finally:
        library.rd_kafka_mock_cluster_destroy(cluster)
        library.rd_kafka_destroy(client)


def _library() -> ctypes.CDLL:
    """The librdkafka of the wheel, loaded, its functions declared."""
    try:
        import confluent_kafka
    except ImportError as error:
        raise StackError("The embedded broker needs confluent-kafka", "Install the extra `demo`") from error
    package = Path(confluent_kafka.__file__).parent
    linux, mac = package.with_name("confluent_kafka.libs"), package / ".dylibs"
    found = [*linux.glob("librdkafka*.so*"), *mac.glob("librdkafka*.dylib")]
    if not found:
        raise StackError(f"No librdkafka beside {package}", "Install confluent-kafka as a wheel from the registry")
    library = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _client(library: ctypes.CDLL) -> int:
    """The librdkafka client that a mock cluster lives in; it produces nothing itself."""
    message = ctypes.create_string_buffer(512)
    conf = library.rd_kafka_conf_new()
    library.rd_kafka_conf_set(conf, b"log_level", ERRORS_ONLY, message, len(message))
    client: int | None = library.rd_kafka_new(PRODUCER, conf, message, len(message))
    if client is None:
        raise StackError(f"The embedded broker did not start: {message.value.decode()}", "See the README")
    return client
