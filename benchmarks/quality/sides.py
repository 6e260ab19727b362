"""An SAE trained by either side on the same batches, written by it to disk as it delivers one, and loaded by SAELens.

Owns each side's settings; must not judge what comes out.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.quality.data import Data, Shape
from mistudio_schemas import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    StandardSAE,
    TopKSAE,
)
from mistudio_train.sae.build import build_sae, recipe_for
from mistudio_train.sae.trainer import Trainer
from mistudio_train.training.allocator import freed_memory_kept
from mistudio_train.training.saelens import Origin, write_saelens

K_SPARSE: Final = ("topk", "batchtopk", "matryoshka")
BY_COEFFICIENT: Final = ("jumprelu", "gated", "standard")
"""Kinds whose L0 a coefficient decides."""
KINDS: Final = (*K_SPARSE, *BY_COEFFICIENT)
SHARES: Final = [1 / 32, 1 / 16, 1 / 8, 1 / 4]
"""Of the latents, in the groups of `matryoshka`; the rest is one more."""
WARMUP: Final = 0.05
DECAY: Final = 0.2
SPARSITY_WARMUP: Final = {"jumprelu": 0.2, "gated": 0.05, "standard": 0.05}
"""Share of the steps over which the penalty rises."""
DEAD_AFTER: Final = 0.1
"""Share of the steps without being active that makes a latent dead."""
OURS_DEAD_AFTER: Final = {"jumprelu": 0.05, "gated": 0.05}
"""Where SAELens trains no dead latents at all: our default."""
THRESHOLD_RATE: Final = 0.05
DEFAULT_RATE: Final = 3e-4
"""SAELens' own learning rate."""
ORIGIN: Final = Origin("benchmark", "AutoModelForCausalLM", "model.layers.9", 9, "resid_post", 128, False, True, "", "")


@dataclass(frozen=True)
class Run:
    """One training."""

    data: str
    side: str
    """`ours`, `saelens`, or `defaults`: SAELens untuned."""
    kind: str
    lr: float
    coefficient: float | None
    seed: int
    steps: int


def trained(run: Run, data: Data, shape: Shape) -> Any:
    """SAELens' inference SAE, as loaded from what the side has written."""
    batches = data.batches(run.seed, shape.batch, run.steps)
    with tempfile.TemporaryDirectory(prefix="quality-") as folder, freed_memory_kept():
        SIDES[run.side](run, data, shape, batches, Path(folder))
        from sae_lens import SAE

        return SAE.load_from_disk(folder)


def _ours(run: Run, data: Data, shape: Shape, batches: Iterator[Tensor], folder: Path) -> None:
    config, rows = our_config(run, shape), run.steps * shape.batch
    recipe = recipe_for(config, rows=rows, mean_pooled=False)
    trainer = Trainer(build_sae(config, data.d), recipe, rows=rows, device="cpu", seed=run.seed)
    trainer.prepare(data.sample_ND)
    for x_BD in batches:
        trainer.step(x_BD)
    trainer.end_epoch()
    write_saelens(folder, trainer.sae.folded(), ORIGIN, torch.zeros(shape.m))


def our_config(run: Run, shape: Shape) -> SAEConfig:
    """Our recipe's defaults, but for the learning rate and the coefficient."""
    common: dict[str, Any] = {
        "hidden_dim": shape.m,
        "seed": run.seed,
        "max_epochs": 1,
        "batch_size": shape.batch,
        "learning_rate": run.lr,
        "warmup": WARMUP,
        "decay": DECAY,
        "dead_after": OURS_DEAD_AFTER.get(run.kind, DEAD_AFTER),
    }
    warmup = SPARSITY_WARMUP.get(run.kind)
    made: dict[str, Callable[[], SAEConfig]] = {
        "topk": lambda: TopKSAE(**common, k=shape.k),
        "batchtopk": lambda: BatchTopKSAE(**common, k=shape.k, threshold_rate=THRESHOLD_RATE),
        "matryoshka": lambda: MatryoshkaSAE(**common, k=shape.k, threshold_rate=THRESHOLD_RATE, group_shares=SHARES),
        "jumprelu": lambda: JumpReLUSAE(**common, target_l0=run.coefficient, sparsity_warmup=warmup),
        "gated": lambda: GatedSAE(**common, sparsity_coeff=run.coefficient, sparsity_warmup=warmup),
        "standard": lambda: StandardSAE(
            **common, penalty="decoder_norm", sparsity_coeff=run.coefficient, sparsity_warmup=warmup
        ),
    }
    return made[run.kind]()


def _tuned(run: Run, data: Data, shape: Shape, batches: Iterator[Tensor], folder: Path) -> None:
    from sae_lens.config import SAETrainerConfig

    sae = _saelens_sae(run, data.d, shape, round(SPARSITY_WARMUP.get(run.kind, 0) * run.steps), THRESHOLD_RATE)
    with torch.no_grad():
        sae.b_dec.copy_(data.sample_ND.mean(0))
    config = SAETrainerConfig(
        run.steps * shape.batch,
        shape.batch,
        lr=run.lr,
        lr_end=run.lr / 10,  # not used by its constant schedule, but must be given
        lr_warm_up_steps=round(WARMUP * run.steps),
        lr_decay_steps=round(DECAY * run.steps),
        dead_feature_window=round(DEAD_AFTER * run.steps),
    )
    _run_saelens(sae, config, batches, folder)


def _defaults(run: Run, data: Data, shape: Shape, batches: Iterator[Tensor], folder: Path) -> None:
    from sae_lens.config import SAETrainerConfig

    config = SAETrainerConfig(run.steps * shape.batch, shape.batch, lr_end=DEFAULT_RATE / 10)
    _run_saelens(_saelens_sae(run, data.d, shape, 0), config, batches, folder)


def _run_saelens(sae: Any, config: Any, batches: Iterator[Tensor], folder: Path) -> None:
    """What `fit` does, without its progress bar."""
    from sae_lens.training.sae_trainer import SAETrainer

    trainer: Any = SAETrainer(config, sae, batches)
    for x_BD in batches:
        trainer.step(x_BD)
        trainer.n_training_steps += 1
    sae.save_inference_model(folder)


def _saelens_sae(run: Run, d: int, shape: Shape, warmup_steps: int, threshold_rate: float | None = None) -> Any:
    from sae_lens import saes

    torch.manual_seed(run.seed)
    common: dict[str, Any] = {"d_in": d, "d_sae": shape.m}
    batch_k: dict[str, Any] = {"k": shape.k} | ({"topk_threshold_lr": threshold_rate} if threshold_rate else {})
    widths = [round(shape.m * sum(SHARES[:groups])) for groups in range(1, len(SHARES) + 1)] + [shape.m]
    l0 = {"l0_coefficient": run.coefficient, "l0_warm_up_steps": warmup_steps}
    l1 = {"l1_coefficient": run.coefficient, "l1_warm_up_steps": warmup_steps}
    made: dict[str, Callable[[], Any]] = {
        "topk": lambda: saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**common, k=shape.k)),
        "batchtopk": lambda: saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**common, **batch_k)),
        "matryoshka": lambda: saes.MatryoshkaBatchTopKTrainingSAE(
            saes.MatryoshkaBatchTopKTrainingSAEConfig(**common, **batch_k, matryoshka_widths=widths)
        ),
        "jumprelu": lambda: saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**common, **l0)),
        "gated": lambda: saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(**common, **l1)),
        "standard": lambda: saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**common, **l1)),
    }
    return made[run.kind]()


Side = Callable[[Run, Data, Shape, Iterator[Tensor], Path], None]
SIDES: Final[dict[str, Side]] = {"ours": _ours, "saelens": _tuned, "defaults": _defaults}
