"""`metadata.json`: what the job was, what came out, and what every figure means.

Owns the fields that downstream readers know by name; must not measure anything or read a file.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Final

from mistudio_schemas import CorpusInfo, ModelInfo, SAEResult

from .bundle import ROW_MEANING, BundleInfo, Pooling
from .features import FeaturesInfo
from .files import refused, require

SERVICE: Final = "miStudioTrain"
SPARSITY_MEANING: Final = (
    "l0 is the mean number of active features a row; fraction_active, also called final_sparsity, is l0 / d_sae. "
    "Lower is sparser."
)
SAE_CONFIG: Final = ("sparsity_coeff", "learning_rate")
STATISTICS: Final = (
    "total_features",
    "active_features_count",
    "dead_features_count",
    "avg_activation_frequency",
    "feature_activation_rates",
    "feature_mean_activations",
    "feature_max_activations",
    "total_samples_processed",
    "batches_processed",
)
PER_FEATURE: Final = ("feature_activation_rates", "feature_mean_activations", "feature_max_activations")


@dataclass(frozen=True)
class Paths:
    """Where the three files that miStudioFind looks for will be, as URIs."""

    model_path: str
    activations_path: str
    metadata_path: str


@dataclass(frozen=True)
class Described:
    """Everything that metadata is made of. Mappings hold plain values."""

    job_id: str
    run: int
    attempt: int
    version: str
    """Of the worker."""
    timestamp: datetime
    """When the result was made, with its time zone."""
    model_info: ModelInfo
    corpus: CorpusInfo
    fingerprint: Mapping[str, object]
    """All that the numbers depend on: of the request, model and corpus, the software and the device."""
    pooling: Pooling
    sae: SAEResult
    sae_config: Mapping[str, object]
    """Every setting of the SAE's training as it was used; `sparsity_coeff` is `None` for a kind without one."""
    feature_statistics: Mapping[str, object]
    bundle: BundleInfo
    memory_optimizations: Mapping[str, object]
    paths: Paths
    features: FeaturesInfo | None = None
    """Of the sparse store; `None` where there is none, as the bundle has all that it would."""
    training_results: Mapping[str, object] = field(default_factory=dict)
    """What to add to the results that `sae` holds: seconds, device, losses."""
    exports: Mapping[str, object] = field(default_factory=dict)
    """Folders for other software: whose, or why one is not there."""
    decisions: Mapping[str, object] = field(default_factory=dict)
    """What the request leaves open and how it was decided, by name."""


def metadata(job: Described) -> dict[str, object]:
    """The JSON object, its long lists last; write it with `write_json`, which refuses what JSON cannot hold.

    Raises:
        ExportRefused: if the statistics or settings lack a field, or a list has not one entry a feature.

    """
    _check(job)
    return {
        "job_id": job.job_id,
        "service": SERVICE,
        "version": job.version,
        "timestamp": job.timestamp.isoformat(),
        "run": job.run,
        "attempt": job.attempt,
        "ready_for_find_service": True,
        "memory_optimizations_applied": dict(job.memory_optimizations),
        "model_info": job.model_info.model_dump(mode="json"),
        "sae_config": {"input_dim": job.sae.input_dim, "hidden_dim": job.sae.feature_count, **job.sae_config},
        "training_results": _training_results(job),
        "data_info": _data_info(job),
        "fingerprint": dict(job.fingerprint),
        "paths": {
            "model_path": job.paths.model_path,
            "activations_path": job.paths.activations_path,
            "metadata_path": job.paths.metadata_path,
        },
        "exports": dict(job.exports),
        "decisions": dict(job.decisions),
        "feature_statistics": dict(job.feature_statistics),
    }


def _training_results(job: Described) -> dict[str, object]:
    figures = job.sae.metrics.model_dump(mode="json")
    return {
        "epochs_trained": job.sae.epochs_trained,
        "steps": job.sae.steps,
        "stop_reason": job.sae.stop_reason,
        "final_sparsity": job.sae.metrics.fraction_active,
        "sparsity_meaning": SPARSITY_MEANING,
        **figures,
        **job.training_results,
    }


def _data_info(job: Described) -> dict[str, object]:
    return {
        "text_count": job.corpus.texts,
        "activation_shape": [job.bundle.rows, job.sae.input_dim],
        "feature_activation_shape": [job.bundle.rows, job.sae.feature_count],
        "bundle_truncated": job.bundle.truncated,
        "bundle_size": job.bundle.size,
        "feature_store": asdict(job.features) if job.features else None,
        "pooling": job.pooling,
        "row_meaning": ROW_MEANING[job.pooling],
        "corpus": job.corpus.model_dump(mode="json"),
    }


def _check(job: Described) -> None:
    require(job.sae_config, SAE_CONFIG, "sae_config")
    require(job.feature_statistics, STATISTICS, "feature_statistics")
    for name in PER_FEATURE:
        entries = job.feature_statistics[name]
        if not isinstance(entries, list) or len(entries) != job.sae.feature_count:
            raise refused(f"feature_statistics.{name} is no list of {job.sae.feature_count} entries")
    if job.bundle.total_rows != job.corpus.texts:
        raise refused(f"the bundle is of {job.bundle.total_rows} texts, the corpus has {job.corpus.texts}")
