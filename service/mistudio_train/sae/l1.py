"""The ReLU SAE of Conerly et al. 2024 ("Update on how we train SAEs"): an L1 penalty weighted by the decoder's norms.

Owns its penalty, and that the decoder's rows are free; the seed's own `standard` is another file.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StepInput, StepOutput
from .gates import rectify
from .kernels import fused
from .scaled import ScaledAutoencoder, ScaledOptions
from .sparse import active_above, decode_at

DECODER_RATE = 4.0
"""The decoder's learning rate by the others'. With this, rows of norm 0.3 at the start and norms held in the end,
the FVU of a language model's rows is 0.171 at 32 active latents, and 0.175 without (`benchmarks/quality`, seed 0)."""
HOLDS_NORMS = 0.2
"""Share of the steps. On a language model's rows the FVU is 0.4 to 0.7% lower for it; with 0.4 it is 2% higher."""


class L1Autoencoder(ScaledAutoencoder):
    """With p, z, L_aux and L_pre of `ScaledAutoencoder`, but decoder rows of any norm, which begin at 0.3.

        h = ReLU(p),  ẑ = W_decᵀ h + b_dec
        L = mean (ẑ - z)² + λ(t) · mean over rows of Σ_f h_f ||W_dec,f|| / D + L_aux + L_pre

    λ(t) rises linearly over the first steps. Weighted so, the penalty does not change when a latent's encoder shrinks
    and its decoder grows: nothing has to hold the norms. Only latents with p > 0 have any gradient.

    Over the last fifth of the steps the penalty holds ||W_dec,f|| fixed, so that the decoder makes up for what the
    penalty takes from activations (Wright & Sharkey 2024, "Addressing Feature Suppression in SAEs"). Not before: the
    norms would grow without end.
    """

    kind: ClassVar[str] = "standard"
    decoder_start = 0.3
    has_unit_rows = False

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

    def step(self, inputs: StepInput) -> StepOutput:
        """The losses in the scaled space."""
        centred_BD, z_BD = self.ends(inputs)
        with torch.no_grad():
            pre_BF = self._pre(centred_BD)
            active = active_above(pre_BF, 0)
        values_N = self.values_at(active, pre_BF, centred_BD)
        acts_N, acts_F, active_rows_F = rectify(active, values_N, self.bias())
        z_hat_BD = decode_at(active, acts_N, self.W_dec) + self.b_dec
        reconstruction_loss = functional.mse_loss(z_hat_BD, z_BD)
        norm_F, held = _norms(self.W_dec), inputs.is_in_last(HOLDS_NORMS)
        penalty = (acts_F * (held * norm_F.detach() + (1 - held) * norm_F)).sum() / z_BD.numel()
        sparsity_loss = self.sparsity_coeff * inputs.risen(self.sparsity_warmup) * penalty
        sparsity_loss = sparsity_loss + self.aux_k_loss(pre_BF, centred_BD, (z_BD - z_hat_BD).detach(), inputs.dead_F)
        sparsity_loss = sparsity_loss + self.pre_act_loss(pre_BF, centred_BD, inputs.dead_F)
        return self.output(active_rows_F, len(z_BD), reconstruction_loss, sparsity_loss)

    def relative_rates(self) -> dict[nn.Parameter, float]:
        """The decoder's."""
        return {self.W_dec: DECODER_RATE}

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h / s, so that they and their decoder rows make up x and not z."""
        return self.pre_activations(x_BD).relu() / self.scale

    def before_update(self) -> None:
        """Nothing: the norms are free."""

    def after_update(self) -> None:
        """Nothing: the norms are free."""


@fused
def _norms(weight_FD: Tensor) -> Tensor:
    norm_F: Tensor = torch.linalg.vector_norm(weight_FD, dim=1)
    return norm_F
