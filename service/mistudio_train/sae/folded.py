"""The trained SAE as evaluation and exports see it: plain weights on plain rows, with nothing left to know but k.

Owns what the features of a finished SAE are; must not train, and must not know how any kind came to its weights.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from .largest import largest_of_rows
from .sparse import Active, active_above

SAME_TO = 1e-4
"""Relative difference up to which norms, or thresholds, count as one."""
LEAST_NORM = 1e-12


class CannotStart(ValueError):
    """A kind of SAE cannot be, on all rows, what a trained one is; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, eq=False)
class FoldedSAE:
    """Weights that work on rows as they were extracted: every scale and pre-bias is folded into them.

    Features are `relu(encoder(x))`, of which only the k largest of a row stay where `k` is given, and only those above
    their latent's threshold where `threshold` is given; `decoder(features)` reconstructs x, a transcoder's the row y of
    another site, which then is meant by x in what follows. Units: a feature's
    activation times its decoder column is its part of x, in x's own units, so where columns have norm 1 (in all kinds
    but `standard`) the activation is a length in the space of x. All tensors are fp32, contiguous, detached, and share
    no storage with each other or with the SAE they came from.
    """

    kind: str
    encoder_weight: Tensor
    """[d_sae, d_in]"""
    encoder_bias: Tensor
    """[d_sae]"""
    decoder_weight: Tensor
    """[d_in, d_sae]"""
    decoder_bias: Tensor
    """[d_in]"""
    k: int | None = None
    """Latents kept a row; `None`: all that are positive."""
    threshold: Tensor | None = None
    """[d_sae]: a latent is kept where it is above; `None`: where it is positive."""
    gain: Tensor | None = None
    """[d_sae], of `gated`: magnitudes by gates. Says nothing of the features; training that goes on needs it."""

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.encoder_weight.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.encoder_weight.shape[0]

    @property
    def needs(self) -> str | None:
        """What a reader must do beyond `relu(encoder(x))`, in a sentence; `None` where that is all."""
        if self.threshold is not None:
            return "Of relu(encoder(x)) keep the values above `threshold` and set the others to zero."
        if self.k is None:
            return None
        return f"Of relu(encoder(x)) keep the {self.k} largest values of each row and set the others to zero."

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by the names of two linear layers: `encoder.weight` [d_sae, d_in] and so on."""
        return {
            "encoder.weight": self.encoder_weight,
            "encoder.bias": self.encoder_bias,
            "decoder.weight": self.decoder_weight,
            "decoder.bias": self.decoder_bias,
        }

    def to(self, device: torch.device | str) -> "FoldedSAE":
        """The same SAE on another device."""
        return replace(
            self,
            encoder_weight=self.encoder_weight.to(device),
            encoder_bias=self.encoder_bias.to(device),
            decoder_weight=self.decoder_weight.to(device),
            decoder_bias=self.decoder_bias.to(device),
            threshold=None if self.threshold is None else self.threshold.to(device),
            gain=None if self.gain is None else self.gain.to(device),
        )

    def with_unit_rows(self) -> "FoldedSAE":
        """The same function with decoder columns of norm 1: activations and thresholds are larger by what these were.

        Raises:
            CannotStart: if a column has no direction, or other latents would then be a row's k largest.
        """
        norm_F = torch.linalg.vector_norm(self.decoder_weight, dim=0, dtype=torch.float64)
        least, most = float(norm_F.min()), float(norm_F.max())
        if least <= LEAST_NORM:
            latent = int(norm_F.argmin())
            raise CannotStart(
                f"the decoder row of latent {latent} is zero, and rows have norm 1 here",
                "Use another SAE, or 'standard'.",
            )
        if self.k is not None and not is_one_value(norm_F):
            raise CannotStart(
                f"its decoder rows have norms from {least:.4g} to {most:.4g}; with norm 1, as here, other latents "
                "would be the k largest",
                "Only a topk SAE whose decoder rows are equally long, or that SAELens saved with "
                "rescale_acts_by_decoder_norm, can be gone on from.",
            )
        return replace(
            self,
            encoder_weight=plain(self.encoder_weight * norm_F[:, None]),
            encoder_bias=plain(self.encoder_bias * norm_F),
            decoder_weight=plain(self.decoder_weight / norm_F),
            threshold=None if self.threshold is None else plain(self.threshold * norm_F),
        )

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Tensor:
        """Rows to features `acts_BF`, dense."""
        acts_BF = functional.linear(x_BD, self.encoder_weight, self.encoder_bias).relu_()
        if self.threshold is not None:
            return acts_BF.masked_fill_(acts_BF <= self.threshold, 0)
        if self.k is None:
            return acts_BF
        largest = Active.same_number(largest_of_rows(acts_BF, self.k), self.d_sae)
        return largest.dense(largest.pick(acts_BF))

    @torch.no_grad()
    def encode_sparse(self, x_BD: Tensor) -> tuple[Active, Tensor]:
        """The same as places in ascending order, and the values there: `active.dense(values)` is what `encode` gives.

        Many features, and those of a GPU, are at all places, with the matrix itself for values.
        """
        acts_BF = self.encode(x_BD)
        active = active_above(acts_BF, 0)
        return active, active.pick(acts_BF)

    @torch.no_grad()
    def decode(self, acts_BF: Tensor) -> Tensor:
        """Features back to rows `x_hat_BD`."""
        return functional.linear(acts_BF, self.decoder_weight, self.decoder_bias)

    @torch.no_grad()
    def decode_sparse(self, active: Active, values: Tensor) -> Tensor:
        """What `decode` gives for the same features, from `encode_sparse`; holds a second copy of the decoder."""
        return active.times(values, self._decoder_rows_FD) + self.decoder_bias

    @cached_property
    def _decoder_rows_FD(self) -> Tensor:  # noqa: N802
        return self.decoder_weight.T.contiguous()


def is_one_value(values_F: Tensor) -> bool:
    """Whether they are all the same, as far as rounding goes."""
    least, most = float(values_F.min()), float(values_F.max())
    return most - least <= SAME_TO * max(abs(least), abs(most))


def plain(weight: Tensor) -> Tensor:
    """A detached, contiguous fp32 copy, as `FoldedSAE` wants them."""
    return weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
