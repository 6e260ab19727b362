"""One row a text from one row a token: maxima of features, means of activations, wherever blocks end."""

import pytest
import torch
from torch import Tensor

from mistudio_train.errors import ExportRefused
from mistudio_train.training.features import RowFeatures
from mistudio_train.training.text_rows import one_row_a_text

#                          text 0       text 1 (three tokens)              text 3
TEXT_B = torch.tensor([0, 0, 1, 1, 1, 3])
ACTS_BF = torch.tensor([[1.0, 0], [0, 5], [0, 0], [2, 0], [0, 3], [7, 0]])
X_BD = torch.tensor([[2.0], [4], [-3], [0], [9], [5]])
EXPECTED_ACTS = torch.tensor([[1.0, 5], [2, 3], [0, 0], [7, 0], [0, 0]])
EXPECTED_X = torch.tensor([[3.0], [2], [0], [5], [0]])


def block(acts_BF: Tensor, x_BD: Tensor, text_B: Tensor) -> tuple[RowFeatures, Tensor]:
    row, feature = acts_BF.nonzero(as_tuple=True)
    return RowFeatures(text_B, text_B, text_B, row, feature, acts_BF[row, feature]), x_BD


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7])
def test_blocks_may_end_inside_a_text(size: int) -> None:
    blocks = [block(ACTS_BF[i : i + size], X_BD[i : i + size], TEXT_B[i : i + size]) for i in range(0, 6, size)]
    rows = list(one_row_a_text(blocks, 2, n_texts=5))
    assert torch.equal(torch.cat([acts_TF for acts_TF, _ in rows]), EXPECTED_ACTS)
    assert torch.equal(torch.cat([x_TD for _, x_TD in rows]), EXPECTED_X)


@pytest.mark.parametrize("text", [[1, 0], [0, 2]])
def test_texts_out_of_order_or_range_are_refused(text: list[int]) -> None:
    blocks = [block(ACTS_BF[:2], X_BD[:2], torch.tensor(text))]
    with pytest.raises(ExportRefused, match="order of their texts, of which there are 2"):
        list(one_row_a_text(blocks, 2, n_texts=2))


def test_a_later_block_may_not_go_back() -> None:
    blocks = [block(ACTS_BF[:1], X_BD[:1], torch.tensor([text])) for text in (1, 0)]
    with pytest.raises(ExportRefused):
        list(one_row_a_text(blocks, 2, n_texts=2))
