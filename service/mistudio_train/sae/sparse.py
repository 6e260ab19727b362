"""Sparse activations as values and indices of k latents a row: choosing them, spreading them out, decoding them.

Owns the arithmetic only; must not know of weights' training, kinds or folding.
"""

import torch
from torch import Tensor
from torch.nn import functional


def keep_largest(acts_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as `(values_BK, indices_BK)`: exactly k, also among equal ones, in no order."""
    values_BK, indices_BK = acts_BF.topk(k, dim=1, sorted=False)
    return values_BK, indices_BK


def to_dense(values_BK: Tensor, indices_BK: Tensor, d_sae: int) -> Tensor:
    """`acts_BF` with the values at their indices and zero elsewhere; indices differ within a row."""
    dense_BF = torch.zeros(len(values_BK), d_sae, dtype=values_BK.dtype, device=values_BK.device)
    return dense_BF.scatter(1, indices_BK, values_BK)


def decode_sparse(values_BK: Tensor, indices_BK: Tensor, decoder_DF: Tensor) -> Tensor:
    """`acts_BF @ decoder_DFᵀ` touching only the k columns a row that are not zero: `[B, d_in]`, no bias."""
    decoded_BD: Tensor = functional.embedding_bag(
        indices_BK, decoder_DF.T.contiguous(), per_sample_weights=values_BK, mode="sum"
    )
    return decoded_BD
