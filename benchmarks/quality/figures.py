"""The figures of a loaded SAE: FVU, L0, latents that never fire, the toy's features found, the model's loss.

Knows neither side; whatever trained an SAE, it is judged by the same lines.
"""

from typing import Any, Final

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from benchmarks.quality.data import Data, Truth
from mistudio_train.sae.statistics import FeatureStatistics

Figures = dict[str, float]
ROWS_AT_ONCE: Final = 4096


@torch.no_grad()
def figures_of(sae: Any, data: Data, threshold_for: int | None, *, splice: bool) -> Figures:
    """All that is known of an SAE.

    Args:
        sae: SAELens' inference SAE, on scaled rows.
        data: to judge it by.
        threshold_for: the L0 for which its one threshold is set on validation rows; `None`: it stays as it is.
        splice: whether to put it in the language model's place, if there is one.

    """
    ordinary_ND, others_ND = data.test_ND[data.ordinary_N], data.test_ND[~data.ordinary_N]
    figures: Figures = {}
    if threshold_for is not None:
        figures = _of_rows("delivered_", _counted(sae, ordinary_ND))
        set_threshold(sae, data.validation_ND, threshold_for)
    validation, ordinary, others = (_counted(sae, rows) for rows in (data.validation_ND, ordinary_ND, others_ND))
    figures |= _of_rows("validation_", validation) | _of_rows("", ordinary)
    if others.rows:
        figures["fvu_outliers"] = others.fvu() or 0.0
        ordinary.add(others)
        figures["fvu_all"] = ordinary.fvu() or 0.0
    ordinary.add(validation)
    figures["never_fires"] = ordinary.dead / ordinary.d_sae
    if data.truth is not None:
        figures |= recovery(sae, data.test_ND, data.truth)
    if splice and data.spliced is not None:
        figures |= data.spliced.recovered(lambda x_ND: sae.decode(sae.encode(x_ND)))
    return figures


def _of_rows(prefix: str, counted: FeatureStatistics) -> Figures:
    metrics = counted.metrics()
    return {f"{prefix}fvu": metrics.fvu or 0.0, f"{prefix}l0": metrics.l0 or 0.0}


def _counted(sae: Any, rows_ND: Tensor) -> FeatureStatistics:
    counted = FeatureStatistics(sae.cfg.d_sae, sae.cfg.d_in)
    for x_BD in torch.split(rows_ND, ROWS_AT_ONCE):
        acts_BF = sae.encode(x_BD)
        counted.update(x_BD, sae.decode(acts_BF), acts_BF)
    return counted


@torch.no_grad()
def set_threshold(sae: Any, rows_ND: Tensor, l0: int) -> None:
    """Give all latents of a JumpReLU SAE the threshold above which, on these rows, `l0` are active in the mean."""
    sae.threshold.zero_()
    positive = torch.cat([(acts_BF := sae.encode(x_BD))[acts_BF > 0] for x_BD in torch.split(rows_ND, ROWS_AT_ONCE)])
    wanted = l0 * len(rows_ND)
    if wanted < len(positive):
        sae.threshold.fill_(float(positive.kthvalue(len(positive) - wanted).values))


@torch.no_grad()
def recovery(sae: Any, rows_ND: Tensor, truth: Truth) -> Figures:
    """How well the toy's features are found, each by the one latent that it is matched with (Hungarian, on cosines).

    `mcc` is the mean cosine of matched pairs, `f1` the mean over features of how well the latent's firing tells theirs.
    """
    cosine_FG = truth.features_FD @ functional.normalize(sae.W_dec.detach(), dim=1).T
    features, latents = linear_sum_assignment(cosine_FG.numpy(), maximize=True)
    mine_F = torch.from_numpy(latents)
    fired_NF = torch.cat([sae.encode(x_BD)[:, mine_F] > 0 for x_BD in torch.split(rows_ND, ROWS_AT_ONCE)])
    active_NF = truth.active_NF[:, torch.from_numpy(features)]
    hit_F, fired_F, active_F = (fired_NF & active_NF).sum(0), fired_NF.sum(0), active_NF.sum(0)
    f1_F = 2 * hit_F / (fired_F + active_F).clamp_min(1)
    return {"mcc": float(cosine_FG[features, latents].mean()), "f1": float(f1_F.mean())}
