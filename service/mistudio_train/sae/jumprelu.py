"""The JumpReLU SAE of Rajamanoharan et al. 2024 (arXiv:2407.14435). Owns its thresholds and its two penalties."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StepInput, StepOutput
from .folded import CannotStart, FoldedSAE, plain
from .gates import jump_relu
from .scaled import ScaledAutoencoder, ScaledOptions
from .sparse import active_above, decode_at, encode_at

TANH_SCALE = 4.0
"""Of the activations within the penalty's tanh (Conerly et al. 2025, "Dictionary Learning Optimization Techniques")."""

THRESHOLD_RATE = 10.0
"""The learning rate of log thresholds by the others'."""


class JumpReLUAutoencoder(ScaledAutoencoder):
    """A threshold θ_f of its own for every latent, learned; with p, z, L_aux and L_pre of `ScaledAutoencoder`.

        h = p · [p > θ],  ẑ = W_decᵀ h + b_dec,  L0 = mean over rows of Σ_f [p_f > θ_f]
        L = mean (ẑ - z)² + λ(t) · S + L_aux + L_pre
        S = (L0 / target - 1)²                        with a target L0
        S = mean over rows of Σ_f tanh(4 h_f) / D     without one

    θ = exp(τ) > 0, and τ, always fp32, is the parameter. Its gradients are straight-through estimates (`gates`), and
    λ(t) rises linearly over the first steps. Only latents with p > θ - ε / 2 have any gradient, and of those not above
    θ it is the threshold's alone: all else is left out of the arithmetic behind the encoder's product.
    """

    kind: ClassVar[str] = "jumprelu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        options: ScaledOptions,
        *,
        sparsity_coeff: float,
        target_l0: float | None,
        sparsity_warmup: float,
        bandwidth: float,
        initial_threshold: float,
        generator: torch.Generator,
    ) -> None:
        """`sparsity_warmup`: share of the steps over which λ rises. `initial_threshold`, `bandwidth`: in units of z."""
        self.initial_threshold = initial_threshold
        super().__init__(d_in, d_sae, options, generator)
        self.sparsity_coeff, self.target_l0, self.bandwidth = sparsity_coeff, target_l0, bandwidth
        self.sparsity_warmup = sparsity_warmup
        self.log_threshold = nn.Parameter(torch.full((d_sae,), initial_threshold).log())

    @property
    def by_latent(self) -> list[nn.Parameter]:
        """The thresholds, too."""
        return [*super().by_latent, self.log_threshold]

    def relative_rates(self) -> dict[nn.Parameter, float]:
        """The thresholds' too: they have orders of magnitude to go, where weights have fractions."""
        return super().relative_rates() | {self.log_threshold: THRESHOLD_RATE}

    @property
    def threshold(self) -> Tensor:
        """θ, [d_sae]."""
        return self.log_threshold.exp()

    def step(self, inputs: StepInput) -> StepOutput:
        """The losses in the scaled space."""
        centred_BD, z_BD = self.ends(inputs)
        with torch.no_grad():
            pre_BF = self._pre(centred_BD)
            near = active_above(pre_BF, self.threshold - self.bandwidth / 2)
            values_N = near.scores(pre_BF, centred_BD, self.W_enc, self.b_enc)
            active = near.zero_below(values_N, self.threshold)
        values_N = encode_at(active, values_N, centred_BD, self.W_enc)
        tanh_scale = TANH_SCALE if self.target_l0 is None else 0.0
        acts_N, number, tanh, active_rows_F = jump_relu(
            active, values_N, self.bias(), self.threshold, self.bandwidth, tanh_scale
        )
        z_hat_BD = decode_at(active, acts_N, self.W_dec) + self.b_dec
        reconstruction_loss = functional.mse_loss(z_hat_BD, z_BD)
        penalty = tanh / z_BD.numel() if self.target_l0 is None else (number / len(z_BD) / self.target_l0 - 1).square()
        sparsity_loss = (
            self.sparsity_coeff * inputs.risen(self.sparsity_warmup) * penalty
            + self.aux_k_loss(pre_BF, centred_BD, (z_BD - z_hat_BD).detach(), inputs.dead_F)
            + self.pre_act_loss(pre_BF, centred_BD, inputs.dead_F, self.threshold)
        )
        return self.output(active_rows_F, len(z_BD), reconstruction_loss, sparsity_loss)

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h / s, so that they and their decoder rows make up x and not z."""
        pre_BF = self.pre_activations(x_BD)
        return pre_BF * (pre_BF > self.threshold) / self.scale

    @torch.no_grad()
    def reset_latents(self, which_F: Tensor, generator: torch.Generator) -> None:
        """Their thresholds, too, begin again."""
        super().reset_latents(which_F, generator)
        self.log_threshold[which_F.to(self.log_threshold.device)] = torch.tensor(self.initial_threshold).log()

    @torch.no_grad()
    def start_choice(self, trained: FoldedSAE) -> None:
        """Only of an SAE whose thresholds are positive, as θ = exp(τ) is."""
        if trained.threshold is None:
            raise CannotStart("it has no thresholds", "Train it as the kind that it is.")
        if not bool((trained.threshold > 0).all()):
            number = int((trained.threshold <= 0).sum())
            raise CannotStart(
                f"{number} of its thresholds are not above zero, as those of this kind are", "Train the kind 'gated'."
            )
        self.log_threshold.copy_((trained.threshold.double() * self.scale.double()).log())

    def folded(self) -> FoldedSAE:
        """With the thresholds θ / s."""
        threshold_F = self.threshold.detach().double() / self.scale.double()
        return replace(super().folded(), threshold=plain(threshold_F))
