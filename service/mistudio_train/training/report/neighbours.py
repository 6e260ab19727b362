"""How alike a dictionary's directions are: each decoder row's nearest ones by cosine.

Reads weights, changes none; knows no rows and no features' activations.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

NEAREST: Final = 4
QUERIES_AT_ONCE: Final = 512
MOST_PRODUCTS: Final = 2e12
"""Multiplications; of a dictionary that would take more only some features are asked for, evenly spread."""


@dataclass(frozen=True)
class Neighbours:
    """Of some features those whose decoder rows point the same way, the nearest first."""

    feature: NDArray[np.int64]
    """[Q]: whose they are, ascending."""
    nearest: NDArray[np.int64]
    """[Q, n]"""
    cosine: NDArray[np.float32]
    """[Q, n]"""


@torch.no_grad()
def neighbours(decoder_DF: Tensor, living: NDArray[np.int64], device: torch.device) -> Neighbours:
    """Among the living features.

    Args:
        decoder_DF: a column a feature.
        living: which features to compare, ascending.
        device: where to.

    """
    at = torch.from_numpy(living)
    directions_LD = functional.normalize(decoder_DF.T[at.to(decoder_DF.device)].to(device), dim=1)
    count, width = directions_LD.shape
    asked = max(1, min(count, int(MOST_PRODUCTS // max(1, count * width))))
    queries = np.arange(asked) * count // asked if count else np.zeros(0, np.int64)
    nearest = min(NEAREST, max(0, count - 1))
    cosine, places = np.zeros((len(queries), nearest), np.float32), np.zeros((len(queries), nearest), np.int64)
    for first in range(0, len(queries) if nearest else 0, QUERIES_AT_ONCE):
        some = torch.from_numpy(queries[first : first + QUERIES_AT_ONCE]).to(device)
        cosines_QL = directions_LD[some] @ directions_LD.T
        cosines_QL[torch.arange(len(some), device=device), some] = -torch.inf
        found = cosines_QL.topk(nearest, dim=1)
        cosine[first : first + len(some)] = found.values.cpu().numpy()
        places[first : first + len(some)] = found.indices.cpu().numpy()
    return Neighbours(living[queries], living[places], cosine)
