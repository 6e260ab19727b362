"""Writes the files of one trained SAE: the folder that readers find at the run's root, or under `saes/{name}/`.

Brings the writers together; each file's format is its own module's.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio_schemas import CorpusInfo, CrossEntropy, ModelInfo, Probing, SAEConfig, SAEMetrics, SAEResult
from mistudio_train import __version__
from mistudio_train.messages import JobSpec

from . import advice
from .bundle import BundleInfo, write_bundle
from .evaluate import Evaluation
from .features import FeaturesInfo, FeatureStore, RowFeatures, feature_store
from .files import write_json
from .fit import Fitted
from .metadata import Described, Paths, metadata
from .model_file import write_model_file
from .probe import probe
from .report.material import Material
from .reporter import Reporter
from .saelens import Origin, saelens_cannot, write_saelens
from .sparsify import sparsify_cannot, write_sparsify
from .text_rows import one_row_a_text
from .texts import Texts
from .tokens import RowIndex
from .wanted import Trained

DECISIONS = {
    "final_weights": "the weights after the last epoch; final_loss is that epoch's mean loss",
    "early_stopping": "of the standard kind: an epoch's mean loss below min_loss, or ten epochs without a new lowest",
    "dead_feature": "dead_features_count: above 1e-6 on no row; rarely_active_features_count: on less than 1% of rows",
    "special_tokens": "those that the tokenizer or its chat template adds are left out unless include_special_tokens",
    "metrics_over": "held-out rows; where there are none, all rows that the SAE was trained on",
}


@dataclass(frozen=True)
class Context:
    """What all SAEs of a job share."""

    spec: JobSpec
    info: ModelInfo
    corpus: CorpusInfo
    texts: Texts
    memory_optimizations: dict[str, Any]
    device: torch.device
    tokenizer: Any
    """The model's."""
    revision: str | None
    """The model's commit; `None` of a folder."""
    fingerprint: Mapping[str, object]
    """All that the numbers depend on."""

    def material(self, index: RowIndex, warnings: Sequence[str]) -> Material:
        """What a report is made of, besides an SAE's own folder."""
        return Material(
            job_id=self.spec.job_id,
            version=__version__,
            request=self.spec.request,
            model=self.info,
            revision=self.revision,
            corpus=self.corpus,
            texts=self.texts,
            index=index,
            tokenizer=self.tokenizer,
            device=self.device,
            warnings=warnings,
        )

    @property
    def mean_pooled(self) -> bool:
        """Whether a row is a text."""
        return self.spec.request.pooling == "mean"


@dataclass(frozen=True)
class Written:
    """What was written of one SAE."""

    result: SAEResult
    bundle: BundleInfo
    training_results: dict[str, object]
    batch_size: int
    """Rows of a step."""


def write_result(
    context: Context,
    trained: Trained,
    cross_entropy: CrossEntropy | None,
    place: str,
    reporter: Reporter,
    share: tuple[float, float],
) -> Written:
    """Evaluate the SAE on its rows and write all of its files.

    Args:
        context: of the job.
        trained: the SAE.
        cross_entropy: what the language model loses with it in its place, if that was measured.
        place: its folder below the run's root, ending in `/`; empty for the primary SAE.
        reporter: told how far it is.
        share: of the whole work.

    Raises:
        ExportRefused: if a file would be wrong for its readers.
        DiskFull: if the disk has no room.
    """
    wanted, fitted = trained.wanted, trained.fitted
    name, rows, selection, origin = wanted.config.name, wanted.stores[0], wanted.selection, wanted.origin
    middle = (share[0] + share[1]) / 2
    folder = context.spec.output / place
    folder.mkdir(parents=True, exist_ok=True)

    def on_progress(done: float) -> None:
        if reporter.due:
            reporter.say(done)

    reporter.enter("evaluating", f"evaluating {name}", (share[0], middle), name)
    evaluation = Evaluation(
        fitted.sae, rows, selection.flags, selection.left_out, context.device, on_progress, wanted.targets
    )
    bundle, features = _write_rows(context, fitted, evaluation, folder, origin)
    reporter.enter("exporting", f"writing the files of {name}", (middle, share[1]), name)
    _warn_of_truncation(reporter, wanted.config, bundle, features)
    metrics = evaluation.metrics(fitted.final_loss, cross_entropy)
    metrics = metrics.model_copy(update={"probing": _probing(context, fitted, bundle, folder, reporter)})
    result = _result(context, trained, metrics, place)
    statistics = evaluation.statistics().result()
    rates_F = torch.tensor(statistics["feature_activation_rates"], dtype=torch.float64)
    for sentence in advice.on_sparsity(result.name, result.kind, result.metrics):
        reporter.warn(sentence)
    if context.mean_pooled:
        active_rows_F = (rates_F * rows.rows).round().long().numpy()
        for sentence in advice.on_result(result.name, rows.rows, fitted.sae.d_sae, result.metrics, active_rows_F):
            reporter.warn(sentence)
    if saelens_cannot(fitted.sae, origin) is None:
        write_saelens(folder / "sae", fitted.sae, origin, rates_F)
    if sparsify_cannot(fitted.sae) is None:
        write_sparsify(folder / "sparsify", fitted.sae, transcodes=origin.predicts is not None)
    _write_model(context, fitted, folder, origin)
    write_json(
        folder / "metadata.json", metadata(_described(context, fitted, origin, result, statistics, bundle, features))
    )
    stats = _training_results(fitted, context) | _seconds(fitted)
    return Written(result, bundle, stats, fitted.recipe.batch_size)


def _probing(context: Context, fitted: Fitted, bundle: BundleInfo, folder: Path, reporter: Reporter) -> Probing | None:
    """By the labels of the texts, where the request names their column."""
    labels, sae = context.texts.labels, fitted.sae
    if labels is None:
        return None
    nothing = f"no value of the column '{labels.column}' is that of enough texts to be probed"
    probing = None
    with reporter.one_call(), reporter.optional(f"{fitted.config.name} has not been probed"):
        probing = probe(folder, labels, context.texts, bundle.rows, sae.d_sae, sae.d_in)
        if probing is None and nothing not in reporter.warnings:
            reporter.warn(nothing)
    return probing


def _write_rows(
    context: Context, fitted: Fitted, evaluation: Evaluation, folder: Path, origin: Origin
) -> tuple[BundleInfo, FeaturesInfo | None]:
    """Bundle and store, of tokens in one pass; of whole texts there is a store where the bundle does not hold all."""
    if not context.mean_pooled:
        bundle_bytes = 4 * context.corpus.texts * (fitted.sae.d_sae + 2 * fitted.sae.d_in)
        reserved = min(bundle_bytes, context.spec.bundle_max_bytes)
        with _store(context, fitted, folder, origin, reserved) as store:
            bundle = _write_bundle(context, fitted, _added_to(store, evaluation.blocks()), folder, origin.layer)
        return bundle, store.info
    bundle = _write_bundle(context, fitted, evaluation.blocks(), folder, origin.layer)
    if not bundle.truncated:
        return bundle, None
    with _store(context, fitted, folder, origin, reserved=0) as store:
        for features, _ in evaluation.blocks(count=False):
            store.add(features)
    return bundle, store.info


def _store(
    context: Context, fitted: Fitted, folder: Path, origin: Origin, reserved: int
) -> AbstractContextManager[FeatureStore]:
    """As large as half of the disk's room but for what is reserved; the other half is the other files'."""
    room = shutil.disk_usage(folder).free - reserved
    about = {"pooling": context.spec.request.pooling, "model_name": context.info.model_name, "layer": origin.layer}
    path = folder / "features" / "activations.parquet"
    return feature_store(path, d_sae=fitted.sae.d_sae, max_bytes=room // 2, about=about)


def _added_to(
    store: FeatureStore, blocks: Iterable[tuple[RowFeatures, Tensor]]
) -> Iterator[tuple[RowFeatures, Tensor]]:
    for features, x_BD in blocks:
        store.add(features)
        yield features, x_BD


def _write_bundle(
    context: Context, fitted: Fitted, blocks: Iterable[tuple[RowFeatures, Tensor]], folder: Path, layer: int
) -> BundleInfo:
    texts = one_row_a_text(blocks, fitted.sae.d_sae, context.corpus.texts)
    bundle = write_bundle(
        folder / "feature_activations.pt",
        texts,
        texts=context.texts,
        total_rows=context.corpus.texts,
        d_sae=fitted.sae.d_sae,
        d_in=fitted.sae.d_in,
        model_info=_info(context, layer).model_dump(mode="json"),
        max_bytes=context.spec.bundle_max_bytes,
        complete=context.spec.request.bundle_complete,
        pooling=context.spec.request.pooling,
    )
    for _ in texts:  # the statistics are of all rows, also of those that did not fit
        pass
    return bundle


def _warn_of_truncation(
    reporter: Reporter, config: SAEConfig, bundle: BundleInfo, features: FeaturesInfo | None
) -> None:
    if bundle.truncated:
        reporter.warn(
            f"{config.name}: feature_activations.pt holds the first {bundle.rows} of {bundle.total_rows} texts, all "
            "that bundle_max_bytes lets it; features/activations.parquet has the others"
        )
    if features is not None and features.truncated:
        reporter.warn(
            f"{config.name}: features/activations.parquet ends before text {features.first_missing_text}: "
            "the worker's disk has no room for more"
        )


def _write_model(context: Context, fitted: Fitted, folder: Path, origin: Origin) -> None:
    settings = _settings(fitted)
    asked = context.spec.request.model_dump(mode="json", exclude={"huggingface_token", "sae", "saes"})
    write_model_file(
        folder / "sae_model.pt",
        fitted.sae,
        config=asked | settings,
        training_stats=_training_results(fitted, context),
        sparsity_coeff=settings["sparsity_coeff"],
        predicts=origin.predicts,
        model_info=_info(context, origin.layer).model_dump(mode="json"),
        # what was free is of that moment, and the same request and seed give the same bytes
        memory_optimizations={k: v for k, v in context.memory_optimizations.items() if k != "available_bytes"},
    )


def _described(
    context: Context,
    fitted: Fitted,
    origin: Origin,
    result: SAEResult,
    statistics: dict[str, Any],
    bundle: BundleInfo,
    features: FeaturesInfo | None,
) -> Described:
    spec = context.spec
    return Described(
        job_id=spec.job_id,
        run=spec.run,
        attempt=spec.attempt,
        version=__version__,
        timestamp=datetime.now(UTC),
        model_info=_info(context, result.layer_number),
        corpus=context.corpus,
        fingerprint=context.fingerprint,
        pooling=spec.request.pooling,
        sae=result,
        sae_config=_settings(fitted),
        feature_statistics=statistics,
        bundle=bundle,
        features=features,
        memory_optimizations=context.memory_optimizations,
        paths=_paths(result.prefix),
        training_results=_training_results(fitted, context) | _seconds(fitted),
        exports={
            "sae": saelens_cannot(fitted.sae, origin) or "SAELens",
            "sparsify": sparsify_cannot(fitted.sae) or "EleutherAI sparsify",
        },
        decisions=DECISIONS | _reinitialization(fitted),
    )


def _info(context: Context, layer: int) -> ModelInfo:
    return context.info.model_copy(update={"selected_layer": layer})


def _result(context: Context, trained: Trained, metrics: SAEMetrics, place: str) -> SAEResult:
    config, origin, fitted = trained.wanted.config, trained.wanted.origin, trained.fitted
    return SAEResult(
        name=config.name or config.kind,
        kind=config.kind,
        layer_number=origin.layer,
        hook_site=origin.hook_site,
        predicts=origin.predicts,
        input_dim=fitted.sae.d_in,
        feature_count=fitted.sae.d_sae,
        epochs_trained=len(fitted.epochs),
        steps=fitted.steps,
        stop_reason=fitted.stop_reason,
        rows=trained.wanted.selection.counts,
        metrics=metrics,
        prefix=context.spec.uri_prefix + place,
    )


def _settings(fitted: Fitted) -> dict[str, Any]:
    """As requested, and over it as used."""
    used = asdict(fitted.recipe) | {"resample_at": list(fitted.recipe.resample_at)}
    return {"sparsity_coeff": None} | fitted.config.model_dump(mode="json") | used


def _training_results(fitted: Fitted, context: Context) -> dict[str, object]:
    return {
        "losses": [epoch.loss for epoch in fitted.epochs],
        "reconstruction_errors": [epoch.reconstruction_loss for epoch in fitted.epochs],
        "sparsity_levels": [epoch.fraction_active for epoch in fitted.epochs],
        "l0_levels": [epoch.l0 for epoch in fitted.epochs],
        "reinitialized": [epoch.reinitialized for epoch in fitted.epochs],
        "final_loss": fitted.final_loss,
        "learning_rate_share": fitted.rate,
        "held_out_curve": {
            "steps": [point.step for point in fitted.held_out],
            "fvu": [point.fvu for point in fitted.held_out],
            "l0": [point.l0 for point in fitted.held_out],
            "cosine": [point.cosine for point in fitted.held_out],
        },
        "device": str(context.device),
    }


def _seconds(fitted: Fitted) -> dict[str, object]:
    """Not among the results that go into `sae_model.pt`: the same request and seed give the same bytes."""
    return {"training_seconds": fitted.seconds}


def _reinitialization(fitted: Fitted) -> dict[str, object]:
    every = fitted.recipe.reinitialize_dead_every
    rule = f"after every {every} epochs, none in the last ten; active on less than 1% of the epoch's rows"
    return {"dead_features_reinitialized": rule if every else "never"}


def _paths(uri: str) -> Paths:
    return Paths(uri + "sae_model.pt", uri + "feature_activations.pt", uri + "metadata.json")
