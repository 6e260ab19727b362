from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_train.sae import sparse
from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.training import evaluate
from mistudio_train.training.evaluate import BLOCK_BYTES, FP64_COPIES, Evaluation
from mistudio_train.training.selection import HELD_OUT, OUTLIER
from mistudio_train.training.text_rows import one_row_a_text

from .exports import D_IN, D_SAE, rows, small_sae


class Stored:
    """Five rows a text, in memory."""

    def __init__(self, x_ND: Tensor) -> None:
        self.x_ND, self.rows = x_ND, len(x_ND)
        self.text_of_row = np.arange(self.rows, dtype=np.int32) // 5
        self.position_of_row = np.arange(self.rows, dtype=np.int32) % 5
        self.token_of_row = self.position_of_row + 100

    def blocks(self, rows_per_block: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.rows, rows_per_block):
            yield start, self.x_ND[start : start + rows_per_block]


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "standard"])
@pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["dense", "sparse"])
def test_figures_and_features_equal_a_brute_force_evaluation(
    kind: str, dense_above: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "DENSE_ABOVE", dense_above)
    monkeypatch.setattr(evaluate, "BLOCK_BYTES", 16 * (4 * D_SAE + 8 * FP64_COPIES * D_IN))
    monkeypatch.setattr(evaluate, "PLACES_AT_ONCE", 7 * D_SAE)
    x, folded = rows(203), small_sae(kind)
    flags = np.zeros(203, np.uint8)
    flags[100:] |= HELD_OUT
    flags[::7] |= OUTLIER
    evaluation = Evaluation(folded, Stored(x), flags, OUTLIER, torch.device("cpu"), lambda done: None)
    found = list(evaluation.blocks())
    assert max(len(features.text) for features, _ in found) == (16 if dense_above else 7)
    texts = list(one_row_a_text(found, D_SAE, 42))
    acts = folded.encode(x)
    hat = folded.decode(acts)

    dense, seen = torch.zeros(203, D_SAE), 0
    for features, x_BD in found:
        at_N = features.text[features.row] * 5 + features.position[features.row]
        assert torch.equal(at_N, features.row + seen)
        assert torch.equal(features.token_id, features.position + 100)
        dense[at_N, features.feature] = features.activation
        seen += len(x_BD)
    torch.testing.assert_close(dense, acts)
    maxima = torch.stack([acts[5 * text : 5 * text + 5].amax(0) for text in range(41)])
    means = torch.stack([x[5 * text : 5 * text + 5].mean(0) for text in range(41)])
    torch.testing.assert_close(torch.cat([acts_TF for acts_TF, _ in texts]), torch.cat((maxima, torch.zeros(1, D_SAE))))
    torch.testing.assert_close(torch.cat([x_TD for _, x_TD in texts]), torch.cat((means, torch.zeros(1, D_IN))))

    metrics = evaluation.metrics(0.5)
    for rows_N, fvu in (
        ((flags & HELD_OUT != 0) & (flags & OUTLIER == 0), metrics.fvu),
        ((flags & HELD_OUT == 0) & (flags & OUTLIER == 0), metrics.training_fvu),
        (flags & OUTLIER != 0, metrics.fvu_outliers),
    ):
        part, part_hat = x[rows_N].double(), hat[rows_N].double()
        assert fvu == pytest.approx(
            float((part - part_hat).square().sum() / (part - part.mean(0)).square().sum()), rel=1e-6
        )
    judged = acts[(flags & HELD_OUT != 0) & (flags & OUTLIER == 0)]
    assert metrics.l0 == pytest.approx(float((judged > 1e-6).sum(1).double().mean()))
    result = evaluation.statistics().result()
    assert result["feature_activation_rates"] == pytest.approx((acts > 1e-6).double().mean(0).tolist())
    assert result["feature_mean_activations"] == pytest.approx(acts.double().mean(0).tolist(), rel=1e-5)
    assert result["feature_max_activations"] == pytest.approx(acts.amax(0).tolist(), rel=1e-5)
    assert [features.text.tolist() for features, _ in evaluation.blocks(count=False)] == [
        features.text.tolist() for features, _ in found
    ]
    assert evaluation.statistics().rows == 203


class Rows:
    """Endless rows, of which only the size of the first block is made."""

    rows = 10**9

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in
        self.asked = 0

    def blocks(self, rows_per_block: int) -> Iterator[tuple[int, Tensor]]:
        self.asked = rows_per_block
        yield 0, torch.ones(2, self.d_in)

    @property
    def text_of_row(self) -> NDArray[np.int32]:
        return np.arange(2, dtype=np.int32)

    position_of_row = token_of_row = text_of_row


def sae(d_in: int, d_sae: int) -> FoldedSAE:
    return FoldedSAE(
        "standard", torch.ones(d_sae, d_in), torch.zeros(d_sae), torch.ones(d_in, d_sae), torch.zeros(d_in)
    )


@pytest.mark.parametrize(("d_in", "d_sae"), [(512, 64), (64, 4096), (768, 32768)])
def test_a_block_is_bounded_by_the_rows_width_as_well_as_by_the_number_of_features(d_in: int, d_sae: int) -> None:
    rows = Rows(d_in)
    evaluation = Evaluation(sae(d_in, d_sae), rows, np.zeros(2, np.uint8), 0, torch.device("cpu"), lambda done: None)
    next(evaluation.blocks())
    held = rows.asked * (4 * d_sae + 8 * FP64_COPIES * d_in)
    assert BLOCK_BYTES * 0.9 < held <= BLOCK_BYTES
