"""The rows on which SAEs of both trainers are compared: a toy whose features are known, and a language model's.

Owns what is trained on, tuned on and judged by, scaled once for both sides; must not know any trainer.

The toy, anew for every seed: 512 features, directions uniform on the sphere of 128 dimensions. On each row each feature
is active by itself with probability 8/512, with a magnitude uniform in [0.5, 1.5]; a row is the sum. No noise, no mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mistudio_train.training.order import RowOrder

D_TOY: Final = 128
FEATURES: Final = 512
ACTIVE: Final = 8
"""Of the toy's features, in the mean over rows."""
TOY_HELD_OUT: Final = 16_384
"""Rows to tune on, and as many to be judged by."""
SEEDS_OF_TOYS: Final = 1_000_000
"""Added to a run's seed: with the seed itself, the first latents that a trainer draws could be the true features."""
TOY_AT_ONCE: Final = 16_384
SAMPLE: Final = 32_768
"""Training rows that the scale and the decoders' first bias come from."""
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the SAEs that are trained on some data, and how long."""

    m: int
    k: int
    batch: int
    steps: int
    wanted: tuple[float, ...]
    """L0 at which kinds are compared that cannot be told one; the middle one is tuned for."""

    @property
    def middle(self) -> float:
        """The L0 that is tuned for."""
        return self.wanted[len(self.wanted) // 2]


SHAPES: Final = {
    "toy": Shape(m=1024, k=8, batch=1024, steps=1000, wanted=(4, 8, 16)),
    "smollm2": Shape(m=2048, k=32, batch=1024, steps=189, wanted=(16, 32, 64)),
}


@dataclass(frozen=True, eq=False)
class Truth:
    """What the toy's rows were made of."""

    features_FD: Tensor  # noqa: N815
    """Directions of norm 1."""
    active_NF: Tensor  # noqa: N815
    """bool: which of them make up each row that is judged by."""


class Spliced(Protocol):
    """A language model with something else in the place of the rows."""

    def recovered(self, change: Change) -> dict[str, float]:
        """Figures of its loss when unscaled rows go through `change`."""
        ...


@dataclass(frozen=True, eq=False)
class Data:
    """Scaled rows: about their mean, the mean squared norm of the training rows is their width."""

    train_ND: Tensor  # noqa: N815
    validation_ND: Tensor  # noqa: N815
    test_ND: Tensor  # noqa: N815
    """Also those that are left out of training and validation."""
    ordinary_N: Tensor  # noqa: N815
    """bool: which of them would not have been left out."""
    truth: Truth | None = None
    spliced: Spliced | None = None

    @cached_property
    def sample_ND(self) -> Tensor:  # noqa: N802
        """Training rows from everywhere."""
        return sample_of(self.train_ND)

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.train_ND.shape[1]

    def batches(self, seed: int, size: int, steps: int) -> Iterator[Tensor]:
        """The same for both sides: the training rows in the seed's order, and from the beginning in another one."""
        epoch = 0
        while steps:
            for rows in RowOrder(len(self.train_ND), (seed, epoch)).batches(size):
                if len(rows) < size or not steps:
                    break
                yield self.train_ND[torch.from_numpy(rows)]
                steps -= 1
            epoch += 1


def sample_of(rows_ND: Tensor) -> Tensor:
    """At most `SAMPLE` rows, evenly spread."""
    count = min(SAMPLE, len(rows_ND))
    return rows_ND[torch.arange(count) * len(rows_ND) // count]


def scale_of(sample_ND: Tensor) -> float:
    """By what rows are multiplied."""
    rows_ND = sample_ND.double()
    return float((rows_ND - rows_ND.mean(0)).square().mean().rsqrt())


def data_of(name: str, seed: int, steps: int) -> Data:
    """Of a name in `SHAPES`; the language model's are the same for every seed, and so is what they are tuned on."""
    if name == "toy":
        return toy(seed, steps * SHAPES[name].batch)
    from benchmarks.quality.smollm2 import smollm2  # the model's libraries take a while to import

    return smollm2()


@lru_cache(maxsize=1)
def toy(seed: int, rows: int) -> Data:
    """Rows of the seed's own dictionary, none twice."""
    generator = torch.Generator().manual_seed(SEEDS_OF_TOYS + seed)
    features_FD = functional.normalize(torch.randn(FEATURES, D_TOY, generator=generator), dim=1)
    train_ND, _ = _toy_rows(features_FD, rows, generator)
    validation_ND, _ = _toy_rows(features_FD, TOY_HELD_OUT, generator)
    test_ND, active_NF = _toy_rows(features_FD, TOY_HELD_OUT, generator)
    scale = scale_of(sample_of(train_ND))
    for rows_ND in (train_ND, validation_ND, test_ND):
        rows_ND.mul_(scale)
    ordinary_N = torch.ones(len(test_ND), dtype=torch.bool)
    return Data(train_ND, validation_ND, test_ND, ordinary_N, Truth(features_FD, active_NF))


def _toy_rows(features_FD: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows, and of the last `TOY_AT_ONCE` which features are active."""
    rows_ND = torch.empty(count, features_FD.shape[1])
    active_BF = torch.empty(0)
    for start in range(0, count, TOY_AT_ONCE):
        shape = (min(TOY_AT_ONCE, count - start), len(features_FD))
        active_BF = torch.rand(shape, generator=generator) < ACTIVE / len(features_FD)
        magnitudes_BF = 0.5 + torch.rand(shape, generator=generator)
        rows_ND[start : start + shape[0]] = (active_BF * magnitudes_BF) @ features_FD
    return rows_ND, active_BF
