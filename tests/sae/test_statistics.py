"""The statistics against brute-force counts, however the rows are split, and where figures are not defined."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from mistudio_train.errors import TrainingDiverged
from mistudio_train.sae.statistics import FeatureStatistics

ROWS, D_IN, D_SAE = 1003, 5, 9


def random_data() -> tuple[Tensor, Tensor, Tensor]:
    """Rows far from zero, reconstructions, and activations with a dead, a rare and a barely active feature."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, D_IN, generator=generator) + 1000
    x_hat = x + 0.3 * torch.randn(ROWS, D_IN, generator=generator)
    acts = torch.randn(ROWS, D_SAE, generator=generator).relu()
    acts[:, 0] = 0
    acts[:, 1] = 0
    acts[17, 1] = 2.5
    acts[:, 2] = 1e-6
    return x, x_hat, acts


def counted(x: Tensor, x_hat: Tensor, acts: Tensor, batch: int) -> FeatureStatistics:
    statistics = FeatureStatistics(acts.shape[1], x.shape[1])
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        statistics.update(x[part], x_hat[part], acts[part])
    return statistics


@pytest.mark.parametrize("batch", [1, 7, 64, ROWS])
def test_features_equal_a_brute_force_count(batch: int) -> None:
    x, x_hat, acts = random_data()
    result = counted(x, x_hat, acts, batch).result()
    rates = [sum(1 for row in range(ROWS) if float(acts[row, f]) > 1e-6) / ROWS for f in range(D_SAE)]
    assert result["feature_activation_rates"] == pytest.approx(rates)
    assert result["feature_mean_activations"] == pytest.approx(
        [sum(acts[:, f].tolist()) / ROWS for f in range(D_SAE)], rel=1e-12
    )
    assert result["feature_max_activations"] == [max(acts[:, f].tolist()) for f in range(D_SAE)]
    assert result["dead_features_count"] == 2  # 0 is never active, 2 never above the threshold
    assert result["active_features_count"] == D_SAE - 2
    assert result["rarely_active_features_count"] == 3  # those and 1, active on one row of 1003
    assert result["avg_activation_frequency"] == pytest.approx(sum(rates) / D_SAE)
    assert result["total_features"] == D_SAE
    assert result["total_samples_processed"] == ROWS
    assert result["batches_processed"] == -(-ROWS // batch)


@pytest.mark.parametrize("batch", [1, 7, 64, ROWS])
def test_metrics_equal_their_formulas(batch: int) -> None:
    x, x_hat, acts = random_data()
    metrics = counted(x, x_hat, acts, batch).metrics(final_loss=0.5)
    rows, hat = x.numpy().astype(np.float64), x_hat.numpy().astype(np.float64)
    squared_error = ((rows - hat) ** 2).sum()
    fvu = squared_error / ((rows - rows.mean(0)) ** 2).sum()
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(hat, axis=1)
    l0 = int((acts.numpy() > 1e-6).sum()) / ROWS
    assert metrics.final_loss == 0.5
    assert metrics.mse == pytest.approx(squared_error / ROWS / D_IN, rel=1e-10)
    assert metrics.fvu == pytest.approx(fvu, rel=1e-9)
    assert metrics.explained_variance == pytest.approx(1 - fvu, rel=1e-9)
    assert metrics.cosine == pytest.approx(float(((rows * hat).sum(1) / norms).mean()), rel=1e-12)
    assert metrics.l0 == pytest.approx(l0)
    assert metrics.fraction_active == pytest.approx(l0 / D_SAE)
    assert metrics.dead_share == pytest.approx(2 / D_SAE)


def test_metrics_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    x_hat = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    metrics = counted(x, x_hat, torch.tensor([[1.0, 0.0], [1.0, 2.0]]), 1).metrics()
    assert metrics.mse == 0.25  # one of four errors is 1
    assert metrics.fvu == 0.5  # 1 over (1 - 2)² + (3 - 2)²
    assert metrics.l0 == 1.5
    assert metrics.cosine == pytest.approx((0.5**0.5 + 1) / 2)


def test_no_rows_leave_every_figure_undefined() -> None:
    statistics = FeatureStatistics(3, 2)
    statistics.update(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 3))
    assert set(statistics.metrics().model_dump().values()) == {None}
    assert statistics.result()["dead_features_count"] == 3
    assert statistics.result()["batches_processed"] == 0


def test_rows_that_do_not_vary_have_no_explained_variance() -> None:
    x = torch.full((10, 2), 0.1)
    metrics = counted(x, x + 1, torch.ones(10, 1), 3).metrics()
    assert metrics.fvu is None
    assert metrics.explained_variance is None
    assert metrics.mse == pytest.approx(1, rel=1e-6)


def test_zero_rows_have_no_angle() -> None:
    zero, row = torch.zeros(1, 2), torch.ones(1, 2)
    acts = torch.ones(1, 1)
    assert counted(zero, row, acts, 1).metrics().cosine is None
    assert counted(torch.cat((zero, row)), torch.ones(2, 2), torch.ones(2, 1), 1).metrics().cosine == pytest.approx(1)


def test_a_number_that_is_none_is_refused() -> None:
    acts = torch.tensor([[1.0], [float("nan")]])
    statistics = counted(torch.ones(2, 2), torch.ones(2, 2), acts, 1)
    with pytest.raises(TrainingDiverged):
        statistics.result()
    with pytest.raises(TrainingDiverged):
        statistics.metrics()


def test_the_result_is_plain_strict_json() -> None:
    result = counted(*random_data(), 64).result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {
        type(value) for values in result.values() for value in (values if isinstance(values, list) else [values])
    } <= {
        int,
        float,
    }
