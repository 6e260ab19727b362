"""What the formulas in dense matrices share: the update that follows a loss, written out again."""

from collections.abc import Collection

import torch
from torch import Tensor

from mistudio_train.sae.trainer import Trainer


def adam_of(weights: dict[str, Tensor], *, free: bool = False) -> torch.optim.Adam:
    """Decoders learn twice as fast as the rest, `free` ones four times, logarithms of thresholds ten times."""
    rates = {"W_dec": 4.0 if free else 2.0, "log_threshold": 10.0}
    return torch.optim.Adam([{"params": [one], "rate": rates.get(name, 1.0)} for name, one in weights.items()], lr=1.0)


def update(
    weights: Collection[Tensor],
    decoder: Tensor,
    adam: torch.optim.Adam,
    loss: Tensor,
    trainer: Trainer,
    *,
    free: bool = False,
) -> None:
    """One step of Adam as `trainer` is about to make: the decoder's gradient without the part along its rows, clipped
    to norm 1, at the schedule's rate; and the rows' norms back to 1, if these are not `free`.
    """
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    slope = decoder.grad
    assert slope is not None
    if not free:
        slope -= ((slope * decoder).sum(1, keepdim=True) * decoder).detach()
    torch.nn.utils.clip_grad_norm_(weights, 1.0 / decoder.shape[1])
    rate = trainer.recipe.learning_rate_at(trainer.steps, trainer.total_steps)
    for group in adam.param_groups:
        group["lr"] = group["rate"] * rate
    adam.step()
    if not free:
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
