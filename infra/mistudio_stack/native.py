"""Kafka and MinIO as ordinary processes on free ports, with handles to break them. No Docker, no root.

It owns the two processes and what they write under the folder it is given; the programs come from `artefacts`.
"""

import base64
import http.client
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import artefacts, broker
from .errors import StackError
from .process import Server, free_ports
from .stack import ACCESS_KEY, Stack

LOG4J = Path(__file__).with_name("log4j2.properties")


@dataclass(frozen=True, kw_only=True)
class NativeStack(Stack):
    """A stack whose servers can be killed, paused and started again on the same port and data."""

    kafka: Server
    minio: Server


@contextmanager
def native_stack() -> Iterator[NativeStack]:
    """A new Kafka and a new MinIO with empty data, gone with their data at the end, or when this process dies.

    Raises:
        StackError: if a program is missing, or a server does not come up.

    """
    with tempfile.TemporaryDirectory(prefix="mistudio-stack-") as folder, ExitStack() as servers:
        yield start(Path(folder), servers)


def start(folder: Path, servers: ExitStack) -> NativeStack:
    """Start both servers with their data and logs under `folder`; `servers` ends them."""
    require_programs()
    kafka_port, controller_port, minio_port, console_port = free_ports(4)
    secret = secrets.token_hex(16)
    kafka = kafka_server(folder, kafka_port, controller_port)
    minio = _minio(folder, minio_port, console_port, secret)
    for server in (minio, kafka):
        servers.callback(server.kill)
        server.start()
    return NativeStack(
        backend="native",
        bootstrap_servers=f"127.0.0.1:{kafka_port}",
        minio_endpoint=f"127.0.0.1:{minio_port}",
        access_key=ACCESS_KEY,
        secret_key=secret,
        kafka=kafka,
        minio=minio,
    )


def require_programs() -> None:
    """Check that the programs that the native stack needs are installed, before anything is built.

    Raises:
        StackError: if one is missing; it names all that are.

    """
    if missing := artefacts.missing_programs():
        raise StackError(
            "Kafka and MinIO cannot run on this machine without a Docker engine: it lacks " + ", ".join(missing),
            "Install these, or start a Docker engine, or name running servers by KAFKA_BOOTSTRAP_SERVERS, "
            "MINIO_ENDPOINT, MINIO_ACCESS_KEY and MINIO_SECRET_KEY",
        )


def prepare() -> None:
    """Build what the native stack needs, so that a later start is quick."""
    require_programs()
    artefacts.kafka_jars()
    artefacts.minio_binary()


def kafka_server(
    folder: Path,
    port: int,
    controller_port: int,
    protocol: str = "PLAINTEXT",
    settings: Mapping[str, str] | None = None,
) -> Server:
    """A formatted broker, not yet started.

    Args:
        folder: of its data and log.
        port: for clients.
        controller_port: for itself.
        protocol: that clients speak, `SASL_SSL` say, which needs more `settings`.

    """
    properties = folder / "server.properties"
    listeners = {
        "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller_port}",
        "listeners": f"CLIENTS://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"CLIENTS://127.0.0.1:{port}",
        "listener.security.protocol.map": f"CLIENTS:{protocol},CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "CLIENTS",
        "log.dirs": str(folder / "kafka"),
    }
    properties.write_text(broker.as_properties(broker.SETTINGS | listeners | dict(settings or {})))
    java = [
        *("java", "-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
        *(f"-Dlog4j2.configurationFile={LOG4J}", "-cp", f"{artefacts.kafka_jars()}/*"),
    ]
    _format(java, properties)
    return Server(
        "Kafka", [*java, "kafka.Kafka", str(properties)], folder / "kafka.log", lambda said: broker.STARTED in said
    )


def _format(java: list[str], properties: Path) -> None:
    """Give the empty data folder its cluster id."""
    # The leading zero byte keeps the text from beginning with "-", which the tool would take for an option.
    cluster_id = base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15)).decode().rstrip("=")
    tool = [*java, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties), "--standalone"]
    result = subprocess.run(tool, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if result.returncode != 0:
        raise StackError(f"Kafka's storage tool failed:\n{result.stdout[-2000:].strip()}\n", "Is Java 17 or newer?")


def _minio(folder: Path, port: int, console_port: int, secret: str) -> Server:
    data = folder / "minio"
    data.mkdir()
    listen = ["--address", f"127.0.0.1:{port}", "--console-address", f"127.0.0.1:{console_port}"]
    return Server(
        "MinIO",
        [str(artefacts.minio_binary()), "server", "--quiet", *listen, str(data)],
        folder / "minio.log",
        lambda _said: minio_is_ready(f"127.0.0.1:{port}"),
        {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": secret, "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"},
    )


def minio_is_ready(endpoint: str) -> bool:
    """Whether the MinIO at `host:port` takes requests."""
    connection = http.client.HTTPConnection(endpoint, timeout=5)
    try:
        connection.request("GET", "/minio/health/cluster")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()
