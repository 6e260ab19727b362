"""Makes one row a text of one row a token, as the bundle wants it.

Owns that reduction, over blocks whose ends may fall inside a text; must not run an SAE or touch a disk.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .features import RowFeatures
from .files import refused


def one_row_a_text(
    blocks: Iterable[tuple[RowFeatures, Tensor]], d_sae: int, n_texts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows to text rows: of features the maximum over the text's rows, `acts_TF`, of activations the mean, `x_TD`.

    A text without any row (nothing but special tokens) has no active feature: its rows are zeros.

    Args:
        blocks: features, and the activations `x_BD` that they are of, in the order of the texts.
        d_sae: number of features.
        n_texts: row i of all that is given belongs to text i, for i up to this.

    Raises:
        ExportRefused: if a row's text is out of order or range.

    """
    text = 0  # of which more rows may come
    maxima_F, sums_D, rows = torch.zeros(d_sae), None, torch.zeros((), dtype=torch.int64)
    for features, x_BD in blocks:
        if not len(x_BD):
            continue
        _check_order(features.text, text, n_texts)
        texts_B = features.text - text
        count = int(texts_B[-1]) + 1
        maxima_TF = torch.zeros(count, d_sae)
        maxima_TF[0] = maxima_F
        places_N = texts_B[features.row] * d_sae + features.feature
        maxima_TF.view(-1).scatter_reduce_(0, places_N, features.activation, "amax")
        sums_TD = torch.zeros(count, x_BD.shape[1], dtype=torch.float64)
        sums_TD[0] = 0 if sums_D is None else sums_D
        sums_TD.index_add_(0, texts_B, x_BD.double())
        rows_T = torch.bincount(texts_B, minlength=count)
        rows_T[0] += rows
        yield maxima_TF[:-1], _mean(sums_TD[:-1], rows_T[:-1])
        text, maxima_F, sums_D, rows = int(features.text[-1]), maxima_TF[-1].clone(), sums_TD[-1], rows_T[-1]
    if sums_D is not None:
        acts_TF, x_TD = torch.zeros(n_texts - text, d_sae), torch.zeros(n_texts - text, len(sums_D))
        acts_TF[0], x_TD[0] = maxima_F, _mean(sums_D[None], rows[None])[0]
        yield acts_TF, x_TD


def _check_order(text_B: Tensor, least: int, n_texts: int) -> None:
    if int(text_B[0]) < least or int(text_B[-1]) >= n_texts or bool((text_B.diff() < 0).any()):
        raise refused(f"rows of tokens are not in the order of their texts, of which there are {n_texts}")


def _mean(sums_TD: Tensor, rows_T: Tensor) -> Tensor:
    return (sums_TD / rows_T[:, None].clamp_min(1)).float()
