"""What the kinds share that keep a number of latents: the step on active entries, and the loss that revives the dead.

Owns the step; which latents are kept is each kind's choice, and which are dead is the trainer's to say.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from .base import ACTIVE_ABOVE, StepInput, StepOutput
from .scaled import ScaledAutoencoder
from .sparse import Active, decode_at, encode_at, keep_largest


class KSparseAutoencoder(ScaledAutoencoder):
    """The formulas, with p and z of `ScaledAutoencoder`.

        h   = ReLU(p) where `choose` says, zero elsewhere
        ẑ   = W_decᵀ h + b_dec
        L   = mean (ẑ - z)² + c · L_aux
        L_aux = min(dead / k_aux, 1) · ||W_decᵀ a - e||² / ||e||²,   e = z - ẑ held fixed,
        a   = the k_aux = round(D / 2) largest of the dead latents of each row of ReLU(p)

    L_aux is of Gao et al. 2024 (arXiv:2406.04093). ||e||² is the residual's variance about zero, over the batch, as in
    the authors' code: defined for one row, too.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, aux_k_coeff: float, generator: torch.Generator) -> None:
        super().__init__(d_in, d_sae, generator)
        self.k = k
        self.k_aux = min(max(1, round(d_in / 2)), d_sae)
        self.aux_k_coeff = aux_k_coeff

    @abstractmethod
    def choose(self, pre_BF: Tensor) -> Active:
        """The latents that a training step keeps, from p; without gradients."""

    def reconstruction_loss(self, active: Active, values_N: Tensor, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised of the error ẑ - z, and ẑ."""
        z_hat_BD = decode_at(active, values_N, self.W_dec) + self.b_dec
        return functional.mse_loss(z_hat_BD, z_BD), z_hat_BD

    def step(self, inputs: StepInput) -> StepOutput:
        """The losses in the scaled space. Behind the encoder's product only active entries are touched."""
        z_BD = inputs.x_BD * self.scale
        with torch.no_grad():
            centred_BD = z_BD - self.b_dec
            pre_BF = self._pre(centred_BD)
            active = self.choose(pre_BF)
        values_N = encode_at(active, pre_BF, centred_BD, self.b_dec, self.W_enc, self.b_enc).relu()
        reconstruction_loss, z_hat_BD = self.reconstruction_loss(active, values_N, z_BD)
        aux_loss = self.aux_k_coeff * self._aux_loss(pre_BF, centred_BD, (z_BD - z_hat_BD).detach(), inputs.dead_F)
        is_active_N = values_N.detach() > ACTIVE_ABOVE
        return StepOutput(
            loss=reconstruction_loss + aux_loss,
            reconstruction_loss=reconstruction_loss,
            sparsity_loss=aux_loss,
            l0=is_active_N.sum() / len(z_BD),
            active_rows_F=active.count_by_latent(is_active_N),
        )

    def _aux_loss(self, pre_BF: Tensor, centred_BD: Tensor, residual_BD: Tensor, dead_F: Tensor | None) -> Tensor:
        """L_aux; its gradient reaches the decoder and, through the values, the encoder."""
        if dead_F is None or self.aux_k_coeff == 0:
            return residual_BD.new_zeros(())
        # Reading a flag would make a GPU wait; on a CPU it is free and spares the whole loss, which would be zero.
        if not residual_BD.is_cuda and not bool(dead_F.any()):
            return residual_BD.new_zeros(())
        with torch.no_grad():
            active = Active.same_number(self._largest_dead(pre_BF, dead_F), self.d_sae)
            is_dead_N = dead_F[active.latents_N]
        values_N = encode_at(active, pre_BF, centred_BD, self.b_dec, self.W_enc, self.b_enc).relu() * is_dead_N
        error = (decode_at(active, values_N, self.W_dec) - residual_BD).square().sum()
        energy = residual_BD.square().sum().clamp_min(torch.finfo(residual_BD.dtype).tiny)
        return (dead_F.sum() / self.k_aux).clamp_max(1) * error / energy

    def _largest_dead(self, pre_BF: Tensor, dead_F: Tensor) -> Tensor:
        """At most k_aux latents a row, [B, K]; where a GPU would have to wait for their number, some are not dead."""
        if pre_BF.is_cuda:
            return keep_largest(pre_BF.masked_fill(~dead_F, -torch.inf), self.k_aux)[1]
        dead_latents = dead_F.nonzero().squeeze(1)
        return dead_latents[keep_largest(pre_BF[:, dead_latents], min(self.k_aux, len(dead_latents)))[1]]
