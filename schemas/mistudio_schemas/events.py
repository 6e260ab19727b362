"""What the worker says: progress, and one of three ends. What others tell it besides requests: controls.

Every event carries the seed's `TrainingStatus` fields by their names; `TrainCompleted` the `TrainingResult` fields too.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from .base import Contract
from .errors import ErrorCode
from .requests import JobId

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

Status = Literal["queued", "running", "completed", "failed", "cancelling", "cancelled"]
Phase = Literal[
    "queued",
    "accepting",
    "fetching",
    "planning",
    "loading",
    "extracting",
    "training",
    "evaluating",
    "exporting",
    "uploading",
    "publishing",
    "ended",
]


def now() -> datetime:
    """The time of an event, in UTC."""
    return datetime.now(UTC)


class ModelInfo(Contract):
    """The language model, as the seed describes it."""

    model_name: str
    """As requested."""
    actual_model_loaded: str
    """What was loaded: name or folder, with the resolved commit after an `@` where there is one."""
    architecture: str
    """The family, as the model's config names it (`llama`, `bert`)."""
    total_layers: int
    selected_layer: int
    hidden_size: int
    vocab_size: int
    requires_token: bool
    """Whether the hub asked for a token (a gated or private model)."""


class ArtifactRef(Contract):
    """One object that a run left, and how to know that it is whole."""

    name: str
    """Its path below the attempt's prefix, `sae/sae_weights.safetensors`."""
    bucket: str
    """The bucket; for a directory store, the folder."""
    key: str
    uri: str
    """`s3://bucket/key`, or `file:///…` from a directory store."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: Sha256
    media_type: str


class CorpusInfo(Contract):
    """What was read, kept and cut."""

    texts: int
    """Texts used."""
    texts_dropped: int = 0
    """Texts that are not used, for any of the next three reasons."""
    texts_empty: int = 0
    """Dropped because they are empty or blank."""
    texts_too_short: int = 0
    """Dropped because they have fewer characters than `min_text_characters`."""
    texts_too_long: int = 0
    """Dropped because they have more characters than `max_text_characters`."""
    texts_beyond_budget: int = 0
    """Not used because the token budget was used up before them; not among `texts_dropped`."""
    texts_truncated: int = 0
    """Used, but cut at the length limit (mean pooling only)."""
    tokens: int
    """Real tokens that went through the model."""
    tokens_truncated: int = 0
    """Tokens beyond the length limit, not seen (mean pooling only)."""
    windows: int = 0
    """Sequences that went through the model: pieces of texts (token pooling; equal to `texts` when none was longer than
    the limit), or several texts in each (`packing`)."""
    rows: int
    """Rows of activations: texts when mean-pooled, tokens otherwise."""
    sha256: Sha256
    """Of the file; of several files, of their hashes in order, a line each."""
    commit: str | None = None
    """Of a dataset of the hub."""


class RowsInfo(Contract):
    """What became of the rows of activations at one site."""

    total: int
    training: int
    """Trained on."""
    held_out: int
    """Of texts that no SAE is trained on: the figures are of these."""
    left_out: int
    """Neither trained on nor judged by, as the request's `left_out` says."""
    first_token: int
    """Those that are the first token that the model sees; found also where they are not left out."""
    high_norm: int
    """Others whose norm is above `high_norm_ratio` times the median."""
    median_norm: float | None = None
    """Of the rows' norms; `null` where a row is a whole text."""


class CrossEntropy(Contract):
    """What the language model loses when rows are replaced, in nats a predicted token, on held-out texts."""

    tokens: int
    """Predicted ones."""
    masked: bool
    """Whether masked tokens were predicted (an encoder), or each next one."""
    clean: float
    """Nothing replaced."""
    spliced: float
    """Rows replaced by their reconstructions."""
    zero: float
    """Rows replaced by zero."""
    mean: float
    """Rows replaced by their mean over the training rows."""
    recovered_zero: float | None
    """(zero - spliced) / (zero - clean)."""
    recovered_mean: float | None
    """(mean - spliced) / (mean - clean)."""


class Probing(Contract):
    """How well a few features tell a label of the texts: k-sparse probing after Gurnee et al. 2023, arXiv:2305.01610.

    Of each label a logistic regression on the k features whose means with and without it lie farthest apart, judged on
    a quarter of the texts that it has not seen. Of tokens a text's feature is its highest.
    """

    column: str
    """Of the corpus, that holds the labels."""
    labels: int
    """That were probed, at most 50; each is that of 10 texts on either side at least."""
    texts: int
    """With a label, that it was done on."""
    features: list[int]
    """Each k."""
    balanced_accuracy: list[float]
    """Of each k: the mean over the labels of the shares of texts with and without it that are told; 0.5 is chance."""
    all_dimensions: float
    """The same with all dimensions of the model's activations, the mean over a text's tokens, in place of features."""


class SAEMetrics(Contract):
    """How good an SAE is, on the held-out rows; where there are none, on the rows it was trained on.

    `null`: not defined for this data. Rows that were left out of training count only where it says so.
    """

    held_out: bool | None = None
    """Whether the rows were held out."""
    rows: int | None = None
    """How many they are."""
    final_loss: float | None
    """Mean training loss of the last epoch, of the weights that are saved."""
    mse: float | None
    """Mean over rows and dimensions of the squared error."""
    fvu: float | None
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2."""
    explained_variance: float | None
    """1 - fvu."""
    cosine: float | None
    """Mean cosine similarity of rows and reconstructions."""
    l0: float | None
    """Mean number of active latents a row."""
    fraction_active: float | None
    """l0 / d_sae: what the seed calls sparsity."""
    dead_share: float | None
    """Share of the latents that are active on none of these rows."""
    never_active_share: float | None = None
    """Share of the latents that are active on no row at all, training rows included."""
    training_fvu: float | None = None
    """`fvu` on the rows it was trained on; much lower than `fvu`: it knows them by heart."""
    fvu_ordinary: float | None = None
    """`fvu` without first tokens and high norms, also where these were trained on."""
    fvu_outliers: float | None = None
    """Of first tokens and high norms, held out or not."""
    outliers_variance_share: float | None = None
    """Their share of the variance of all rows."""
    firing_histogram: list[int] | None = None
    """Numbers of latents by the share of all rows that they are active on: never, below 1e-6, then twelve bins of half
    a power of ten up to 1."""
    cross_entropy: CrossEntropy | None = None
    """With the reconstruction in the language model's place; `null`: of whole texts, or no text was held out, or there
    was no room."""
    probing: Probing | None = None
    """By `label_column`; `null`: the request names none, or no label is that of enough texts."""


class SAEResult(Contract):
    """One trained SAE."""

    name: str
    kind: str
    layer_number: int
    hook_site: str
    predicts: str | None = None
    """The site that a transcoder reconstructs; the figures are of its rows."""
    input_dim: int
    feature_count: int
    epochs_trained: int
    steps: int
    stop_reason: str
    """`max_epochs`, `min_loss`, `no_improvement` or `stopped` (as a control asked)."""
    rows: RowsInfo | None = None
    metrics: SAEMetrics
    prefix: str
    """URI of the folder of its files."""

    @property
    def sites(self) -> str:
        """Where it reads, and of a transcoder what it predicts: `resid_post`, `mlp_in to mlp_out`."""
        return self.hook_site if self.predicts is None else f"{self.hook_site} to {self.predicts}"


class SAEFailure(Contract):
    """An SAE of several that could not be trained; the others were."""

    name: str
    kind: str
    code: ErrorCode
    message: str
    hint: str
    """What to do."""


class StatusFields(Contract):
    """The seed's `TrainingStatus`, and who speaks of which run."""

    job_id: JobId
    run: int | None = Field(None, ge=1)
    """Counts the times this job was run; `null` before a worker has taken it."""
    attempt: int | None = Field(None, ge=1)
    """Counts the tries within a run."""
    worker: str | None = None
    """Which worker speaks; `null` for the client's first status."""
    time: datetime = Field(default_factory=now)
    """When this was said, UTC."""
    status: Status
    progress: float = Field(0.0, ge=0, le=1)
    """Share of the whole job, 0.0 to 1.0."""
    current_epoch: int = 0
    current_loss: float | None = None
    """The last training loss; `null` before training has begun, never a made-up number."""
    estimated_time_remaining: int | None = None
    """Seconds to the end of the job, from measured rates; `null` while none is known."""
    message: str = ""
    model_info: ModelInfo | None = None
    last_checkpoint: str | None = None
    """URI of the newest checkpoint; `null` where there is none."""


class TrainProgress(StatusFields):
    """A job's status. The topic is compacted: the latest event of a job is how it stands."""

    phase: Phase = "queued"
    sae: str | None = None
    """The SAE in training, of several."""
    step: int | None = None
    total_steps: int | None = None
    tokens_done: int | None = None
    """Tokens extracted, or rows trained on, in this phase."""
    tokens_per_second: float | None = None
    """Tokens extracted, or rows trained on, a second."""
    reconstruction_loss: float | None = None
    sparsity_loss: float | None = None
    l0: float | None = None
    """Mean number of active latents a row, of the last step that was measured."""
    dead_share: float | None = None
    held_out_fvu: float | None = None
    """Fraction of variance unexplained on held-out rows, as measured last; `null` where none are held out."""
    held_out_l0: float | None = None
    memory_allocated_bytes: int | None = None
    """GPU memory of the job, or the child's resident memory on a CPU."""
    memory_peak_bytes: int | None = None
    device: str | None = None
    unknown_fields: list[str] = []
    """Fields of the request that this version does not know and has ignored; in the first event of a run."""
    warnings: list[str] = []
    """What the requester should know, so far."""


class TrainCompleted(StatusFields):
    """A job has a result. Read with `read_committed`; drop repeats by the header `ce_id`."""

    status: Literal["completed"] = "completed"
    progress: float = Field(1.0, ge=0, le=1)
    model_info: ModelInfo
    model_path: str
    """URI of the primary SAE's `sae_model.pt`."""
    activations_path: str
    """URI of the primary SAE's `feature_activations.pt`."""
    metadata_path: str
    """URI of the primary SAE's `metadata.json`."""
    training_stats: dict[str, Any]
    """The primary SAE's `training_results`, as in `metadata.json`; long lists by evenly spaced entries."""
    feature_count: int
    ready_for_find_service: bool
    checkpoints: list[str] | None = None
    saes: list[SAEResult]
    """Every SAE of the job that was trained, the primary one first."""
    failed_saes: list[SAEFailure] = []
    """Those that could not be; a job of which none can fails."""
    corpus: CorpusInfo
    manifest: ArtifactRef
    artifacts: list[ArtifactRef]
    """Every object of the run but the manifest."""
    bundle_rows: int
    """Rows in the primary bundle; fewer than the texts when its size limit was reached."""
    reused_from: str | None = None
    """`job/run` whose result this is, because it was asked for the same; `null`: this run's own."""
    stopped_early: bool = False
    """Somebody asked for the result before training was over."""
    warnings: list[str] = []
    device: str
    duration_seconds: float
    """From the run's beginning to this event, all attempts included."""
    memory_peak_bytes: int | None = None
    version: str
    """Of the worker."""


class TrainFailed(StatusFields):
    """A job ended without a result."""

    status: Literal["failed"] = "failed"
    code: ErrorCode
    hint: str
    """What to do."""
    retryable: bool
    """Whether the same request may succeed later as it is."""
    attempts: int = Field(1, ge=0)
    traceback: list[str] = []
    """The last lines, secrets removed; empty where the message says it all."""
    phase: Phase | None = None
    """Where it was."""


class TrainCancelled(StatusFields):
    """A job was cancelled."""

    status: Literal["cancelled"] = "cancelled"
    requested_by: str | None = None
    phase: Phase | None = None
    step: int | None = None
    kept: list[str] = []
    """What was left in the store, if anything."""


class TrainControl(Contract):
    """Cancel a job (throw it away) or stop it (finish now and keep the result)."""

    job_id: JobId
    run: int | None = Field(None, ge=1)
    """`null`: the unfinished run, or the first that begins later."""
    action: Literal["cancel", "stop"]
    requested_by: str | None = None
    reason: str | None = None
    time: datetime = Field(default_factory=now)
