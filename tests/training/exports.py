"""SAEs small enough to work out, which the tests of the files share."""

import torch

from mistudio_train.sae.folded import FoldedSAE

D_IN, D_SAE = 12, 40


def small_sae(kind: str) -> FoldedSAE:
    """Random weights; of a row half of the features are positive, topk keeps 5, batchtopk those above 1 or so."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = normal(D_SAE, D_IN), normal(D_SAE), normal(D_IN, D_SAE), normal(D_IN)
    threshold = 1 + 0.1 * normal(D_SAE) if kind == "batchtopk" else None
    return FoldedSAE(kind, *weights, k=5 if kind == "topk" else None, threshold=threshold)


def rows(n: int = 200) -> torch.Tensor:
    """Activations, x_BD."""
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(4))
