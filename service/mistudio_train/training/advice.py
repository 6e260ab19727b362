"""What a requester should know about an SAE of few or odd data, in sentences.

Looks at figures and at a sample of rows; changes nothing and decides nothing.
"""

from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_schemas import SAEMetrics

FEW_TEXTS: Final = 1000
ROWS_A_LATENT: Final = 8
FEW_TEXTS_A_LATENT: Final = 10
MANY_FAINT: Final = 0.25
"""Of the latents that live: more with so few texts each are worth a word."""
BY_HEART: Final = 1.5
"""Held-out FVU by that of the training rows."""
DENSE: Final = 0.1
"""Share of the latents that is active on a row: above it an SAE is hardly sparse."""
SAMPLE: Final = 2000
TWINS: Final = 0.999
"""Cosine, about the mean, of two rows of which one adds nothing."""
MANY_TWINS: Final = 0.05
LENGTH_EXPLAINS: Final = 0.7
"""Correlation of the first principal component with the logarithm of the text's length."""


class Store(Protocol):
    """Rows that some can be read of."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    def gather(self, indices: NDArray[np.int64], /) -> Tensor:
        """The rows of these numbers, fp32."""
        ...


def on_rows(rows: Store, length_of: Callable[[int], int]) -> Iterator[str]:
    """Of mean-pooled rows, one a text, whatever is trained on them; `length_of` gives a text's length."""
    if rows.rows < FEW_TEXTS:
        yield f"of {rows.rows} texts an SAE learns clusters rather than features; give it some thousand"
    chosen = np.arange(min(SAMPLE, rows.rows)) * rows.rows // min(SAMPLE, rows.rows)
    centred_ND = rows.gather(chosen).double()
    centred_ND = centred_ND - centred_ND.mean(0)
    twins = _share_of_twins(centred_ND)
    if twins > MANY_TWINS:
        yield f"{twins:.0%} of the texts have a near-duplicate: they count twice, and may be held out and trained on"
    correlation = _with_first_component(centred_ND, [length_of(int(row)) for row in chosen])
    if correlation > LENGTH_EXPLAINS:
        yield (
            "what differs most between the texts is their length "
            f"(correlation {correlation:.2f} with the first principal component)"
        )


def on_result(name: str, rows: int, d_sae: int, metrics: SAEMetrics, active_rows_F: NDArray[np.int64]) -> Iterator[str]:
    """Of one SAE on mean-pooled rows; `active_rows_F`: on how many rows each latent is active."""
    if rows < ROWS_A_LATENT * d_sae:
        yield f"{name}: {rows} rows are few for {d_sae} latents; {ROWS_A_LATENT} a latent are a start"
    fvu, training = metrics.fvu, metrics.training_fvu
    if metrics.held_out and fvu is not None and training is not None and fvu > BY_HEART * training:
        yield f"{name}: held-out FVU is {fvu:.3g}, of the training rows {training:.3g}: it knows these by heart"
    living = active_rows_F[active_rows_F > 0]
    faint = int((living < FEW_TEXTS_A_LATENT).sum())
    if faint > MANY_FAINT * len(living):
        yield f"{name}: {faint} of {len(living)} latents are active on fewer than {FEW_TEXTS_A_LATENT} texts"


def on_sparsity(name: str, kind: str, metrics: SAEMetrics) -> Iterator[str]:
    """Of any SAE: whether it is one."""
    share = metrics.fraction_active
    if share is not None and share > DENSE:
        remedy = "a larger sparsity_coeff, or" if kind == "standard" else "fewer of them, or"
        yield (
            f"{name}: {share:.0%} of the latents are active on a row, so it is hardly sparse and its features say "
            f"little; ask for {remedy} the kind batchtopk"
        )


def _share_of_twins(centred_ND: Tensor) -> float:
    norms_N = torch.linalg.vector_norm(centred_ND, dim=1)
    directions_ND = centred_ND / norms_N.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    cosines_NN = (directions_ND @ directions_ND.T).fill_diagonal_(-1)
    return float(((cosines_NN.amax(1) > TWINS) | (norms_N == 0)).double().mean())


def _with_first_component(centred_ND: Tensor, lengths: list[int]) -> float:
    """The absolute correlation; 0 where one of them does not vary."""
    _, _, directions = torch.linalg.svd(centred_ND, full_matrices=False)
    component_N, length_N = centred_ND @ directions[0], torch.tensor(lengths, dtype=torch.float64).clamp_min(1).log()
    both = torch.stack([component_N, length_N])
    return float(torch.corrcoef(both)[0, 1].abs().nan_to_num(0.0))
