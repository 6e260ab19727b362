"""Ends of jobs, as a worker would tell them."""

from mistudio_schemas import (
    ArtifactRef,
    CorpusInfo,
    ErrorCode,
    ModelInfo,
    SAEMetrics,
    SAEResult,
    TrainCancelled,
    TrainCompleted,
    TrainFailed,
    TrainProgress,
)

MODEL = ModelInfo(
    model_name="gpt2",
    actual_model_loaded="gpt2@607a30d",
    architecture="gpt2",
    total_layers=12,
    selected_layer=6,
    hidden_size=768,
    vocab_size=50257,
    requires_token=False,
)


def running(job_id: str, run: int = 1, step: int = 10) -> TrainProgress:
    return TrainProgress(
        job_id=job_id,
        run=run,
        attempt=1,
        worker="w",
        status="running",
        phase="training",
        sae="standard-0",
        step=step,
        total_steps=100,
        current_loss=0.25,
        l0=31.9,
        tokens_per_second=1234.4,
        estimated_time_remaining=75,
        progress=0.5,
    )


def completed(job_id: str, run: int = 1) -> TrainCompleted:
    manifest = ArtifactRef(
        name="manifest.json", bucket="b", key="k", uri="s3://b/k", size=1, sha256="0" * 64, media_type="text/plain"
    )
    return TrainCompleted(
        job_id=job_id,
        run=run,
        attempt=1,
        message="1 SAE trained",
        model_info=MODEL,
        model_path="s3://b/sae_model.pt",
        activations_path="s3://b/feature_activations.pt",
        metadata_path="s3://b/metadata.json",
        training_stats={},
        feature_count=1024,
        ready_for_find_service=True,
        saes=[sae_result()],
        corpus=CorpusInfo(texts=10, tokens=100, rows=10, sha256="0" * 64),
        manifest=manifest,
        artifacts=[],
        bundle_rows=10,
        device="cpu",
        duration_seconds=90.4,
        version="0.1.0",
    )


def sae_result() -> SAEResult:
    metrics = SAEMetrics(
        final_loss=0.125,
        mse=0.1,
        fvu=0.0625,
        explained_variance=0.9375,
        cosine=0.99,
        l0=32.0,
        fraction_active=0.03125,
        dead_share=None,
    )
    return SAEResult(
        name="standard-0",
        kind="standard",
        layer_number=6,
        hook_site="resid_post",
        input_dim=768,
        feature_count=1024,
        epochs_trained=50,
        steps=500,
        stop_reason="max_epochs",
        metrics=metrics,
        prefix="s3://b/jobs/j/runs/1/a1/",
    )


def failed(job_id: str, run: int = 1) -> TrainFailed:
    return TrainFailed(
        job_id=job_id,
        run=run,
        attempt=1,
        message="there is no corpus stories.txt",
        code=ErrorCode.CORPUS_NOT_FOUND,
        hint="Put it with `mistudio-train corpus put`.",
        retryable=False,
    )


def cancelled(job_id: str, run: int = 1) -> TrainCancelled:
    return TrainCancelled(job_id=job_id, run=run, attempt=1, requested_by="ada")
