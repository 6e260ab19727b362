"""Settings of a worker and of the command line, from the environment. Nothing is read at import.

Secrets are `SecretStr`: they print as stars, and only the few lines that hand them to a client unwrap them.
"""

import os
import socket
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mistudio_schemas import Limits, Topics

from .messages import Logging

GIB = 1024**3
SinkName = Literal["tensorboard", "mlflow", "wandb"]
SINK_NAMES: tuple[SinkName, ...] = get_args(SinkName)
"""Those of their libraries, too."""
CREDENTIALS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)
"""Variables of libraries that hold secrets, or begin the names of such."""


class Settings(BaseSettings):
    """Each field is the environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(env_nested_delimiter="__", extra="ignore", use_attribute_docstrings=True)

    kafka_bootstrap_servers: str = "localhost:9092"
    """Comma-separated `host:port`."""
    kafka_group_id: str = "mistudio-train"
    """Workers of one group share the requests."""
    kafka_topic_prefix: str = ""
    """Put before every topic's name."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    kafka_sasl_username: str | None = None
    kafka_sasl_password: SecretStr | None = None
    kafka_ssl_cafile: Path | None = None
    """PEM file of the authorities to trust; unset: the system's."""
    kafka_ssl_certfile: Path | None = None
    kafka_ssl_keyfile: Path | None = None
    kafka_session_timeout_ms: int = Field(45_000, ge=1_000)
    """A worker that is silent for this long has left the group."""
    kafka_transactions: bool = True
    """Off for a broker that has none: the end of a job is then published at least once, not exactly once."""
    kafka_request_partitions: int = Field(64, ge=1)
    """Partitions of `train.requested` when the worker creates it: at least four times the GPUs that may serve it."""
    kafka_replication_factor: int | None = Field(None, ge=1)
    """Of topics that the worker creates; unset: three, or as many as there are brokers if fewer."""

    minio_endpoint: str = "localhost:9000"
    """`host:port` of MinIO or another S3 store."""
    minio_access_key: SecretStr = SecretStr("")
    minio_secret_key: SecretStr = SecretStr("")
    minio_secure: bool = False
    """HTTPS."""
    minio_bucket: str = "mistudio"
    """Created when it is missing."""
    minio_region: str = "us-east-1"
    store_path: Path | None = None
    """A folder in place of MinIO, for one machine."""
    store_prefix: str = ""
    """Put before every key in the bucket."""

    data_path: Path = Path("/data")
    """Base of the worker's disk: `samples/` (local corpora), `cache/` (workspaces, models)."""
    api_host: str = "0.0.0.0"
    api_port: int = Field(8001, ge=0, le=65535)
    """Health, metrics and GPU status; 0: a free one."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    cuda_memory_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's free memory that jobs may plan."""
    max_concurrent_jobs: int = Field(2, ge=1, le=64)
    """Slots; each runs one job at a time on its share of a GPU or of the CPU."""
    workspace_max_bytes: int | None = Field(None, ge=1)
    """Of the disk below `DATA_PATH` that one job may take; unset: what there is."""
    memory_limit_bytes: int | None = Field(None, ge=1)
    """Memory that all jobs on the CPU may use together; unset: what the machine or its container has free."""

    worker_id: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """Who this worker says it is."""
    local_corpus_folders: list[Path] = []
    """Folders that requests may read corpora from, besides `DATA_PATH/samples`; a JSON list."""
    local_model_folders: list[Path] = []
    """Folders that requests may load models from, and SAEs to go on from; a JSON list."""
    corpus_buckets: list[str] = []
    """Buckets that `s3://` corpora may come from, besides the worker's own; a JSON list."""
    model_buckets: list[str] = []
    """Buckets that `s3://` models, and SAEs to go on from, may come from, besides the worker's own; a JSON list."""
    model_cache_max_bytes: int = Field(100 * GIB, ge=1)
    """Of the disk below `DATA_PATH` that models from buckets may take together, for all workers on it."""
    allow_unsafe_models: bool = False
    """Load models with pickled weights. Whoever may write a request could then run code on the worker."""
    hf_token: SecretStr | None = None
    """The model hub's token; `HF_TOKEN_<NAME>` holds further ones that a request may name."""
    hub_push_owners: list[str] = []
    """Owners on the hub whose repositories requests may have results put in, with HF_TOKEN; a JSON list."""
    hub_push_seconds: float = Field(300.0, gt=0)
    """Time that this may take, after which the job ends without it."""
    max_attempts: int = Field(3, ge=1)
    """Tries of a run before a retryable error is final."""
    stall_seconds: float = Field(600.0, gt=0)
    """A child that has not moved for this long is ended."""
    loading_stall_seconds: float = Field(3600.0, gt=0)
    """The same while a model or a dataset is downloaded, or a model loaded."""
    grace_seconds: float = Field(25.0, gt=0)
    """Of a worker that is told to stop: time to save its jobs' checkpoints. Below the time after which it is killed."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Between two checkpoints at least; longer where saving one takes more than 2% of the time."""
    reuse_results: bool = False
    """Answer a request that is identical to an earlier one, model and corpus included, by the earlier one's result."""
    bundle_max_bytes: int = Field(4 * GIB, ge=1)
    """Size limit of `feature_activations.pt`."""
    sinks: Annotated[tuple[SinkName, ...], NoDecode] = ()
    """Where training curves are shown live: `tensorboard`, `mlflow`, `wandb`; comma-separated."""
    tensorboard_dir: Path | None = None
    """Folder of the runs' event files; unset: `DATA_PATH/tensorboard`."""
    mlflow_tracking_uri: SecretStr | None = None
    """MLflow's server, or a folder; it may hold a password."""
    mlflow_experiment_name: str = "mistudio-train"
    wandb_project: str = "mistudio-train"
    wandb_dir: Path | None = None
    """Folder that W&B makes its own `wandb/` in; unset: `DATA_PATH`. `WANDB_MODE` and the like are the library's."""
    sink_close_seconds: float = Field(10.0, gt=0)
    """Time that a sink has after its job, and at most keeps `run` or a worker from ending."""
    limits: Limits = Limits()
    """Bounds of a request, `LIMITS__MAX_HIDDEN_DIM=65536`; the defaults are the seed's."""

    @field_validator("sinks", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @classmethod
    def is_secret(cls, variable: str) -> bool:
        """Whether the environment variable of that name holds a secret."""
        field = cls.model_fields.get(variable.lower())
        named = variable.upper().startswith(CREDENTIALS)
        return named or (field is not None and "SecretStr" in str(field.annotation))

    @property
    def topics(self) -> Topics:
        """The topics' names."""
        return Topics(self.kafka_topic_prefix)

    @property
    def event_source(self) -> str:
        """`ce_source` of this worker's events."""
        return f"/mistudio-train/{self.worker_id}"

    @property
    def logging(self) -> Logging:
        """How this process and its children log."""
        return Logging(self.log_level, self.log_format)

    @property
    def corpus_folders(self) -> list[Path]:
        """Every folder that a request may read a corpus from."""
        return [self.data_path / "samples", *self.local_corpus_folders]

    @property
    def workspaces(self) -> Path:
        """The folder of the jobs' own folders."""
        return self.data_path / "cache" / "workspaces"

    @property
    def paces(self) -> Path:
        """The file that says how long the jobs here took; in the user's cache where there is no `DATA_PATH`."""
        if self.data_path.is_dir():
            return self.data_path / "paces.jsonl"
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "mistudio-train" / "paces.jsonl"

    @property
    def tensorboard_folder(self) -> Path:
        """The folder of the runs' event files."""
        return self.tensorboard_dir or self.data_path / "tensorboard"

    @property
    def wandb_folder(self) -> Path:
        """The folder that W&B writes in."""
        return self.wandb_dir or self.data_path

    @property
    def model_cache(self) -> Path:
        """The folder of models from buckets, which jobs and workers on this disk share."""
        return self.data_path / "cache" / "models"

    def hub_token(self, name: str | None) -> SecretStr | None:
        """The hub's token of that name, from `HF_TOKEN_<NAME>`; the worker's own when no name is given.

        Raises:
            KeyError: if the operator holds no token of that name.

        """
        if name is None:
            return self.hf_token
        return SecretStr(os.environ[f"HF_TOKEN_{name.upper()}"])
