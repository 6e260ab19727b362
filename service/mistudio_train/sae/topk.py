"""The TopK SAE of Gao et al. 2024 (arXiv:2406.04093) with the auxiliary loss by which dead latents learn the residual.

Owns its equations, its scaling and its decoder's norm; which latents are dead is the trainer's to say.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .base import ACTIVE_ABOVE, SparseAutoencoder, StepInput, StepOutput
from .folded import FoldedSAE, plain
from .sparse import decode_sparse, keep_largest, to_dense


class TopKAutoencoder(SparseAutoencoder):
    """The formulas, for rows x of width D, in the scaled space of z = s x in which it trains.

        f   = ReLU(W_enc (z - b_dec) + b_enc)
        h   = the k largest of each row of f, zero elsewhere
        ẑ   = W_dec h + b_dec
        L   = mean (ẑ - z)² + c · L_aux
        L_aux = min(dead / k_aux, 1) · ||W_dec a - e||² / ||e||²,   e = z - ẑ held fixed,
        a   = the k_aux = round(D / 2) largest of the dead latents of each row of f

    Start: `prepare` sets b_dec to the sample's mean and s such that the encoder's input z - b_dec has mean squared norm
    D, so that the reconstruction loss is about the fraction of variance unexplained. W_dec has columns of norm 1 at all
    times (the gradient along a column is removed); W_enc starts as a copy of its transpose; b_enc = 0.
    ||e||² is the residual's variance about zero, over the batch, as in the authors' code: defined for one row, too.
    """

    kind: ClassVar[str] = "topk"
    scale: Tensor

    def __init__(self, d_in: int, d_sae: int, k: int, aux_k_coeff: float, generator: torch.Generator) -> None:
        super().__init__(d_in, d_sae, generator)
        self.k = k
        self.k_aux = min(max(1, round(d_in / 2)), d_sae)
        self.aux_k_coeff = aux_k_coeff
        self.register_buffer("scale", torch.ones(()))

    def draw_encoder(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Directions uniform on the sphere, bias 0."""
        weight_FD = torch.randn(self.d_sae, self.d_in, generator=generator)
        return functional.normalize(weight_FD, dim=1), torch.zeros(self.d_sae)

    @torch.no_grad()
    def prepare(self, sample_ND: Tensor) -> None:
        """Set s and b_dec from `sample_ND`; a sample without variance leaves s at 1."""
        rows_ND = sample_ND.double()
        mean_D = rows_ND.mean(0)
        mean_square = (rows_ND - mean_D).square().mean()
        scale = torch.where(mean_square > 0, mean_square.rsqrt(), torch.ones_like(mean_square))
        self.scale.copy_(scale)
        self.decoder.bias.copy_(mean_D * scale)

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h / s, so that they and their decoder columns make up x and not z."""
        return to_dense(*keep_largest(self._pre_select(x_BD * self.scale), self.k), self.d_sae) / self.scale

    def decode(self, acts_BF: Tensor) -> Tensor:
        """The reconstruction ẑ / s."""
        return functional.linear(acts_BF, self.decoder.weight, self.decoder.bias / self.scale)

    def step(self, inputs: StepInput) -> StepOutput:
        """Mean squared error of the scaled rows plus the weighted auxiliary loss; both in the scaled space."""
        z_BD = inputs.x_BD * self.scale
        positive_BF = self._pre_select(z_BD)
        values_BK, indices_BK = keep_largest(positive_BF, self.k)
        z_hat_BD = decode_sparse(values_BK, indices_BK, self.decoder.weight) + self.decoder.bias
        reconstruction_loss = functional.mse_loss(z_hat_BD, z_BD)
        aux_loss = self.aux_k_coeff * self._aux_loss(positive_BF, (z_BD - z_hat_BD).detach(), inputs.dead_F)
        active_BK = values_BK.detach() > ACTIVE_ABOVE
        active_rows_F = torch.zeros(self.d_sae, dtype=torch.int64, device=z_BD.device)
        active_rows_F.index_add_(0, indices_BK.flatten(), active_BK.flatten().long())
        return StepOutput(
            loss=reconstruction_loss + aux_loss,
            reconstruction_loss=reconstruction_loss,
            sparsity_loss=aux_loss,
            l0=active_BK.sum() / len(z_BD),
            active_rows_F=active_rows_F,
        )

    @torch.no_grad()
    def before_update(self) -> None:
        """Remove the part of the decoder's gradient along each column: the norm is fixed."""
        gradient_DF, weight_DF = self.decoder.weight.grad, self.decoder.weight
        if gradient_DF is not None:
            gradient_DF.sub_((gradient_DF * weight_DF).sum(0) * weight_DF)

    @torch.no_grad()
    def after_update(self) -> None:
        """Bring the decoder's columns back to norm 1."""
        self.decoder.weight.copy_(functional.normalize(self.decoder.weight, dim=0))

    def folded(self) -> FoldedSAE:
        """Only the biases change, since ReLU and the choice of the largest do not mind a positive factor.

        h / s = topk(ReLU(W_enc x + (b_enc - W_enc b_dec) / s)) and x̂ = W_dec (h / s) + b_dec / s.
        """
        scale, weight_FD = self.scale.double(), self.encoder.weight.detach().double()
        bias_D = self.decoder.bias.detach().double()
        return FoldedSAE(
            kind=self.kind,
            encoder_weight=plain(self.encoder.weight),
            encoder_bias=plain((self.encoder.bias.detach().double() - weight_FD @ bias_D) / scale),
            decoder_weight=plain(self.decoder.weight),
            decoder_bias=plain(bias_D / scale),
            k=self.k,
        )

    def _pre_select(self, z_BD: Tensor) -> Tensor:
        return functional.relu(self.encoder(z_BD - self.decoder.bias))

    def _aux_loss(self, positive_BF: Tensor, residual_BD: Tensor, dead_F: Tensor | None) -> Tensor:
        """L_aux; its gradient reaches the decoder and, through the values, the encoder."""
        if dead_F is None or self.aux_k_coeff == 0:
            return residual_BD.new_zeros(())
        # Reading a flag would make a GPU wait; on a CPU it is free and spares the whole loss, which would be zero.
        if not residual_BD.is_cuda and not bool(dead_F.any()):
            return residual_BD.new_zeros(())
        values_BK, indices_BK = keep_largest(positive_BF * dead_F, self.k_aux)
        error = (decode_sparse(values_BK, indices_BK, self.decoder.weight) - residual_BD).square().sum()
        energy = residual_BD.square().sum().clamp_min(torch.finfo(residual_BD.dtype).tiny)
        return (dead_F.sum() / self.k_aux).clamp_max(1) * error / energy
