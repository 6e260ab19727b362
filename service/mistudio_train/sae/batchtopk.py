"""The BatchTopK SAE of Bussmann et al. 2024 (arXiv:2412.06410). Owns the choice of latents and the threshold."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .folded import CannotStart, FoldedSAE, is_one_value
from .ksparse import KSparseAutoencoder
from .largest import LargestOfBatch
from .scaled import ScaledOptions
from .sparse import Active


class BatchTopKAutoencoder(KSparseAutoencoder):
    """In training, the B·k largest positive p of a batch of B rows; afterwards, those above a threshold θ.

        h = ReLU(p) · [p > θ]
        θ ← θ + r (t - θ) after each step, where t is the smallest p that it kept; at the first, θ = t

    so that a row may have more latents than another, k in the mean; the rest is `KSparseAutoencoder`'s. A finished one
    is a JumpReLU SAE with the same threshold for all latents.
    """

    kind: ClassVar[str] = "batchtopk"
    threshold: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        options: ScaledOptions,
        *,
        k: int,
        threshold_rate: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(d_in, d_sae, options, k=k, generator=generator)
        self.threshold_rate = threshold_rate
        self.register_buffer("threshold", torch.full((), torch.nan))
        self._largest = LargestOfBatch()

    def choose(self, pre_BF: Tensor) -> Active:
        """The B·k largest of the batch that are positive; moves the threshold."""
        active, smallest = self._largest.choose(pre_BF, self.k * len(pre_BF))
        moved = self.threshold + self.threshold_rate * (smallest - self.threshold)
        self.threshold.copy_(torch.where(self.threshold.isnan(), smallest, moved))
        return active

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h / s, so that they and their decoder rows make up x and not z."""
        pre_BF = self.pre_activations(x_BD)
        return torch.where(pre_BF > self._finite_threshold, pre_BF.relu(), 0) / self.scale

    @torch.no_grad()
    def start_choice(self, trained: FoldedSAE) -> None:
        """Only of an SAE with one threshold for all its latents, which is known before the first step then."""
        if trained.threshold is None:
            raise CannotStart("it has no threshold", "Train it as the kind that it is.")
        if not is_one_value(trained.threshold):
            least, most = float(trained.threshold.min()), float(trained.threshold.max())
            raise CannotStart(
                f"with decoder rows of norm 1 its thresholds are from {least:.4g} to {most:.4g}, and the kind "
                f"{self.kind!r} has one for all latents",
                "Train the kind 'jumprelu'.",
            )
        self.threshold.copy_(trained.threshold.double().mean() * self.scale.double())

    def folded(self) -> FoldedSAE:
        """With the threshold θ / s."""
        threshold = (self._finite_threshold.double() / self.scale.double()).float()
        return replace(super().folded(), threshold=threshold.expand(self.d_sae).clone())

    @property
    def _finite_threshold(self) -> Tensor:
        """Zero before the first step."""
        return self.threshold.nan_to_num(0.0)
