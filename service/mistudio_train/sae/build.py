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
    PenaltyFields,
    SAEConfig,
    StandardSAE,
    TopKSAE,
)

from .base import SparseAutoencoder
from .batchtopk import BatchTopKAutoencoder
from .gated import GatedAutoencoder
from .jumprelu import JumpReLUAutoencoder
from .l1 import L1Autoencoder
from .matryoshka import MatryoshkaAutoencoder
from .recipe import Recipe
from .scaled import ScaledOptions
from .standard import StandardAutoencoder
from .topk import TopKAutoencoder

PATIENCE: Final = 10
"""The seed's epochs without improvement before `standard` ends."""
DEAD_AFTER: Final = 0.05
"""Share of the rows. With 0.1 more latents never fire on a language model's rows: of `matryoshka` 1.6% and not 0.6%, of
`gated` 0.7% and not 0.2%, of `jumprelu` 0.7% and not 0.2%, at the same FVU (one seed, `benchmarks/quality`)."""
DEAD_AFTER_AT_MOST: Final = 10_000_000
"""Rows without being active that make a latent dead in the longest of runs (Gao et al. 2024)."""

AUX_K_COEFF: Final = 1 / 32
"""Gao et al.'s."""
AUX_K_COEFF_OF_TOPK: Final = 1.0
"""On a language model's rows 0.03% of the latents never fire with it and 0.4% with theirs, at the same FVU; the other
kinds, whose rows may have few latents or many, have nothing from it (`benchmarks/quality`)."""
PRE_ACT_COEFF: Final = 0.03
"""On a language model's rows, of latents that never fire: `standard` 2.4% (without: 30%), `gated` 0.7% (4.7%),
`jumprelu` 0.6% (1.6%), each at its sparsest and at the same FVU; with 1.0 the FVU is 1 to 3% higher."""
AUX_K_ROWS: Final = 20_000
"""Fewer mean-pooled rows are learned by heart before the losses of dead latents help."""
L1_COEFF: Final = 2.0
ADAM_EPS: Final = 1e-12
"""With PyTorch's 1e-8 the auxiliary loss' clipped gradients are lost beside it, and twice as many latents stay dead."""

T = TypeVar("T")


def build_sae(config: SAEConfig, d_in: int) -> SparseAutoencoder:
    """A freshly initialised SAE on the CPU in fp32; the same configuration gives the same weights.

    `config` is one of `TrainRequested.resolved_saes()`, best `settled`; `d_in` is the width of a row.

    Raises:
        ValueError: if a field that resolving fills in is missing, or k is above the number of latents.
    """
    d_sae = _given(config.hidden_dim, "hidden_dim")
    generator = torch.Generator().manual_seed(_given(config.seed, "seed"))
    if isinstance(config, StandardSAE) and config.is_the_seeds:
        return StandardAutoencoder(d_in, d_sae, _given(config.sparsity_coeff, "sparsity_coeff"), generator)
    options = ScaledOptions(
        aux_k_coeff=_aux_k_coeff(config) if config.aux_k_coeff is None else config.aux_k_coeff,
        k_aux=config.k_aux,
        pre_act_coeff=_pre_act_coeff(config),
        b_dec_init=config.b_dec_init,
        transcodes=config.predicts is not None,
    )
    shape = d_in, d_sae, options
    match config:
        case StandardSAE():
            return L1Autoencoder(
                *shape,
                sparsity_coeff=config.sparsity_coeff or L1_COEFF,
                sparsity_warmup=config.sparsity_warmup,
                generator=generator,
            )
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
    k = _given(config.k, "k")
    if k > d_sae:
        raise ValueError(f"k must be at most the hidden dimension ({k} > {d_sae})")
    match config:
        case TopKSAE():
            return TopKAutoencoder(*shape, k=k, generator=generator)
        case BatchTopKSAE():
            return BatchTopKAutoencoder(*shape, k=k, threshold_rate=config.threshold_rate, generator=generator)
        case MatryoshkaSAE():
            return MatryoshkaAutoencoder(
                *shape,
                k=k,
                threshold_rate=config.threshold_rate,
                prefixes=_prefixes(config.group_shares, d_sae),
                generator=generator,
            )


def settled(config: SAEConfig, *, rows: int, mean_pooled: bool) -> SAEConfig:
    """The configuration with the defaults filled in that depend on the data, the seed's as it is.

    Mean-pooled rows are thousands, one a text, where tokens are millions: smaller batches, or there would be too few
    steps; many passes, so an end when nothing is learned any more; and latents that die early, and begin anew.

    Raises:
        ValueError: if a field that resolving fills in is missing.
    """
    if isinstance(config, StandardSAE) and config.is_the_seeds:
        return config
    d_sae, max_epochs = _given(config.hidden_dim, "hidden_dim"), _given(config.max_epochs, "max_epochs")
    few = mean_pooled and rows < AUX_K_ROWS
    defaults = {
        "learning_rate": 2e-4 / math.sqrt(d_sae / 2**14),
        "batch_size": min(256, max(16, rows // 16)) if mean_pooled else 1024,
        "dead_after": min(1.0, 5 / max_epochs) if mean_pooled else DEAD_AFTER,
        "aux_k_coeff": 0.0 if few else _aux_k_coeff(config),
        "pre_act_coeff": 0.0 if few else PRE_ACT_COEFF,
        "resample_at": [0.2, 0.4] if mean_pooled else [],
        "patience": 10 if mean_pooled else 0,
    }
    missing = (name for name in defaults if name in type(config).model_fields and getattr(config, name) is None)
    return config.model_copy(update={name: defaults[name] for name in missing})


def _aux_k_coeff(config: SAEConfig) -> float:
    return AUX_K_COEFF_OF_TOPK if isinstance(config, TopKSAE) else AUX_K_COEFF


def _pre_act_coeff(config: SAEConfig) -> float:
    if not isinstance(config, PenaltyFields):
        return 0.0
    return PRE_ACT_COEFF if config.pre_act_coeff is None else config.pre_act_coeff


def recipe_for(config: SAEConfig, *, rows: int, mean_pooled: bool) -> Recipe:
    """How to train what `config` names on `rows` rows, which are one a text where `mean_pooled`.

    Raises:
        ValueError: if a field that resolving fills in is missing.
    """
    if isinstance(config, StandardSAE) and config.is_the_seeds:
        return _standard_recipe(config, rows)
    config = settled(config, rows=rows, mean_pooled=mean_pooled)
    in_all = config.training_rows or rows * _given(config.max_epochs, "max_epochs")
    return Recipe(
        learning_rate=_given(config.learning_rate, "learning_rate"),
        batch_size=_given(config.batch_size, "batch_size"),
        max_epochs=math.ceil(in_all / rows),
        training_rows=config.training_rows,
        dead_after_rows=min(math.ceil(_given(config.dead_after, "dead_after") * in_all), DEAD_AFTER_AT_MOST),
        warmup=config.warmup,
        decay=config.decay,
        grad_clip=config.grad_clip,
        adam_eps=ADAM_EPS,
        precision=config.precision,
        resample_at=tuple(config.resample_at or ()),
        held_out_patience=config.patience or None,
    )


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


def _prefixes(shares: list[float], d_sae: int) -> list[int]:
    """Numbers of latents that reconstruct alone: those of the groups so far, each at least one, and in the end all."""
    ends = {round(d_sae * sum(shares[:groups])) for groups in range(1, len(shares) + 1)}
    return [*sorted(end for end in ends if 0 < end < d_sae), d_sae]


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"'{name}' is missing: pass a configuration from TrainRequested.resolved_saes()")
    return value
