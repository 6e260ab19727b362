"""Kafka and MinIO as containers, by testcontainers' generic container. It needs a Docker engine that answers.

Everything about images, listeners inside a container and ports of the host is here and nowhere else.
"""

import gc
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

from . import broker
from .errors import StackError
from .process import free_ports
from .stack import ACCESS_KEY, Stack

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

KAFKA_IMAGE = "apache/kafka:4.3.1"
MINIO_IMAGE = "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"
"""Another one by the variable `MINIO_IMAGE`."""
KAFKA_PORT, S3_PORT = 9092, 9000


def engine_answers() -> bool:
    """Whether testcontainers is installed and a Docker engine answers."""
    try:
        import docker  # type: ignore[import-untyped]
        import testcontainers  # noqa: F401
    except ImportError:
        return False
    with warnings.catch_warnings():
        # the library drops a socket that nobody has answered on, without closing it
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with closing(docker.from_env(timeout=5)) as client:
                return bool(client.ping())
        except docker.errors.DockerException:
            return False
        finally:
            gc.collect()


@contextmanager
def container_stack() -> Iterator[Stack]:
    """A new Kafka and a new MinIO in containers, removed with their data at the end.

    If this process is killed, testcontainers' reaper removes them, where it is not disabled.

    Raises:
        StackError: if no engine answers, or a container does not come up.

    """
    with ExitStack() as containers:
        stack, _ids = start(containers)
        yield stack


def start(containers: ExitStack, *, outlive: bool = False) -> tuple[Stack, list[str]]:
    """Start both containers; `containers` removes them. Also gives their ids.

    With `outlive` testcontainers' reaper is kept away from them, so that they go on when this process ends.

    Raises:
        StackError: if no engine answers, or a container does not come up.

    """
    if not engine_answers():
        raise StackError(
            "No Docker engine answers, or testcontainers is not installed",
            "Start the engine and install the extra `containers`, or choose MISTUDIO_STACK=native",
        )
    if outlive:
        _without_reaper()
    secret = secrets.token_hex(16)
    [kafka_port] = free_ports(1)
    minio = _minio(secret)
    # What the broker tells its clients must be known before it starts, so its port on the host is chosen here.
    host = minio.get_docker_client().host()
    kafka = _kafka(host, kafka_port)
    for container in (minio, kafka):
        _up(containers, container)
    stack = Stack(
        backend="docker",
        bootstrap_servers=f"{host}:{kafka_port}",
        minio_endpoint=f"{host}:{minio.get_exposed_port(S3_PORT)}",
        access_key=ACCESS_KEY,
        secret_key=secret,
    )
    return stack, [minio.get_container_id(), kafka.get_container_id()]


def is_running(container_id: str) -> bool:
    """Whether a container that `start` has started still runs."""
    import docker

    try:
        with closing(docker.from_env()) as client:
            return bool(client.containers.get(container_id).status == "running")
    except docker.errors.DockerException:
        return False


def remove(container_id: str) -> None:
    """End a container that `start` has started, and delete its data. One that is gone already is no error."""
    import docker

    try:
        with closing(docker.from_env()) as client:
            client.containers.get(container_id).remove(force=True, v=True)
    except docker.errors.NotFound:
        return
    except docker.errors.DockerException as error:
        raise StackError(f"Container {container_id[:12]} could not be removed: {error}", "Start the engine") from error


def _without_reaper() -> None:
    from testcontainers.core.config import testcontainers_config

    testcontainers_config.ryuk_disabled = True


def _up(containers: ExitStack, container: "DockerContainer") -> None:
    import docker

    containers.callback(container.stop)
    try:
        container.start()
    except (docker.errors.DockerException, TimeoutError) as error:
        raise StackError(
            f"The container of {container.image} did not come up: {error}",
            "Is its image to be had? Set TESTCONTAINERS_RYUK_DISABLED=true where only the reaper's image is not, "
            "or choose MISTUDIO_STACK=native",
        ) from error


def _kafka(host: str, port: int) -> "DockerContainer":
    """A broker with three listeners: one for the host, one for itself, one for its controller.

    It must reach its own inter-broker listener, or every transaction waits for ever.
    """
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    listeners = {
        "controller.quorum.voters": "1@localhost:9093",
        "listeners": f"HOST://:{KAFKA_PORT},CONTROLLER://:9093,INSIDE://localhost:9094",
        "advertised.listeners": f"HOST://{host}:{port},INSIDE://localhost:9094",
        "listener.security.protocol.map": "HOST:PLAINTEXT,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "INSIDE",
    }
    return (
        DockerContainer(KAFKA_IMAGE, env=broker.as_environment(broker.SETTINGS | listeners))
        .with_bind_ports(KAFKA_PORT, port)
        .waiting_for(LogMessageWaitStrategy(broker.STARTED).with_poll_interval(0.2))
    )


def _minio(secret: str) -> "DockerContainer":
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import HttpWaitStrategy

    ready = HttpWaitStrategy(S3_PORT, "/minio/health/cluster").with_poll_interval(0.2)
    return (
        DockerContainer(
            os.environ.get("MINIO_IMAGE", MINIO_IMAGE),
            env={"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": secret},
            command="server /data",
        )
        .with_exposed_ports(S3_PORT)
        .waiting_for(ready)
    )
