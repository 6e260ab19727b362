"""What every backend yields: where a Kafka and an S3 store are. It starts nothing and imports no backend."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Backend = Literal["external", "docker", "native"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

ACCESS_KEY = "mistudio"
"""Of the stores that we start ourselves; the secret key is new each time."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A Kafka and an S3 store that answer."""

    backend: Backend
    bootstrap_servers: str
    """Comma-separated `host:port` of Kafka."""
    minio_endpoint: str
    """`host:port` of the store."""
    access_key: str
    secret_key: str = field(repr=False)
    secure: bool = False
    """The store is reached by HTTPS."""

    def env(self) -> dict[str, str]:
        """The worker's environment variables that point at this stack."""
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "MINIO_ENDPOINT": self.minio_endpoint,
            "MINIO_ACCESS_KEY": self.access_key,
            "MINIO_SECRET_KEY": self.secret_key,
            "MINIO_SECURE": str(self.secure).lower(),
        }
