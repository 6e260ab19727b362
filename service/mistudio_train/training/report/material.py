"""What an SAE is shown by besides its own folder: of the job, the model, the corpus and the rows.

Carries these and nothing else; must not know what is made of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mistudio_schemas import CorpusInfo, ModelInfo, TrainRequested
from mistudio_train.training.texts import Texts
from mistudio_train.training.tokens import RowIndex


@dataclass(frozen=True)
class Material:
    """Besides the SAE's folder."""

    job_id: str
    version: str
    request: TrainRequested
    model: ModelInfo
    revision: str | None
    corpus: CorpusInfo
    texts: Texts
    index: RowIndex
    tokenizer: Any
    device: torch.device
    warnings: Sequence[str]

    @property
    def whole_texts(self) -> bool:
        """Whether a row is a text."""
        return self.request.pooling == "mean"
