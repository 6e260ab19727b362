"""An SAE that begins as a trained one: the same function on raw rows, the same loss, or a refusal that says why."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mistudio_schemas import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    StandardSAE,
    TopKSAE,
    TrainRequested,
)
from mistudio_train.sae.base import SparseAutoencoder, StepInput
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.folded import CannotStart, FoldedSAE
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.trainer import Trainer

D_IN, D_SAE = 12, 40
KINDS: dict[str, SAEConfig] = {
    "seed": StandardSAE(),
    "decoder_norm": StandardSAE(penalty="decoder_norm"),
    "topk": TopKSAE(k=4),
    "batchtopk": BatchTopKSAE(k=4),
    "matryoshka": MatryoshkaSAE(k=4),
    "jumprelu": JumpReLUSAE(target_l0=4),
    "gated": GatedSAE(),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)


def rows(seed: int, count: int = 3200) -> Tensor:
    """Of a mean that is not zero, and far from the scale in which is trained."""
    return 3 * torch.randn(count, D_IN, generator=torch.Generator().manual_seed(seed)) + torch.arange(float(D_IN))


def built(config: SAEConfig) -> SparseAutoencoder:
    asked = TrainRequested(model_name="m", corpus_file="c.txt", hidden_dim=64, pooling="token", sae=config)
    return build_sae(asked.resolved_saes()[0].model_copy(update={"hidden_dim": D_SAE}), D_IN)


def trained(kind: str) -> SparseAutoencoder:
    x_ND = rows(0)
    trainer = Trainer(built(KINDS[kind]), Recipe(3e-3, 64, 1, 10**9), rows=len(x_ND), device="cpu", seed=0)
    trainer.prepare(x_ND)
    for x_BD in torch.split(x_ND, 64):
        trainer.step(x_BD)
    return trainer.sae


def started(kind: str, start: FoldedSAE, sample_ND: Tensor, **fields: Any) -> SparseAutoencoder:
    sae = built(KINDS[kind].model_copy(update=fields))
    sae.prepare(sample_ND)
    sae.start_from(start)
    return sae


def stretched(sae: FoldedSAE, factor_F: Tensor) -> FoldedSAE:
    """The same function with other decoder norms."""
    return replace(
        sae,
        encoder_weight=sae.encoder_weight / factor_F[:, None],
        encoder_bias=sae.encoder_bias / factor_F,
        decoder_weight=sae.decoder_weight * factor_F,
        threshold=None if sae.threshold is None else sae.threshold / factor_F,
    )


def factors() -> Tensor:
    return 0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(1))


@of_every_kind
def test_the_first_loss_is_the_origins_last_one(kind: str) -> None:
    origin, x_BD = trained(kind), rows(5, 256)
    sae = started(kind, origin.folded(), rows(0))
    for step in (0, 60, 99):
        inputs = StepInput(x_BD, step, 100)
        for one in ("loss", "reconstruction_loss", "sparsity_loss", "l0"):
            expected = float(getattr(origin.step(inputs), one).detach())
            assert float(getattr(sae.step(inputs), one).detach()) == pytest.approx(expected, rel=1e-4, abs=1e-9), one


@of_every_kind
def test_on_rows_of_another_scale_it_is_the_same_function(kind: str) -> None:
    start, x_BD = trained(kind).folded(), rows(5, 256)
    sae = started(kind, start, 20 * rows(7) - 3)
    same_function(sae.folded(), start, x_BD)
    torch.testing.assert_close(sae.encode(x_BD), start.encode(x_BD), rtol=1e-3, atol=2e-3)


def same_function(found: FoldedSAE, expected: FoldedSAE, x_BD: Tensor) -> None:
    acts_BF, wanted_BF = found.encode(x_BD), expected.encode(x_BD)
    torch.testing.assert_close(acts_BF, wanted_BF, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(found.decode(acts_BF), expected.decode(wanted_BF), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["seed", "decoder_norm", "jumprelu", "gated"])
def test_other_decoder_norms_change_activations_but_not_what_is_reconstructed(kind: str) -> None:
    start, x_BD = trained(kind).folded(), rows(5, 256)
    other = stretched(start, factors())
    sae = started(kind, other, rows(0)).folded()
    torch.testing.assert_close(sae.decode(sae.encode(x_BD)), start.decode(start.encode(x_BD)), rtol=1e-3, atol=2e-3)
    if kind in ("jumprelu", "gated"):
        same_function(sae, start, x_BD)
    else:
        same_function(sae, other, x_BD)


@pytest.mark.parametrize(
    ("kind", "change", "says", "hint"),
    [
        ("topk", lambda sae: stretched(sae, factors()), "norms from", "equally long"),
        ("topk", lambda sae: replace(sae, k=5), "keeps 5 latents a row, and k is 4", "Set k to 5"),
        (
            "batchtopk",
            lambda sae: replace(sae, threshold=sae.threshold * factors()),
            "thresholds are from",
            "'jumprelu'",
        ),
        ("jumprelu", lambda sae: replace(sae, threshold=sae.threshold - 10), "not above zero", "'gated'"),
        ("jumprelu", lambda sae: stretched(sae, torch.zeros(D_SAE)), "latent 0 is zero", "another"),
        ("seed", lambda sae: replace(sae, k=4), "fewer latents", "kind"),
        ("decoder_norm", lambda sae: replace(sae, k=4), "fewer latents", "kind"),
        ("gated", lambda sae: replace(sae, threshold=None), "no gates", "kind"),
        ("batchtopk", lambda sae: replace(sae, threshold=None), "no threshold", "kind"),
        ("jumprelu", lambda sae: replace(sae, threshold=None), "no thresholds", "kind"),
        ("topk", lambda sae: replace(sae, k=None), "no fixed number", "kind"),
    ],
)
def test_what_a_kind_cannot_be_is_refused(kind: str, change: Any, says: str, hint: str) -> None:
    with pytest.raises(CannotStart, match=says) as caught:
        started(kind, change(trained(kind).folded()), rows(0))
    assert hint in caught.value.hint


def test_a_gated_sae_goes_on_from_any_thresholds_though_its_gates_have_a_gain_of_one_then() -> None:
    start, x_BD = trained("batchtopk").folded(), rows(5, 256)
    same_function(started("gated", start, rows(0)).folded(), start, x_BD)


def test_a_jumprelu_goes_on_from_a_batchtopk_and_a_batchtopk_keeps_its_threshold() -> None:
    start, x_BD = trained("batchtopk").folded(), rows(5, 256)
    same_function(started("jumprelu", start, rows(0)).folded(), start, x_BD)
    sae = started("batchtopk", start, rows(0), threshold_rate=1e-9)
    sae.step(StepInput(x_BD, 0, 100))
    torch.testing.assert_close(sae.folded().threshold, start.threshold)


def test_a_transcoder_is_refused() -> None:
    sae = built(KINDS["batchtopk"].model_copy(update={"hook_site": "mlp_in", "predicts": "mlp_out"}))
    with pytest.raises(CannotStart, match="transcoder"):
        sae.start_from(trained("batchtopk").folded())
