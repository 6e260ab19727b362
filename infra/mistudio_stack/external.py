"""A Kafka and an S3 store that somebody else runs, named by the worker's own environment variables. It only looks."""

import os
import socket

from .errors import StackError
from .stack import Stack

REQUIRED = ("KAFKA_BOOTSTRAP_SERVERS", "MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY")


def is_named() -> bool:
    """Whether the environment names a Kafka or a store."""
    return "KAFKA_BOOTSTRAP_SERVERS" in os.environ or "MINIO_ENDPOINT" in os.environ


def external_stack() -> Stack:
    """The servers that the environment names.

    Raises:
        StackError: if it names only a part of them, or one takes no connection.

    """
    if missing := [name for name in REQUIRED if not os.environ.get(name)]:
        raise StackError(
            f"The environment names running servers only in part: {', '.join(missing)} not set",
            "Set all four, or unset them, or choose MISTUDIO_STACK=native or docker",
        )
    stack = Stack(
        backend="external",
        bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        minio_endpoint=os.environ["MINIO_ENDPOINT"],
        access_key=os.environ["MINIO_ACCESS_KEY"],
        secret_key=os.environ["MINIO_SECRET_KEY"],
        secure=os.environ.get("MINIO_SECURE", "").lower() in {"1", "true", "yes", "on"},
    )
    _must_listen("Kafka", stack.bootstrap_servers.split(",")[0], 9092)
    _must_listen("The S3 store", stack.minio_endpoint, 443 if stack.secure else 80)
    return stack


def _must_listen(name: str, address: str, default_port: int) -> None:
    host, _, port = address.strip().rpartition(":") if ":" in address else (address, "", str(default_port))
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise StackError(
            f"{name} at {address} takes no connection ({error})", "Start it, name another, or unset the variables"
        ) from error
