"""What parent and child say to each other over the pipe: a closed set of typed messages, and nothing else.

Imports no torch and no Kafka, so that both sides can. The child's files go through the workspace folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from mistudio_schemas import CorpusInfo, ErrorCode, ModelInfo, Phase, SAEFailure, SAEResult, TrainRequested
from mistudio_train.paces import Pace


@dataclass(frozen=True)
class Lease:
    """What a job may use while it runs: one GPU or the CPU, and which share of its free memory."""

    gpu: int | None
    """CUDA index; `None`: the CPU."""
    memory_share: float = 1.0
    """Of the device's free memory at the start, already reduced by CUDA_MEMORY_FRACTION."""


@dataclass(frozen=True)
class Logging:
    """How a process logs."""

    level: str = "INFO"
    format: Literal["text", "json"] = "text"


@dataclass(frozen=True)
class Push:
    """Where on the hub a result is put."""

    repository: str
    """`owner/name`."""
    token: str = field(repr=False)
    seconds: float
    """Time that it may take."""


@dataclass(frozen=True)
class JobSpec:
    """Parent to child, once: everything the child needs to know. Holds no store and no broker."""

    job_id: str
    run: int
    attempt: int
    request: TrainRequested
    """Without its token."""
    corpus: Path | None
    """The corpus file, local; `None`: a dataset of the hub, which the child fetches."""
    workspace: Path
    """The child's own folder, on a disk with room."""
    lease: Lease
    uri_prefix: str
    """Where the parent will put the files of `output`, ending in `/`; written into metadata."""
    bundle_max_bytes: int
    model: Path | None = None
    """The folder of a model that the parent has brought; `None`: the child finds it."""
    starts: Mapping[str, Path] = field(default_factory=dict)
    """The folders of trained SAEs, by the `init_from` that names them; a local one is where it was."""
    model_folders: tuple[Path, ...] = ()
    """Local folders that models may be loaded from."""
    allow_unsafe_models: bool = False
    """Pickled weights and remote code, off unless the operator wants them."""
    workspace_max_bytes: int | None = None
    """Of the disk that the job may take; `None`: what there is."""
    memory_limit_bytes: int | None = None
    """Upper bound of the child's memory; `None`: what the machine or its container has free."""
    token: str | None = field(default=None, repr=False)
    """The model hub's; a child sees no credential but this and that of `push`."""
    logging: Logging = Logging()
    checkpoint_seconds: float = 60.0
    """Between two checkpoints at least; longer where one takes more than 2% of the time."""
    identify: bool = False
    """Say which result it will be, before the work begins."""
    model_commit: str | None = None
    """What `model_revision` meant at the run's first attempt; `None`: it has not been resolved yet."""
    tell_log: bool = False
    """Say every line of the training logs."""
    corpus_commit: str | None = None
    """The same of a dataset's revision."""
    push: Push | None = None
    """`None`: the result stays here."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no line of the child may show."""
        return tuple(token for token in (self.token, self.push.token if self.push else None) if token)

    @property
    def output(self) -> Path:
        """The files of the result, laid out as below the attempt's prefix."""
        return self.workspace / "output"

    @property
    def scratch(self) -> Path:
        """Shards and whatever else is gone with the job."""
        return self.workspace / "scratch"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints: an earlier attempt's to go on from, and this one's."""
        return self.workspace / "checkpoints"


@dataclass(frozen=True)
class Progress:
    """Child to parent: where the job is. Field names are those of `TrainProgress`."""

    phase: Phase
    message: str
    progress: float
    """Share of the child's whole work, 0 to 1."""
    moved: bool = True
    """False from inside one long library call: alive, but not a step further, so a hang still looks like one."""
    estimated_time_remaining: int | None = None
    current_epoch: int = 0
    current_loss: float | None = None
    sae: str | None = None
    step: int | None = None
    total_steps: int | None = None
    tokens_done: int | None = None
    tokens_per_second: float | None = None
    reconstruction_loss: float | None = None
    sparsity_loss: float | None = None
    l0: float | None = None
    dead_share: float | None = None
    held_out_fvu: float | None = None
    held_out_l0: float | None = None
    memory_allocated_bytes: int | None = None
    memory_peak_bytes: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Loaded:
    """Child to parent: which model it is, as soon as that is known."""

    model_info: ModelInfo
    commit: str | None = None
    """Of the model's repository; `None` for a folder."""


@dataclass(frozen=True)
class DatasetFound:
    """Child to parent: at which commit the hub's dataset is read."""

    commit: str


@dataclass(frozen=True)
class Identified:
    """Child to parent: what the result will be the result of, as one name; said where the spec asks for it."""

    identity: str


@dataclass(frozen=True)
class Saved:
    """Child to parent: a checkpoint is whole on disk, and `checkpoints/{number:06d}.json` names its files."""

    number: int


@dataclass(frozen=True)
class Logged:
    """Child to parent: lines of an SAE's training log, all of it in order; said where the spec asks for it.

    A log that an attempt goes on with, or that was taken back to a checkpoint, is said again from its line 0.
    """

    sae: str
    first: int
    """Number of the first of these lines in the log, from 0."""
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Warned:
    """Child to parent: something that the requester should know."""

    message: str


@dataclass(frozen=True)
class Finished:
    """Child to parent, its last word: all files lie under `output`."""

    model_info: ModelInfo
    corpus: CorpusInfo
    saes: list[SAEResult]
    training_stats: dict[str, object]
    bundle_rows: int
    device: str
    memory_peak_bytes: int
    stopped_early: bool = False
    """Somebody asked for the result before training was over."""
    failed_saes: list[SAEFailure] = field(default_factory=list)
    """Those of several that could not be trained."""
    pace: Pace | None = None
    """How long it took; `None` of a job that was not done whole and in one go."""


@dataclass(frozen=True)
class Left:
    """Child to parent, its last word: it ended as it was asked to. No result: on `stop` nothing was trained yet."""


@dataclass(frozen=True)
class Failed:
    """Child to parent, its last word: why there is no result."""

    code: ErrorCode
    message: str
    hint: str
    retryable: bool
    traceback: list[str] = field(default_factory=list)


ChildMessage = Progress | Loaded | DatasetFound | Identified | Saved | Logged | Warned | Finished | Left | Failed
Wish = Literal["stop", "leave"]
"""Parent to child: `stop`, train no more and deliver what there is; `leave`, save a checkpoint and end."""


class LeftEarly(Exception):
    """Raised by the work to end as the parent has asked, without a result."""


class Parent(Protocol):
    """The child's end of the pipe."""

    def __call__(self, message: ChildMessage, /) -> None:
        """Say something."""
        ...

    @property
    def wish(self) -> Wish | None:
        """What the parent wants by now, if anything."""
        ...
