"""From the contract's resolved configuration to the SAE and the recipe: the one place that knows every kind.

Owns the defaults that depend on d_sae or on the data; must not train.
"""

import math
from typing import Final, TypeVar

import torch

from mistudio_schemas import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    ScheduledFields,
    StandardSAE,
    TopKSAE,
)

from .base import SparseAutoencoder
from .batchtopk import BatchTopKAutoencoder
from .gated import GatedAutoencoder
from .jumprelu import JumpReLUAutoencoder
from .matryoshka import MatryoshkaAutoencoder
from .recipe import Recipe
from .standard import StandardAutoencoder
from .topk import TopKAutoencoder

PATIENCE: Final = 10
"""The seed's epochs without improvement before `standard` ends."""
DEAD_AFTER_AT_MOST: Final = 10_000_000
"""Rows without being active that make a latent dead in the longest of runs (Gao et al. 2024)."""

T = TypeVar("T")


def build_sae(config: SAEConfig, d_in: int) -> SparseAutoencoder:
    """A freshly initialised SAE on the CPU in fp32; the same configuration gives the same weights.

    `config` is one of `TrainRequested.resolved_saes()`; `d_in` is the width of a row.

    Raises:
        ValueError: if a field that resolving fills in is missing, or k is above the number of latents.
    """
    d_sae = _given(config.hidden_dim, "hidden_dim")
    generator = torch.Generator().manual_seed(_given(config.seed, "seed"))
    if isinstance(config, StandardSAE):
        return StandardAutoencoder(d_in, d_sae, _given(config.sparsity_coeff, "sparsity_coeff"), generator)
    shape = d_in, d_sae, config.aux_k_coeff
    match config:
        case GatedSAE():
            return GatedAutoencoder(
                *shape,
                sparsity_coeff=config.sparsity_coeff,
                sparsity_warmup=config.sparsity_warmup,
                generator=generator,
            )
        case JumpReLUSAE():
            return JumpReLUAutoencoder(
                *shape,
                sparsity_coeff=config.sparsity_coeff,
                target_l0=config.target_l0,
                sparsity_warmup=config.sparsity_warmup,
                bandwidth=config.bandwidth,
                initial_threshold=config.initial_threshold,
                generator=generator,
            )
    if config.k > d_sae:
        raise ValueError(f"k must be at most the hidden dimension ({config.k} > {d_sae})")
    match config:
        case TopKSAE():
            return TopKAutoencoder(*shape, k=config.k, generator=generator)
        case BatchTopKSAE():
            return BatchTopKAutoencoder(*shape, k=config.k, threshold_rate=config.threshold_rate, generator=generator)
        case MatryoshkaSAE():
            return MatryoshkaAutoencoder(
                *shape,
                k=config.k,
                threshold_rate=config.threshold_rate,
                prefixes=_prefixes(config.group_shares, d_sae),
                generator=generator,
            )


def recipe_for(config: SAEConfig, *, rows: int, mean_pooled: bool) -> Recipe:
    """How to train what `config` names on `rows` rows, which are one a text where `mean_pooled`.

    Raises:
        ValueError: if a field that resolving fills in is missing.
    """
    if isinstance(config, StandardSAE):
        return _standard_recipe(config, rows)
    return _scheduled_recipe(config, rows, mean_pooled)


def _standard_recipe(config: StandardSAE, rows: int) -> Recipe:
    return Recipe(
        learning_rate=_given(config.learning_rate, "learning_rate"),
        batch_size=_given(config.batch_size, "batch_size"),
        max_epochs=_given(config.max_epochs, "max_epochs"),
        dead_after_rows=rows,
        reinitialize_dead_every=config.reinitialize_dead_every,
        min_loss=_given(config.min_loss, "min_loss"),
        patience=PATIENCE,
    )


def _scheduled_recipe(config: ScheduledFields, rows: int, mean_pooled: bool) -> Recipe:
    d_sae, max_epochs = _given(config.hidden_dim, "hidden_dim"), _given(config.max_epochs, "max_epochs")
    # Thousands of rows instead of millions: small batches, or there would be too few steps.
    largest = max(16, rows // 16) if mean_pooled else config.batch_size
    return Recipe(
        learning_rate=config.learning_rate or 2e-4 / math.sqrt(d_sae / 2**14),
        batch_size=min(config.batch_size, largest),
        max_epochs=max_epochs,
        dead_after_rows=min(math.ceil(config.dead_after * rows * max_epochs), DEAD_AFTER_AT_MOST),
        warmup=config.warmup,
        decay=config.decay,
        grad_clip=1.0,
    )


def _prefixes(shares: list[float], d_sae: int) -> list[int]:
    """Numbers of latents that reconstruct alone: those of the groups so far, each at least one, and in the end all."""
    ends = {round(d_sae * sum(shares[:groups])) for groups in range(1, len(shares) + 1)}
    return [*sorted(end for end in ends if 0 < end < d_sae), d_sae]


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"'{name}' is missing: pass a configuration from TrainRequested.resolved_saes()")
    return value
