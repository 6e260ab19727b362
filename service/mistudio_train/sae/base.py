"""What every kind of SAE is to the trainer: one record in, one record out, and a few moments at which a kind may act.

Owns the weights of the two linear layers and their start; must not know any kind, an optimiser, a disk or a network.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from .folded import FoldedSAE

ACTIVE_ABOVE: Final = 1e-6
"""An activation counts as active above this (the seed's threshold), in training and in statistics alike."""
RARE_BELOW: Final = 0.01
"""A latent active on a smaller share of the rows is dead by the seed's frequency threshold."""


@dataclass(frozen=True, eq=False)
class StepInput:
    """What a training step may know."""

    x_BD: Tensor  # noqa: N815
    """Rows of activations as extracted, unscaled, fp32: what the encoder reads."""
    step: int | Tensor
    """Counts the steps made before this one; on a GPU a number that stays there, as a step is recorded and repeated."""
    total_steps: int
    """Steps of the whole run, if it is not ended early."""
    dead_F: Tensor | None = None  # noqa: N815
    """True for the latents that count as dead; `None` while none can be."""
    y_BD: Tensor | None = None  # noqa: N815
    """What is to be reconstructed, of the same kind; `None`: x itself."""

    def risen(self, share: float) -> float | Tensor:
        """How far something has come that rises from 0 to 1 over the first `share` of the steps."""
        steps = round(share * self.total_steps)
        if not steps:
            return 1.0
        risen = (self.step + 1) / steps
        return risen.clamp_max(1.0) if isinstance(risen, Tensor) else min(1.0, risen)

    def is_in_last(self, share: float) -> float | Tensor:
        """1 in the last `share` of the steps, else 0."""
        late = self.step >= self.total_steps - round(share * self.total_steps)
        return late.float() if isinstance(late, Tensor) else float(late)


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a training step says. Scalars are 0-d tensors on the device, so that nothing waits for them."""

    loss: Tensor
    """What is minimised, the sum of the next two; carries the gradient."""
    reconstruction_loss: Tensor
    sparsity_loss: Tensor
    """The rest of the loss, its coefficient included: the L1 penalty, or the auxiliary loss of dead latents."""
    l0: Tensor
    """Mean number of active latents a row."""
    active_rows_F: Tensor  # noqa: N815
    """int64: on how many rows of this batch each latent was active."""


def sides(rows_BD: Tensor, d_in: int) -> tuple[Tensor, Tensor | None]:
    """What an SAE reads of rows, and what it is to reconstruct: the same (`None`), or of a transcoder, whose rows have
    both side by side, [B, 2 d_in], the second half.
    """
    return rows_BD[:, :d_in], rows_BD[:, d_in:] if rows_BD.shape[1] > d_in else None


class SparseAutoencoder(nn.Module, ABC):
    """An encoder and a decoder, which never share storage; in both, a row of the weight is a latent's direction.

    A transcoder reads rows x of a site and reconstructs rows y of another, as wide; its `rows` are both, side by side.

    `W_enc` and `W_dec` [d_sae, d_in], `b_enc` [d_sae], `b_dec` [d_in], as the field calls them.
    `encode` and `decode` take and give the rows' own units; whatever scaling a kind trains in stays inside `step`.
    """

    kind: ClassVar[str]
    operands: torch.dtype = torch.float32
    """What the operands of products of whole batches are rounded to, by kinds that can; weights and sums are fp32."""
    encoder_start: ClassVar[float] = 1.0
    """The encoder's rows are so many times the drawn ones at the start."""
    decoder_start: ClassVar[float] = 1.0
    """And the decoder's."""

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.empty(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self._draw(torch.ones(d_sae, dtype=torch.bool), generator)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[0]

    @property
    def by_latent(self) -> list[nn.Parameter]:
        """The parameters that have a row for each latent."""
        return [self.W_enc, self.b_enc, self.W_dec]

    def relative_rates(self) -> dict[nn.Parameter, float]:
        """By what the learning rate is multiplied, of parameters that do not simply take it."""
        return {}

    def reset_latents(self, which_F: Tensor, generator: torch.Generator) -> None:
        """Give the latents in `which_F` fresh encoder rows and biases, and decoder rows of the same directions.

        A whole encoder is drawn, on the CPU, so that the values depend neither on the device nor on which are reset.
        """
        self._draw(which_F, generator)

    @torch.no_grad()
    def _draw(self, which_F: Tensor, generator: torch.Generator) -> None:
        drawn_FD, drawn_F = self.draw_encoder(generator)
        which_F = which_F.to(self.W_enc.device)
        encoder_FD, decoder_FD = self.encoder_start * drawn_FD, self.decoder_start * drawn_FD
        for parameter, drawn in ((self.W_enc, encoder_FD), (self.b_enc, drawn_F), (self.W_dec, decoder_FD)):
            parameter[which_F] = drawn.to(parameter)[which_F]

    def resample(self, dead_F: Tensor, rows_BD: Tensor, generator: torch.Generator) -> Tensor:
        """Give dead latents another start, as the rows at hand suggest; bool [d_sae]: those that have one now."""
        self.reset_latents(dead_F, generator)
        return dead_F

    @abstractmethod
    def draw_encoder(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A fresh encoder on the CPU: weight [d_sae, d_in] and bias [d_sae]."""

    @abstractmethod
    def encode(self, x_BD: Tensor) -> Tensor:
        """Rows to their activations `acts_BF`, dense."""

    @abstractmethod
    def decode(self, acts_BF: Tensor) -> Tensor:
        """Activations back to rows `x_hat_BD`, of a transcoder `y_hat_BD`."""

    @abstractmethod
    def step(self, inputs: StepInput) -> StepOutput:
        """The losses of one batch, ready for `loss.backward()`."""

    @abstractmethod
    def folded(self) -> FoldedSAE:
        """The same SAE as plain fp32 weights on rows as they are; copies, on the device of the weights."""

    def prepare(self, rows_ND: Tensor) -> None:
        """See a first sample of rows, once, before any step."""

    @abstractmethod
    def start_from(self, trained: FoldedSAE) -> None:
        """Be, on rows as they are, what `trained` is; after `prepare`, whose scale stays, and before any step.

        Raises:
            CannotStart: if this kind cannot.
        """

    def before_update(self) -> None:
        """Act on the gradients, after `backward` and before they are clipped."""

    def after_update(self) -> None:
        """Act on the weights, after the optimiser has changed them."""


def count_active(acts_BF: Tensor) -> Tensor:
    """On how many rows each latent is active: int64 [d_sae]."""
    return (acts_BF > ACTIVE_ABOVE).sum(0)
