"""What a finished SAE's features do over all rows, counted in one pass: rates, means, maxima, L0, FVU, cosine.

Owns the definitions of these figures; must not run an SAE, and must not decide what to do about a bad one.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from mistudio_schemas import SAEMetrics
from mistudio_train.errors import TrainingDiverged

from .base import ACTIVE_ABOVE, RARE_BELOW
from .sparse import Active, Everywhere

FIRING_EDGES: Final = tuple(10 ** (exponent / 2) for exponent in range(-12, 1))
"""Of the firing histogram: 1e-6 to 1 in half powers of ten."""


class FeatureStatistics:
    """Accumulates over batches of rows, reconstructions and feature activations; sums in fp64, on the device.

    A feature is active on a row where its activation is above 1e-6, and active at all if it is so on any row.
    """

    def __init__(self, d_sae: int, d_in: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.d_sae = d_sae
        self.d_in = d_in
        self.rows = 0
        self.batches = 0
        self._active_rows_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._sum_F = zeros(d_sae)
        self._max_F = zeros(d_sae)
        self.mean_D = zeros(d_in)
        """Of the rows, fp64."""
        self._squared_deviation_D = zeros(d_in)
        self._squared_error = zeros()
        self._cosine_sum = zeros()
        self._cosine_rows = zeros()

    @torch.no_grad()
    def update(self, x_BD: Tensor, x_hat_BD: Tensor, acts_BF: Tensor) -> None:
        """Count a batch: rows as extracted, their reconstructions, their features; all on this object's device."""
        self.update_sparse(x_BD, x_hat_BD, Everywhere(*acts_BF.shape), acts_BF)

    @torch.no_grad()
    def update_sparse(self, x_BD: Tensor, x_hat_BD: Tensor, active: Active, values: Tensor) -> None:
        """The same, of features as values, none negative, at their places."""
        if len(x_BD) == 0:
            return
        rows_BD, rows_hat_BD = x_BD.double(), x_hat_BD.double()
        self._count_features(active, values)
        self._count_variance(rows_BD)
        self._squared_error += (rows_BD - rows_hat_BD).square().sum()
        # The angle to a zero row is not defined; a zero reconstruction of another row counts as 0.
        defined_B = rows_BD.square().sum(1) > 0
        self._cosine_sum += (functional.cosine_similarity(rows_BD, rows_hat_BD, dim=1) * defined_B).sum()
        self._cosine_rows += defined_B.sum()
        self.rows += len(x_BD)
        self.batches += 1

    def metrics(self, final_loss: float | None = None) -> SAEMetrics:
        """The contract's figures; `None` where undefined: no rows, or rows that do not vary.

        Raises:
            TrainingDiverged: if a row, a reconstruction or an activation was NaN or infinite.
        """
        if self.rows == 0:
            return SAEMetrics(**dict.fromkeys(SAEMetrics.model_fields))
        self._refuse_non_finite()
        squared_error, fvu = float(self._squared_error), self.fvu()
        l0 = int(self._active_rows_F.sum()) / self.rows
        cosine_rows = float(self._cosine_rows)
        return SAEMetrics(
            rows=self.rows,
            final_loss=final_loss,
            mse=squared_error / (self.rows * self.d_in),
            fvu=fvu,
            explained_variance=None if fvu is None else 1 - fvu,
            cosine=float(self._cosine_sum) / cosine_rows if cosine_rows else None,
            l0=l0,
            fraction_active=l0 / self.d_sae,
            dead_share=self.dead / self.d_sae,
        )

    def fvu(self) -> float | None:
        """Sum ||x - x̂||² / sum ||x - mean(x)||²; `None` where rows differ by rounding only."""
        variance = self.variance
        energy = variance + self.rows * float(self.mean_D.square().sum())
        return float(self._squared_error) / variance if variance > 1e-24 * energy else None

    @property
    def variance(self) -> float:
        """Sum ||x - mean(x)||² over the rows."""
        return float(self._squared_deviation_D.sum())

    def squared_deviation_from(self, centre_D: Tensor) -> float:
        """Sum ||x - centre||² over the rows."""
        return self.variance + self.rows * float((self.mean_D - centre_D).square().sum())

    def firing_histogram(self) -> list[int]:
        """Numbers of features by the share of the rows that they are active on: never, below the first edge, bins."""
        if not self.rows:
            return [self.d_sae] + [0] * len(FIRING_EDGES)
        rates_F = self._active_rows_F.double().cpu() / self.rows
        alive_N = rates_F[rates_F > 0]
        bins = torch.bucketize(alive_N, torch.tensor(FIRING_EDGES[:-1], dtype=torch.float64), right=True)
        return [self.dead, *torch.bincount(bins, minlength=len(FIRING_EDGES)).tolist()]

    def add(self, other: "FeatureStatistics") -> None:
        """Count what another one has counted, of other rows."""
        if not other.rows:
            return
        self._active_rows_F += other._active_rows_F
        self._sum_F += other._sum_F
        self._max_F = torch.maximum(self._max_F, other._max_F)
        self._merge_variance(other.mean_D, other._squared_deviation_D, other.rows)
        self._squared_error += other._squared_error
        self._cosine_sum += other._cosine_sum
        self._cosine_rows += other._cosine_rows
        self.rows += other.rows
        self.batches += other.batches

    def result(self) -> dict[str, Any]:
        """The seed's feature statistics, plain Python numbers and lists. Rates and means are over all rows.

        `dead_features_count` is those active on no row; `rarely_active_features_count` those active on less than 1%
        of the rows, the former included: both of the seed's thresholds.

        Raises:
            TrainingDiverged: if a row, a reconstruction or an activation was NaN or infinite.
        """
        self._refuse_non_finite()
        rates_F = self._active_rows_F.double() / max(self.rows, 1)
        return {
            "total_features": self.d_sae,
            "active_features_count": self.d_sae - self.dead,
            "dead_features_count": self.dead,
            "rarely_active_features_count": int((self._active_rows_F < RARE_BELOW * self.rows).sum()),
            "avg_activation_frequency": float(rates_F.mean()),
            "feature_activation_rates": rates_F.tolist(),
            "feature_mean_activations": (self._sum_F / max(self.rows, 1)).tolist(),
            "feature_max_activations": self._max_F.tolist(),
            "total_samples_processed": self.rows,
            "batches_processed": self.batches,
        }

    def _count_features(self, active: Active, values: Tensor) -> None:
        self._active_rows_F += active.count_above(values, ACTIVE_ABOVE)
        self._sum_F += active.sum_by_latent(values.double())
        # Not `clamp` or `max` of plain numbers: these keep a NaN, which the results then refuse.
        self._max_F = torch.maximum(self._max_F, active.max_by_latent(values).double())

    def _count_variance(self, rows_BD: Tensor) -> None:
        mean_D = rows_BD.mean(0)
        self._merge_variance(mean_D, (rows_BD - mean_D).square().sum(0), len(rows_BD))

    def _merge_variance(self, mean_D: Tensor, squared_deviation_D: Tensor, count: int) -> None:
        """Of other rows (Chan, Golub and LeVeque 1979): no difference of large sums."""
        total = self.rows + count
        shift_D = mean_D - self.mean_D
        self._squared_deviation_D += squared_deviation_D + shift_D.square() * (self.rows * count / total)
        self.mean_D += shift_D * (count / total)

    @property
    def dead(self) -> int:
        """Features that are active on no row."""
        return int((self._active_rows_F == 0).sum())

    def _refuse_non_finite(self) -> None:
        sums = (self._sum_F, self._max_F, self.mean_D, self._squared_error, self._cosine_sum)
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            raise TrainingDiverged(
                "A row, a reconstruction or an activation is NaN or infinite.",
                "Look for infinite activations of the language model (try dtype float32), or lower learning_rate.",
            )
