"""Which tokens a feature makes likelier and which less so, by its direction alone: the head applied to decoder columns.

The logit lens (nostalgebraist 2020) for directions: W_U · (norm(d_f) - norm(0)), with the norm behind the last block.
It leaves out what later blocks make of the feature, so it says most near the end of the model. Changes no weight.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mistudio_train.sae.folded import FoldedSAE

from .language_model import HeadedModel

TOKENS: Final = 8
NUMBERS_AT_ONCE: Final = 1 << 24
"""Logits that are held at once."""
FINAL_NORMS: Final = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")
"""What families call the norm behind their last block."""


@dataclass(frozen=True)
class Promoted:
    """Of each feature the tokens that it speaks most for and most against."""

    most: NDArray[np.int32]
    """[d_sae, n] token ids, the strongest first."""
    most_logits: NDArray[np.float32]
    least: NDArray[np.int32]
    least_logits: NDArray[np.float32]


@torch.inference_mode()
def promoted_tokens(model: HeadedModel, sae: FoldedSAE) -> Promoted | None:
    """Look at every feature; `None` of a model without a plain unembedding of the SAE's width.

    Logits are relative to their mean over the vocabulary, which softmax does not mind.
    """
    weight_VD = _unembedding(model.model)
    if weight_VD is None or weight_VD.shape[1] != sae.decoder_weight.shape[0] or not model.causal:
        return None
    norm, count = _final_norm(model.model), min(TOKENS, len(weight_VD))
    columns_FD = sae.decoder_weight.T.to(weight_VD.device, weight_VD.dtype)
    found = []
    for some_BD in columns_FD.split(max(1, NUMBERS_AT_ONCE // len(weight_VD))):  # type: ignore[no-untyped-call]
        seen_BD = some_BD if norm is None else norm(some_BD) - norm(torch.zeros_like(some_BD))
        logits_BV = (seen_BD.to(weight_VD.dtype) @ weight_VD.T).float()
        logits_BV -= logits_BV.mean(1, keepdim=True)
        most, least = logits_BV.topk(count, dim=1), logits_BV.topk(count, dim=1, largest=False)
        found.append([most.indices.int(), most.values, least.indices.int(), least.values])
    return Promoted(*(torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)))


def _unembedding(model: Any) -> Tensor | None:
    """[vocabulary, d]; `None` where the head is more than one matrix, or quantised."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return weight if isinstance(head, nn.Linear) and isinstance(weight, Tensor) and weight.is_floating_point() else None


def _final_norm(model: Any) -> Any:
    """The norm before the head; `None` where there is none by a name that we know."""
    for trunk in (model.base_model, getattr(model.base_model, "decoder", None)):
        for name in FINAL_NORMS:
            if isinstance(norm := getattr(trunk, name, None), nn.Module):
                return norm
    return None
