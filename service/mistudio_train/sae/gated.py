"""The gated SAE of Rajamanoharan et al. 2024 (arXiv:2404.16014). Owns its gates and its penalty."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StepInput, StepOutput
from .folded import CannotStart, FoldedSAE, plain
from .gates import gate
from .scaled import ScaledAutoencoder, ScaledOptions
from .sparse import active_above, decode_at


class GatedAutoencoder(ScaledAutoencoder):
    """Whether a latent is active and how much are told apart; with p, z, L_aux and L_pre of `ScaledAutoencoder`.

        p     = W_enc (z - b_dec) + b_enc                  the gate's, π_gate there; b_enc is b_gate
        m     = e^r (p - b_enc) + b_mag                    the magnitude's
        h     = [p > 0] · ReLU(m),  ẑ = W_decᵀ h + b_dec
        ẑ_g   = Wᵀ ReLU(p) + b,  W and b being W_dec and b_dec held fixed
        L     = mean (ẑ - z)² + λ(t) · mean over rows of Σ_f ReLU(p_f) / D + mean (ẑ_g - z)² + L_aux + L_pre

    λ(t) rises linearly over the first steps. [p > 0] has no gradient: the gates learn from the other two terms. Only
    latents with p > 0 have any: all else is left out of the arithmetic behind the encoder's product.
    """

    kind: ClassVar[str] = "gated"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        options: ScaledOptions,
        *,
        sparsity_coeff: float,
        sparsity_warmup: float,
        generator: torch.Generator,
    ) -> None:
        """`sparsity_warmup` is the share of the steps over which λ rises."""
        super().__init__(d_in, d_sae, options, generator)
        self.sparsity_coeff, self.sparsity_warmup = sparsity_coeff, sparsity_warmup
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    @property
    def by_latent(self) -> list[nn.Parameter]:
        """The magnitudes' parameters, too."""
        return [*super().by_latent, self.r_mag, self.b_mag]

    def step(self, inputs: StepInput) -> StepOutput:
        """The losses in the scaled space."""
        centred_BD, z_BD = self.ends(inputs)
        with torch.no_grad():
            pre_BF = self._pre(centred_BD)
            active = active_above(pre_BF, 0)
        values_N = self.values_at(active, pre_BF, centred_BD)
        gain_F = self.r_mag.exp()
        offset_F = self.b_mag - gain_F * self.b_enc
        gate_N, acts_N, gates, active_rows_F = gate(active, values_N, self.bias(), gain_F, offset_F)
        z_hat_BD = decode_at(active, acts_N, self.W_dec) + self.b_dec
        gate_hat_BD = decode_at(active, gate_N, self.W_dec.detach()) + self.b_dec.detach()
        reconstruction_loss = functional.mse_loss(z_hat_BD, z_BD)
        sparsity_loss = (
            self.sparsity_coeff * inputs.risen(self.sparsity_warmup) * gates / z_BD.numel()
            + functional.mse_loss(gate_hat_BD, z_BD)
            + self.aux_k_loss(pre_BF, centred_BD, (z_BD - z_hat_BD).detach(), inputs.dead_F)
            + self.pre_act_loss(pre_BF, centred_BD, inputs.dead_F)
        )
        return self.output(active_rows_F, len(z_BD), reconstruction_loss, sparsity_loss)

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h / s, so that they and their decoder rows make up x and not z."""
        pre_BF = self.pre_activations(x_BD)
        magnitudes_BF = self.r_mag.exp() * (pre_BF - self.b_enc) + self.b_mag
        return (pre_BF > 0) * magnitudes_BF.relu() / self.scale

    @torch.no_grad()
    def reset_latents(self, which_F: Tensor, generator: torch.Generator) -> None:
        """Their magnitudes, too, begin again."""
        super().reset_latents(which_F, generator)
        for parameter in (self.r_mag, self.b_mag):
            parameter[which_F.to(parameter.device)] = 0

    @torch.no_grad()
    def start_choice(self, trained: FoldedSAE) -> None:
        """Of any SAE with thresholds: the gate is (m - s threshold) / gain, and its gain 1 if nobody knows it."""
        if trained.threshold is None:
            raise CannotStart("it has no gates and no thresholds", "Train it as the kind that it is.")
        gain_F = torch.ones_like(trained.threshold) if trained.gain is None else trained.gain
        self.b_mag.copy_(self.unfolded_bias(trained))
        self.r_mag.copy_(gain_F.double().log())
        exact_F = self.r_mag.double().exp()
        self.W_enc.copy_(trained.encoder_weight / exact_F[:, None])
        self.b_enc.copy_((self.b_mag.double() - trained.threshold.double() * self.scale.double()) / exact_F)

    def folded(self) -> FoldedSAE:
        """The magnitudes' encoder, with thresholds: p > 0 exactly where m > b_mag - e^r b_enc."""
        gain_F, magnitude_F = self.r_mag.detach().double().exp(), self.b_mag.detach().double()
        weight_FD, bias_F = self.folded_encoder(gain_F[:, None] * self.W_enc.detach().double(), magnitude_F)
        threshold_F = (magnitude_F - gain_F * self.b_enc.detach().double()) / self.scale.double()
        return replace(
            super().folded(),
            encoder_weight=weight_FD,
            encoder_bias=bias_F,
            threshold=plain(threshold_F),
            gain=plain(gain_F),
        )
