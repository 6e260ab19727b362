"""An order of rows to train in, where no store of activations is at hand."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mistudio_train.sae.trainer import Trainer


def batches_of(trainer: Trainer) -> Iterator[Tensor]:
    """Row numbers of each batch that the epoch in progress still needs; the order depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(1000 * trainer.seed + trainer.epoch)
    rest = torch.randperm(trainer.rows, generator=generator)[trainer.rows_done :]
    return iter(torch.split(rest, trainer.recipe.batch_size))
