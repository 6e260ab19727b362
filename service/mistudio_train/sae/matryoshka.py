"""The Matryoshka BatchTopK SAE of Bussmann et al. 2025 (arXiv:2503.17547). Owns its nested losses."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .batchtopk import BatchTopKAutoencoder
from .scaled import ScaledOptions
from .sparse import Active, decode_at


class MatryoshkaAutoencoder(BatchTopKAutoencoder):
    """Reconstructs from its first latents alone, too, so that these stay general while later ones specialise.

        L = 1/G Σ_g mean (ẑ_g - z)² + c · L_aux,   ẑ_g = Σ_{f < m_g} h_f W_dec,f + b_dec

    for the G prefixes of m_1 < … < m_G = d_sae latents; the rest is `BatchTopKAutoencoder`'s, L_aux's residual that of
    the whole ẑ_G. (The authors sum over prefixes; the mean leaves c as it is.)
    """

    kind: ClassVar[str] = "matryoshka"
    _ends: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        options: ScaledOptions,
        *,
        k: int,
        threshold_rate: float,
        prefixes: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        """`prefixes`: m_1 … m_G, ascending, the last one `d_sae`."""
        super().__init__(d_in, d_sae, options, k=k, threshold_rate=threshold_rate, generator=generator)
        self.prefixes = tuple(prefixes)
        self.register_buffer("_ends", torch.tensor(self.prefixes[:-1]), persistent=False)

    def reconstruction_loss(self, active: Active, values_N: Tensor, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over prefixes, and the whole reconstruction."""
        groups = len(self.prefixes)
        apart, order_N = active.split(torch.bucketize(active.latents_N, self._ends, right=True), groups)
        of_groups_GBD = decode_at(apart, values_N[order_N], self.W_dec).view(groups, *z_BD.shape)
        z_hats_GBD = of_groups_GBD.cumsum(0) + self.b_dec
        return functional.mse_loss(z_hats_GBD, z_BD.expand_as(z_hats_GBD)), z_hats_GBD[-1]
