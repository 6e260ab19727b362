"""What the kinds share that keep a number of latents: the step on active entries.

Owns the step; which latents are kept is each kind's choice.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from .base import ACTIVE_ABOVE, StepInput, StepOutput
from .scaled import ScaledAutoencoder, ScaledOptions
from .sparse import Active, decode_at


class KSparseAutoencoder(ScaledAutoencoder):
    """The formulas, with p, z and L_aux of `ScaledAutoencoder`.

        h   = ReLU(p) where `choose` says, zero elsewhere
        ẑ   = W_decᵀ h + b_dec
        L   = mean (ẑ - z)² + L_aux

    Means are over rows and dimensions.
    """

    def __init__(self, d_in: int, d_sae: int, options: ScaledOptions, *, k: int, generator: torch.Generator) -> None:
        super().__init__(d_in, d_sae, options, generator)
        self.k = k

    @abstractmethod
    def choose(self, pre_BF: Tensor) -> Active:
        """The latents that a training step keeps, from p; without gradients."""

    def reconstruction_loss(self, active: Active, values_N: Tensor, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised of the error ẑ - z, and ẑ."""
        z_hat_BD = decode_at(active, values_N, self.W_dec) + self.b_dec
        return functional.mse_loss(z_hat_BD, z_BD), z_hat_BD

    def step(self, inputs: StepInput) -> StepOutput:
        """The losses in the scaled space. Behind the encoder's product only active entries are touched."""
        centred_BD, z_BD = self.ends(inputs)
        with torch.no_grad():
            pre_BF = self._pre(centred_BD)
            active = self.choose(pre_BF)
        values_N = self.rectified_at(active, pre_BF, centred_BD)
        reconstruction_loss, z_hat_BD = self.reconstruction_loss(active, values_N, z_BD)
        aux_loss = self.aux_k_loss(pre_BF, centred_BD, (z_BD - z_hat_BD).detach(), inputs.dead_F)
        active_rows_F = active.count_above(values_N.detach(), ACTIVE_ABOVE)
        return self.output(active_rows_F, len(z_BD), reconstruction_loss, aux_loss)
