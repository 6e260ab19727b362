"""`metadata.json` has every field that downstream readers know, as strict JSON, and says what figures mean."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from mistudio_schemas import CorpusInfo, ModelInfo, SAEMetrics, SAEResult
from mistudio_train.errors import ExportRefused
from mistudio_train.sae.statistics import FeatureStatistics
from mistudio_train.training.bundle import BundleInfo
from mistudio_train.training.files import write_json
from mistudio_train.training.metadata import Described, Paths, metadata

from .exports import D_IN, D_SAE, rows, small_sae


def statistics() -> FeatureStatistics:
    sae, x_BD = small_sae("topk"), rows()
    counted = FeatureStatistics(D_SAE, D_IN)
    counted.update(x_BD, sae.decode(sae.encode(x_BD)), sae.encode(x_BD))
    return counted


COUNTED = statistics()
METRICS: SAEMetrics = COUNTED.metrics(final_loss=0.125)
JOB = Described(
    job_id="train_1",
    run=2,
    attempt=1,
    version="0.1.0",
    timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    model_info=ModelInfo(
        model_name="tiny",
        actual_model_loaded="tiny@0123",
        architecture="llama",
        total_layers=2,
        selected_layer=1,
        hidden_size=D_IN,
        vocab_size=20,
        requires_token=False,
    ),
    corpus=CorpusInfo(texts=200, tokens=900, rows=200, sha256="0" * 64),
    fingerprint={"torch": "2"},
    pooling="mean",
    sae=SAEResult(
        name="topk-0",
        kind="topk",
        layer_number=1,
        hook_site="resid_post",
        input_dim=D_IN,
        feature_count=D_SAE,
        epochs_trained=3,
        steps=30,
        stop_reason="max_epochs",
        metrics=METRICS,
        prefix="s3://b/p/",
    ),
    sae_config={"kind": "topk", "k": 5, "sparsity_coeff": None, "learning_rate": 1e-3},
    feature_statistics=COUNTED.result(),
    bundle=BundleInfo(rows=150, total_rows=200, size=12345),
    memory_optimizations={"is_large_model": False},
    paths=Paths("s3://b/p/sae_model.pt", "s3://b/p/feature_activations.pt", "s3://b/p/metadata.json"),
    training_results={"seconds": 1.5},
    decisions={"dead features are re-initialised": "every 10 epochs"},
)


def test_every_field_is_there(tmp_path: Path) -> None:
    write_json(tmp_path / "metadata.json", metadata(JOB))
    read = json.loads((tmp_path / "metadata.json").read_text(), parse_constant=pytest.fail)
    assert read["job_id"] == "train_1"
    assert read["service"] == "miStudioTrain"
    assert read["version"] == "0.1.0"
    assert read["timestamp"] == "2026-01-02T03:04:05+00:00"
    assert read["ready_for_find_service"] is True
    assert read["memory_optimizations_applied"] == {"is_large_model": False}
    assert read["model_info"] == JOB.model_info.model_dump()
    assert read["sae_config"] == {
        "input_dim": D_IN,
        "hidden_dim": D_SAE,
        "kind": "topk",
        "k": 5,
        "sparsity_coeff": None,
        "learning_rate": 1e-3,
    }
    assert read["paths"] == {
        "model_path": "s3://b/p/sae_model.pt",
        "activations_path": "s3://b/p/feature_activations.pt",
        "metadata_path": "s3://b/p/metadata.json",
    }
    assert read["decisions"] == {"dead features are re-initialised": "every 10 epochs"}
    assert read["feature_statistics"] == COUNTED.result()


def test_sparsity_is_stated_with_its_meaning() -> None:
    results = metadata(JOB)["training_results"]
    assert isinstance(results, dict)
    assert results["final_loss"] == 0.125
    assert results["epochs_trained"] == 3
    assert results["l0"] == pytest.approx(5, abs=0.1)
    assert results["fraction_active"] == results["final_sparsity"] == pytest.approx(results["l0"] / D_SAE)
    assert "l0 / d_sae" in results["sparsity_meaning"]
    assert results["seconds"] == 1.5


def test_data_info_describes_the_bundle_and_its_rows() -> None:
    info = metadata(JOB)["data_info"]
    assert isinstance(info, dict)
    assert info["text_count"] == 200
    assert info["activation_shape"] == [150, D_IN]
    assert info["feature_activation_shape"] == [150, D_SAE]
    assert info["bundle_truncated"] is True
    assert "mean of its tokens' activations" in info["row_meaning"]
    by_token = metadata(replace(JOB, pooling="token"))["data_info"]
    assert isinstance(by_token, dict)
    assert "maximum over the text's tokens" in by_token["row_meaning"]


def test_what_is_missing_or_does_not_line_up_is_refused() -> None:
    wrong = COUNTED.result()
    for job, message in [
        (replace(JOB, sae_config={"learning_rate": 1.0}), "sae_config lacks sparsity_coeff"),
        (replace(JOB, feature_statistics={}), "feature_statistics lacks total_features"),
        (replace(JOB, feature_statistics=wrong | {"feature_mean_activations": [1.0]}), "no list of 40 entries"),
        (
            replace(JOB, feature_statistics=wrong | {"feature_max_activations": torch.zeros(D_SAE)}),
            "feature_max_activations is no list",
        ),
        (replace(JOB, bundle=BundleInfo(2, 201, 1)), "bundle is of 201 texts, the corpus has 200"),
    ]:
        with pytest.raises(ExportRefused, match=message):
            metadata(job)


def test_a_number_that_json_cannot_hold_is_refused_by_the_writer(tmp_path: Path) -> None:
    content = metadata(replace(JOB, training_results={"seconds": math.nan}))
    with pytest.raises(ExportRefused, match=r"training_results\.seconds is nan"):
        write_json(tmp_path / "metadata.json", content)
