"""The seed's SAE: ReLU with a penalty on the mean absolute latent, Xavier start, encoder bias -0.1.

Owns its equations and nothing else; when latents are re-initialised and when training ends is the recipe's.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import SparseAutoencoder, StepInput, StepOutput, count_active
from .folded import CannotStart, FoldedSAE, plain


class StandardAutoencoder(SparseAutoencoder):
    """The seed's formulas, with λ = `sparsity_coeff`, rows x of width D and F latents.

        h = ReLU(W_enc x + b_enc)
        x̂ = W_dec h + b_dec
        L = mean (x̂ - x)² + λ mean |h|        means over rows and dimensions, rows and latents

    Start: W_enc Xavier-uniform, U(±√(6 / (D + F))); b_enc = -0.1; W_dec = a copy of W_encᵀ (which is kept transposed,
    a row a latent); b_dec = 0.
    Nothing is scaled, so activations have the units that the loss gives them.
    """

    kind: ClassVar[str] = "standard"

    def __init__(self, d_in: int, d_sae: int, sparsity_coeff: float, generator: torch.Generator) -> None:
        super().__init__(d_in, d_sae, generator)
        self.sparsity_coeff = sparsity_coeff

    def draw_encoder(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Xavier-uniform weight, bias -0.1."""
        weight_FD = nn.init.xavier_uniform_(torch.empty(self.d_sae, self.d_in), generator=generator)
        return weight_FD, torch.full((self.d_sae,), -0.1)

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h."""
        return functional.relu(functional.linear(x_BD, self.W_enc, self.b_enc))

    def decode(self, acts_BF: Tensor) -> Tensor:
        """The reconstruction x̂."""
        return functional.linear(acts_BF, self.W_dec.T, self.b_dec)

    def step(self, inputs: StepInput) -> StepOutput:
        """Mean squared error plus λ times the mean absolute latent."""
        acts_BF = self.encode(inputs.x_BD)
        reconstruction_loss = functional.mse_loss(self.decode(acts_BF), inputs.x_BD)
        sparsity_loss = self.sparsity_coeff * acts_BF.abs().mean()
        active_rows_F = count_active(acts_BF.detach())
        return StepOutput(
            loss=reconstruction_loss + sparsity_loss,
            reconstruction_loss=reconstruction_loss,
            sparsity_loss=sparsity_loss,
            l0=active_rows_F.sum() / len(acts_BF),
            active_rows_F=active_rows_F,
        )

    @torch.no_grad()
    def start_from(self, trained: FoldedSAE) -> None:
        """Its weights as they are."""
        if trained.k is not None or trained.threshold is not None:
            raise CannotStart("it keeps fewer latents than a ReLU does", "Train it as the kind that it is.")
        self.W_enc.copy_(trained.encoder_weight)
        self.b_enc.copy_(trained.encoder_bias)
        self.W_dec.copy_(trained.decoder_weight.T)
        self.b_dec.copy_(trained.decoder_bias)

    def folded(self) -> FoldedSAE:
        """The weights as they are."""
        return FoldedSAE(
            kind=self.kind,
            encoder_weight=plain(self.W_enc),
            encoder_bias=plain(self.b_enc),
            decoder_weight=plain(self.W_dec.T),
            decoder_bias=plain(self.b_dec),
        )
