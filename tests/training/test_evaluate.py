from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.training.evaluate import BLOCK_BYTES, FP64_COPIES, Evaluation


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
    next(evaluation.text_blocks(2, mean_pooled=True))
    held = rows.asked * (4 * d_sae + 8 * FP64_COPIES * d_in)
    assert BLOCK_BYTES * 0.9 < held <= BLOCK_BYTES
