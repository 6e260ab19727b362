"""The TopK SAE of Gao et al. 2024 (arXiv:2406.04093). Owns the choice of latents and nothing else."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from .folded import CannotStart, FoldedSAE
from .ksparse import KSparseAutoencoder
from .largest import largest_of_rows
from .sparse import Active


class TopKAutoencoder(KSparseAutoencoder):
    """h = ReLU of the k largest p of each row, in training and afterwards; the rest is `KSparseAutoencoder`'s."""

    kind: ClassVar[str] = "topk"

    def choose(self, pre_BF: Tensor) -> Active:
        """The k largest of each row."""
        return Active.same_number(largest_of_rows(pre_BF, self.k), self.d_sae)

    def encode(self, x_BD: Tensor) -> Tensor:
        """The activations h / s, so that they and their decoder rows make up x and not z."""
        acts_BF = self.pre_activations(x_BD).relu()
        active = self.choose(acts_BF)
        return active.dense(active.pick(acts_BF)) / self.scale

    def start_choice(self, trained: FoldedSAE) -> None:
        """Only of an SAE with the same k."""
        if trained.k is None:
            raise CannotStart("it keeps no fixed number of latents a row", "Train it as the kind that it is.")
        if trained.k != self.k:
            raise CannotStart(f"it keeps {trained.k} latents a row, and k is {self.k}", f"Set k to {trained.k}.")

    def folded(self) -> FoldedSAE:
        """With the number of latents that stay."""
        return replace(super().folded(), k=self.k)
